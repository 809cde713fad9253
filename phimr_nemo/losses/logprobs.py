"""Token log-probabilities straight from hidden states, without holding more logits than there is room for.

Every stage (supervised loss, DPO, GRPO) needs log p(label | prefix) per token and nothing else of the
[tokens, vocabulary] matrix, which at 16,384 x 200,064 in float32 is 13 GB before its gradient. So the forward
pass walks over chunks of tokens, keeps one log-sum-exp per token, and the backward pass recomputes each
chunk's logits. Memory is O(chunk_size * vocabulary / tensor_parallel) instead of O(tokens * vocabulary).
One chunk is kept from one pass to the other, which saves its product; what fits in one chunk saves all of them.

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

from phimr_nemo.config import OutputFormat
from phimr_nemo.losses.products import Products, is_wider, products_of
from phimr_nemo.losses.vocabulary import (
    IGNORED_LABEL,
    already_added,
    check_arguments,
    divided,
    gather_sequence,
    group_size,
    is_fused,
    labelled,
    local_columns,
    reduce_hidden_gradient,
    scatter,
    statistics_dtype,
)

__all__ = ["IGNORED_LABEL", "token_logprobs", "token_logprobs_and_entropy"]

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
    accumulate: bool = False,
    output_format: OutputFormat = "own",
) -> Tensor:
    """Log-probability (nats) of each label under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [..., h]; with ``sequence_parallel`` this rank's slice [s / tp, ..., h] of the first axis.
        weight: [vocabulary / tp, h], this rank's block of rows; the same tensor may be the input embedding.
        labels: [...], integer ids of the *whole* vocabulary, the same on every rank of the group and, with
            ``sequence_parallel``, of the whole sequence. ``IGNORED_LABEL`` marks tokens to leave out; they
            cost no arithmetic either. On the CPU they keep nothing waiting; a device's are waited for.
        temperature: divides the logits; > 0.
        tp_group: the tensor-parallel group that shares the vocabulary; None for one process.
        sequence_parallel: gather ``hidden`` along its first axis before, reduce-scatter its gradient after.
        chunk_size: tokens per chunk; changes memory and speed, not the result beyond rounding.
        accumulate: add the weight's gradient straight to its `main_grad`, where Megatron's DistributedDataParallel
            sums over micro-batches in float32; its own `grad` gets zeros.
        output_format: "fp32" = logits of a 16-bit ``weight`` in float32, gradients as without; "fp8" = products in 8
            bits, on a GPU with Transformer Engine; see :mod:`phimr_nemo.losses.products`.

    Returns:
        Tensor shaped like ``labels``, float32 (float64 for float64 weights), 0 at ignored labels. Logits are
        rounded to the dtype of ``weight`` unless `output_format` says otherwise, and everything after that is
        computed in float32. Differentiable once with respect to ``hidden`` and ``weight``; the weight's gradient
        reaches autograd like any other, so Megatron's main_grad hooks see it.

    Raises:
        UserError: shapes that do not belong together, a label outside the vocabulary, temperature <= 0,
            chunk_size < 1, a matrix that 8-bit products do not take.

    >>> hidden, head = torch.zeros(2, 8), torch.randn(100, 8)
    >>> [f"{value:.4f}" for value in token_logprobs(hidden, head, torch.tensor([3, 7]))]  # -ln 100
    ['-4.6052', '-4.6052']
    """
    options = (temperature, tp_group, sequence_parallel, chunk_size, accumulate, output_format)
    return _apply(hidden, weight, labels, *options, False)[0]


def token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    accumulate: bool = False,
    output_format: OutputFormat = "own",
) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` and the entropy -sum_v p_v log p_v (nats) at each token.

    Takes the arguments of ``token_logprobs``. The entropy is shaped like ``labels``, 0 at ignored labels, and
    differentiable as the log-probability is. It costs one more buffer of the size of a chunk's logits.

    Raises:
        UserError: as ``token_logprobs``.
    """
    options = (temperature, tp_group, sequence_parallel, chunk_size, accumulate, output_format)
    return _apply(hidden, weight, labels, *options, True)


