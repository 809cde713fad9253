"""Losses over micro-batches add up to the loss over the whole batch; the schedule; refusals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phimr_nemo.align.grpo.objective import GRPOObjective, advantages_of
from phimr_nemo.config import CheckpointConfig, GRPOConfig, ParallelConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.losses import IGNORED_LABEL, PolicyBatch, PolicyLoss, dapo_loss, dr_grpo_loss, grpo_loss, gspo_loss
from phimr_nemo.training.distributed import PreemptionGuard, start_process_group

PAD = 0


def random_rows(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [n, longest]; the first third of each row is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths)), PAD)
    labels = torch.full_like(tokens, IGNORED_LABEL)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(1, 50, (length,), generator=generator)
        labels[row, length // 3 : length] = torch.randint(1, 50, (length - length // 3,), generator=generator)
    return tokens, labels


def model(tokens: Tensor, labels: Tensor) -> Tensor:
    """Stands for the model: log-probabilities that depend on token and label, 0 where there is no label."""
    return torch.where(labels == IGNORED_LABEL, 0.0, -0.01 * tokens - 0.002 * labels)


def added_up(objective: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for micro in objective.micro_batches(batch):
        loss, count, sums = objective.loss(model(micro.tokens, micro.labels), micro)
        for name, value in {"loss": loss, "count": count, **sums}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def grpo_config(repository: Path, *overrides: str) -> GRPOConfig:
    return load_config(GRPOConfig, repository / "conf" / "grpo" / "tiny.yaml", overrides)


def grpo_batch() -> dict[str, Tensor]:
    tokens, labels = random_rows([6, 1, 11, 4, 1, 9], 3)
    labels[[1, 4]] = IGNORED_LABEL  # rows that only fill up
    generator = torch.Generator().manual_seed(5)
    noise = 0.3 * torch.randn(labels.shape, generator=generator)
    return {
        "response_tokens": tokens,
        "labels": labels,
        "advantages": torch.tensor([1.0, 9.0, -1.0, 0.5, 9.0, -0.7]),
        "sampler_logprobs": model(tokens, labels) + 0.001 + 0.5 * noise,
        "old_logprobs": model(tokens, labels) + noise,
        "reference_logprobs": model(tokens, labels) - noise,
    }


LOSSES: dict[str, Callable[..., PolicyLoss]] = {
    "grpo": grpo_loss,
    "dr_grpo": partial(dr_grpo_loss, max_new_tokens=8),
    "dapo": dapo_loss,
    "gspo": gspo_loss,
}
CAP = 1.05


def loss_settings(kind: str) -> tuple[str, ...]:
    return (f"loss.kind={kind}", "loss.clip_low=0.2", "loss.clip_high=0.28")


CORRECTIONS = {"none": ("correction.kind=none",), "truncated": ("correction.kind=truncated", f"correction.cap={CAP}")}


@pytest.mark.parametrize("packed", ["false", "true"])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_grpo_micro_batches_add_up_to_the_whole(
    repository: Path, kind: str, correction: str, micro_batch: int, packed: str
) -> None:
    """To the configured loss of all rows at once. Rows that only fill up are in no micro-batch."""
    settings = (f"micro_batch={micro_batch}", f"packed={packed}", "sequence_length=12", "max_new_tokens=8", "kl=0.1")
    config = grpo_config(repository, *settings, *loss_settings(kind), *CORRECTIONS[correction])
    objective = GRPOObjective(config, multiple=1, pad_id=PAD)
    batch = grpo_batch()
    totals = added_up(objective, batch)
    weights = torch.exp(batch["old_logprobs"] - batch["sampler_logprobs"]).clamp(max=CAP)
    mask = batch["labels"] != IGNORED_LABEL
    responses = PolicyBatch(
        model(batch["response_tokens"], batch["labels"]),
        batch["old_logprobs"],
        batch["advantages"],
        mask,
        ref_logprobs=batch["reference_logprobs"],
        importance_weights=weights if correction == "truncated" else None,
    )
    whole = LOSSES[kind](responses, clip_low=0.2, clip_high=0.28, kl_coefficient=0.1)
    assert totals["count"] == float(whole.denominator)
    assert totals["loss"] == pytest.approx(float(whole.loss_sum), rel=1e-5)
    assert totals["clipped_low"] + totals["clipped_high"] == float(
        whole.metrics["clipped_low"] + whole.metrics["clipped_high"]
    )
    assert totals["kl_to_reference"] == pytest.approx(float(whole.metrics["kl_to_reference"]), rel=1e-5)
    summary = objective.summary(totals)
    assert summary["loss"] == pytest.approx(float(whole.loss_sum / whole.denominator), rel=1e-5)
    assert summary["trained_tokens"] == int(mask.sum())
    if correction == "truncated":
        assert summary["sampler_weight"] == pytest.approx(float(weights[mask].mean()), rel=1e-5)


def test_packed_rows_hold_a_budget_of_tokens(repository: Path) -> None:
    """Used lengths 6, 11, 4 and 9 in rows of 2 x 10 = 20 tokens: 11 + 9 and 6 + 4, instead of two padded pairs."""
    settings = ("packed=true", "micro_batch=2", "sequence_length=10", "max_new_tokens=8")
    micros = GRPOObjective(grpo_config(repository, *settings), multiple=1, pad_id=PAD).micro_batches(grpo_batch())
    assert sorted(sorted(micro.documents) for micro in micros) == [[4, 6], [9, 11]]
    assert sorted(row for micro in micros for row in micro.extras["rows"].tolist()) == [0, 2, 3, 5]


def test_a_packed_row_is_filled_to_the_multiple_that_the_layout_wants(repository: Path) -> None:
    """The padding is a document of its own and changes no sum."""
    config = grpo_config(repository, "packed=true", "micro_batch=64")
    (plain,) = GRPOObjective(config, multiple=1, pad_id=PAD).micro_batches(grpo_batch())
    objective = GRPOObjective(config, multiple=8, pad_id=PAD)
    (filled,) = objective.micro_batches(grpo_batch())
    assert filled.documents == (*plain.documents, 2)
    assert filled.tokens.shape == (1, 32)
    expected = added_up(GRPOObjective(config, multiple=1, pad_id=PAD), grpo_batch())
    assert added_up(objective, grpo_batch()) == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "expected"), [("dr_grpo", [0.5, -0.5]), ("dapo", [2**-0.5, -(2**-0.5)])])
def test_the_loss_says_how_rewards_become_advantages(repository: Path, kind: str, expected: list[float]) -> None:
    """Rewards 1 and 0: half apart from their mean; their sample deviation is the root of a half."""
    function = advantages_of(grpo_config(repository, *loss_settings(kind)))
    found = function(torch.tensor([1.0, 0.0]), torch.tensor([3, 3]))
    assert found.tolist() == pytest.approx(expected, abs=2e-4)


def test_the_gap_is_between_sampler_and_the_policy_before_the_update(repository: Path) -> None:
    """Without old log-probabilities the current ones are the old ones: here 0.001 nats from the sampler's."""
    objective = GRPOObjective(grpo_config(repository), multiple=1, pad_id=PAD)
    batch = grpo_batch()
    del batch["old_logprobs"], batch["reference_logprobs"]
    batch["sampler_logprobs"] = model(batch["response_tokens"], batch["labels"]) + 0.001
    summary = objective.summary(added_up(objective, batch))
    assert summary["logprob_gap"] == pytest.approx(0.001, rel=1e-3)
    assert summary["ratio"] == pytest.approx(1.0)
    assert summary["kl_to_old"] == 0.0


