"""`phimr evaluate` as a command: every engine, resuming, and bad input, which is one clear error each."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_server import OpenAIServer, Reply, user_text
from safetensors.torch import load_file, save_file

from phimr_nemo.cli import main as cli
from phimr_nemo.config import BaseConfig, LongRopePolicy, load_config
from phimr_nemo.evaluate.evaluate import read_result, read_settings
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.model.origin import Origin
from phimr_nemo.store.shards import read_table

SHAPE = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4")
COUNT = 3
LONG: LongRopePolicy = "long_when_max_length_exceeds_original"
ENDPOINT = (
    "engine.kind=endpoint",
    "engine.endpoint.model=served",
    "engine.endpoint.concurrency=2",
    "engine.endpoint.idle_seconds=30",
    "engine.endpoint.total_seconds=60",
    "engine.endpoint.attempts=1",
    "engine.endpoint.backoff_seconds=0.01",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("model")
    overrides = [f"run.output={output}", "initializer_range=0.2", *SHAPE]
    run_stage("base", load_config(BaseConfig, Path("conf/base/tiny.yaml"), overrides))
    return output / "hf"


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(1, COUNT + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def evaluate(monkeypatch: pytest.MonkeyPatch, out: Path, *overrides: str) -> int:
    """The exit code of the command, run in this process."""
    fixed = (f"run.output={out}", "samples=2", "max_new_tokens=6", "workers=1")
    arguments = ["phimr", "evaluate", "--config", "conf/evaluate/tiny.yaml", *fixed, *overrides]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], code: int, *named: str) -> None:
    """Exit code 2 and one message with the value, the rule and the remedy."""
    message = capsys.readouterr().err
    assert code == 2, message
    assert [message.count(part) for part in ("error: ", "  rule:   ", "  remedy: ")] == [1, 1, 1]
    assert "Traceback" not in message
    for part in named:
        assert part in message


def own(path: Path) -> tuple[str, str]:
    return ("problems.kind=file", f"problems.path={path}")


def test_a_run_is_stored_and_a_second_one_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, problems: Path
) -> None:
    out = tmp_path / "out"
    assert evaluate(monkeypatch, out, f"model={model}", *own(problems)) == 0
    result, settings = read_result(out / "results.json"), read_settings(out / "results.json")
    assert (result.questions, result.samples) == (COUNT, 2)
    # The base model's run stands beside it; a file of one's own has its name.
    assert (settings["row"], settings["benchmark"]) == ("base", "mine")
    verdicts = read_table(out / "verdicts", "verdicts")
    assert verdicts.num_rows == 2 * COUNT
    assert result.lengths is not None
    assert sum(result.lengths.bins) == result.lengths.known == 2 * COUNT
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert evaluate(monkeypatch, out, f"model={model}", *own(problems)) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == files


def test_an_interrupted_run_continues_question_by_question_and_other_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, problems: Path
) -> None:
    from phimr_nemo.generate.local.engine import LocalSampler

    out, command = tmp_path / "out", (f"model={model}", *own(problems), "shard_questions=1")
    whole = LocalSampler.sample
    asked: list[int] = []

    def interrupted(self: LocalSampler, requests: Sequence[Any], params: Any) -> Any:
        asked.append(len(requests))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, requests, params)

    with monkeypatch.context() as patched:
        patched.setattr(LocalSampler, "sample", interrupted)
        assert evaluate(monkeypatch, out, *command) == 3
    capsys.readouterr()
    first = (out / "rollouts" / "part-00000.parquet").read_bytes()
    for change, named in (
        ("temperature=0.7", "temperature: 0.6 there, 0.7 now"),
        ("samples=3", "samples: 2 there, 3 now"),
        ("longrope=always_short", "longrope: 'as_trained' there, 'always_short' now"),
        ("prompt='Do {question}'", "prompt: '{question}' there"),
    ):
        refused(capsys, evaluate(monkeypatch, out, *command, change), "other settings", named)
    # What changes no response may change.
    assert evaluate(monkeypatch, out, *command, "engine.max_batch=1", "workers=2") == 0
    assert (out / "rollouts" / "part-00000.parquet").read_bytes() == first
    assert asked == [2, 2]
    undisturbed = tmp_path / "undisturbed"
    assert evaluate(monkeypatch, undisturbed, *command) == 0
    columns = ["id", "response", "finish_reason", "verdict"]
    assert read_table(out / "verdicts", "verdicts", columns) == read_table(
        undisturbed / "verdicts", "verdicts", columns
    )


def test_a_served_model_is_evaluated_without_its_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problems: Path
) -> None:
    def teacher(body: dict[str, Any]) -> Reply:
        number = int(user_text(body).split("+")[0].split()[-1])
        return Reply(f"It is \\boxed{{{2 * number if number > 1 else 7}}}.")

    out = tmp_path / "out"
    with OpenAIServer(teacher) as server:
        settings = (*ENDPOINT, f"engine.endpoint.base_urls=[{server.url}]", "model=null")
        assert evaluate(monkeypatch, out, *settings, *own(problems)) == 0
    result = read_result(out / "results.json")
    assert sorted(result.per_question.values()) == [0.0, 1.0, 1.0]
    assert read_settings(out / "results.json")["row"] == "served"


def with_two_regimes(
    model: Path, copy: Path, original: int, origin: Origin | None = None, factors: tuple[float, float] = (1.0, 40.0)
) -> Path:
    """The model with these short factors up to `original` tokens and these long ones beyond, trained as `origin`."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    pairs = len(config["rope_scaling"]["long_factor"])
    for name, factor in zip(("short_factor", "long_factor"), factors, strict=True):
        config["rope_scaling"][name] = [factor] * pairs
    config["original_max_position_embeddings"] = original
    config |= {} if origin is None else origin.to_config()
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def greedy(monkeypatch: pytest.MonkeyPatch, out: Path, model: Path, problems: Path, *more: str) -> list[str]:
    settings = (f"model={model}", "temperature=0", "max_new_tokens=24", "samples=1", *more, *own(problems))
    assert evaluate(monkeypatch, out, *settings) == 0
    found: list[str] = read_table(out / "verdicts", "verdicts", ["response"]).column("response").to_pylist()
    return found


