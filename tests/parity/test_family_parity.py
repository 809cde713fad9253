"""Every family equals transformers in fp32: logits, loss, every gradient, in every layout, and faults are seen.

transformers 4.51 has no SmolLM3, see `tests/smollm3.py`; that of transformers 5 is compared with by itself.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import family_worker
import model_worker as worker
import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file, save_file
from test_model_parity import FAULT, GRADIENT, LAYOUTS, LOGITS, gap, worst_gradient

from phimr_nemo.errors import UserError
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.plan.request import find_model

Measured = Callable[[str], dict[str, worker.Results]]
PARAMETERS = 3_075_098_624
"""Of SmolLM3-3B, as its safetensors headers say."""
CHOSEN = ("one", "tp2", "tp2_sp", "pp2", "cp2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def references(root: str) -> dict[str, worker.Results]:
    found: dict[str, worker.Results] = run_distributed(family_worker.references, 1, root)[0]
    return found


@pytest.fixture(scope="module")
def measured(root: str, references: dict[str, worker.Results]) -> Measured:
    """All cases in a layout, once for all tests."""

    @functools.cache
    def get(name: str) -> dict[str, worker.Results]:
        layout = LAYOUTS[name]
        ranks = run_distributed(family_worker.measure, layout.world_size, root, layout)
        return next(rank for rank in ranks if next(iter(rank.values()))["logits"] is not None)

    return get


@pytest.mark.parametrize("layout", CHOSEN)
@pytest.mark.parametrize("case", family_worker.CASES)
def test_logits_loss_and_packed_documents_equal_transformers(
    case: str, layout: str, measured: Measured, references: dict[str, worker.Results]
) -> None:
    found, wanted = measured(layout)[case], references[case]
    for name in ("logits", "nll"):
        assert gap(found[name], wanted[name]) <= LOGITS, name
    for part, alone in zip(found["packed"][0].split(worker.DOCUMENTS), wanted["documents"], strict=True):
        assert gap(part, alone) <= LOGITS


@pytest.mark.parametrize("layout", CHOSEN)
@pytest.mark.parametrize("case", family_worker.CASES)
def test_every_gradient_equals_transformers(
    case: str, layout: str, measured: Measured, references: dict[str, worker.Results]
) -> None:
    for name in ("gradients", "packed_gradients"):
        worst, tensor = worst_gradient(measured(layout)[case][name], references[case][name])
        assert worst <= GRADIENT, (name, tensor)


@pytest.mark.parametrize("layout", CHOSEN)
@pytest.mark.parametrize("case", family_worker.CASES)
def test_export_returns_the_weights_bit_for_bit(
    case: str, layout: str, measured: Measured, references: dict[str, worker.Results]
) -> None:
    weights, wanted = measured(layout)[case]["weights"], references[case]["weights"]
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in weights)


def test_planted_faults_break_the_logits(root: str, references: dict[str, worker.Results]) -> None:
    faults = run_distributed(family_worker.measure_faults, 1, root)[0]
    for name, logits in faults.items():
        assert gap(logits, references[name.partition(":")[0]]["logits"]) > FAULT, name


def test_planted_fault_norms_of_heads_not_summed_over_the_ranks(
    root: str, references: dict[str, worker.Results]
) -> None:
    found = run_distributed(family_worker.measure_unsummed_norms, 2, root, LAYOUTS["tp2"])[0]
    worst, name = worst_gradient(found, references["qwen3, tied"]["gradients"])
    assert worst > FAULT
    assert name.endswith(("q_norm.weight", "k_norm.weight"))


@pytest.mark.parametrize("environment", ["vllm", "bridge"])
def test_smollm3_equals_that_of_transformers_5(
    environment: str, root: str, measured: Measured, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    python, script = request.getfixturevalue(f"{environment}_python"), Path(__file__).with_name("smollm3_worker.py")
    ids, labels = worker.batch()
    save_file({"ids": ids, "labels": labels}, tmp_path / "inputs")
    preset = find_model("smollm3-3b")
    (tmp_path / "preset").write_text(json.dumps(preset.to_hf_config()), "utf-8")
    for case in ("smollm3", "smollm3, untied"):
        ours, names = (
            measured("one")[case],
            [Path(root) / case, *(tmp_path / name for name in ("inputs", "out", "preset"))],
        )
        done = subprocess.run([python, script, *names], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found = load_file(tmp_path / "out")
        assert gap(ours["logits"], found.pop("logits")) <= LOGITS
        assert found.pop("parameters") == preset.num_parameters == PARAMETERS
        worst, tensor = worst_gradient(ours["gradients"], found)
        assert worst <= GRADIENT, tensor


@pytest.mark.usefixtures("references")
def test_planted_fault_another_head_dim_is_refused(root: str, tmp_path: Path) -> None:
    copy = shutil.copytree(Path(root) / "qwen3, tied", tmp_path / "hf")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"head_dim": 8}))
    with pytest.raises(UserError, match="shape"):
        HFDirectory(copy)