@pytest.mark.parametrize("packed", ["false", "true"])
def test_a_rank_without_rows_still_takes_part(repository: Path, packed: str) -> None:
    objective = GRPOObjective(grpo_config(repository, f"packed={packed}"), multiple=1, pad_id=PAD)
    batch = {name: value[[1, 4]] for name, value in grpo_batch().items()}
    assert len(objective.micro_batches(batch)) == 1
    totals = added_up(objective, batch)
    assert (totals["count"], totals["loss"]) == (0.0, 0.0)
    assert objective.summary(totals)["loss"] == 0.0


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("group_size=1", "group_size=1"),
        ("inner_batches=0", "inner_batches=0"),
        ("inner_batches=7", "inner_batches=7"),
        ("max_new_tokens=256", "max_new_tokens=256"),
    ],
)
def test_impossible_rounds_are_refused(repository: Path, override: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        grpo_config(repository, override)


def test_a_run_without_checkpoints_is_refused() -> None:
    with pytest.raises(UserError, match=r"every=0"):
        CheckpointConfig(every=0)


def test_a_layout_for_other_processes_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"1 processes were started for parallel\.tensor=2"):
        start_process_group(ParallelConfig(tensor=2), seed=0)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_the_old_handler_returns(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with PreemptionGuard() as guard:
        assert not guard.requested
        os.kill(os.getpid(), number)
        assert guard.requested
    assert signal.getsignal(number) is before
