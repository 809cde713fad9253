"""What a rank does in GRPO's parity tests: one update padded or packed, what it allocates, an interrupted round."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from align_worker import Case, run_case
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phimr_nemo.align import forward
from phimr_nemo.align.grpo import stage as grpo
from phimr_nemo.align.grpo.objective import GRPOObjective
from phimr_nemo.align.grpo.trainer import GRPOTrainer
from phimr_nemo.config import GRPOConfig, load_config
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron import gpt as megatron
from phimr_nemo.training.distributed import start_process_group
from phimr_nemo.training.guard import BatchGuard

PROMPT = 5
NOISE = 0.2
"""Nats: how far old, sampler's and reference's log-probabilities are from the policy's."""


@dataclass(frozen=True)
class Update:
    """One forward and backward pass over all rows as one global batch.

    Attributes:
        loss: over its denominator.
        metrics: what is logged.
        gradients: of all parameters of this rank, flat.
        before: log-probabilities [n, s] in the same micro-batches.
        micro_batches: how many there were.
        tokens: that they hold, padding included.
        vocabulary_rows: the most rows of any tensor [..., vocabulary] that was not a parameter or its gradient.
    """

    loss: float
    metrics: dict[str, float]
    gradients: Tensor
    before: Tensor
    micro_batches: int
    tokens: int
    vocabulary_rows: int


class Watch(TorchDispatchMode):
    """Looks at every tensor that an operation makes."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.ndim >= 2 and leaf.shape[-1] == self._vocabulary:
                self.rows = max(self.rows, leaf.numel() // self._vocabulary)
        return result


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Break one thing that packing or the memory of long responses depends on."""
    if fault is None:
        yield
    elif fault == "the row is one document":
        whole = forward.packed_parameters
        with mock.patch.object(forward, "packed_parameters", lambda documents: whole((sum(documents),))):
            yield
    elif fault == "one chunk of logits":
        with mock.patch.object(megatron, "chunk_within", return_value=10**6):
            yield
    else:
        raise ValueError(fault)


def rows_of(lengths: Sequence[int], vocabulary: int, pad: int) -> dict[str, Tensor]:
    """Made-up responses behind made-up prompts; the last row only fills up."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((len(lengths) + 1, max(lengths)), pad)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    for row, length in enumerate(lengths):
        whole = torch.randint(vocabulary, (length + 1,), generator=generator)
        tokens[row, :length] = whole[:-1]
        labels[row, PROMPT:length] = whole[PROMPT + 1 :]
    return {"response_tokens": tokens, "labels": labels, "advantages": torch.randn(len(tokens), generator=generator)}


def one_update(path: Path, overrides: Sequence[str], lengths: Sequence[int], fault: str | None) -> Update:
    """Loss and gradients of all rows in one step, as the trainer makes it; the values from before are made up."""
    config = load_config(GRPOConfig, path, overrides)
    base = HFDirectory(config.base)
    start_process_group(config.parallel, config.run.seed)
    objective = GRPOObjective(config, **grpo.layout_of(config, base))
    trained = grpo.build_policy(config, base, BatchGuard(config.run.output, config.guard, lambda _: []), objective)
    batch = rows_of(lengths, base.architecture.vocab_size, base.architecture.pad_token_id)
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    batch = {name: value[rank::ranks] for name, value in batch.items()}
    watch = Watch(base.architecture.vocab_size // config.parallel.tensor)
    with planted(fault), watch:
        sampled = torch.zeros(batch["labels"].shape)
        before = trained.batch_log_probs(batch | {"sampler_logprobs": sampled})
        batch |= made_up(before)
        micros = trained.objective.micro_batches(batch)
        trained.prepare_for_training_step()
        loss, metrics = trained.get_loss_and_metrics(batch, forward_only=False)
    gradients = torch.cat([parameter.main_grad.flatten() for parameter in trained.model.parameters()])
    tokens = sum(micro.tokens.numel() for micro in micros)
    return Update(loss, metrics, gradients.clone(), before, len(micros), tokens, watch.rows)


def made_up(before: Tensor) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    names = ("sampler_logprobs", "old_logprobs", "reference_logprobs")
    return {name: before + NOISE * torch.randn(before.shape, generator=generator) for name in names}


def run_interrupted(case: Case, call: int | None) -> list[int]:
    """Run the stage; at its sampler's call `call`, counted from 0, this process is told to stop.

    Returns:
        Prompts consumed before each round.
    """
    calls, consumed = 0, []
    real_sample, real_rollouts = LocalSampler.sample, GRPOTrainer.generate_rollouts

    def sample(self: Any, requests: Any, params: Any) -> Any:
        nonlocal calls
        if calls == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        calls += 1
        return real_sample(self, requests, params)

    def rollouts(self: Any) -> Any:
        consumed.append(int(self.consumed_samples))
        return real_rollouts(self)

    with (
        mock.patch.object(LocalSampler, "sample", sample),
        mock.patch.object(GRPOTrainer, "generate_rollouts", rollouts),
    ):
        run_case(case)
    return consumed
