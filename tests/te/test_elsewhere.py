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


def test_planted_tensors_without_a_device_are_caught() -> None:
    [caught] = run_distributed(elsewhere_worker.planted, 1)
    assert caught == {
        "a mask made on the CPU": True,
        "an index from the CPU, as a GPU takes it": False,
        "a number from the CPU, as a GPU takes it": False,
        "results gathered on the CPU": True,
        "a copy to the device": False,
    }
