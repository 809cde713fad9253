"""The data engine at growing sizes: CPU seconds a row and peak memory of verify, curate and pack, and of the reduce.

    python bench/data_scale.py [--quick] [--rows 10000,100000] [--characters 10000] [--workers 2]
                               [--narrow 1000000,10000000,100000000] [--tokenizer DIR] [--work DIR] [--tasks 64]

Each step is the command a user would type, in a process of its own; its memory is the largest resident set of any of
its processes, read every 50 ms. Rollouts are eight a problem, 10,000 a shard, as long as real chains of thought, with
integer answers (cheap to verify: what is measured is the engine, not sympy), a quarter of them wrong. CPU seconds are
those of all processes of a step; on a machine that other work shares they say more than the wall clock.

The second block is the reduce of curate alone, over narrow columns that were made up (bench/narrow_columns.py): the
part that one process does for all. `--narrow ""` leaves it out, `--rows ""` the first.

With `--work` a run that was stopped continues: sizes that are measured are not run again. The tokenizer is the tiny
model's unless `--tokenizer` names the directory of another. There is no peer for the whole chain; the ratio is CPU
seconds a row at the largest over the smallest size, the worst of all steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import psutil
from common import machine, print_result, versions

from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import finish, is_complete, rows_to_table, shard_is_complete, write_shard

REPOSITORY = Path(__file__).resolve().parents[1]
SEED = 0
SHARD_ROWS = 10_000
ROLLOUTS_PER_PROBLEM = 8
WRONG_SHARE = 0.25
POOL_LINES = 20_000
CHARACTERS_PER_TOKEN = 3.3
SEQUENCE_LENGTH = 16_384
POLL_SECONDS = 0.05
TEN_MILLION = 10_000_000
MEBIBYTE = 2**20
SECONDS_AN_HOUR = 3600
MICROSECONDS = 1_000_000
DIFFICULTIES = ("elementary", "middle", "high_school", "college", "graduate", None)
STEPS = ("verify", "curate", "pack")
HEADER = "|        rows | step   |  seconds | CPU secs | CPU us/row | peak MiB |\n" + 6 * "|---" + "|"
QUICK = {"rows": "500,1000", "narrow": "50000,200000"}
TEMPLATES = (
    "Let the value be {a}; then {a} + {b} = {c}.",
    "Subtracting {b} from {c} leaves {a}, as it should.",
    "Wait, check this again: {a} times {b} is {d}.",
    "So the next term is {c}, and {c} - {a} = {b}.",
    "Since {b} divides {d}, the quotient is {a}.",
)


@dataclass(frozen=True)
class Measured:
    """One step at one size."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def write_rollouts(directory: Path, rows: int, characters: int) -> None:
    """A finished directory of rollouts; shards that are there already are kept."""
    for index, start in enumerate(range(0, rows, SHARD_ROWS)):
        if not shard_is_complete(directory, index):
            table = [rollout(number, characters) for number in range(start, min(start + SHARD_ROWS, rows))]
            write_shard(directory, index, rows_to_table(table, "rollouts"), kind="rollouts")
    if not is_complete(directory, "rollouts"):
        finish(directory, kind="rollouts", config={"synthetic": rows, "characters": characters})


def rollout(number: int, characters: int) -> dict[str, object]:
    problem, sample = divmod(number, ROLLOUTS_PER_PROBLEM)
    rng = random.Random(number)
    answer = 17 * problem + 3
    given = answer if rng.random() > WRONG_SHARE else answer + rng.randint(1, 9)
    length = int(rng.lognormvariate(0, 0.5) * characters)
    lines, written, pool = [], 0, line_pool()
    while written < length:
        lines.append(rng.choice(pool))
        written += len(lines[-1]) + 1
    response = "\n".join([*lines, f"The answer is \\boxed{{{given}}}."])
    problem_id = content_id("scale", str(problem))
    return {
        "id": content_id("rollout", problem_id, str(sample)),
        "problem_id": problem_id,
        "question": f"What is 17 times {problem}, plus 3?",
        "answer": str(answer),
        "response": response,
        "teacher": "synthetic",
        "sample_index": sample,
        "seed": number,
        "finish_reason": "stop",
        "tokens": int(len(response) / CHARACTERS_PER_TOKEN),
        "domain": None,
        "difficulty": DIFFICULTIES[problem % len(DIFFICULTIES)],
        "metadata": "{}",
    }


@cache
def line_pool() -> list[str]:
    """Lines of which responses are made: drawing one is much cheaper than writing it."""
    rng = random.Random(SEED)
    pairs = [(rng.randrange(10_000), rng.randrange(1, 1000)) for _ in range(POOL_LINES)]
    return [rng.choice(TEMPLATES).format(a=a, b=b, c=a + b, d=a * b) for a, b in pairs]


def command(step: str, root: Path, tokenizer: Path, workers: int, rows: int) -> list[str]:
    settings = {
        "verify": [f"rollouts={root / 'rollouts'}"],
        "curate": [
            f"verdicts={root / 'verify'}",
            f"tokenizer={tokenizer}",
            "sft.difficulties=[elementary,middle,high_school,college,graduate]",
            f"sft.size={max(1, rows // 40)}",
        ],
        "pack": [
            f"conversations={root / 'curate' / 'midtrain'}",
            f"tokenizer={tokenizer}",
            f"sequence_length={SEQUENCE_LENGTH}",
        ],
    }
    config = REPOSITORY / "conf" / step / "paper.yaml"
    own = [f"run.output={root / step}", f"workers={workers}", *settings[step]]
    return [sys.executable, "-m", "phimr_nemo.cli", step, "--config", str(config), *own]


