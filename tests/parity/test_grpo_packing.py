"""GRPO's updates packed equal padded ones, without the logits of a whole row; refilled and interrupted rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from align_inputs import CONF, make_case, make_inputs
from distributed import run_distributed
from grpo_worker import PROMPT, Update, one_update, run_interrupted
from test_align_parity import curve, weights_differ_by

from phimr_nemo.model.architecture import Architecture

LENGTHS = (7, 40, 12, 90, 8, 33, 9, 61)
LONG = 6 * LENGTHS
TOLERANCE = 1e-5
"""Relative, float32: sums over the same numbers in another order."""
REFILLED = (
    "steps=3",
    "inner_batches=1",
    "kl=0",
    "rebalance.drop_above=0.3",
    "rebalance.refill_rounds=2",
    "prompts_per_step=5",
)
NEVER = 99


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grpo-packing")
    make_inputs(root)
    return root


def update(
    root: Path,
    *overrides: str,
    lengths: tuple[int, ...] = LENGTHS,
    ranks: int = 1,
    fault: str | None = None,
) -> list[Update]:
    settings = [f"run.output={root / 'run'}", f"base={root / 'base' / 'hf'}", f"prompts={root / 'prompts'}"]
    settings += ["sequence_length=100", "max_new_tokens=80", "micro_batch=3", "kl=0.1", "packed=false", *overrides]
    found: list[Update] = run_distributed(one_update, ranks, CONF / "grpo" / "tiny.yaml", settings, lengths, fault)
    return found


def gradient_difference(one: Update, other: Update) -> float:
    """Largest difference of an entry, relative to the largest entry."""
    return float((one.gradients - other.gradients).abs().max() / other.gradients.abs().max())


CORRECTED = ("correction.kind=truncated", "correction.cap=1.1")
GSPO = ("loss.kind=gspo", "loss.clip_low=0.01", "loss.clip_high=0.01")


@pytest.mark.parametrize("settings", [CORRECTED, GSPO], ids=["dapo", "gspo"])
def test_a_packed_update_is_the_padded_one(root: Path, settings: tuple[str, ...]) -> None:
    (padded,), (packed,) = update(root, *settings), update(root, "packed=true", *settings)
    assert packed.loss == pytest.approx(padded.loss, rel=TOLERANCE)
    assert gradient_difference(packed, padded) < TOLERANCE
    assert torch.allclose(packed.before, padded.before, rtol=TOLERANCE, atol=TOLERANCE)
    assert packed.metrics == pytest.approx(padded.metrics, rel=10 * TOLERANCE, abs=TOLERANCE)
    assert packed.metrics["trained_tokens"] == sum(length - PROMPT for length in LENGTHS)
    # 260 tokens in one row of up to 3 x 100, against three rows by three rows by two.
    assert (packed.micro_batches, packed.tokens) == (1, sum(LENGTHS))
    assert (padded.micro_batches, padded.tokens) == (3, 3 * 90 + 3 * 33 + 2 * 8)


def test_packed_with_context_parallelism_is_the_padded_update_of_one_process(root: Path) -> None:
    """The two ranks share every row, and the gradient that each has is the whole one."""
    (padded,) = update(root)
    for packed in update(root, "packed=true", "parallel.context=2", "optim.distributed=false", ranks=2):
        assert packed.loss == pytest.approx(padded.loss, rel=TOLERANCE)
        assert gradient_difference(packed, padded) < TOLERANCE
        assert torch.allclose(packed.before, padded.before, rtol=TOLERANCE, atol=TOLERANCE)


def test_responses_that_see_each_other_are_noticed(root: Path) -> None:
    (padded,), (leaking,) = update(root), update(root, "packed=true", fault="the row is one document")
    assert gradient_difference(leaking, padded) > 100 * TOLERANCE


ONE_ROW = ("packed=true", "micro_batch=1", "sequence_length=2000")
CHUNK = 500


def room_for(root: Path, tokens: int) -> str:
    """What the logits of so many tokens take, in float32."""
    words = Architecture.from_directory(root / "base" / "hf").vocab_size
    return f"model.logits_gib={4 * words * tokens / 2**30}"


def test_the_logits_of_a_row_never_exist_together(root: Path) -> None:
    """Of 1,560 tokens, those of one chunk exist at a time: a bound that does not know the row's length."""
    (found,) = update(root, *ONE_ROW, room_for(root, CHUNK), lengths=LONG)
    assert (found.micro_batches, found.tokens) == (1, sum(LONG))
    assert 0 < found.vocabulary_rows <= CHUNK < sum(length - PROMPT for length in LONG)


def test_logits_of_a_whole_row_are_noticed(root: Path) -> None:
    (found,) = update(root, *ONE_ROW, room_for(root, CHUNK), lengths=LONG, fault="one chunk of logits")
    assert found.vocabulary_rows >= sum(length - PROMPT for length in LONG)


@pytest.fixture(scope="module")
def refilled(root: Path) -> list[int]:
    """Prompts consumed before each round of the run `refilled`."""
    consumed: list[int] = run_distributed(run_interrupted, 1, make_case(root, "refilled", "grpo", *REFILLED), None)[0]
    return consumed


def test_a_step_is_refilled_with_further_prompts(root: Path, refilled: list[int]) -> None:
    """Prompts with one right response of four are trained on; others are replaced until there are five, or twice."""
    rows = curve(root / "refilled", steps=3)
    assert any(row["refills"] > 0 for row in rows)
    for row, before in zip(rows, refilled, strict=True):
        sampled = row["consumed_samples"] - before
        found = row["trained_prompts"]
        assert found + row["dropped_easy"] + row["dropped_impossible"] + row["dropped_surplus"] == sampled
        assert 5 <= sampled <= 15
        assert found == 5 or row["refills"] == 2
        # One right response and one wrong one of each.
        assert row["kept"] == pytest.approx(2 * found / (4 * sampled))


def test_a_run_stopped_in_the_middle_of_a_round_is_the_same_run(root: Path, refilled: list[int]) -> None:
    """Told to stop while it samples for the second step: saved as after the first, it samples the round again."""
    first_round = 1 + int(curve(root / "refilled", steps=3)[0]["refills"])
    case = replace(make_case(root, "interrupted", "grpo", *REFILLED), stop_after=NEVER)
    assert run_distributed(run_interrupted, 1, case, first_round)[0] == refilled[:2]
    checkpoints = [path.name for path in (root / "interrupted" / "checkpoints").iterdir()]
    assert checkpoints == ["step=1"]
    assert run_distributed(run_interrupted, 1, replace(case, stop_after=None), None)[0] == refilled[1:]
    assert curve(root / "interrupted", steps=3) == curve(root / "refilled", steps=3)
    assert weights_differ_by(root / "interrupted", root / "refilled") == 0.0