@pytest.mark.parametrize(
    ("original", "trained", "factor"),
    [
        # Prompt and response have some 50 tokens: more than 16, fewer than 1024.
        (16, Origin(12, LONG), 1.0),  # trained short, asked beyond
        (1024, Origin(2048, LONG), 40.0),  # trained long, asked below: opened for one token more
        (16, None, 40.0),  # a model from elsewhere: by the length, as vLLM
    ],
)
def test_a_model_is_evaluated_with_the_factors_of_its_training(
    original: int,
    trained: Origin | None,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: Path,
    problems: Path,
) -> None:
    copy = with_two_regimes(model, tmp_path / "model" / "hf", original, trained)
    found = greedy(monkeypatch, tmp_path / "by itself", copy, problems)
    for wanted in (1.0, 40.0):
        # With both sets the same there is nothing to choose.
        same = with_two_regimes(model, tmp_path / f"{wanted}" / "hf", original, factors=(wanted, wanted))
        expected = greedy(monkeypatch, tmp_path / f"by {wanted}", same, problems, f"longrope={LONG}")
        assert (found == expected) is (wanted == factor)


def test_longrope_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, problems: Path) -> None:
    """Beyond the original length the two policies use other factors, and only there."""
    copy = with_two_regimes(model, tmp_path / "model" / "hf", 16)
    responses = {}
    for policy in ("long_when_max_length_exceeds_original", "always_short"):
        out = tmp_path / policy
        settings = (f"model={copy}", f"longrope={policy}", "temperature=0", "max_new_tokens=24")
        assert evaluate(monkeypatch, out, *settings, *own(problems)) == 0
        responses[policy] = read_table(out / "verdicts", "verdicts", ["response"]).column("response").to_pylist()
    assert responses["always_short"] != responses["long_when_max_length_exceeds_original"]


def test_bad_input_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, problems: Path
) -> None:
    out, given = tmp_path / "out", f"model={model}"
    benchmark = ("problems.kind=benchmark", f"problems.path={problems}")
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    columns = tmp_path / "columns.jsonl"
    columns.write_text('{"title": "a", "text": "b"}\n')
    unanswered = tmp_path / "unanswered.jsonl"
    unanswered.write_text('{"question": "a?", "answer": "1"}\n{"question": "b?", "answer": ""}\n')
    cases: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        ((given, *benchmark, "problems.name=AIME42"), ("problems.name='AIME42'", "AIME24")),
        ((given, *benchmark, "problems.name=AIME24"), (f"{problems} holds {COUNT} questions", "AIME24 has 30")),
        ((given, *own(columns)), (f"{columns} lacks a question column", "['text', 'title']")),
        ((given, *own(unanswered)), (f"{unanswered}, line 2 has no answer",)),
        ((given, *own(problems), "problems.answer=gold"), ("the answer column 'gold'",)),
        ((given, *own(tmp_path / "none.jsonl")), ("none.jsonl does not exist",)),
        ((f"model={bare}", *own(problems)), (f"{bare} holds no tokenizer.json",)),
        ((f"model={tmp_path / 'no'}", *own(problems)), ("no does not exist",)),
        (("model=null", *own(problems)), ("no model for engine.kind=local",)),
        ((given, *own(problems), "prompt=hello"), ("prompt template 'hello'",)),
        ((given, *own(problems), "engine.kind=magic"), ("engine.kind='magic'", "local, vllm, endpoint")),
    ]
    if importlib.util.find_spec("vllm") is None:
        vllm = ("engine.kind=vllm", "engine.max_batch=1", "engine.dtype=fp32", "engine.memory_share=0.5")
        cases.append(((given, *own(problems), *vllm), ("engine.kind=vllm, but vLLM is not installed", ".venv-vllm")))
    for overrides, named in cases:
        refused(capsys, evaluate(monkeypatch, out, *overrides), *named)
        assert not out.exists(), overrides


def test_a_model_that_says_nothing_is_no_score_of_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, problems: Path
) -> None:
    """Without weights all tokens are equal and greedy decoding takes the first one, which ends the response."""
    silent = tmp_path / "silent"
    shutil.copytree(model, silent)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, silent / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    code = evaluate(monkeypatch, out, f"model={silent}", *own(problems), "temperature=0")
    refused(capsys, code, f"all {2 * COUNT} responses in {out / 'verdicts'} are empty", "phimr sample")
    assert not (out / "results.json").exists()
