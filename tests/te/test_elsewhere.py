"""No tensor is made on the CPU where the others are on a device, in losses, objectives, model and sampler.

What stays on the CPU by intent: a micro-batch's tokens, labels and extras until the policy or the loss takes them
(`MegatronPolicy._forward`, the objectives' `loss`), the log-probabilities that `log_probs` returns, the sampler's
requests and completions, which are numbers.
"""

from __future__ import annotations

from pathlib import Path

import elsewhere_worker
from distributed import run_distributed

CASES = 31


def test_everything_computes_on_the_device_what_it_computes_on_the_cpu(tmp_path: Path, repository: Path) -> None:
    [faults] = run_distributed(elsewhere_worker.compare, 1, str(tmp_path / "hf"), str(repository))
    assert faults.pop("cases") == str(CASES)
    assert faults == {}


def test_no_micro_batch_waits_for_the_device(tmp_path: Path, repository: Path) -> None:
    """However many there are, the CPU waits once: for a step's sums, for a round's log-probabilities.

    NeMo's own sum over a step's micro-batches asks each whether it had tokens, when all of them are on their way.
    """
    [waits] = run_distributed(elsewhere_worker.count_waits, 1, str(tmp_path / "hf"), str(repository))
    counts = {name: len(found) for name, found in waits.items()}
    ways = ("padded", "packed")
    assert counts == {
        **{f"supervised, {way}": 0 for way in ways},
        **{f"dpo, {way}": 1 for way in ways},
        **{f"grpo, {way}, entropy bonus {bonus}": 1 for way in ways for bonus in ("0.0", "0.01")},
        # One a micro-batch, fetched when all are on their way.
        "log-probabilities of a round": 3,
        "weights for a sampler": 0,
    }, waits


def test_a_token_of_the_sampler_waits_for_the_device_once(tmp_path: Path) -> None:
    """For what was drawn: whether it ends a response, and whether it is a number."""
    short, long = 4, 15
    [(few, many)] = run_distributed(elsewhere_worker.count_sampler_waits, 1, str(tmp_path / "hf"), (short, long))
    assert len(many) - len(few) == long - short, many


def test_planted_tensors_without_a_device_are_caught() -> None:
    [caught] = run_distributed(elsewhere_worker.planted, 1)
    assert caught == {
        "a mask made on the CPU": True,
        "an index from the CPU, as a GPU takes it": False,
        "a number from the CPU, as a GPU takes it": False,
        "results gathered on the CPU": True,
        "a copy to the device": False,
    }
