"""What has changed since a run was begun: named before it is continued or reused; another place is no change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import STAGES, QuickstartConfig, load_config
from phimr_nemo.data.prepare import stage as prepare_stage
from phimr_nemo.errors import UserError
from phimr_nemo.jobs import chain, launch, quickstart
from phimr_nemo.jobs.changes import changes, made_from
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.jobs.steps.schedule import Child, Starter
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.claims import claimed
from phimr_nemo.store.records import Kind
from phimr_nemo.store.runs import RUN_FILE, RunDirectory
from phimr_nemo.store.shards import finish, read_manifest, read_table, rows_to_table, write_shard

ROW: Mapping[Kind, Callable[[int], dict[str, Any]]] = {
    "rows": lambda n: {"input_ids": [n], "loss_mask": [1], "document_lengths": [1]},
    "conversations": lambda n: (
        {"id": f"{n}", "problem_id": "p", "question": "q", "response": f"r{n}"} | {"domain": None, "difficulty": None}
    ),
    "pairs": lambda n: (
        {"id": f"{n}", "problem_id": "p", "question": "q", "chosen": f"c{n}", "rejected": "r"} | {"mode": "random"}
    ),
    "prompts": lambda n: (
        {"id": f"{n}", "problem_id": "p", "question": f"q{n}", "answer": "1", "pass_rate": 0.5}
        | {"mean_length": 1.0, "length_spread": 0.0, "hard": False}
    ),
}
SHAPE = (
    "hidden_size=32",
    "intermediate_size=48",
    "num_hidden_layers=1",
    "num_attention_heads=4",
    "num_key_value_heads=2",
)
TRAINING: tuple[tuple[str, str, Kind], ...] = (
    ("midtrain", "data", "rows"),
    ("sft", "data", "conversations"),
    ("dpo", "pairs", "pairs"),
    ("grpo", "prompts", "prompts"),
    ("distill", "prompts", "prompts"),
)


def records(path: Path, kind: Kind, *numbers: int) -> Path:
    """A finished directory with a shard a row; what was there is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    for index, number in enumerate(numbers):
        write_shard(path, index, rows_to_table([ROW[kind](number)], kind), kind=kind)
    finish(path, kind=kind, config={})
    return path


