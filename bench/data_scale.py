"""Synthetic rollouts through verify -> curate -> pack: rows a second and peak memory at growing sizes.

    python bench/data_scale.py [--quick] [--rows 100000,300000,1000000] [--characters 200] [--workers 2]
                               [--tokenizer DIR] [--work DIR] [--long-rows 20000] [--tasks 64]

Each step is the command a user would type, in a process of its own; its memory is the sum of the resident set sizes
of that process and its children, read every 50 ms. Rollouts are eight a problem, 10,000 a shard, with integer answers
(cheap to verify: what is measured is the engine, not sympy), a quarter of them wrong. A second block runs fewer
rollouts of the length of real chains of thought (`--long-rows`, 12,000 characters), from which 10 million are
extrapolated: work per row is constant, so hours = rows x CPU seconds a row / (tasks x cores). CPU seconds are those
of all processes of a step; on a machine that other work shares they say more than the wall clock.

With `--work` a run that was stopped continues: sizes that are measured are not run again. The tokenizer is the tiny
model's unless `--tokenizer` names the directory of another. There is no peer for the whole chain; the ratio is peak
memory at the largest over the smallest size.
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
from dataclasses import dataclass
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
LONG_CHARACTERS = 12_000
CHARACTERS_PER_TOKEN = 3.3
SEQUENCE_LENGTH = 16_384
POLL_SECONDS = 0.05
TEN_MILLION = 10_000_000
MEBIBYTE = 2**20
SECONDS_AN_HOUR = 3600
DIFFICULTIES = ("elementary", "middle", "high_school", "college", "graduate", None)
STEPS = ("verify", "curate", "pack")
HEADER = "|      rows | step   |  seconds |    rows/s | CPU secs | rows/CPU s | peak MiB |\n" + 7 * "|---" + "|"
QUICK = {"rows": "2000,6000", "long_rows": 200}
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
    lines, written = [], 0
    while written < length:
        a, b = rng.randrange(10_000), rng.randrange(1, 1000)
        lines.append(rng.choice(TEMPLATES).format(a=a, b=b, c=a + b, d=a * b))
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


def command(step: str, root: Path, tokenizer: Path, workers: int, rows: int) -> list[str]:
    settings = {
        "verify": [f"rollouts={root / 'rollouts'}"],
        "curate": [
            f"verdicts={root / 'verify'}",
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
    """Run a command; its wall time and the highest memory of its processes together."""
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
    """Watches the resident set sizes of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._ended = psutil.Process(pid), threading.Event()
        self.highest = 0

    def run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            total = 0
            try:
                for process in (self._root, *self._root.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.highest = max(self.highest, total)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def run_size(root: Path, rows: int, characters: int, tokenizer: Path, workers: int) -> dict[str, Measured]:
    """All steps at one size; what an earlier run measured is taken from its file."""
    record = root / "measured.json"
    found: dict[str, Measured] = {}
    if record.is_file():
        found = {name: Measured(**values) for name, values in json.loads(record.read_text("utf-8")).items()}
    if set(found) != set(STEPS):
        write_rollouts(root / "rollouts", rows, characters)
    for step in STEPS:
        if step not in found:
            # A step that was stopped half-way would measure only what was left.
            shutil.rmtree(root / step, ignore_errors=True)
            found[step] = measure(command(step, root, tokenizer, workers, rows))
            record.write_text(json.dumps({name: vars(value) for name, value in found.items()}), "utf-8")
        seconds, cpu, peak = found[step].seconds, found[step].cpu_seconds, found[step].peak_mib
        print(
            f"| {rows:9,} | {step:6} | {seconds:8.1f} | {rows / seconds:9,.0f} | {cpu:8.1f} | {rows / cpu:10,.0f} "
            f"| {peak:8,.0f} |",
            flush=True,
        )
    return found


def compare(options: argparse.Namespace, work: Path) -> dict[str, object]:
    tokenizer = options.tokenizer
    if tokenizer is None:
        tokenizer = work / "tokenizer"
        build_tokenizer(synthetic_corpus()).save_pretrained(tokenizer)
    sizes = [int(rows) for rows in options.rows.split(",")]
    print(f"{options.workers} workers, responses of about {options.characters} characters\n{HEADER}")
    short = {
        rows: run_size(work / f"rows-{rows}", rows, options.characters, tokenizer, options.workers) for rows in sizes
    }
    print(f"\nresponses of about {LONG_CHARACTERS:,} characters, as real chains of thought\n{HEADER}")
    root = work / f"long-{options.long_rows}"
    long = run_size(root, options.long_rows, LONG_CHARACTERS, tokenizer, options.workers)
    smallest, largest = short[sizes[0]], short[sizes[-1]]
    growth = {step: round(largest[step].peak_mib / smallest[step].peak_mib, 3) for step in STEPS}
    print(f"\npeak memory at {sizes[-1]:,} over {sizes[0]:,} rows: {growth}")
    print(f"\nEXTRAPOLATED, not measured: {TEN_MILLION:,} rollouts of real length, tasks of {options.workers} cores")
    hours = {}
    for step in STEPS:
        tasks = 1 if step == "curate" else options.tasks
        cpu = TEN_MILLION / options.long_rows * long[step].cpu_seconds
        hours[step] = round(cpu / (tasks * options.workers) / SECONDS_AN_HOUR, 2)
        print(f"| {step:6} | {tasks:3} array tasks | {hours[step]:7.2f} hours |")
    last = sizes[-1]
    return {
        "bench": "data_scale",
        "ours": {
            step: {"rows_per_second": round(last / largest[step].seconds), **vars(largest[step])} for step in STEPS
        },
        "sizes": {str(rows): {step: vars(found[step]) for step in STEPS} for rows, found in short.items()},
        "long": {"rows": options.long_rows, **{step: vars(long[step]) for step in STEPS}},
        "peer": None,
        "ratio": max(growth.values()),
        "extrapolated_hours_for_10M": {"tasks": options.tasks, **hours},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute instead of half an hour")
    parser.add_argument("--rows", default="100000,300000,1000000", help="sizes, separated by commas")
    parser.add_argument("--characters", type=int, default=200, help="median length of a response")
    parser.add_argument("--long-rows", type=int, default=20_000, help="rollouts of real length")
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
    result["versions"] = versions("numpy", "pyarrow", "tokenizers", "math-verify")
    result["machine"] = machine()
    print_result(result)


if __name__ == "__main__":
    main()
