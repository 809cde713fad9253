"""NeMo's own entry points on our model: import from Hugging Face, fine-tune, export to Hugging Face."""

from __future__ import annotations

from pathlib import Path

import nemo_worker
import pytest
import torch
from distributed import run_distributed

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.config.tiny import PLAIN_ROTARY
from phimr_nemo.model.base import run_base
from phimr_nemo.model.families import FAMILIES
from phimr_nemo.model.families.phi3 import PHI3
from phimr_nemo.model.files.hf import HFDirectory

STEPS = 2
LEARNING_RATE = 1e-4
# Adam's bound holds in exact arithmetic.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base") / "run"
    run_base(load_config(STAGES["base"], Path("conf/base/tiny.yaml"), [f"run.output={output}"]))
    return output / "hf"


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    shape = [] if request.param == PHI3.model_type else [f"{key}={value}" for key, value in PLAIN_ROTARY.items()]
    given = [f"run.output={output}", f"family={request.param}", *shape]
    run_base(load_config(STAGES["base"], Path("conf/base/tiny.yaml"), given))
    return output / "hf"


def largest_changes(before: Path, after: Path) -> list[float]:
    """Per tensor, the largest change of a weight."""
    one, other = HFDirectory(before), HFDirectory(after)
    return [float((one.read(name) - other.read(name)).abs().max()) for name in one.names()]


def test_import_and_export_are_the_identity(family_base: Path, tmp_path: Path) -> None:
    run_distributed(nemo_worker.round_trip, 1, family_base, tmp_path)
    files = sorted(file.name for file in family_base.iterdir())
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == files
    for name in files:
        assert (tmp_path / "hf" / name).read_bytes() == (family_base / name).read_bytes(), name
    context = [file for file in (tmp_path / "nemo" / "context").rglob("*") if file.is_file()]
    assert {file.name for file in context} >= {"io.json", "model.yaml", "tokenizer.json"}
    # What NeMo cannot write as JSON it pickles into files without a suffix, and it would take weights along.
    assert {file.suffix for file in context} == {".json", ".yaml"}


def test_converted_checkpoints_are_nemos(family_base: Path, tmp_path: Path) -> None:
    """Hugging Face -> Megatron -> NeMo in two layouts; NeMo exports it, and `convert` reads it without NeMo."""
    run_distributed(nemo_worker.convert_and_export, 1, family_base, tmp_path)
    wanted = {file.name: file.read_bytes() for file in family_base.iterdir()}
    for name in ("hf", "exported"):
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == wanted


def test_finetune_starts_from_the_imported_weights_and_changes_them(base: Path, tmp_path: Path) -> None:
    """In two steps of Adam each weight moves by at most two learning rates, and in every tensor one does."""
    import transformers

    (words,) = run_distributed(nemo_worker.finetune, 1, base, tmp_path, STEPS, LEARNING_RATE, True)
    changes = largest_changes(base, tmp_path / "tuned")
    assert min(changes) > 0
    assert max(changes) <= STEPS * LEARNING_RATE + ROUNDING
    tuned = HFDirectory(tmp_path / "tuned")
    state = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "tuned", torch_dtype="auto").state_dict()
    assert all(torch.equal(state[name], tuned.read(name)) for name in tuned.names())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    assert words == tokenizer.tokenize("1 + 2")


def test_a_finetune_that_does_not_restore_is_seen(base: Path, tmp_path: Path) -> None:
    """The planted fault: training starts from random weights."""
    run_distributed(nemo_worker.finetune, 1, base, tmp_path, STEPS, LEARNING_RATE, False)
    assert max(largest_changes(base, tmp_path / "tuned")) > STEPS * LEARNING_RATE + ROUNDING