def model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training stages that save nothing and finish at the second start; their starts."""
    starts: list[str] = []

    def function(stage: str) -> Callable[[Any], dict[str, Any] | None]:
        def run(config: Any) -> dict[str, Any] | None:
            starts.append(stage)
            (config.run.output / "metrics.jsonl").write_text("")
            return None if len(starts) == 1 else {"steps": 1}

        return run

    monkeypatch.setattr(launch, "stage_function", function)
    return starts


def training(stage: str, root: Path, key: str, *overrides: str) -> Any:
    paths = [f"run.output={root / 'run'}", f"base={root / 'base'}", f"{key}={root / 'data'}"]
    paths += [f"teacher.path={root / 'base'}"] if stage == "distill" else []
    return load_config(STAGES[stage], Path(f"conf/{stage}/tiny.yaml"), [*paths, *overrides])


@pytest.mark.parametrize(("stage", "key", "kind"), TRAINING)
@pytest.mark.parametrize("finished", [False, True])
def test_training_does_not_go_on_with_replaced_rows_or_weights(
    stage: str, key: str, kind: Kind, finished: bool, tmp_path: Path, stopped: list[str]
) -> None:
    records(tmp_path / "data", kind, 1, 2)
    model(tmp_path / "base")
    config = training(stage, tmp_path, key)
    for _ in range(1 + finished):
        run_stage(stage, config)
    assert RunDirectory(config.run.output).is_done == finished
    state = "has finished (20" if finished else "was begun"
    weights, starts = tmp_path / "base" / "model.safetensors", len(stopped)
    then = weights.stat()
    weights.write_bytes(b"Weights")
    os.utime(weights, ns=(then.st_atime_ns, then.st_mtime_ns))
    records(tmp_path / "data", kind, 1, 3)
    with pytest.raises(UserError) as caught:
        run_stage(stage, config)
    assert state in caught.value.problem
    assert "base: content" in caught.value.problem
    assert f"{key}: content" in caught.value.problem
    assert f"rm -r {config.run.output}" in caught.value.remedy
    weights.write_bytes(b"weights")
    with pytest.raises(UserError, match=f"{key}: content") as caught:
        run_stage(stage, config)
    assert "base: content" not in caught.value.problem
    assert len(stopped) == starts
    # Rows made again alike are the same rows.
    records(tmp_path / "data", kind, 1, 2)
    run_stage(stage, config)
    assert RunDirectory(config.run.output).is_done


@pytest.mark.parametrize(("stage", "key", "kind"), TRAINING)
def test_a_run_goes_on_when_everything_was_moved_copied_or_named_otherwise(
    stage: str, key: str, kind: Kind, tmp_path: Path, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    records(here / "data", kind, 1, 2)
    model(here / "base")
    monkeypatch.chdir(tmp_path)
    run_stage(stage, training(stage, Path("here"), key))
    shutil.copytree(here, tmp_path / "copied")
    here.rename(tmp_path / "moved")
    for place in (tmp_path / "copied", Path("moved")):
        run_stage(stage, training(stage, place, key))
        assert RunDirectory(place / "run").is_done
    assert stopped == [stage] * 3


def test_a_finished_run_says_when_it_finished_and_what_changed_since(
    tmp_path: Path, stopped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    records(tmp_path / "data", "rows", 1)
    model(tmp_path / "base")
    for _ in range(2):
        run_stage("midtrain", training("midtrain", tmp_path, "data"))
    capsys.readouterr()
    run = RunDirectory(tmp_path / "run")
    run_stage("midtrain", training("midtrain", tmp_path, "data"))
    told = capsys.readouterr().out
    assert told.startswith(f"midtrain: has finished already ({run.finished_at()}), nothing is made again; ")
    assert told.endswith("its inputs and settings are as they were\n")
    described = json.loads((run.path / RUN_FILE).read_text())
    described["versions"]["torch"] = "0.0"
    (run.path / RUN_FILE).write_text(json.dumps(described))
    run_stage("midtrain", training("midtrain", tmp_path, "data", "checkpoint.every=7"))
    told = capsys.readouterr().out
    assert "checkpoint.every: " in told
    assert "7 now" in told
    assert "torch: 0.0 there" in told
    assert len(stopped) == 2


# Data stages -------------------------------------------------------------------------------------------------


def recorded(path: Path, *responses: str) -> Path:
    rows = [{"question": f"{n}+1?", "answer": str(n + 1), "response": text} for n, text in enumerate(responses)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(out: Path, source: Path, *overrides: str) -> Any:
    given = ["problems=null", "teacher.kind=recorded", f"teacher.path={source}", "shard_size=1", *overrides]
    return load_config(STAGES["generate"], Path("conf/generate/tiny.yaml"), [f"run.output={out}", *given])


def test_two_versions_of_a_recorded_file_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = recorded(tmp_path / "file.jsonl", "a", "b"), tmp_path / "out"
    run_stage("generate", generate(out, source))
    # One that was killed at the end: a task of an array would have made the other's shards as well.
    (out / "DONE").unlink()
    kept = (out / "part-00000.parquet").stat().st_mtime_ns
    # The same question and teacher, so the same ids.
    recorded(source, "a", "B", "c")
    run_stage("generate", generate(out, source))
    assert "teacher.path: content" in capsys.readouterr().out
    assert read_table(out, "rollouts")["response"].to_pylist() == ["a", "B", "c"]
    assert (out / "part-00000.parquet").stat().st_mtime_ns == kept
    recorded(source, "x")
    with pytest.raises(UserError, match=r"teacher\.path: content"):
        run_stage("generate", generate(out, source))
    (out / "DONE").unlink()
    run_stage("generate", generate(out, source))
    assert read_table(out, "rollouts")["response"].to_pylist() == ["x"]


def verify(out: Path, rollouts: Path) -> Any:
    return load_config(
        STAGES["verify"], Path("conf/verify/tiny.yaml"), [f"run.output={out}", f"rollouts={rollouts}", "workers=1"]
    )


def test_verdicts_are_those_of_the_responses_that_are_there(tmp_path: Path) -> None:
    source, rollouts, out = tmp_path / "file.jsonl", tmp_path / "rollouts", tmp_path / "verdicts"
    run_stage("generate", generate(rollouts, recorded(source, "\\boxed{1}", "\\boxed{5}")))
    run_stage("verify", verify(out, rollouts))
    assert read_table(out, "verdicts")["verdict"].to_pylist() == ["correct", "wrong"]
    shutil.rmtree(rollouts)
    run_stage("generate", generate(rollouts, recorded(source, "\\boxed{5}", "\\boxed{2}")))
    with pytest.raises(UserError, match="rollouts: content"):
        run_stage("verify", verify(out, rollouts))
    (out / "DONE").unlink()
    run_stage("verify", verify(out, rollouts))
    assert read_table(out, "verdicts")["verdict"].to_pylist() == ["wrong", "correct"]


def test_rows_are_those_of_the_tokenizer_that_the_manifest_names(tmp_path: Path) -> None:
    from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus

    texts = list(synthetic_corpus())
    for name, size in (("small", 280), ("large", 500)):
        build_tokenizer(texts, vocab_size=size).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "small", tmp_path / "tokenizer")
    records(tmp_path / "conversations", "conversations", 1, 2)

    def pack(out: Path, *overrides: str) -> list[Any]:
        given = [f"run.output={out}", f"conversations={tmp_path / 'conversations'}", "sequence_length=256"]
        given += [f"tokenizer={tmp_path / 'tokenizer'}", "workers=1", *overrides]
        run_stage("pack", load_config(STAGES["pack"], Path("conf/pack/tiny.yaml"), given))
        return read_table(out, "rows")["input_ids"].to_pylist() if RunDirectory(out).is_done else []

    pack(tmp_path / "rows", "shard.count=2", "shard.index=0")
    shutil.rmtree(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "large", tmp_path / "tokenizer")
    mixed = pack(tmp_path / "rows", "shard.count=2", "shard.index=1")
    mixed = mixed or pack(tmp_path / "rows")
    assert mixed == pack(tmp_path / "fresh")
    manifests = [read_manifest(tmp_path / name, "rows") for name in ("rows", "fresh")]
    assert manifests[0].made_from == manifests[1].made_from


def test_candidates_are_those_of_the_source_that_is_there(tmp_path: Path) -> None:
    source = tmp_path / "problems.jsonl"

    def write(*numbers: int) -> None:
        rows = [{"question": f"How much is {n} plus {n}?", "answer": f"{2 * n}"} for n in numbers]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prepare(out: Path) -> list[str]:
        given = [f"run.output={out}", f"sources=[{{name: own, path: {source}}}]", "decontamination=null"]
        run_stage("prepare", load_config(STAGES["prepare"], Path("conf/prepare/paper.yaml"), given))
        return sorted(read_table(out / "problems", "problems")["question"].to_pylist())

    write(3, 5)
    prepare(tmp_path / "out")
    # Killed after its first pass over the sources.
    (tmp_path / "out" / "DONE").unlink()
    (tmp_path / "out" / "problems" / "manifest.json").unlink()
    write(7, 5, 9)
    assert prepare(tmp_path / "out") == prepare(tmp_path / "fresh")
    write(7)
    with pytest.raises(UserError, match=r"sources\.0\.path: content"):
        prepare(tmp_path / "out")


def test_a_source_that_is_replaced_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows would be those of the second content, the manifest would name the first."""
    source, collect = tmp_path / "problems.jsonl", prepare_stage.collect

    def write(number: int) -> None:
        source.write_text(json.dumps({"question": f"How much is {number} plus 1?", "answer": f"{number + 1}"}) + "\n")

    def prepare(out: Path, path: Path = source) -> list[str]:
        given = [f"run.output={out}", f"sources=[{{name: own, path: {path}}}]", "decontamination=null"]
        run_stage("prepare", load_config(STAGES["prepare"], Path("conf/prepare/paper.yaml"), given))
        return list(read_table(out / "problems", "problems")["question"].to_pylist())

    def replaced_before(*given: Any, **named: Any) -> Any:
        write(7)
        return collect(*given, **named)

    write(3)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_stage, "collect", replaced_before)
        with pytest.raises(UserError, match=r"replaced while it was read \(sources\.0\.path"):
            prepare(tmp_path / "out")
    assert not RunDirectory(tmp_path / "out").is_done
    assert prepare(tmp_path / "out") == prepare(tmp_path / "fresh") == ["How much is 7 plus 1?"]
    # An output inside the directory that is read is no other source.
    (tmp_path / "rows").mkdir()
    source.rename(tmp_path / "rows" / source.name)
    assert prepare(tmp_path / "rows" / "out", tmp_path / "rows") == ["How much is 7 plus 1?"]


