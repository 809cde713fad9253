"""`phimr data check`: names what is damaged, and a finished run makes that, and only that, again."""

from __future__ import annotations

from pathlib import Path

import pytest
from warm_phimr import phimr

from phimr_nemo.config import GenerateConfig, PackConfig, VerifyConfig, load_config
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.store.check import check_directory, forget_damaged
from phimr_nemo.store.shards import finish, iter_shards, rows_to_table, write_shard


def conversations(directory: Path) -> Path:
    for index in range(3):
        rows = [
            {"id": f"{index}-{n}", "problem_id": "p", "question": f"{n}+{index}?", "response": f"It is {n + index}."}
            for n in range(5)
        ]
        write_shard(directory, index, rows_to_table(rows, "conversations"), kind="conversations")
    finish(directory, kind="conversations", config={})
    return directory


@pytest.fixture
def stages(repository: Path, tmp_path: Path) -> dict[str, tuple[str, object]]:
    """A stage of each kind with several shards: its directory's kind and its configuration."""
    tokenizer = tmp_path / "tokenizer"
    build_tokenizer(synthetic_corpus()).save_pretrained(tokenizer)
    conf, rollouts = repository / "conf", tmp_path / "generate"
    source = conversations(tmp_path / "conversations")
    return {
        "generate": (
            "rollouts",
            load_config(
                GenerateConfig,
                conf / "generate" / "tiny.yaml",
                [f"run.output={rollouts}", "problems.count=30", "shard_size=10"],
            ),
        ),
        "verify": (
            "verdicts",
            load_config(
                VerifyConfig,
                conf / "verify" / "tiny.yaml",
                [f"run.output={tmp_path / 'verify'}", f"rollouts={rollouts}"],
            ),
        ),
        "pack": (
            "rows",
            load_config(
                PackConfig,
                conf / "pack" / "tiny.yaml",
                [f"run.output={tmp_path / 'pack'}", f"conversations={source}", f"tokenizer={tokenizer}"],
            ),
        ),
    }


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_every_stage_makes_only_the_damaged_shard_again(
    damage: str, stages: dict[str, tuple[str, object]], tmp_path: Path
) -> None:
    for stage, (kind, config) in stages.items():
        directory = tmp_path / stage
        run_stage(stage, config)
        before = {path: path.read_bytes() for path in directory.glob("part-*.parquet")}
        assert len(before) == 3
        victim = directory / "part-00001.parquet"
        data = before[victim]
        if damage == "missing":
            victim.unlink()
        else:
            victim.write_bytes(data[:-9] if damage == "truncated" else data[:60] + bytes([data[60] ^ 4]) + data[61:])
        times = {path: path.stat().st_mtime_ns for path in before if path != victim}
        with pytest.raises(UserError, match=r"part-00001\.parquet is"):
            list(iter_shards(directory, kind))  # type: ignore[arg-type]
        done = phimr("data", "check", str(directory), variables={"COLUMNS": "200"})
        assert done.returncode == 2
        assert "part-00001.parquet" in done.stdout
        assert "part-00000.parquet" not in done.stdout
        # A finished run is a no-op: nothing is repaired behind the user's back.
        run_stage(stage, config)
        assert phimr("data", "check", str(directory), "--redo", variables={"COLUMNS": "200"}).returncode == 0
        run_stage(stage, config)
        assert {path: path.read_bytes() for path in directory.glob("part-*.parquet")} == before
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert phimr("data", "check", str(directory), variables={"COLUMNS": "200"}).returncode == 0


def test_what_is_sound_and_what_is_no_record_directory(tmp_path: Path) -> None:
    directory = conversations(tmp_path / "a" / "b")
    (found,) = check_directory(tmp_path)
    assert (found.directory, found.count, found.shards, found.run) == (directory, 3, [], None)
    (directory / "part-00002.json").write_text("{", "utf-8")
    assert check_directory(tmp_path)[0].shards == ["part-00002.parquet"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"kind": "something else"}', "utf-8")
    assert len(check_directory(tmp_path)) == 1
    with pytest.raises(UserError, match="no finished record directory"):
        check_directory(tmp_path / "other")
    (directory / "manifest.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="is damaged"):
        check_directory(tmp_path)


def test_a_set_belongs_to_the_run_above_it(tmp_path: Path) -> None:
    """Curated sets lie below their run, whose mark must go too, or the stage would take itself for done."""
    directory = conversations(tmp_path / "curated" / "sft")
    other = conversations(tmp_path / "curated" / "midtrain")
    done = tmp_path / "curated" / "DONE"
    done.write_text("{}", "utf-8")
    (directory / "part-00001.parquet").write_bytes(b"PAR1")
    for damage in check_directory(tmp_path):
        assert damage.run == tmp_path / "curated"
        forget_damaged(damage)
    assert not done.exists()
    assert sorted(path.name for path in directory.iterdir()) == [
        *("part-00000.json", "part-00000.parquet", "part-00002.json", "part-00002.parquet"),
    ]
    assert (other / "manifest.json").is_file()
