"""What losses over the whole vocabulary share: chunks of logits from hidden states, shared by tensor-parallel ranks.

Hidden states are [..., h], Megatron's are sequence first; the output matrix is this rank's block of rows
[vocabulary / tp, h]. With ``tp_group=None`` nothing needs torch.distributed.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.distributed as dist
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.losses.device import sent

IGNORED_LABEL = -100
"""Label of a token that takes no part: log-probability 0, entropy 0, no gradient."""


def statistics_dtype(operand: Tensor) -> torch.dtype:
    """What sums over the vocabulary are computed in: float64 for float64 weights, else float32."""
    return torch.float64 if operand.dtype == torch.float64 else torch.float32


def is_fused(logits: Tensor) -> bool:
    """Whether logits stay in their format, and Triton's kernels work on them: of at most 32 bits, on a GPU."""
    return logits.is_cuda and logits.dtype != torch.float64 and _has("triton")


@functools.cache
def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def divided(product: Tensor, temperature: float) -> Tensor:
    """Logits of a product / temperature in the statistics dtype; the product's buffer may become theirs."""
    logits = product.to(statistics_dtype(product))
    return logits if temperature == 1.0 else logits.div_(temperature)


def local_columns(labels: Tensor, local_vocabulary: int, tp_group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Each label's column in this rank's block (0 where another rank has it) and whether this rank has it."""
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    columns = labels - rank * local_vocabulary
    owned = (columns >= 0) & (columns < local_vocabulary)
    return torch.where(owned, columns, 0), owned


def accumulate_weight_gradient(grad_weight: Tensor, grad_logits: Tensor, rows: Tensor) -> None:
    """Add a chunk's part, of grad_logits [chunk, vocabulary / tp] and rows [chunk, h], to the matrix's gradient."""
    if grad_weight.dtype == grad_logits.dtype:
        grad_weight.addmm_(grad_logits.t(), rows)
    elif has_wide_products(grad_logits):
        # One product that adds unrounded: no matrix of its own, which would be read and written once more.
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.module.base import get_workspace

        general_gemm(
            rows,
            grad_logits,
            get_workspace(),
            out_dtype=grad_weight.dtype,
            layout="NT",
            grad=True,
            accumulate=True,
            out=grad_weight,
        )
    else:
        grad_weight.add_(torch.mm(grad_logits.t(), rows))


def labelled(labels: Tensor, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions that have a label, and the labels there: int64 [n] each, on the device.

    Where the labels are on the CPU nothing waits for the device.

    Raises:
        UserError: a label outside the vocabulary.
    """
    flat = labels.reshape(-1)
    positions = torch.nonzero(flat != IGNORED_LABEL).squeeze(1)
    wanted = flat[positions]
    check_labels(wanted, vocabulary)
    return sent(positions, device), sent(wanted, device)


def has_wide_products(operand: Tensor) -> bool:
    """Whether Transformer Engine is there to add a product of 16-bit matrices to one in float32: on a GPU."""
    return operand.is_cuda and _has("transformer_engine")


def already_added(weight: Tensor) -> Tensor:
    """What autograd is given where a weight's gradient has gone to its `main_grad`: zeros that take no memory.

    Megatron's DistributedDataParallel leaves them out, or adds what came beside them (a tied embedding's).
    """
    weight.grad_added_to_main_grad = True
    return weight.new_zeros(()).expand(weight.shape)


def scatter(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """Values at their flat positions of a tensor of this shape, 0 elsewhere."""
    full = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
    return full.index_copy_(0, positions, values).reshape(shape)


def group_size(tp_group: dist.ProcessGroup | None) -> int:
    """Ranks that share the vocabulary."""
    return 1 if tp_group is None else dist.get_world_size(tp_group)


def gather_sequence(hidden: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[s / tp, ..., h] of each rank -> [s, ..., h] on every rank."""
    size = group_size(tp_group)
    if size == 1:
        return hidden
    gathered = torch.empty((hidden.shape[0] * size, *hidden.shape[1:]), dtype=hidden.dtype, device=hidden.device)
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=tp_group)
    return gathered


def reduce_hidden_gradient(gradient: Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum the ranks' partial gradients; under sequence parallelism keep this rank's slice."""
    size = group_size(tp_group)
    if size == 1:
        return gradient
    if not sequence_parallel:
        dist.all_reduce(gradient, group=tp_group)
        return gradient
    local = torch.empty(
        (gradient.shape[0] // size, *gradient.shape[1:]), dtype=gradient.dtype, device=gradient.device
    )
    dist.reduce_scatter_tensor(local, gradient, group=tp_group)
    return local


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_size: int,
) -> None:
    """Raise a UserError unless the shapes belong together, temperature > 0 and chunk_size >= 1."""
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise UserError(
            f"hidden states {tuple(hidden.shape)} do not fit an output matrix {tuple(weight.shape)}",
            rule="hidden is [..., h] and weight [vocabulary / tp, h] with one h",
            remedy="pass the final hidden states and the output layer's weight of the same model",
        )
    factor = group_size(tp_group) if sequence_parallel else 1
    expected = (hidden.shape[0] * factor, *hidden.shape[1:-1])
    if tuple(labels.shape) != expected:
        raise UserError(
            f"labels {tuple(labels.shape)} do not fit hidden states {tuple(hidden.shape)}",
            rule=f"one label per hidden state of the whole sequence, here {expected}",
            remedy="bring the labels into the layout of the hidden states (Megatron: sequence first)",
        )
    if not temperature > 0:
        raise UserError(
            f"temperature {temperature}",
            rule="temperature > 0",
            remedy="use 1.0 for the model's own distribution",
        )
    if chunk_size < 1:
        raise UserError(f"chunk_size {chunk_size}", rule="chunk_size >= 1", remedy="leave it out for the default")


def check_labels(wanted: Tensor, vocabulary: int) -> None:
    """Raise a UserError unless every label is a word of the vocabulary."""
    if wanted.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in torch.stack(torch.aminmax(wanted)).tolist())
    if lowest < 0 or highest >= vocabulary:
        outside = lowest if lowest < 0 else highest
        raise UserError(
            f"label {outside} is outside the vocabulary of {vocabulary} words",
            rule=f"0 <= label < {vocabulary}, or {IGNORED_LABEL} for a token to leave out",
            remedy="tokenize the data with the tokenizer of this model",
        )
