"""What a rank does to compare packed with padded pairs: loss and gradients of one global batch, references."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from torch import Tensor

from phimr_nemo.align import forward
from phimr_nemo.align.dpo import objective
from phimr_nemo.align.dpo import stage as dpo
from phimr_nemo.align.dpo.pairs import PairCollate, load_pairs
from phimr_nemo.align.microbatch import MicroBatch
from phimr_nemo.config import DPOConfig, ParallelConfig, load_config
from phimr_nemo.config.dpo import PlainLoss
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.losses import IGNORED_LABEL, token_logprobs
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.training.distributed import start_process_group
from phimr_nemo.training.guard import BatchGuard

REFERENCE_SPREAD = 5.0
"""Nats: references as far from the policy as late in training, so that every pair has a weight of its own."""


@dataclass(frozen=True)
class Step:
    """One forward and backward pass over all pairs as one global batch.

    Attributes:
        loss: mean over the pairs.
        metrics: what is logged.
        gradients: of all parameters of this rank, flat.
        reference: log-probabilities [2 n] of this rank's share, computed with the same micro-batches.
        micro_batches: how many there were.
        tokens: that they hold, padding included.
    """

    loss: float
    metrics: dict[str, float]
    gradients: Tensor
    reference: Tensor
    micro_batches: int
    tokens: int


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Break one thing that packing depends on."""
    if fault is None:
        yield
    elif fault == "a boundary leaks":

        def leaking(documents: Sequence[int]) -> Any:
            first, second, *others = documents
            return real(((first + second), *others))

        real = forward.packed_parameters
        with mock.patch.object(forward, "packed_parameters", leaking):
            yield
    elif fault == "the row is one document":
        whole = forward.packed_parameters
        with mock.patch.object(forward, "packed_parameters", lambda documents: whole((sum(documents),))):
            yield
    elif fault == "sides swapped in one row":
        real_sums = objective.sequence_sums

        def swapped(values: Tensor, micro: Any) -> Tensor:
            sums = real_sums(values, micro)
            return sums.flip(0) if micro.documents and values.requires_grad else sums

        with mock.patch.object(objective, "sequence_sums", swapped):
            yield
    else:
        raise ValueError(fault)


def one_step(path: Path, overrides: Sequence[str], fault: str | None) -> Step:
    """Loss and gradients of all pairs in one step. The references do not depend on the packing."""
    config = load_config(DPOConfig, path, overrides)
    base = HFDirectory(config.base)
    start_process_group(config.parallel, config.run.seed)
    pairs = load_pairs(config.pairs, load_tokenizer(config.base), config.sequence_length, config.overlong)
    trained = dpo.build_policy(config, base, 1, BatchGuard(config.run.output, config.guard, lambda _: []))
    pad = base.architecture.pad_token_id
    noise = torch.randn(2, len(pairs), generator=torch.Generator().manual_seed(0))
    collate = PairCollate(
        pairs,
        REFERENCE_SPREAD * noise - 60.0,
        pad,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
    )
    batch = collate(range(len(pairs)))
    stored = batch.pop("reference")
    with planted(fault):
        trained.keep_reference()
        reference = trained.get_ref_policy_logprobs(batch)
        # As NeMo-Aligner's trainer adds them.
        batch["ref_policy_log_probs_chosen"], batch["ref_policy_log_probs_rejected"] = stored
        micros = trained.objective.micro_batches(batch)
        trained.prepare_for_training_step()
        loss, metrics = trained.get_loss_and_metrics(batch, forward_only=False)
    gradients = torch.cat([parameter.main_grad.flatten() for parameter in trained.model.parameters()])
    return Step(loss, metrics, gradients.clone(), reference, len(micros), sum(m.tokens.numel() for m in micros))


@dataclass(frozen=True)
class Loss:
    """Mean loss and accuracy over some pairs, and the gradient of the hidden states."""

    loss: float
    accuracy: float
    gradient: Tensor


def aligner_and_our_loss(kind: str) -> tuple[Loss, Loss]:
    """Ours and NeMo-Aligner's, from the same random hidden states and output matrix."""
    from nemo_aligner.models.nlp.gpt.megatron_gpt_dpo_model import MegatronGPTDPOModel
    from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs

    start_process_group(ParallelConfig(), seed=0)
    generator = torch.Generator().manual_seed(0)
    pairs, length, hidden_size, vocabulary, beta = 6, 17, 8, 64, 0.2
    hidden = torch.randn(2 * pairs, length, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator)
    labels = torch.randint(vocabulary, (2 * pairs, length), generator=generator)
    for row in range(2 * pairs):
        labels[row, : row % 5] = IGNORED_LABEL  # questions of several lengths
        labels[row, length - row % 7 :] = IGNORED_LABEL  # responses as well
    before = token_logprobs(hidden, weight, labels) + 0.3 * torch.randn(labels.shape, generator=generator)
    reference = torch.where(labels == IGNORED_LABEL, 0.0, before)

    mine = hidden.clone().requires_grad_()
    micro = MicroBatch(labels, labels, {"reference": reference.sum(1)})
    loss_sum, metrics = objective.pair_loss(PlainLoss(kind=kind), beta)(  # type: ignore[arg-type]
        objective.pair_sums(token_logprobs(mine, weight, labels), micro)
    )
    (loss_sum / pairs).backward()

    model = SimpleNamespace(preference_loss=kind.split("_")[-1], ref_policy_kl_penalty=beta)
    model.get_reduced_masked_logps = partial(MegatronGPTDPOModel.get_reduced_masked_logps, model)
    model.split_output_tensor = partial(MegatronGPTDPOModel.split_output_tensor, model)
    other = hidden.clone().requires_grad_()
    # Aligner's gradient writes into the logits that it is given.
    logprobs = from_parallel_logits_to_logprobs(
        (other @ weight.T).clone(), labels.clamp(min=0), higher_stability=True, ignore_last=False
    )
    their_loss, accuracy = MegatronGPTDPOModel.loss_func(
        model, logprobs, reference, labels, None, average_log_probs=kind.startswith("length")
    )
    their_loss.backward()
    assert mine.grad is not None
    assert other.grad is not None
    return (
        Loss(float(loss_sum) / pairs, float(metrics["accuracy"]) / pairs, mine.grad),
        Loss(float(their_loss), float(accuracy), other.grad),
    )