def test_a_finished_evaluation_does_not_answer_for_other_weights(tmp_path: Path, stopped: list[str]) -> None:
    given = [f"run.output={tmp_path / 'run'}", f"model={model(tmp_path / 'hf')}"]
    config = load_config(STAGES["evaluate"], Path("conf/evaluate/tiny.yaml"), given)
    for _ in range(3):
        run_stage("evaluate", config)
    assert len(stopped) == 2
    weights = tmp_path / "hf" / "model.safetensors"
    then = weights.stat()
    weights.write_bytes(b"Weights")
    os.utime(weights, ns=(then.st_atime_ns, then.st_mtime_ns))
    with pytest.raises(UserError, match=r"has finished \(20.*model: content"):
        run_stage("evaluate", config)


# Quickstart and pipeline -------------------------------------------------------------------------------------


def steps(root: Path, *overrides: str) -> list[Step]:
    config = load_config(QuickstartConfig, Path("conf/quickstart/tiny.yaml"), overrides)
    return quickstart.seed_steps(config, 0, root)[:3]


class Ended:
    """A process that has done its work."""

    def poll(self) -> int:
        return 0


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The quickstart's first three steps, here; the names of those that ran."""
    ran: list[str] = []
    small = {"base": [*SHAPE], "verdicts": ["workers=1"]}

    def plan(path: Path, seeds: Any, out: Path, overrides: Any) -> list[Step]:
        planned = steps(out / "seed-0", "train_problems=6", *overrides)
        return [Step(step.name, (*step.arguments, *small.get(step.name, ())), step.output) for step in planned]

    def start(starter: Starter, step: Step, output: object = None) -> Ended:
        ran.append(step.name)
        stage, _, preset, *overrides = step.arguments
        run_stage(stage, load_config(STAGES[stage], Path(preset), overrides))
        return Ended()

    monkeypatch.setattr(quickstart, "plan_quickstart", plan)
    monkeypatch.setattr(Starter, "start", start)
    monkeypatch.setattr(quickstart, "write_report", lambda *_: None)
    monkeypatch.setattr(quickstart, "answers", lambda _: iter(()))
    return ran


