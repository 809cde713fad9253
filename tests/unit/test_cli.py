"""The console command as a process of its own: exit codes, one clear message, nothing half-written."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from architectures import small
from processes import start

from phimr_nemo.config import STAGES, load_config, parse_config
from phimr_nemo.store.claims import LOCK_FILE
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import finish, read_manifest, read_table, rows_to_table, write_shard

HEAVY = ("torch", "transformers", "nemo", "nemo_run", "megatron", "nemo_aligner", "lightning", "vllm", "datasets")
GOOD_ROW = json.dumps({"question": "What is 2+3?", "answer": "5", "response": "2+3=5. The answer is \\boxed{5}."})
RECORDED = ("--config", "conf/generate/tiny.yaml", "problems=null", "teacher.kind=recorded")


def phimr(
    *arguments: str, cwd: Path, light: bool = False, preexec: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `phimr`; `light` makes every import of a heavy package fail."""
    block = f"sys.modules.update(dict.fromkeys({HEAVY!r}));" if light else ""
    program = f"import sys; {block} sys.argv = ['phimr', *{list(arguments)!r}]; import phimr_nemo.cli.__main__"
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        check=False,
        preexec_fn=preexec,
    )


def assert_refused(done: subprocess.CompletedProcess[str], *named: str) -> None:
    """Exit code 2 and one error that names the value, the rule and the remedy."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in ("error: ", "  rule:   ", "  remedy: "):
        assert done.stderr.count(part) == 1, done.stderr
    for value in named:
        assert value in done.stderr


def remnants(directory: Path) -> list[str]:
    """Temporary files and directories that a crash would leave."""
    files = [path for path in directory.rglob("*") if not path.name.startswith(LOCK_FILE)]
    return [str(path) for path in files if path.suffix == ".tmp" or path.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "does not exist"),
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        (f"{GOOD_ROW}\n{GOOD_ROW}\n{GOOD_ROW[:-1]}\n", "line 3 is not JSON"),
        (f"{GOOD_ROW}\n[1, 2]\n", "line 2 is a JSON list"),
        (GOOD_ROW.replace("response", "reply"), "a response column"),
    ],
    ids=["missing", "empty", "blank", "malformed line", "no object", "no such column"],
)
def test_bad_input_of_a_data_stage(content: str | None, named: str, tmp_path: Path) -> None:
    source = tmp_path / "recorded.jsonl"
    if content is not None:
        source.write_text(content)
    done = phimr("generate", *RECORDED, f"teacher.path={source}", f"run.output={tmp_path / 'out'}", cwd=tmp_path)
    assert_refused(done, str(source), named)
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else [source.name])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "--config", "conf/generate/tiny.yaml", "teacher.mistake_raet=0.5"), "teacher.mistake_rate"),
        (("sft", "--config", "conf/sft/tiny.yaml", "data=none/conversations", "base=none"), "none/conversations"),
        (("grpo", "--config", "conf/grpo/tiny.yaml", "prompts=none/prompts", "base=none"), "none/prompts"),
        (("verify", "none.jsonl", "out.jsonl"), "none.jsonl"),
        (("report", "none"), "none"),
    ],
    ids=["unknown key", "sft before curate", "grpo before curate", "verify nothing", "report nothing"],
)
def test_a_mistake_leaves_nothing_behind(arguments: tuple[str, ...], named: str, tmp_path: Path) -> None:
    assert_refused(phimr(*arguments, cwd=tmp_path), named)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk's: the kernel refuses the write in the same place."""
    limit = 8192

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    output = tmp_path / "out"
    arguments = (
        "generate",
        *("--config", "conf/generate/tiny.yaml", f"run.output={output}"),
        *("problems.count=400", "shard_size=200"),
    )
    assert_refused(phimr(*arguments, cwd=tmp_path, preexec=small_files), "no space left", str(output))
    assert list(tmp_path.iterdir()) == []
    assert phimr(*arguments, cwd=tmp_path).returncode == 0
    # The test means something: a shard is larger than the limit.
    assert (output / "part-00000.parquet").stat().st_size > limit


