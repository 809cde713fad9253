"""Narrow columns as `phimr curate` takes them, made up, and the reduce over them: for bench/data_scale.py.

    python bench/narrow_columns.py make DIR ROWS
    python bench/narrow_columns.py reduce DIR ROWS THREADS

Eight rollouts a problem, a quarter of them wrong, four sources, every difficulty; problems of one file follow each
other, and a tenth of them have a second round of eight in the second half of the files, as after another sampling.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from common import status_bytes

from phimr_nemo.config import CurateConfig, load_config
from phimr_nemo.data.curate.decide import decide
from phimr_nemo.data.curate.narrow import CORRECT, NARROW
from phimr_nemo.data.curate.survey import Shard, Survey
from phimr_nemo.data.fate import Fate

REPOSITORY = Path(__file__).resolve().parents[1]
FILE_ROWS = 100_000
ROLLOUTS_PER_PROBLEM = 8
WRONG_SHARE = 0.25
SECOND_ROUND_SHARE = 0.1
SOURCES, DOMAINS, DIFFICULTIES = 4, 8, 6
CHARACTERS_PER_TOKEN = 3.3
MEDIAN_CHARACTERS = 10_000
MIX = np.uint64(0x9E3779B97F4A7C15)


def mixed(numbers: npt.NDArray[np.integer], salt: int) -> npt.NDArray[np.uint64]:
    """A hash of each number (splitmix64's finaliser)."""
    value = (numbers.astype(np.uint64) + np.uint64(salt)) * MIX
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def made(start: int, count: int, rows: int) -> npt.NDArray[np.void]:
    """The rows `start` to `start + count` of `rows`."""
    row = np.arange(start, start + count)
    rng = np.random.default_rng(start)
    problem = row // ROLLOUTS_PER_PROBLEM
    # A second round asks problems of the first half again.
    half = rows // 2
    again = (row >= half) & (mixed(problem, 5) % np.uint64(100) < np.uint64(100 * SECOND_ROUND_SHARE))
    problem = np.where(again, problem - half // ROLLOUTS_PER_PROBLEM, problem)
    narrow = np.zeros(count, NARROW)
    narrow["row"], narrow["sample"] = row, row % ROLLOUTS_PER_PROBLEM
    narrow["problem"], narrow["rollout"], narrow["response"] = mixed(problem, 1), mixed(row, 2), mixed(row, 3)
    narrow["source"], narrow["domain"] = mixed(problem % SOURCES, 6), mixed(problem % DOMAINS, 7)
    narrow["difficulty"] = mixed(problem, 8) % np.uint64(DIFFICULTIES)
    narrow["characters"] = rng.lognormal(np.log(MEDIAN_CHARACTERS), 0.8, count)
    narrow["bytes"] = narrow["characters"] + 200
    narrow["tokens"] = narrow["characters"] / CHARACTERS_PER_TOKEN
    narrow["prompt"], narrow["length"] = 60, narrow["tokens"] + 60
    narrow["repetition"] = rng.beta(1, 12, count)
    narrow["verdict"] = np.where(rng.random(count) < WRONG_SHARE, 1, CORRECT)
    narrow["boxes"], narrow["stopped"] = 1, rng.random(count) > 0.03
    return narrow


def paths(directory: Path, rows: int) -> list[Path]:
    """The files of so many rows."""
    return [directory / f"narrow-{number:05d}.parquet" for number in range(-(-rows // FILE_ROWS))]


def make(directory: Path, rows: int) -> None:
    """Write the files that are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths(directory, rows)):
        if path.is_file():
            continue
        start = number * FILE_ROWS
        narrow = made(start, min(FILE_ROWS, rows - start), rows)
        temporary = path.with_suffix(".temporary")
        pq.write_table(pa.table({name: narrow[name].copy() for name in NARROW.names or ()}), temporary)
        os.replace(temporary, path)


def reduce(directory: Path, rows: int, threads: int) -> dict[str, object]:
    """All decisions of the paper's preset; sizes are scaled with the rows, so that balance has its work."""
    sizes = [f"sft.size={max(1, rows // 50)}", "run.output=unused", "verdicts=unused"]
    config = load_config(CurateConfig, REPOSITORY / "conf" / "curate" / "paper.yaml", sizes)
    files = paths(directory, rows)
    shards = [
        Shard(path, "", number * FILE_ROWS, min(FILE_ROWS, rows - number * FILE_ROWS))
        for number, path in enumerate(files)
    ]
    decisions = decide(config, Survey(shards, files, threads))
    kept = {name: int((fates == Fate.KEPT).sum()) for name, fates in decisions.fates.items()}
    prompts = decisions.prompts
    assert prompts is not None
    kept["prompts"] = len(prompts.rows)
    return {"kept": kept, "peak_bytes": status_bytes("VmHWM")}


def main() -> None:
    what, directory, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if what == "make":
        make(directory, rows)
    else:
        print(json.dumps(reduce(directory, rows, int(sys.argv[4]))))


if __name__ == "__main__":
    main()
