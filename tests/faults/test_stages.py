"""Every data stage under kill -9, a full disk, a read-only output and damaged inputs: nothing lost, nothing wrong.

`make faults` runs the long form. What other tests inject into other stages is counted in docs/faults.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_length import LONG

from phimr_nemo.config import STAGES, load_config, to_yaml
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.launch import run_stage
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import read_manifest, read_table

KILLS = {
    stage: 40 if LONG else kills for stage, kills in (("generate", 8), ("verify", 8), ("curate", 8), ("pack", 4))
}
STAGE_NAMES = ("generate", "verify", "curate", "pack")
OUTPUTS: dict[str, dict[str, Kind]] = {
    "generate": {"": "rollouts"},
    "verify": {"": "verdicts"},
    "curate": {"midtrain": "conversations", "sft": "conversations", "pairs": "pairs", "prompts": "prompts"},
    "pack": {"": "rows"},
}
Injected = Callable[[str, str, int, str], None]


@dataclass(frozen=True)
class Chain:
    """The four stages, run once in order.

    Attributes:
        root: `<stage>.yaml`, and the output `<stage>` of each.
        inputs: the record directory that a stage reads, and its kind.
    """

    root: Path
    inputs: dict[str, tuple[Path, Kind]]

    def config(self, stage: str, output: Path, **changes: object) -> Any:
        overrides = [f"run.output={output}", *(f"{key}={value}" for key, value in changes.items())]
        return load_config(STAGES[stage], self.root / f"{stage}.yaml", overrides)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Chain:
    from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus

    root = tmp_path_factory.mktemp("chain")
    build_tokenizer(synthetic_corpus()).save_pretrained(root / "tokenizer")
    settings = {
        "generate": ["problems.count=80", "rollouts_per_problem=4", "shard_size=40"],
        "verify": [f"rollouts={root / 'generate'}", "workers=1"],
        "curate": [f"verdicts={root / 'verify'}", "workers=1"],
        "pack": [f"conversations={root / 'curate' / 'midtrain'}", f"tokenizer={root / 'tokenizer'}"],
    }
    for stage in STAGE_NAMES:
        overrides = [*settings[stage], f"run.output={root / stage}"]
        # Only the paper's curation makes all four sets.
        preset = repository / "conf" / stage / ("paper.yaml" if stage == "curate" else "tiny.yaml")
        config: Any = load_config(STAGES[stage], preset, overrides)
        (root / f"{stage}.yaml").write_text(to_yaml(config))
        run_stage(stage, config)
    return Chain(
        root,
        {
            "verify": (root / "generate", "rollouts"),
            "curate": (root / "verify", "verdicts"),
            "pack": (root / "curate" / "midtrain", "conversations"),
        },
    )


def contents(stage: str, output: Path) -> dict[str, Any]:
    """The rows of every record directory of a stage's output, and the counts that tell why others are not there."""
    found = {}
    for name, kind in OUTPUTS[stage].items():
        found[name] = (read_table(output / name, kind).to_pylist(), read_manifest(output / name, kind).counts)
    return found


def visible(directory: Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_killed_again_and_again_it_ends_with_the_same_rows(
    stage: str, chain: Chain, tmp_path: Path, injected: Injected
) -> None:
    command = [sys.executable, str(Path(__file__).with_name("killed_stage.py")), stage]
    done = subprocess.run(
        [*command, str(chain.root / f"{stage}.yaml"), str(tmp_path), str(KILLS[stage]), "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["by_call"] + result["by_moment"] == KILLS[stage]
    expected = contents(stage, chain.root / stage)
    assert contents(stage, tmp_path / "clean") == expected
    for number in range(result["directories"]):
        output = tmp_path / f"killed-{number}"
        assert contents(stage, output) == expected
        assert visible(output) == visible(tmp_path / "clean")
    injected(stage, "kill -9 before a call of the system", result["by_call"], "the same rows after a rerun")
    injected(stage, "kill -9 at a random moment", result["by_moment"], "the same rows after a rerun")


def lacks_space(stage: str, config: Any) -> bool:
    """Whether the stage ends with that error; any other passes on."""
    try:
        run_stage(stage, config)
    except UserError as error:
        if "no space left" not in error.problem:
            raise
        return True
    return False


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_disk_that_is_full_and_has_room_again(
    stage: str,
    chain: Chain,
    small_disk: tuple[Path, Callable[[str], None]],
    injected: Injected,
) -> None:
    place, change = small_disk
    sizes = ("16k", "32k", "48k", "64k") if LONG else ("16k", "32k")
    refused = 0
    for size in sizes:
        change(f"size={size}")
        refused += lacks_space(stage, chain.config(stage, place / "out"))
    assert refused
    change("size=64m")
    run_stage(stage, chain.config(stage, place / "out"))
    assert contents(stage, place / "out") == contents(stage, chain.root / stage)
    injected(stage, "disk full", refused, "one clear error; the same command completes when there is room")


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_an_output_that_cannot_be_written(
    stage: str,
    chain: Chain,
    small_disk: tuple[Path, Callable[[str], None]],
    injected: Injected,
) -> None:
    place, change = small_disk
    change("ro")
    with pytest.raises(UserError, match="cannot write"):
        run_stage(stage, chain.config(stage, place / "out"))
    assert list(place.iterdir()) == []
    injected(stage, "read-only output", 1, "one clear error, nothing written")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "bit flipped": flip,
    "emptied": empty,
    "removed": Path.unlink,
}


@pytest.fixture
def damaged(chain: Chain) -> Iterator[Callable[[Path, str], None]]:
    """Damage a file, until it is damaged otherwise or the test ends."""
    saved: dict[Path, bytes] = {}

    def damage(path: Path, kind: str) -> None:
        if path not in saved:
            saved[path] = path.read_bytes()
        path.write_bytes(saved[path])
        if kind in DAMAGE:
            DAMAGE[kind](path)

    yield damage
    for path, data in saved.items():
        path.write_bytes(data)


@pytest.mark.parametrize("stage", ["verify", "curate", "pack"])
def test_damaged_inputs_are_named_and_used_by_nobody(
    stage: str, chain: Chain, damaged: Callable[[Path, str], None], tmp_path: Path, injected: Injected
) -> None:
    source, _ = chain.inputs[stage]
    # A bit of a manifest may be one of a count that this stage does not read: then the shards' checksums still hold.
    harmless = {("manifest.json", "bit flipped")}
    faults = 0
    for file in (*sorted(source.glob("part-*.parquet")), source / "manifest.json"):
        for kind in DAMAGE:
            if (file.name, kind) in harmless:
                continue
            damaged(file, kind)
            output = tmp_path / f"{file.name}-{kind}"
            with pytest.raises(UserError) as caught:
                run_stage(stage, chain.config(stage, output))
            assert str(source) in str(caught.value)
            assert not (output / "DONE").exists()
            assert not (output / "manifest.json").exists()
            faults += 1
        damaged(file, "nothing")
    injected(stage, "input damaged (cut, bit flipped, emptied, removed)", faults, "named, nothing made from it")


def test_a_clock_that_jumps_changes_nothing(
    chain: Chain, tmp_path: Path, injected: Injected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock goes a day back and forth between any two looks at it; deadlines go by the monotonic clock."""
    import itertools
    import time

    real, jumps = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (-86_400 if next(jumps) % 2 else 86_400))
    for stage in STAGE_NAMES:
        run_stage(stage, chain.config(stage, tmp_path / stage))
        assert contents(stage, tmp_path / stage) == contents(stage, chain.root / stage)
        injected(stage, "wall clock jumps by days", 1, "the same rows")