def test_a_disk_that_fills_up_later_keeps_the_finished_shards(tmp_path: Path) -> None:
    """The second shard is larger than the first, and only it is larger than the limit."""
    limit = 40_000
    source, output = tmp_path / "recorded.jsonl", tmp_path / "out"
    noise = random.Random(0)
    rows = [
        {"question": f"What is {i}+1?", "answer": str(i + 1), "response": noise.randbytes(i * 1000).hex()}
        for i in (1, 2, 30, 40)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("generate", *RECORDED, f"teacher.path={source}", f"run.output={output}", "shard_size=2")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert_refused(phimr(*arguments, cwd=tmp_path, preexec=small_files), "no space left", "part-00001.parquet")
    assert remnants(output) == []
    first = output / "part-00000.parquet"
    written = first.stat().st_mtime_ns
    assert sorted(path.name for path in output.glob("part-*")) == ["part-00000.json", "part-00000.parquet"]
    assert not (output / "manifest.json").exists()
    done = phimr(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == written
    responses = read_table(output, "rollouts").column("response").to_pylist()
    assert responses == [row["response"] for row in rows]


def test_ctrl_c_is_a_stop_that_the_same_command_continues(tmp_path: Path) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    sizes = ("--config", "conf/generate/tiny.yaml", "problems.count=3000", "shard_size=20")
    command = [sys.executable, "-m", "phimr_nemo.cli", "generate", *sizes, f"run.output={output}"]
    process = start(command, ctrl_c=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (output / "part-00001.json").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 3, errors
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors
    assert not RunDirectory(output).is_done
    assert remnants(output) == [], errors
    written = (output / "part-00000.parquet").stat().st_mtime_ns
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (output / "part-00000.parquet").stat().st_mtime_ns == written
    subprocess.run([*command[:-1], f"run.output={whole}"], cwd=tmp_path, check=True, capture_output=True)
    assert read_table(output, "rollouts") == read_table(whole, "rollouts")


def test_a_failure_of_ours_is_told_from_a_mistake_of_the_users(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['phimr', 'report', 'runs']\n"
        "import phimr_nemo.jobs.quickstart as pipeline\n"
        "from phimr_nemo.errors import Preempted, UserError\n"
        "errors = {'1': RuntimeError('ours'), '2': UserError('a', rule='b', remedy='c'), '3': Preempted('later')}\n"
        "def fail(*_):\n    raise errors[sys.stdin.read()]\n"
        "pipeline.write_report = fail\n"
        "from phimr_nemo.cli.main import main; main()\n"
    )
    for code in (1, 2, 3):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=str(code),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert ("Traceback" in done.stderr) == (code == 1)


ARCHITECTURE = small(
    vocab_size=300,
    max_position_embeddings=512,
    original_max_position_embeddings=64,
    short_factor=(1.0, 1.0, 1.0),
    long_factor=(1.0, 2.0, 3.0),
)


def parameters_by_hand() -> int:
    """Tied embeddings, fused projections, two norms a layer and one at the end."""
    a = ARCHITECTURE
    head = a.hidden_size // a.num_attention_heads
    qkv = (a.num_attention_heads + 2 * a.num_key_value_heads) * head * a.hidden_size
    layer = qkv + a.hidden_size**2 + 3 * a.hidden_size * a.intermediate_size + 2 * a.hidden_size
    return a.vocab_size * a.hidden_size + a.num_hidden_layers * layer + a.hidden_size


@pytest.mark.parametrize(
    ("stage", "sequences", "overrides"),
    [
        ("midtrain", 8, ["global_batch=8", "micro_batch=2", "validation_rows=0"]),
        ("sft", 16, ["global_batch=16", "micro_batch=2", "validation_rows=0"]),
        ("dpo", 16, ["global_batch=8", "micro_batch=2"]),
        ("grpo", 12, ["prompts_per_step=4", "group_size=3"]),
    ],
)
def test_dry_run_prints_config_and_numbers_that_follow_from_it(
    stage: str, sequences: int, overrides: list[str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(ARCHITECTURE.to_hf_config()))
    overrides = [
        *overrides,
        *(f"base={base}", f"run.output={tmp_path / 'out'}", "sequence_length=200"),
        *("parallel.tensor=2", "parallel.data=2", "model.dtype=bf16", "optim.distributed=true"),
    ]
    done = phimr(stage, "--config", f"conf/{stage}/tiny.yaml", "--dry-run", *overrides, cwd=tmp_path, light=True)
    assert done.returncode == 0, done.stderr
    resolved = parse_config(STAGES[stage], yaml.safe_load(done.stdout))
    assert resolved == load_config(STAGES[stage], Path(f"conf/{stage}/tiny.yaml"), overrides)
    lines = [line.removeprefix("# ") for line in done.stdout.splitlines() if line.startswith("# ")]
    numbers = dict(line.split(": ", 1) for line in lines)
    assert numbers["processes"] == "4"
    assert numbers["parameters"] == f"{parameters_by_hand():,}"
    # bf16 weights, fp32 gradients, two moments and master weights in fp32 over two data-parallel ranks.
    size = parameters_by_hand() / 2 * (2 + 4 + 12 / 2)
    assert numbers["weights, gradients, optimizer per GPU"] == f"{size / 2**30:.3f} GiB"
    tokens = next(value for name, value in numbers.items() if name.startswith("tokens per step"))
    assert tokens == f"{sequences * 200:,}"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_dry_run_refuses_an_impossible_layout(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE.to_hf_config()))
    arguments = ("--config", "conf/sft/tiny.yaml", f"base={tmp_path}", "parallel.pipeline=3")
    assert_refused(phimr("sft", "--dry-run", *arguments, cwd=tmp_path, light=True), "parallel.pipeline=3", "2 layers")


def test_dry_run_of_the_quickstart_is_every_command_and_writes_nothing(tmp_path: Path) -> None:
    done = phimr(
        "quickstart", "--dry-run", "--seeds", "0,4", "--out", str(tmp_path / "out"), cwd=tmp_path, light=True
    )
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert all(line.startswith("phimr ") for line in commands)
    # The quickstart generates its problems; nothing of it is prepared, and there is no larger teacher to learn from.
    assert {line.split()[1] for line in commands} == set(STAGES) - {"prepare", "distill"}
    for seed in (0, 4):
        assert sum(f"{tmp_path}/out/seed-{seed}/" in line for line in commands) == len(commands) // 2
    assert list(tmp_path.iterdir()) == []


ANSWERS = [
    ("It is \\boxed{42}.", "42", "correct"),
    ("It is \\boxed{41}.", "42", "wrong"),
    ("I do not know.", "42", "unparsable"),
    ("So x = \\boxed{\\frac{1}{2}}.", "0.5", "correct"),
    ("\\boxed{7}", "7", "correct"),
    ("\\boxed{-7}", "7", "wrong"),
    ("", "7", "unparsable"),
]


def answer_rows() -> list[dict[str, object]]:
    rows = [
        {"n": i, "model_says": response, "gold": gold, "expected": expected, "note": "é\n"}
        for i, (response, gold, expected) in enumerate(ANSWERS * 3)
    ]
    random.Random(1).shuffle(rows)
    return rows


def test_verify_a_jsonl_file_keeps_rows_and_order(tmp_path: Path) -> None:
    rows = answer_rows()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = ("--response", "model_says", "--answer", "gold")
    done = phimr("verify", str(source), str(target), *columns, cwd=tmp_path, light=True)
    assert done.returncode == 0, done.stderr
    graded = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in graded] == rows
    assert [row["verdict"] for row in graded] == [row["expected"] for row in rows]
    assert all(row["extracted"] for row in graded if row["verdict"] != "unparsable")
    for verdict in ("correct", "wrong", "unparsable"):
        assert f"{verdict}: {sum(row['expected'] == verdict for row in rows)}" in done.stdout


def test_verify_a_parquet_file_keeps_rows_and_order(tmp_path: Path) -> None:
    rows = answer_rows()
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source)
    columns = ("--response", "model_says", "--answer", "gold")
    done = phimr("verify", str(source), str(target), *columns, cwd=tmp_path, light=True)
    assert done.returncode == 0, done.stderr
    graded = pq.read_table(target)
    assert graded.select(list(rows[0])).to_pylist() == rows
    assert graded.column("verdict").to_pylist() == [row["expected"] for row in rows]


@pytest.mark.parametrize(
    ("content", "columns", "named"),
    [
        (f"{GOOD_ROW}\n{{\n", (), "line 2"),
        (f"{GOOD_ROW}\n", ("--response", "reply"), "reply"),
        ("", (), "in.jsonl"),
    ],
    ids=["malformed line", "no such column", "empty"],
)
def test_verify_a_bad_file(content: str, columns: tuple[str, ...], named: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    assert_refused(phimr("verify", str(source), str(tmp_path / "out.jsonl"), *columns, cwd=tmp_path), named)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_verify_as_a_stage_starts_with_finished_rollouts(tmp_path: Path) -> None:
    row = {
        "id": "r",
        "problem_id": "p",
        "question": "2+3?",
        "answer": "5",
        "response": "\\boxed{5}",
        "teacher": "t",
        "sample_index": 0,
        "seed": 0,
        "finish_reason": "stop",
        "tokens": 1,
        "metadata": "{}",
    }
    rollouts, output = tmp_path / "rollouts", tmp_path / "verdicts"
    arguments = ("verify", "--config", "conf/verify/tiny.yaml", f"rollouts={rollouts}", f"run.output={output}")
    write_shard(rollouts, 0, rows_to_table([row], "rollouts"), kind="rollouts")
    assert_refused(phimr(*arguments, cwd=tmp_path), f"{rollouts} is not finished")
    assert not output.exists()
    finish(rollouts, kind="rollouts", config={})
    done = phimr(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_manifest(output, "verdicts").counts == {"correct": 1}


LONG_PATHS = ["/".join(["d" * 100] * 44), "d" * 300]


@pytest.mark.parametrize("path", LONG_PATHS, ids=["4,400 characters", "a name of 300"])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--config", "conf/generate/tiny.yaml", "run.output={}"],
        ["verify", "--config", "conf/verify/tiny.yaml", "rollouts={}", "run.output=out"],
        ["sft", "--config", "conf/sft/tiny.yaml", "base={}", "run.output=out"],
        ["generate", "--config", "{}"],
        ["status", "{}"],
        ["report", "{}"],
        ["convert", "{}", "out"],
        ["quickstart", "--out", "{}"],
        ["verify", "{}", "out.jsonl"],
        ["data", "check", "{}"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_path_that_no_file_system_takes_is_one_error(
    words: list[str], path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from phimr_nemo.cli import main as cli

    monkeypatch.setattr("sys.argv", ["phimr", *(word.format(path) for word in words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2, told
    assert [told.count(part) for part in ("error: ", "  rule:   ", "  remedy: ")] == [1, 1, 1]


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_the_letters_gets_escapes(encoding: str, tmp_path: Path) -> None:
    name = tmp_path / "Wurzel-√-日本"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "phimr_nemo.cli", "base", "--config", "conf/base/tiny.yaml", "--dry-run"]
    done = subprocess.run([*command, f"run.output={name}"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"output: " in done.stdout
    assert b"\\u221a" in done.stdout
