"""A path of the wrong kind: the remedy names the right one, or a command that makes it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from phimr_nemo.data.sources.rawfiles import read_rows
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.inputs import MADE_BY, is_hub_name, model_remedy, records_remedy, table_remedy
from phimr_nemo.store.records import KINDS, SCHEMA_VERSION, Kind
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import MANIFEST, read_manifest
from phimr_nemo.verify.stage import verify_file


def a_run(path: Path, stage: str, *, model: bool = True) -> Path:
    RunDirectory(path).describe(stage=stage, config_yaml="", seed=0, facts={})
    if model:
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text("{}")
    return path


def records(path: Path, kind: Kind = "prompts") -> Path:
    path.mkdir(parents=True)
    absent: dict[str, dict[str, str]] = {key: {} for key in ("shards", "config", "inputs", "counts", "versions")}
    (path / MANIFEST).write_text(json.dumps({"kind": kind, "rows": 0, "schema_version": SCHEMA_VERSION, **absent}))
    return path


def test_a_run_directory_for_its_model(tmp_path: Path) -> None:
    run = a_run(tmp_path / "sft", "sft")
    assert model_remedy(run) == f"did you mean {run}/hf?"
    for open_it in (HFDirectory, Architecture.from_directory):
        with pytest.raises(UserError) as caught:
            open_it(run)
        assert caught.value.remedy == f"did you mean {run}/hf?"


def test_a_directory_of_runs_for_a_model(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        a_run(tmp_path / name, "sft")
    named = " or ".join(f"{tmp_path}/{name}/hf" for name in "abc")
    assert model_remedy(tmp_path) == f"did you mean {named}? (there are more)"
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert model_remedy(tmp_path / "models--x") == f"did you mean {snapshot}?"
    assert model_remedy(snapshot / "config.json") == f"did you mean {snapshot}?"


def test_a_run_without_a_model_yet(tmp_path: Path) -> None:
    run = a_run(tmp_path / "grpo", "grpo", model=False)
    assert "run of grpo" in model_remedy(run)
    assert "run of grpo" in model_remedy(run / "hf")
    assert "has not finished" in model_remedy(run / "hf")


@pytest.mark.parametrize("name", ["microsoft/Phi-4-mini-instruct", "Qwen/Qwen2.5-0.5B", "a/b_c"])
def test_a_name_of_the_hub_gets_the_download(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        HFDirectory(Path(name))
    where = f"models/{name.partition('/')[2]}"
    assert caught.value.remedy.endswith(f"huggingface-cli download {name} --local-dir {where}")


@pytest.mark.parametrize("name", ["runs/absent", "data/problems.jsonl", "/absolute/path", "one", "a/b/c"])
def test_a_path_is_no_name_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "download" not in model_remedy(Path(name))


def test_records_of_another_kind_or_above_the_right_ones(tmp_path: Path) -> None:
    curated = a_run(tmp_path / "curated", "curate", model=False)
    right = records(curated / "sft", "conversations")
    pairs = records(curated / "pairs", "pairs")
    for given in (curated, pairs):
        assert records_remedy(given, "conversations") == f"did you mean {right}?"
        with pytest.raises(UserError, match="did you mean") as caught:
            read_manifest(given, "conversations")
        assert caught.value.remedy == f"did you mean {right}?"


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_that_makes_a_kind(kind: Kind, tmp_path: Path) -> None:
    assert MADE_BY[kind] in records_remedy(tmp_path / "x" / "absent", kind)


def test_a_model_for_records(tmp_path: Path) -> None:
    model = a_run(tmp_path / "x" / "y" / "z" / "sft", "sft") / "hf"
    assert records_remedy(model, "rows") == f"{model} is a model; run the step that makes it first, `phimr pack`"
    written = records(tmp_path / "rows", "rows")
    assert f"{written} holds 'rows' records" in model_remedy(written)


def test_a_damaged_manifest_does_not_stop_the_remedy(tmp_path: Path) -> None:
    (records(tmp_path / "a") / MANIFEST).write_text("{")
    (records(tmp_path / "b") / MANIFEST).write_text("[]")
    assert "phimr pack" in records_remedy(tmp_path, "rows")


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_a_table_of_text_is_converted_by_the_printed_command(suffix: str, delimiter: str, tmp_path: Path) -> None:
    """Commas, line breaks, leading zeros and a spreadsheet's mark survive, and a file name with a space."""
    table = tmp_path / f"my problems{suffix}"
    rows = [["question", "answer"], ["a, b\nc", "007"], ['say "x"', "½"]]
    quoted = ("\n".join(delimiter.join('"' + c.replace('"', '""') + '"' for c in row) for row in rows)).encode()
    table.write_bytes(b"\xef\xbb\xbf" + quoted)
    with pytest.raises(UserError) as caught:
        list(read_rows(table))
    assert caught.value.remedy == table_remedy(table)
    command = caught.value.remedy.removeprefix("convert it: ")
    assert shlex.split(command)[0] == "python"
    subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True, cwd=tmp_path)
    converted = [row for _, row in read_rows(table.with_suffix(".jsonl"))]
    assert converted == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    with pytest.raises(UserError) as caught:
        verify_file(table, tmp_path / "out.jsonl", response="question", answer="answer", workers=1)
    assert caught.value.remedy == table_remedy(table)


def test_a_directory_of_rollouts_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory") as caught:
        verify_file(tmp_path, tmp_path / "out.jsonl", response="response", answer="answer", workers=1)
    assert f"phimr verify rollouts={tmp_path}" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("microsoft/Phi-4-mini-instruct", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("a randomly initialised tiny model", False),
        ("gpt2", False),
        ("runs/base/hf", False),
        ("/models/base", False),
        ("./base", False),
        ("conf/base", False),
        ("team/a--b", False),
        ("team/model.", False),
        ("team/model.git", False),
        ("team/-model", False),
        ("team-/model", False),
        ("team/" + "m" * 92, False),
    ],
)
def test_names_of_the_hub_are_told_from_sentences_and_places(text: str, is_name: bool) -> None:
    assert is_hub_name(text) == is_name
