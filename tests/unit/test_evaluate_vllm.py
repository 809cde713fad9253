"""`phimr evaluate` in vLLM's environment: greedy responses are those of the built-in engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from warm_phimr import Phimr

from phimr_nemo.cli import main as cli
from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.evaluate.evaluate import read_result
from phimr_nemo.model.base import run_base
from phimr_nemo.store.shards import read_table

# vLLM's attention on CPU wants heads of 32 dimensions or more.
SHAPE = ("hidden_size=128", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=4")
VLLM = (
    "engine.kind=vllm",
    "engine.max_batch=8",
    "engine.dtype=fp32",
    "engine.memory_share=0.5",
    "engine.eager=true",
)


def test_vllm_evaluates_as_the_built_in_engine_does(
    tmp_path: Path,
    vllm_phimr: Phimr,
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
) -> None:
    """The planted fault is a model with other weights: the built-in engine's own responses to it are others."""
    for seed, name in enumerate(("base", "other")):
        settings = [f"run.output={tmp_path / name}", f"run.seed={seed}", "initializer_range=0.2", *SHAPE]
        run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), settings))
    problems = tmp_path / "mine.jsonl"
    rows = [{"question": f"What is {'1' * n}+1?", "answer": "2"} for n in (1, 5, 9)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    command = ["evaluate", "--config", "conf/evaluate/tiny.yaml"]
    command += ["problems.kind=file", f"problems.path={problems}", "samples=2", "workers=1"]
    command += ["temperature=0", "max_new_tokens=16"]
    model = f"model={tmp_path / 'base' / 'hf'}"
    done = vllm_phimr(*command, model, f"run.output={tmp_path / 'vllm'}", *VLLM, place=repository)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, asked in (("local", "base"), ("planted", "other")):
        settings = [f"model={tmp_path / asked / 'hf'}", f"run.output={tmp_path / name}"]
        monkeypatch.setattr("sys.argv", ["phimr", *command, *settings])
        with pytest.raises(SystemExit):
            cli.main()
    columns = ["id", "response", "finish_reason", "tokens", "verdict"]
    ours, theirs, planted = (
        read_table(tmp_path / name / "verdicts", "verdicts", columns) for name in ("local", "vllm", "planted")
    )
    assert theirs == ours
    assert planted["response"].to_pylist() != ours["response"].to_pylist()
    assert read_result(tmp_path / "vllm" / "results.json") == read_result(tmp_path / "local" / "results.json")
