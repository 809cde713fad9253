"""Token log-probabilities straight from hidden states, without ever holding all logits.

Every stage (supervised loss, DPO, GRPO) needs log p(label | prefix) per token and nothing else of the
[tokens, vocabulary] matrix, which at 16,384 x 200,064 in float32 is 13 GB before its gradient. So the forward
pass walks over chunks of tokens, keeps one log-sum-exp per token, and the backward pass recomputes each
chunk's logits. Memory is O(chunk_size * vocabulary / tensor_parallel) instead of O(tokens * vocabulary).

For one token with hidden state h, temperature T and the output matrix W (rows are words):

    z = W h / T                 log p(y) = z_y - log sum_v exp(z_v)
    d log p(y) / d z_v = [v = y] - p_v                      H = -sum_v p_v log p_v
    d H / d z_v = -p_v (log p_v + H)

Under tensor parallelism every rank holds a block of rows of W. The maximum, the sum of exponentials and the
label's logit are all-reduced once per call (Shoeybi et al. 2019, arXiv 1909.08053, section 3), and the
gradients are those of Megatron-Core's ColumnParallelLinear followed by its vocab_parallel_cross_entropy:
the hidden states' gradient is all-reduced over the group, or reduce-scattered under sequence parallelism.
The process group is passed in; with ``tp_group=None`` the module needs no torch.distributed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimr_nemo.errors import UserError

__all__ = ["IGNORED_LABEL", "token_logprobs", "token_logprobs_and_entropy"]

IGNORED_LABEL = -100
"""Label of a token that takes no part: log-probability 0, entropy 0, no gradient."""

DEFAULT_CHUNK_SIZE = 1024
"""Tokens whose logits exist at one time: 0.8 GB of float32 with the 200,064-word vocabulary on one rank."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Tensor:
    """Log-probability (nats) of each label under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [..., h]; with ``sequence_parallel`` this rank's slice [s / tp, ..., h] of the first axis.
        weight: [vocabulary / tp, h], this rank's block of rows; the same tensor may be the input embedding.
        labels: [...], integer ids of the *whole* vocabulary, the same on every rank of the group and, with
            ``sequence_parallel``, of the whole sequence. ``IGNORED_LABEL`` marks tokens to leave out; they
            cost no arithmetic either.
        temperature: divides the logits; > 0.
        tp_group: the tensor-parallel group that shares the vocabulary; None for one process.
        sequence_parallel: gather ``hidden`` along its first axis before, reduce-scatter its gradient after.
        chunk_size: tokens per chunk; changes memory and speed, not the result beyond rounding.

    Returns:
        Tensor shaped like ``labels``, float32 (float64 for float64 weights), 0 at ignored labels. Logits are
        computed in the dtype of ``weight``, everything after that in float32. Differentiable once with
        respect to ``hidden`` and ``weight``; the weight's gradient reaches autograd like any other, so
        Megatron's main_grad hooks see it.

    Raises:
        UserError: shapes that do not belong together, a label outside the vocabulary, temperature <= 0,
            chunk_size < 1.
    """
    return _apply(hidden, weight, labels, temperature, tp_group, sequence_parallel, chunk_size, False)[0]