def measure(arguments: list[str]) -> Measured:
    """Run a command; its wall time, CPU time and the highest memory of any of its processes."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log, subprocess.Popen(arguments, stdout=log, stderr=log) as process:
        peak = Peak(process.pid)
        peak.start()
        # The usage of the command and of all the processes that it has waited for.
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        peak.stop()
        if code:
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-2000:])
            raise RuntimeError(f"exit code {code}: {' '.join(arguments)}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(round(seconds, 2), round(cpu, 2), round(peak.highest / MEBIBYTE, 1))


class Peak(threading.Thread):
    """Watches the resident set sizes of a process and its children, and keeps the largest of any of them."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._ended = psutil.Process(pid), threading.Event()
        self.highest = 0

    def run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                for process in (self._root, *self._root.children(recursive=True)):
                    self.highest = max(self.highest, process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> None:
        self._ended.set()
        self.join()


def kept_or(record: Path, name: str, measured: Callable[[], Measured]) -> Measured:
    """What an earlier run measured, else what is measured now and written down."""
    found = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    if name not in found:
        found[name] = vars(measured())
        record.write_text(json.dumps(found), "utf-8")
    return Measured(**found[name])


def show(rows: int, step: str, found: Measured) -> None:
    print(
        f"| {rows:11,} | {step:6} | {found.seconds:8.1f} | {found.cpu_seconds:8.1f} | "
        f"{found.cpu_seconds / rows * MICROSECONDS:10,.1f} | {found.peak_mib:8,.0f} |",
        flush=True,
    )


def run_chain(root: Path, rows: int, options: argparse.Namespace, tokenizer: Path) -> dict[str, Measured]:
    """All steps at one size."""
    root.mkdir(parents=True, exist_ok=True)

    def step_of(step: str) -> Measured:
        write_rollouts(root / "rollouts", rows, options.characters)
        # A step that was stopped half-way would measure only what was left.
        shutil.rmtree(root / step, ignore_errors=True)
        return measure(command(step, root, tokenizer, options.workers, rows))

    found = {}
    for step in STEPS:
        found[step] = kept_or(root / "measured.json", step, partial(step_of, step))
        show(rows, step, found[step])
    return found


def run_reduce(directory: Path, rows: int, workers: int) -> Measured:
    """The reduce of curate alone."""
    program = [sys.executable, str(REPOSITORY / "bench" / "narrow_columns.py")]

    def reduce() -> Measured:
        subprocess.run([*program, "make", str(directory), str(rows)], check=True)
        return measure([*program, "reduce", str(directory), str(rows), str(workers)])

    found = kept_or(directory.with_suffix(".json"), "reduce", reduce)
    show(rows, "reduce", found)
    return found


def per_row(found: Mapping[int, Measured]) -> float:
    """CPU seconds a row at the largest over those at the smallest size."""
    smallest, largest = min(found), max(found)
    return round(found[largest].cpu_seconds / largest / (found[smallest].cpu_seconds / smallest), 3)


def compare(options: argparse.Namespace, work: Path) -> dict[str, object]:
    tokenizer = options.tokenizer
    if tokenizer is None:
        tokenizer = work / "tokenizer"
        build_tokenizer(synthetic_corpus()).save_pretrained(tokenizer)
    sizes, narrow = ([int(rows) for rows in text.split(",") if rows] for text in (options.rows, options.narrow))
    print(f"{options.workers} workers, responses of about {options.characters:,} characters\n{HEADER}")
    chain = {rows: run_chain(work / f"rows-{rows}", rows, options, tokenizer) for rows in sizes}
    print(f"\nthe reduce of curate over narrow columns alone\n{HEADER}")
    reduced = {rows: run_reduce(work / f"narrow-{rows}", rows, options.workers) for rows in narrow}
    growth = {step: per_row({rows: found[step] for rows, found in chain.items()}) for step in STEPS if chain}
    if reduced:
        growth["reduce"] = per_row(reduced)
    peak = max(
        found.peak_mib for found in (*reduced.values(), *(one for steps in chain.values() for one in steps.values()))
    )
    print(f"\nCPU seconds a row, largest over smallest size: {growth}; largest process: {peak:,.0f} MiB")
    hours = {}
    if chain:
        last = max(chain)
        print(
            f"\nEXTRAPOLATED, not measured: {TEN_MILLION:,} rollouts, {options.tasks} tasks x {options.workers} cores"
        )
        for step, found in chain[last].items():
            cpu = TEN_MILLION / last * found.cpu_seconds
            hours[step] = round(cpu / (options.tasks * options.workers) / SECONDS_AN_HOUR, 2)
            print(f"| {step:6} | {hours[step]:7.2f} hours |")
    return {
        "bench": "data_scale",
        "ours": {str(rows): {step: vars(one) for step, one in found.items()} for rows, found in chain.items()},
        "reduce": {str(rows): vars(found) for rows, found in reduced.items()},
        "growth": growth,
        "peak_mib": peak,
        "peer": None,
        "ratio": max(growth.values()),
        "extrapolated_hours_for_10M": {"tasks": options.tasks, **hours},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute instead of hours")
    parser.add_argument("--rows", default="10000,100000", help="sizes of the chain, separated by commas")
    parser.add_argument("--characters", type=int, default=10_000, help="median length of a response")
    parser.add_argument("--narrow", default="1000000,10000000,100000000", help="rows of the reduce alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=64, help="array tasks of the extrapolation")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer")
    parser.add_argument("--work", type=Path, help="keep what is made here, and continue with it")
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        result = compare(options, options.work)
    else:
        with tempfile.TemporaryDirectory() as directory:
            result = compare(options, Path(directory))
    result["versions"] = versions("numpy", "pyarrow", "duckdb", "tokenizers", "math-verify")
    result["machine"] = machine()
    print_result(result)


if __name__ == "__main__":
    main()