def test_a_quickstart_names_finished_steps_that_changed_and_makes_them_again_when_asked(
    tmp_path: Path, in_this_process: list[str]
) -> None:
    def run(*overrides: str, redo: bool = False, out: Path = tmp_path / "out") -> None:
        quickstart.run_quickstart(Path("conf/quickstart/tiny.yaml"), [0], out, overrides, redo=redo)

    run()
    assert sorted(in_this_process) == ["base", "rollouts", "verdicts"]
    run()
    (tmp_path / "out").rename(tmp_path / "moved")
    run(out=tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "out")
    assert sorted(in_this_process) == ["base", "rollouts", "verdicts"]
    before = read_table(tmp_path / "out/seed-0/verdicts", "verdicts")
    with pytest.raises(UserError) as caught:
        run("train_problems=7")
    assert f"{tmp_path}/out/seed-0/rollouts: problems.count: 6 there, 7 now" in caught.value.problem
    assert "--redo" in caught.value.remedy
    assert "--out" in caught.value.remedy
    run("train_problems=7", redo=True)
    assert in_this_process[3:] == ["rollouts", "verdicts"]
    after = read_table(tmp_path / "out/seed-0/verdicts", "verdicts")
    assert after.num_rows > before.num_rows
    assert after["id"].to_pylist() == read_table(tmp_path / "out/seed-0/rollouts", "rollouts")["id"].to_pylist()


