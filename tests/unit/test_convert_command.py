"""`phimr convert` with bad input: a message that names the value and the remedy, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from phimr_nemo.cli import main as cli
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.base import random_tensors
from phimr_nemo.model.files.hf import write_hf_directory

WEIGHTS = "model.safetensors"
VOCABULARY = 16
USERS_MISTAKE = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model directory."""
    work = tmp_path_factory.mktemp("model")
    values = yaml.safe_load((Path(__file__).parents[2] / "conf/model/tiny.yaml").read_text())
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    arch = Architecture.from_preset(values, vocab_size=VOCABULARY, num_hidden_layers=2, **ends)
    content = {"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": "<|end|>", "id": 2}]}
    (work / "tokenizer.json").write_text(json.dumps(content))
    write_hf_directory(work / "hf", arch, random_tensors(arch, 0), tokenizer_from=work)
    return work / "hf"


def configure(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def other_family(directory: Path) -> None:
    configure(directory, model_type="llama", architectures=["LlamaForCausalLM"])


def wider(directory: Path) -> None:
    configure(
        directory, intermediate_size=json.loads((directory / "config.json").read_text())["intermediate_size"] * 2
    )


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return damage


def last_becomes(value: float) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][-1] = value

    return change


def cut(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, (directory / WEIGHTS).stat().st_size - 1)


def corrupt_header(directory: Path) -> None:
    with (directory / WEIGHTS).open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 16)


def pickled(directory: Path) -> None:
    torch.save({"model.norm.weight": torch.zeros(1)}, directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


def larger_tokenizer(directory: Path) -> None:
    content = {"model": {"vocab": {"a": VOCABULARY}}, "added_tokens": []}
    (directory / "tokenizer.json").write_text(json.dumps(content))


BAD = {
    "another architecture": (other_family, "llama"),
    "a config of another size": (wider, "has shape"),
    "a missing tensor": (
        with_tensors(lambda t: t.pop("model.norm.weight")),
        "1 tensors missing ['model.norm.weight']",
    ),
    "a tensor too many": (with_tensors(lambda t: t.update(extra=torch.zeros(1))), "1 left over ['extra']"),
    "a misshaped tensor": (
        with_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(7)})),
        "model.norm.weight in",
    ),
    "a truncated file": (cut, "truncated or corrupted"),
    "a corrupted header": (corrupt_header, "truncated or corrupted"),
    "NaN": (with_tensors(last_becomes(float("nan"))), "model.norm.weight"),
    "infinity": (with_tensors(last_becomes(float("-inf"))), "model.norm.weight"),
    "pickled weights": (pickled, "pytorch_model.bin"),
    "a tokenizer beyond the vocabulary": (larger_tokenizer, f"the id {VOCABULARY}"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "no weights"),
    "nothing": (shutil.rmtree, "no directory"),
}


@pytest.mark.parametrize("kind", ["megatron", "hf"])
@pytest.mark.parametrize(("damage", "named"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_message_and_leaves_nothing(
    damage: Callable[[Path], object],
    named: str,
    kind: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    damage(source)
    left = sorted(tmp_path.iterdir())
    target = str(tmp_path / "target")
    monkeypatch.setattr(sys, "argv", ["phimr", "convert", str(source), target, "--to", kind, "--tp", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == USERS_MISTAKE
    told = capsys.readouterr().err
    assert named in told
    assert "Traceback" not in told
    assert sorted(tmp_path.iterdir()) == left


def test_the_sound_directory_converts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cases above fail for their own reason alone."""
    monkeypatch.setattr(sys, "argv", ["phimr", "convert", str(model), str(tmp_path / "target"), "--tp", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path / 'target'}: megatron, tensor 2 x pipeline 1\n"
