"""On-policy distillation: the reverse KL divergence KL(pi || q) of a student pi from its teacher q, token by token.

The student has sampled; the teacher says how probable it finds what the student said (Agarwal et al. 2024, "GKD",
arXiv 2306.13649; Lu et al. 2025, "On-Policy Distillation"). For the distributions of one token given those before it,
with z the student's logits and y the teacher's:

    KL(pi || q) = sum_v pi_v (log pi_v - log q_v)          d KL / d z_v = pi_v (log pi_v - log q_v - KL)

``token_reverse_kl`` has both exactly, over the whole vocabulary; ``sampled_reverse_kl_loss`` estimates them from the
sampled token alone, for which the teacher need tell one number. Both take the tokens before a token as they were
sampled: that another token would have led to other ones is in neither gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from phimr_nemo.config import OutputFormat
from phimr_nemo.errors import UserError
from phimr_nemo.losses.grpo import PolicyBatch, PolicyLoss, dapo_loss
from phimr_nemo.losses.products import products_of
from phimr_nemo.losses.sequences import check_token_shapes
from phimr_nemo.losses.vocabulary import (
    check_arguments,
    divided,
    gather_sequence,
    group_size,
    labelled,
    local_columns,
    reduce_hidden_gradient,
    scatter,
    statistics_dtype,
)

__all__ = ["TeacherStates", "reverse_kl_loss", "sampled_reverse_kl_loss", "token_reverse_kl"]

DEFAULT_CHUNK_SIZE = 512
"""Tokens whose logits exist at one time, in three buffers: 1.2 GB of float32 with 200,064 words on one rank."""


class TeacherStates(NamedTuple):
    """What the teacher's logits are made of, constants.

    Attributes:
        hidden: its final hidden states [..., h'], laid out as the student's; h' is its own width.
        weight: its output matrix [vocabulary / tp, h'], the same rows as the student's.
        output_format: of its logits; see :mod:`phimr_nemo.losses.products`.
    """

    hidden: Tensor
    weight: Tensor
    output_format: OutputFormat = "own"


def sampled_reverse_kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    teacher_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    importance_weights: Tensor | None = None,
) -> PolicyLoss:
    """The policy-gradient form: ``dapo_loss`` with the advantage A_t = log q(o_t) - log pi(o_t) of every token.

    Of what it is unbiased, for a token's distribution given the tokens before it, with rho = pi / pi_old unclipped:

    - its *gradient*, of d KL(pi || q), on tokens drawn from pi_old: -rho A d log pi has there the mean that
      log(pi / q) d log pi has under pi, where that of d log pi is 0; with importance weights pi_old / sampler, on
      tokens drawn by the sampler;
    - its *value*, of KL(pi || q).

    A clipped ratio and truncated or masked weights trade that for a smaller variance, as in GRPO.

    Args:
        logprobs: [S, T] log pi of the sampled tokens (nats, at the sampling temperature), with gradient.
        old_logprobs: [S, T] of the policy at the start of the round.
        teacher_logprobs: [S, T] log q of the same tokens at the same temperature, constant.
        loss_mask: [S, T], nonzero at response tokens.
        clip_low, clip_high: as in ``grpo_loss``.
        importance_weights: [S, T] constants against a mismatch of sampler and trainer.

    Returns:
        PolicyLoss with the number of tokens as its denominator; its metrics have ``reverse_kl`` besides, the sum of
        -A over tokens.

    Raises:
        UserError: shapes that do not fit, clip bounds out of range.
    """
    check_token_shapes(logprobs, teacher_logprobs=teacher_logprobs, loss_mask=loss_mask)
    advantages = torch.where(loss_mask.bool(), teacher_logprobs - logprobs.detach(), 0.0)
    batch = PolicyBatch(logprobs, old_logprobs, advantages, loss_mask, importance_weights=importance_weights)
    loss = dapo_loss(batch, clip_low=clip_low, clip_high=clip_high)
    return loss._replace(metrics=loss.metrics | {"reverse_kl": -advantages.sum()})


def reverse_kl_loss(divergence: Tensor, loss_mask: Tensor) -> PolicyLoss:
    """Every token weighs the same: the sum of ``token_reverse_kl``, over tokens.

    Args:
        divergence: [S, T] of ``token_reverse_kl`` (nats), with gradient.
        loss_mask: [S, T], nonzero at response tokens.

    Returns:
        PolicyLoss with the number of tokens as its denominator; its metrics are tokens, sequences and reverse_kl.

    Raises:
        UserError: shapes that do not fit.
    """
    check_token_shapes(divergence, loss_mask=loss_mask)
    mask = loss_mask.bool()
    total = torch.where(mask, divergence, 0.0).sum()
    counts = {"tokens": mask.sum(), "sequences": mask.any(dim=1).sum()}
    return PolicyLoss(total, counts["tokens"], {**counts, "reverse_kl": total.detach()})


def token_reverse_kl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: TeacherStates,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    output_format: OutputFormat = "own",
) -> tuple[Tensor, Tensor]:
    """log pi(label), and KL(pi || q) over the whole vocabulary (nats), at each token.

    As in ``token_logprobs`` chunks of tokens bound the memory, and the backward pass computes their logits again.

    Args:
        hidden, weight, temperature, tp_group, sequence_parallel, chunk_size, output_format: as in
            ``token_logprobs``; the temperature divides both models' logits.
        labels: as there; where it is ``IGNORED_LABEL`` there is no divergence.
        teacher: of the same tokens; its matrix has as many rows as `weight`, for the same words.

    Returns:
        (log-probabilities, without gradient; divergences, differentiable once with respect to ``hidden`` and
        ``weight``), shaped like ``labels``, 0 at ignored labels.

    Raises:
        UserError: as ``token_logprobs``; another number of words.
    """
    check_arguments(hidden, weight, labels, temperature, tp_group, sequence_parallel, chunk_size)
    check_arguments(teacher.hidden, teacher.weight, labels, temperature, tp_group, sequence_parallel, chunk_size)
    if teacher.weight.shape[0] != weight.shape[0]:
        raise UserError(
            f"a teacher's output matrix of {teacher.weight.shape[0]} rows beside a student's of {weight.shape[0]}",
            rule="teacher and student have a probability for the same words",
            remedy="choose a teacher with the student's vocabulary, or the loss on the sampled token",
        )
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        logprobs, divergence = _TokenReverseKL.apply(
            hidden, weight, labels, teacher, temperature, tp_group, sequence_parallel, chunk_size, output_format
        )
    return logprobs, divergence


class _TokenReverseKL(torch.autograd.Function):
    """Chunked forward, recomputing backward.

    With S = sum_v e^(z_v - m) and D = sum_v e^(z_v - m) (z_v - y_v), KL = D / S - logsumexp(z) + logsumexp(y), and
    its gradient is pi_v (z_v - y_v - D / S): the teacher's normalisation is not needed for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher: TeacherStates,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool,
        chunk_size: int,
        output_format: OutputFormat,
    ) -> tuple[Tensor, Tensor]:
        rows, taught = (_rows(states, tp_group, sequence_parallel) for states in (hidden, teacher.hidden))
        positions, wanted = labelled(labels, weight.shape[0] * group_size(tp_group), hidden.device)
        numbers = {"dtype": statistics_dtype(weight), "device": hidden.device}
        maxima = torch.empty(2, positions.numel(), **numbers)
        sums = torch.empty(4, positions.numel(), **numbers)
        products = products_of(weight, output_format, with_gradients=False)
        theirs_of = products_of(teacher.weight, teacher.output_format, with_gradients=False)
        for start in range(0, positions.numel(), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = divided(products.logits(rows[positions[chunk]]), temperature)
            theirs = divided(theirs_of.logits(taught[positions[chunk]]), temperature).to(logits.dtype)
            columns, owned = local_columns(wanted[chunk], weight.shape[0], tp_group)
            sums[3, chunk] = torch.where(owned, logits.gather(1, columns.unsqueeze(1)).squeeze(1), 0.0)
            _chunk_sums(logits, theirs, maxima[:, chunk], sums[:3, chunk])
        _merge(maxima, sums, tp_group)
        total, gaps, theirs_total, label = sums
        log_sum_exp, mean_gap = maxima[0] + total.log(), gaps / total
        divergence = mean_gap - log_sum_exp + maxima[1] + theirs_total.log()
        ctx.save_for_backward(hidden, weight, teacher.hidden, teacher.weight, positions, log_sum_exp, mean_gap)
        ctx.temperature, ctx.tp_group = temperature, tp_group
        ctx.output_format, ctx.teacher_format = output_format, teacher.output_format
        ctx.sequence_parallel, ctx.chunk_size = sequence_parallel, chunk_size
        logprobs = scatter(label - log_sum_exp, positions, labels.shape)
        ctx.mark_non_differentiable(logprobs)
        return logprobs, scatter(divergence, positions, labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, teacher_hidden, teacher_weight, positions, log_sum_exp, mean_gap = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        rows, taught = (_rows(states, ctx.tp_group, ctx.sequence_parallel) for states in (hidden, teacher_hidden))
        scale = upstream.reshape(-1)[positions].to(log_sum_exp.dtype) / ctx.temperature
        grad_rows = torch.zeros_like(rows) if wants_hidden else None
        # float32: the chunks' contributions are summed, and in bfloat16 every sum would lose bits.
        grad_weight = torch.zeros_like(weight, dtype=log_sum_exp.dtype) if wants_weight else None
        products = products_of(weight, ctx.output_format, with_gradients=wants_hidden)
        theirs_of = products_of(teacher_weight, ctx.teacher_format, with_gradients=False)
        for start in range(0, positions.numel(), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            chunk_rows = rows[positions[chunk]].to(weight.dtype)
            logits = divided(products.logits(chunk_rows), ctx.temperature)
            gaps = logits - divided(theirs_of.logits(taught[positions[chunk]]), ctx.temperature)
            gaps.sub_(mean_gap[chunk].unsqueeze(1)).mul_(scale[chunk].unsqueeze(1))
            gradient = logits.sub_(log_sum_exp[chunk].unsqueeze(1)).exp_().mul_(gaps).to(weight.dtype)
            del gaps
            towards_rows = products.backward(gradient, chunk_rows, grad_weight, wants_rows=wants_hidden)
            if grad_rows is not None and towards_rows is not None:
                grad_rows[positions[chunk]] = towards_rows.to(hidden.dtype)
            # Otherwise this chunk's buffers would still be alive while the next one's are allocated.
            del logits, gradient
        grad_hidden = None
        if grad_rows is not None:
            whole = grad_rows.reshape(-1, *hidden.shape[1:])
            grad_hidden = reduce_hidden_gradient(whole, ctx.tp_group, ctx.sequence_parallel)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


def _rows(states: Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """[tokens, h] of the whole sequence."""
    return (gather_sequence(states, tp_group) if sequence_parallel else states).reshape(-1, states.shape[-1])


def _chunk_sums(logits: Tensor, theirs: Tensor, maxima: Tensor, sums: Tensor) -> None:
    """Fill `maxima` [2, chunk], student's and teacher's, and `sums` [3, chunk]; uses both buffers up."""
    torch.amax(logits, dim=1, out=maxima[0])
    torch.amax(theirs, dim=1, out=maxima[1])
    gaps = logits - theirs
    torch.sum(theirs.sub_(maxima[1].unsqueeze(1)).exp_(), dim=1, out=sums[2])
    exponentials = logits.sub_(maxima[0].unsqueeze(1)).exp_()
    torch.sum(exponentials, dim=1, out=sums[0])
    torch.sum(gaps.mul_(exponentials), dim=1, out=sums[1])


def _merge(maxima: Tensor, sums: Tensor, tp_group: dist.ProcessGroup | None) -> None:
    """Make the ranks' maxima and sums global, in place; a rank's sums are relative to its own maximum."""
    if group_size(tp_group) == 1:
        return
    own = maxima.clone()
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=tp_group)
    shift = (own - maxima).exp_()
    sums[:2].mul_(shift[0])
    sums[2].mul_(shift[1])
    dist.all_reduce(sums, group=tp_group)