def test_a_quickstart_of_an_earlier_version_is_named_once_and_made_again_when_asked(
    tmp_path: Path, in_this_process: list[str]
) -> None:
    arguments = (Path("conf/quickstart/tiny.yaml"), [0], tmp_path / "out", ())
    quickstart.run_quickstart(*arguments, redo=False)
    directories = [tmp_path / "out" / "seed-0" / name for name in sorted(in_this_process)]
    for directory in directories:
        described = json.loads((directory / RUN_FILE).read_text("utf-8"))
        del described["made_from"]
        (directory / RUN_FILE).write_text(json.dumps(described))
    with pytest.raises(UserError) as caught:
        quickstart.run_quickstart(*arguments, redo=False)
    assert caught.value.problem.count("an earlier version did not record") == 1
    assert ", ".join(map(str, directories)) in caught.value.problem
    quickstart.run_quickstart(*arguments, redo=True)
    quickstart.run_quickstart(*arguments, redo=False)
    assert sorted(in_this_process) == sorted(["base", "rollouts", "verdicts"] * 2)


def test_a_step_whose_input_was_replaced_is_named(tmp_path: Path, in_this_process: list[str]) -> None:
    arguments = (Path("conf/quickstart/tiny.yaml"), [0], tmp_path, ())
    quickstart.run_quickstart(*arguments, redo=False)
    rollouts = tmp_path / "seed-0" / "rollouts"
    for index, part in enumerate(read_table(rollouts, "rollouts").to_batches()):
        changed = [{**row, "response": "\\boxed{0}"} for row in part.to_pylist()]
        write_shard(rollouts, index, rows_to_table(changed, "rollouts"), kind="rollouts")
    finish(rollouts, kind="rollouts", **read_manifest(rollouts, "rollouts").made_from.to_json())
    with pytest.raises(UserError, match=r"seed-0/verdicts: rollouts: content"):
        quickstart.run_quickstart(*arguments, redo=False)
    assert sorted(in_this_process) == ["base", "rollouts", "verdicts"]
    quickstart.run_quickstart(*arguments, redo=True)
    assert in_this_process[3:] == ["verdicts"]


def test_the_pipeline_is_told_of_a_finished_stage_that_changed(tmp_path: Path) -> None:
    source, out = recorded(tmp_path / "file.jsonl", "a"), tmp_path / "out"
    run_stage("generate", generate(out, source))
    words = ["generate", "--config", "conf/generate/tiny.yaml", f"run.output={out}", "problems=null", "shard_size=1"]
    words += ["teacher.kind=recorded", f"teacher.path={source}"]
    chain.nodes_of(words)
    with pytest.raises(UserError, match=r"generate: .*shard_size: 1 there, 2 now"):
        chain.nodes_of([*words, "shard_size=2"])
    recorded(source, "b")
    with pytest.raises(UserError, match=r"generate: .*teacher\.path: content"):
        chain.nodes_of(words)


# What decides ------------------------------------------------------------------------------------------------