def chunk_within(room: int | None, weight: Tensor, output_format: OutputFormat) -> int:
    """Tokens whose logits take at most ``room`` bytes, but at least one; None = the default chunk's.

    Args:
        room: bytes.
        weight: [vocabulary / tp, h], the output matrix.
        output_format: of its logits.
    """
    if room is None:
        return DEFAULT_CHUNK_SIZE
    stays = is_fused(weight) and not is_wider(weight, output_format)
    number = weight.element_size() if stays else statistics_dtype(weight).itemsize
    return max(1, room // (number * weight.shape[0]))


def _apply(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_size: int,
    accumulate: bool,
    output_format: OutputFormat,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    check_arguments(hidden, weight, labels, temperature, tp_group, sequence_parallel, chunk_size)
    # Autocast would let the forward logits differ in dtype from those that backward recomputes.
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        options = (temperature, tp_group, sequence_parallel, chunk_size, accumulate, output_format, with_entropy)
        logprobs, entropy = _TokenLogprobs.apply(hidden, weight, labels, *options)
    return logprobs, entropy


class _TokenLogprobs(torch.autograd.Function):
    """Chunked forward; backward from the chunk that was kept, and again. The module's docstring has the formulas."""

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
        accumulate: bool,
        output_format: OutputFormat,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = gather_sequence(hidden, tp_group) if sequence_parallel else hidden
        rows = rows.reshape(-1, hidden.shape[-1])
        positions, wanted = labelled(labels, weight.shape[0] * group_size(tp_group), hidden.device)

        products = products_of(weight, output_format, with_gradients=False)
        dtype = statistics_dtype(weight)
        maximum = torch.empty(positions.numel(), dtype=dtype, device=hidden.device)
        # Rows of one tensor, so that one all-reduce serves: sum of exponentials, label's logit, and for the
        # entropy the sum of exponential * shifted logit.
        sums = torch.empty(3 if with_entropy else 2, positions.numel(), dtype=dtype, device=hidden.device)
        kept = None
        # The first chunk comes last: it is full, and the backward pass begins with it.
        for start in reversed(range(0, positions.numel(), chunk_size)):
            # Otherwise a chunk's buffer would still be alive while the next one's is allocated.
            kept = None
            chunk = slice(start, start + chunk_size)
            of_chunk = rows[positions[chunk]], wanted[chunk]
            kept = _chunk_statistics(products, *of_chunk, temperature, tp_group, maximum[chunk], sums[:, chunk])

        own_maximum, maximum = maximum, _merge_statistics(maximum, sums, tp_group)
        log_sum_exp = maximum + sums[0].log()
        logprobs = scatter(sums[1] - log_sum_exp, positions, labels.shape)
        if with_entropy:
            # -sum p log p = log-sum-exp - sum p z = log S - (sum e (z - m)) / S
            of_rows = sums[0].log() - sums[2] / sums[0]
            entropy = scatter(of_rows, positions, labels.shape)
        else:
            of_rows, entropy = None, torch.empty(0, dtype=dtype, device=hidden.device)

        ctx.save_for_backward(hidden, weight, positions, wanted, log_sum_exp, of_rows, own_maximum)
        ctx.kept = kept
        # An entropy that nothing was made of has no gradient, instead of zeros that one would have to look for.
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.tp_group = temperature, tp_group
        ctx.sequence_parallel, ctx.chunk_size, ctx.accumulate = sequence_parallel, chunk_size, accumulate
        ctx.output_format = output_format
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, positions, wanted, log_sum_exp, entropy, own_maximum = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        gathered = gather_sequence(hidden, ctx.tp_group) if ctx.sequence_parallel else hidden
        rows = gathered.reshape(-1, hidden.shape[-1])
        scale = torch.zeros_like(log_sum_exp)
        if grad_logprobs is not None:
            scale = grad_logprobs.reshape(-1)[positions].to(log_sum_exp.dtype) / ctx.temperature
        towards_entropy = None
        if entropy is not None and grad_entropy is not None:
            towards_entropy = grad_entropy.reshape(-1)[positions].to(log_sum_exp.dtype) / ctx.temperature

        products = products_of(weight, ctx.output_format, with_gradients=wants_hidden)
        grad_rows = torch.zeros_like(rows) if wants_hidden else None
        # float32: the chunks' contributions are summed, and in bfloat16 every sum would lose bits.
        grad_weight: Tensor | None = None
        if wants_weight:
            grad_weight = weight.main_grad if ctx.accumulate else torch.zeros_like(weight, dtype=log_sum_exp.dtype)
        for start in range(0, positions.numel(), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            chunk_rows = rows[positions[chunk]].to(weight.dtype)
            # Taken out, because the gradient is written over it: a second backward pass computes it again.
            used, ctx.kept = ctx.kept, None
            if used is None:
                used = _used_again(products.logits(chunk_rows), ctx.temperature, own_maximum[chunk])
            grad_logits = _logit_gradient(
                used,
                *local_columns(wanted[chunk], used.shape[1], ctx.tp_group),
                ctx.temperature,
                own_maximum[chunk],
                log_sum_exp[chunk],
                scale[chunk],
                None if towards_entropy is None else (towards_entropy[chunk], entropy[chunk]),
                weight.dtype,
            )
            del used
            towards_rows = products.backward(grad_logits, chunk_rows, grad_weight, wants_rows=wants_hidden)
            if grad_rows is not None and towards_rows is not None:
                grad_rows[positions[chunk]] = towards_rows.to(hidden.dtype)
            # Otherwise this chunk's buffer would still be alive while the next one's is allocated.
            del grad_logits

        grad_hidden = None
        if grad_rows is not None:
            grad_hidden = reduce_hidden_gradient(
                grad_rows.reshape(gathered.shape), ctx.tp_group, ctx.sequence_parallel
            )
        if grad_weight is not None:
            grad_weight = already_added(weight) if ctx.accumulate else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None, None


def _chunk_statistics(
    products: Products,
    rows: Tensor,
    labels: Tensor,
    temperature: float,
    tp_group: dist.ProcessGroup | None,
    maximum: Tensor,
    sums: Tensor,
) -> Tensor:
    """Fill ``maximum`` [chunk] and ``sums`` [2 or 3, chunk] from this rank's block of the vocabulary.

    Returns:
        What the chunk's gradient is made of, as ``_used_again``.
    """
    product = products.logits(rows)
    columns, owned = local_columns(labels, product.shape[1], tp_group)
    if is_fused(product):
        from phimr_nemo.losses import fused

        fused.statistics(product, columns, owned, temperature, maximum, sums)
        return product
    logits = divided(product, temperature)
    del product
    torch.amax(logits, dim=1, out=maximum)
    sums[1] = torch.where(owned, logits.gather(1, columns.unsqueeze(1)).squeeze(1), 0.0)
    shifted = logits.sub_(maximum.unsqueeze(1))
    if sums.shape[0] == 2:
        exponentials = shifted.exp_()
    else:
        exponentials = torch.exp(shifted)
        torch.sum(shifted.mul_(exponentials), dim=1, out=sums[2])
    torch.sum(exponentials, dim=1, out=sums[0])
    return exponentials


def _used_again(product: Tensor, temperature: float, maximum: Tensor) -> Tensor:
    """What a chunk's gradient is made of [chunk, vocabulary / tp], bit for bit as in the forward pass.

    The product itself for Triton's kernels, else exp(z - maximum) in the statistics dtype.
    """
    if is_fused(product):
        return product
    return divided(product, temperature).sub_(maximum.unsqueeze(1)).exp_()


def _logit_gradient(
    used: Tensor,
    columns: Tensor,
    owned: Tensor,
    temperature: float,
    maximum: Tensor,
    log_sum_exp: Tensor,
    scale: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """scale * ([v = y] - p_v) of this rank's block [chunk, vocabulary / tp] in a format; uses what it is made of up.

    With `of_entropy`, a factor and the entropy of each row, also factor * -p_v (log p_v + entropy).
    """
    if is_fused(used):
        from phimr_nemo.losses import fused

        return fused.gradient(used, columns, owned, temperature, log_sum_exp, scale, of_entropy, dtype)
    # p_v = exp(z_v - maximum) * exp(maximum - log-sum-exp): this rank's maximum, the whole vocabulary's sum.
    share = (maximum - log_sum_exp).exp()
    if of_entropy is None:
        gradient = used.mul_(-(share * scale).unsqueeze(1))
    else:
        factor, entropy = of_entropy
        probabilities = used.mul_(share.unsqueeze(1))
        # p log p is 0 where p is.
        gradient = torch.special.xlogy(probabilities, probabilities).mul_(-factor.unsqueeze(1))
        gradient.addcmul_(probabilities, (factor * entropy + scale).unsqueeze(1), value=-1)
    gradient.scatter_add_(1, columns.unsqueeze(1), (owned * scale).unsqueeze(1))
    return gradient.to(dtype)


def _merge_statistics(maximum: Tensor, sums: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Make the per-rank sums global, in place, and return the global maximum.

    A rank's sums are relative to its own maximum m_r: S = sum_r S_r exp(m_r - m), and with
    D_r = sum e^(z - m_r) (z - m_r), D = sum_r exp(m_r - m) (D_r + (m_r - m) S_r).
    """
    if group_size(tp_group) == 1:
        return maximum
    merged = maximum.clone()
    dist.all_reduce(merged, op=dist.ReduceOp.MAX, group=tp_group)
    shift = maximum - merged
    if sums.shape[0] == 3:
        sums[2].add_(shift * sums[0]).mul_(shift.exp())
    sums[0].mul_(shift.exp())
    dist.all_reduce(sums, group=tp_group)
    return merged