def token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` and the entropy -sum_v p_v log p_v (nats) at each token.

    Takes the arguments of ``token_logprobs``. The entropy is shaped like ``labels``, 0 at ignored labels, and
    differentiable as the log-probability is. It costs one more buffer of the size of a chunk's logits.

    Raises:
        UserError: as ``token_logprobs``.
    """
    return _apply(hidden, weight, labels, temperature, tp_group, sequence_parallel, chunk_size, True)


def _apply(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_size: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    _check_arguments(hidden, weight, labels, temperature, tp_group, sequence_parallel, chunk_size)
    # Autocast would let the forward logits differ in dtype from those that backward recomputes.
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        logprobs, entropy = _TokenLogprobs.apply(
            hidden, weight, labels, temperature, tp_group, sequence_parallel, chunk_size, with_entropy
        )
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    """Chunked forward, recomputing backward; see the module's docstring for the formulas."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        chunk_size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = _gather_sequence(hidden, tp_group) if sequence_parallel else hidden
        rows = rows.reshape(-1, hidden.shape[-1])
        positions = torch.nonzero(labels.reshape(-1) != IGNORED_LABEL).squeeze(1)
        wanted = labels.reshape(-1)[positions]
        _check_labels(wanted, weight.shape[0] * _group_size(tp_group))

        statistics_dtype = _statistics_dtype(weight)
        maximum = torch.empty(positions.numel(), dtype=statistics_dtype, device=hidden.device)
        # Rows of one tensor, so that one all-reduce serves: sum of exponentials, label's logit, and for the
        # entropy the sum of exponential * shifted logit.
        sums = torch.empty(3 if with_entropy else 2, positions.numel(), dtype=statistics_dtype, device=hidden.device)
        for start in range(0, positions.numel(), chunk_size):
            chunk = slice(start, start + chunk_size)
            _chunk_statistics(
                rows[positions[chunk]], weight, wanted[chunk], temperature, tp_group, maximum[chunk], sums[:, chunk]
            )

        maximum = _merge_statistics(maximum, sums, tp_group)
        log_sum_exp = maximum + sums[0].log()
        logprobs = _scatter(sums[1] - log_sum_exp, positions, labels.shape)
        if with_entropy:
            # -sum p log p = log-sum-exp - sum p z = log S - (sum e (z - m)) / S
            of_rows = sums[0].log() - sums[2] / sums[0]
            entropy = _scatter(of_rows, positions, labels.shape)
        else:
            of_rows, entropy = None, torch.empty(0, dtype=statistics_dtype, device=hidden.device)

        ctx.save_for_backward(hidden, weight, positions, wanted, log_sum_exp, of_rows)
        ctx.temperature, ctx.tp_group = temperature, tp_group
        ctx.sequence_parallel, ctx.chunk_size = sequence_parallel, chunk_size
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, positions, wanted, log_sum_exp, entropy = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        gathered = _gather_sequence(hidden, ctx.tp_group) if ctx.sequence_parallel else hidden
        rows = gathered.reshape(-1, hidden.shape[-1])
        scale = grad_logprobs.reshape(-1)[positions].to(log_sum_exp.dtype) / ctx.temperature
        # Autograd gives zeros for an entropy that nothing was made of.
        towards_entropy = None
        if entropy is not None and bool(grad_entropy.any()):
            towards_entropy = grad_entropy.reshape(-1)[positions].to(log_sum_exp.dtype) / ctx.temperature

        grad_rows = torch.zeros_like(rows) if wants_hidden else None
        # float32: the chunks' contributions are summed, and in bfloat16 every sum would lose bits.
        grad_weight = torch.zeros_like(weight, dtype=log_sum_exp.dtype) if wants_weight else None
        for start in range(0, positions.numel(), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            chunk_rows = rows[positions[chunk]].to(weight.dtype)
            grad_logits = _chunk_logit_gradient(
                chunk_rows,
                weight,
                wanted[chunk],
                ctx.temperature,
                ctx.tp_group,
                log_sum_exp[chunk],
                scale[chunk],
                None if towards_entropy is None else (towards_entropy[chunk], entropy[chunk]),
            )
            if grad_rows is not None:
                grad_rows[positions[chunk]] = torch.mm(grad_logits, weight).to(hidden.dtype)
            if grad_weight is not None:
                _accumulate_weight_gradient(grad_weight, grad_logits, chunk_rows)
            # Otherwise this chunk's buffer would still be alive while the next one's is allocated.
            del grad_logits

        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = _reduce_hidden_gradient(
                grad_rows.reshape(gathered.shape), ctx.tp_group, ctx.sequence_parallel
            )
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _statistics_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _chunk_logits(rows: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Logits [chunk, vocabulary / tp] / temperature in the statistics dtype, in a buffer of their own."""
    logits = torch.mm(rows.to(weight.dtype), weight.t()).to(_statistics_dtype(weight))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunk_statistics(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    maximum: Tensor,
    sums: Tensor,
) -> None:
    """Fill ``maximum`` [chunk] and ``sums`` [2 or 3, chunk] from this rank's block of the vocabulary."""
    logits = _chunk_logits(rows, weight, temperature)
    torch.amax(logits, dim=1, out=maximum)
    columns, owned = _local_columns(labels, weight.shape[0], tp_group)
    sums[1] = torch.where(owned, logits.gather(1, columns.unsqueeze(1)).squeeze(1), 0.0)
    shifted = logits.sub_(maximum.unsqueeze(1))
    if sums.shape[0] == 2:
        torch.sum(shifted.exp_(), dim=1, out=sums[0])
    else:
        exponentials = torch.exp(shifted)
        torch.sum(exponentials, dim=1, out=sums[0])
        torch.sum(exponentials.mul_(shifted), dim=1, out=sums[2])


def _chunk_logit_gradient(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    log_sum_exp: Tensor,
    scale: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """scale * ([v = y] - p_v) of this rank's block [chunk, vocabulary / tp], in the dtype of ``weight``.

    With `of_entropy`, a factor and the entropy of each row, also factor * -p_v (log p_v + entropy).
    """
    gradient = _chunk_logits(rows, weight, temperature).sub_(log_sum_exp.unsqueeze(1))
    columns, owned = _local_columns(labels, weight.shape[0], tp_group)
    if of_entropy is None:
        gradient.exp_().neg_().mul_(scale.unsqueeze(1))
    else:
        factor, entropy = (values.unsqueeze(1) for values in of_entropy)
        probabilities = gradient.exp()
        gradient.add_(entropy).mul_(factor).add_(scale.unsqueeze(1)).mul_(probabilities).neg_()
    gradient.scatter_add_(1, columns.unsqueeze(1), (owned * scale).unsqueeze(1))
    return gradient.to(weight.dtype)


def _local_columns(
    labels: Tensor, local_vocabulary: int, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Each label's column in this rank's block (0 where another rank has it) and whether this rank has it."""
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    columns = labels - rank * local_vocabulary
    owned = (columns >= 0) & (columns < local_vocabulary)
    return torch.where(owned, columns, 0), owned


def _merge_statistics(maximum: Tensor, sums: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Make the per-rank sums global, in place, and return the global maximum.

    A rank's sums are relative to its own maximum m_r: S = sum_r S_r exp(m_r - m), and with
    D_r = sum e^(z - m_r) (z - m_r), D = sum_r exp(m_r - m) (D_r + (m_r - m) S_r).
    """
    if _group_size(tp_group) == 1:
        return maximum
    merged = maximum.clone()
    dist.all_reduce(merged, op=dist.ReduceOp.MAX, group=tp_group)
    shift = maximum - merged
    if sums.shape[0] == 3:
        sums[2].add_(shift * sums[0]).mul_(shift.exp())
    sums[0].mul_(shift.exp())
    dist.all_reduce(sums, group=tp_group)
    return merged


def _accumulate_weight_gradient(grad_weight: Tensor, grad_logits: Tensor, rows: Tensor) -> None:
    if grad_weight.dtype == grad_logits.dtype:
        grad_weight.addmm_(grad_logits.t(), rows)
    else:
        grad_weight.add_(torch.mm(grad_logits.t(), rows))


def _scatter(values: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    full = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
    return full.index_copy_(0, positions, values).reshape(shape)


def _group_size(tp_group: dist.ProcessGroup | None) -> int:
    return 1 if tp_group is None else dist.get_world_size(tp_group)


def _gather_sequence(hidden: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[s / tp, ..., h] of each rank -> [s, ..., h] on every rank."""
    size = _group_size(tp_group)
    if size == 1:
        return hidden
    gathered = torch.empty((hidden.shape[0] * size, *hidden.shape[1:]), dtype=hidden.dtype, device=hidden.device)
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=tp_group)
    return gathered


def _reduce_hidden_gradient(gradient: Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum the ranks' partial gradients; under sequence parallelism keep this rank's slice."""
    size = _group_size(tp_group)
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


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_size: int,
) -> None:
    if weight.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise UserError(
            f"hidden states {tuple(hidden.shape)} do not fit an output matrix {tuple(weight.shape)}",
            rule="hidden is [..., h] and weight [vocabulary / tp, h] with one h",
            remedy="pass the final hidden states and the output layer's weight of the same model",
        )
    factor = _group_size(tp_group) if sequence_parallel else 1
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
        raise UserError(
            f"chunk_size {chunk_size}", rule="chunk_size >= 1", remedy=f"the default is {DEFAULT_CHUNK_SIZE}"
        )


def _check_labels(wanted: Tensor, vocabulary: int) -> None:
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