def test_every_path_of_a_configuration_is_an_input_and_no_setting(tmp_path: Path) -> None:
    config = load_config(
        STAGES["export"],
        Path("conf/export/tiny.yaml"),
        [f"run.output={tmp_path}", "model=m", "stages.sft=a", "evaluations.SFT=b"],
    )
    decides = made_from(config)
    assert decides.inputs.keys() == {"model", "stages.sft", "evaluations.SFT"}
    assert not {key for key in decides.config if key.startswith(("model", "stages", "evaluations", "run.output"))}


def test_an_edited_grader_is_another_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_grading.py").write_text("def grade(response, answer):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config(
        STAGES["verify"],
        Path("conf/verify/tiny.yaml"),
        [f"run.output={tmp_path / 'run'}", f"rollouts={tmp_path}", "grader=my_grading:grade"],
    )
    before = made_from(config)
    (tmp_path / "my_grading.py").write_text("def grade(response, answer):\n    return False\n")
    assert [change.partition(":")[0] for change in before.changes(made_from(config))] == ["grader", "rollouts"]


@pytest.mark.parametrize("text", ["", "{", "[]", "\\xff", "7"])
def test_a_damaged_description_of_a_run_with_results_is_one_error(text: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / RUN_FILE).write_text(text)
    config = training("sft", tmp_path, "data")
    assert changes(run, config) == []
    (run.path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        changes(run, config)


def test_checkpoints_without_a_description_are_not_continued(tmp_path: Path, stopped: list[str]) -> None:
    records(tmp_path / "data", "conversations", 1)
    model(tmp_path / "base")
    config = training("sft", tmp_path, "data")
    run_stage("sft", config)
    (config.run.output / "checkpoints" / "step=3").mkdir(parents=True)
    (config.run.output / RUN_FILE).unlink()
    with pytest.raises(UserError, match=r"has checkpoints and no run\.json"):
        run_stage("sft", config)
    assert stopped == ["sft"]


def test_a_step_whose_input_is_made_again_alike_stays(tmp_path: Path, in_this_process: list[str]) -> None:
    """As after `phimr data check --redo`: until then the input is not finished, and nothing is said of it."""
    arguments = (Path("conf/quickstart/tiny.yaml"), [0], tmp_path, ())
    quickstart.run_quickstart(*arguments, redo=False)
    rollouts = tmp_path / "seed-0" / "rollouts"
    for name in ("DONE", "manifest.json", "part-00000.json"):
        (rollouts / name).unlink()
    quickstart.run_quickstart(*arguments, redo=False)
    assert in_this_process[3:] == ["rollouts"]


def test_a_step_that_another_process_is_at_work_on_is_not_made_again(
    tmp_path: Path, in_this_process: list[str]
) -> None:
    arguments = (Path("conf/quickstart/tiny.yaml"), [0], tmp_path)
    quickstart.run_quickstart(*arguments, (), redo=False)
    rollouts = tmp_path / "seed-0" / "rollouts"
    before = sorted(path.name for path in rollouts.iterdir())
    with claimed(rollouts), pytest.raises(UserError, match="rollouts"):
        quickstart.run_quickstart(*arguments, ("train_problems=7",), redo=True)
    assert sorted(path.name for path in rollouts.iterdir()) == before
    quickstart.run_quickstart(*arguments, ("train_problems=7",), redo=True)
    assert in_this_process[3:] == ["rollouts", "verdicts"]


def test_a_step_that_is_made_again_otherwise_leaves_no_later_one(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (Path("conf/quickstart/tiny.yaml"), [0], tmp_path, ())
    quickstart.run_quickstart(*arguments, redo=False)
    shutil.rmtree(tmp_path / "seed-0" / "rollouts")
    start = Starter.start

    def other(starter: Starter, step: Step, output: Any = None) -> Child:
        return start(starter, replace(step, arguments=(*step.arguments, "teacher.mistake_rate=0.9")), output)

    monkeypatch.setattr(Starter, "start", other)
    with pytest.raises(UserError, match="verdicts: rollouts: content"):
        quickstart.run_quickstart(*arguments, redo=False)
