"""Answers verified a second, and memory: the grader against math-verify called directly, and in a process per item.

    python bench/verify.py [--quick] [--data FILE] [--workers 2]

FILE holds JSON lines (also .gz, .zst) with `response`, `gold` and `correct`; without it the graded rollouts
beside the repository are taken if they are there ($PHIMR_SHARED_DATA), else the examples of docs/verification.md.
All three grade the same sample, taken at even steps; the grader also grades everything, and hostile answers.
As many processes per item run at once as the grader has workers; each is forked from a process that has
math-verify loaded, which is the fastest form of it. math-verify called directly works in one thread only.

Then both, one answer after another, on answers of every class of bench/audit_classes.py: in a line, and behind
12,000 characters of reasoning; a second of processor time counts here, workers included, and how long the slowest
answer took.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil
from audit_classes import CLASSES, make_pairs
from audit_graders import processor_seconds
from common import machine, print_result, versions

from phimr_nemo.verify import Grader
from phimr_nemo.verify.answer import DEADLINE_SECONDS
from phimr_nemo.verify.jsonl import read_rows

REPOSITORY: Final = Path(__file__).resolve().parents[1]
PEER_SECONDS: Final = 5
"""math-verify's own default limit for parsing and for comparing."""
KILL_AFTER_SECONDS: Final = 2 * PEER_SECONDS + 5
MEMORY_POLL_SECONDS: Final = 0.05
MIB: Final = 1 << 20
TARGET: Final = 10.0
SAMPLE: Final = {False: 400, True: 60}
EVERYTHING: Final = {False: 1_000_000, True: 600}
SPEED_TARGETS: Final = {"short answers": 4.0, "long responses": 3.0}
"""Times math-verify's answers per second of processor time."""
SPEED_EACH_CLASS: Final = {False: 40, True: 3}
LONG_CHARS: Final = 12_000
EXAMPLE = re.compile(r"^\| [^|]+ \| `(?P<gold>.+?)` \| `(?P<response>.+)` \| (?P<verdict>[a-z]+) \|$")
HOSTILE: Final = [
    r"\boxed{9^{9^{9}}}",
    r"\boxed{(10^{10})!}",
    r"\boxed{" + "1" * 1_000_000 + "}",
    r"\boxed{" + "{" * 100_000,
    "word " * 2_000_000 + r"\boxed{x}",
    r"\boxed",
    "\x00" * 1000 + r"\boxed{5" + "\x00}",
    r"\boxed{(a+b+c+d+e+f+g+h)^{60}}",
    r"\boxed{\int_0^1 e^{\sin(x^{x^x})} dx}",
    r"\boxed{\zeta(3)^{\zeta(5)^{1000}}}",
    r"\boxed{99999^{99999}}",
]

Row = dict[str, Any]


def read_data(path: Path | None) -> tuple[str, list[Row]]:
    """The rows and what to call them."""
    if path is None:
        shared = Path(os.environ.get("PHIMR_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
        path = shared / "rollouts" / "graded_rollouts.jsonl.gz"
    if path.is_file():
        return path.name, [row for _, row in read_rows(path)]
    lines = (REPOSITORY / "docs" / "verification.md").read_text("utf-8").splitlines()
    rows = [match.groupdict() for line in lines if (match := EXAMPLE.match(line))]
    return "docs/verification.md", [{**row, "correct": row["verdict"] == "correct"} for row in rows]


class PeakMemory:
    """The largest sum of resident memory over the descendants of this process (and over itself where asked)."""

    def __init__(self, *, with_self: bool = False) -> None:
        self.bytes = 0
        self._with_self = with_self
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(MEMORY_POLL_SECONDS):
            total = me.memory_info().rss if self._with_self else 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.bytes = max(self.bytes, total)


def direct(response: str, gold: str) -> bool:
    """math-verify as its documentation calls it."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(response)))


def _answer(connection: Any, response: str, gold: str) -> None:
    logging.disable(logging.CRITICAL)
    connection.send(direct(response, gold))


def in_a_process(response: str, gold: str) -> bool:
    """math-verify in a process of its own, killed when it does not end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, response, gold))
    process.start()
    theirs.close()
    try:
        return bool(ours.poll(KILL_AFTER_SECONDS) and ours.recv())
    except EOFError:
        return False
    finally:
        process.kill()
        process.join()
        ours.close()


def measure_peer(rows: list[Row], grade: Callable[[str, str], bool], workers: int) -> Row:
    direct("$1$", "1")
    with PeakMemory(with_self=True) as memory:
        start = time.perf_counter()
        if workers == 1:
            verdicts = [grade(row["response"], row["gold"]) for row in rows]
        else:
            with ThreadPoolExecutor(workers) as threads:
                verdicts = list(threads.map(lambda row: grade(row["response"], row["gold"]), rows))
        seconds = time.perf_counter() - start
    return summary(rows, verdicts, seconds, memory)


def measure_grader(rows: list[Row], workers: int) -> Row:
    with Grader(workers=workers) as grader, PeakMemory() as memory:
        grader.grade_many([(rf"\boxed{{{n}+x}}", f"x+{n}") for n in range(workers)])
        start = time.perf_counter()
        verdicts = grader.grade_many([(row["response"], row["gold"]) for row in rows])
        seconds = time.perf_counter() - start
    counts = Counter(verdict.verdict for verdict in verdicts)
    return {**summary(rows, [v.verdict == "correct" for v in verdicts], seconds, memory), "verdicts": dict(counts)}


def summary(rows: list[Row], verdicts: list[bool], seconds: float, memory: PeakMemory) -> Row:
    agree = sum(verdict == row["correct"] for verdict, row in zip(verdicts, rows, strict=True))
    return {
        "n": len(rows),
        "per_second": round(len(rows) / seconds, 1),
        "agreement": round(agree / len(rows), 4),
        "peak_mib": round(memory.bytes / MIB),
    }


def measure_hostile(workers: int) -> Row:
    """Hostile answers: the grader comes back, nothing is called correct, memory stays bounded."""
    seconds = []
    counts: Counter[str] = Counter()
    with Grader(workers=workers) as grader, PeakMemory() as memory:
        for response in HOSTILE:
            start = time.perf_counter()
            counts[grader.grade(response, "5").verdict] += 1
            seconds.append(time.perf_counter() - start)
    return {
        "n": len(HOSTILE),
        "hung": sum(taken > DEADLINE_SECONDS + PEER_SECONDS for taken in seconds),
        "slowest_seconds": round(max(seconds), 2),
        "verdicts": dict(counts),
        "peak_mib": round(memory.bytes / MIB),
    }


def reasoning(characters: int) -> str:
    """Text as models write it: sentences with short formulas."""
    steps = (
        rf"Step {n}: we have ${n} \cdot 7 + 3 = {7 * n + 3}$, so $x_{{{n}}} = \frac{{{n}}}{{{n + 1}}}$; check it. "
        for n in range(1, characters)
    )
    text = ""
    for step in steps:
        text += step
        if len(text) >= characters:
            break
    return text[:characters].rpartition(". ")[0] + ".\n"


def measure_speed(rows: list[Row], grade: Callable[[str, str], bool]) -> Row:
    """Answers per second of processor time, one after another, and the wall time of the slowest."""
    seconds = []
    before = processor_seconds()
    for row in rows:
        start = time.perf_counter()
        grade(row["response"], row["gold"])
        seconds.append(time.perf_counter() - start)
    rate = len(rows) / (processor_seconds() - before)
    return {
        "n": len(rows),
        "per_cpu_second": round(rate, 1),
        "slowest_seconds": round(max(seconds), 2),
        "over_limit": sum(taken > DEADLINE_SECONDS for taken in seconds),
    }


def compare_speed(quick: bool) -> dict[str, Row]:
    """Ours and math-verify on the same answers, short ones and long responses."""
    answers = {}
    for seed, (name, before) in enumerate({"short answers": "", "long responses": reasoning(LONG_CHARS)}.items()):
        pairs = [pair for kind in CLASSES for pair in make_pairs(kind, SPEED_EACH_CLASS[quick], seed)]
        answers[name] = [{"response": before + pair.response, "gold": pair.gold} for pair in pairs]
    results: dict[str, Row] = {}
    with Grader(workers=1) as grader:
        grader.grade(r"\boxed{x+1}", "1+x")
        direct(r"$\boxed{x+1}$", "1+x")
        for name, rows in answers.items():
            ours = measure_speed(rows, lambda response, gold: grader.grade(response, gold).verdict == "correct")
            peer = measure_speed(rows, direct)
            ratio = round(ours["per_cpu_second"] / peer["per_cpu_second"], 2)
            results[name] = {"ours": ours, "math-verify": peer, "ratio": ratio, "target": SPEED_TARGETS[name]}
    return results


def print_speed(speed: dict[str, Row]) -> None:
    columns = f"{'n':>6}{'ours':>9}{'math-verify':>13}{'ratio':>7}{'slowest':>9}{'over limit':>12}"
    print(f"{'answers per CPU second':26}{columns}")
    for name, row in speed.items():
        ours, peer = row["ours"], row["math-verify"]
        print(
            f"{name:26}{ours['n']:>6}{ours['per_cpu_second']:>9}{peer['per_cpu_second']:>13}{row['ratio']:>7}"
            f"{ours['slowest_seconds']:>8}s{ours['over_limit']:>12}"
        )


def print_table(results: dict[str, Row]) -> None:
    print(f"{'':36}{'n':>8}{'answers/s':>12}{'agreement':>12}{'peak MiB':>10}")
    for name, row in results.items():
        print(f"{name:36}{row['n']:>8}{row['per_second']:>12}{row['agreement']:>12}{row['peak_mib']:>10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small sample; the figures mean little")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    name, rows = read_data(options.data)
    sample = rows[:: max(1, len(rows) // SAMPLE[options.quick])]
    everything = rows[:: max(1, len(rows) // EVERYTHING[options.quick])]
    results = {
        "grader, sample": measure_grader(sample, options.workers),
        "math-verify, a process per item": measure_peer(sample, in_a_process, options.workers),
        "math-verify, called directly": measure_peer(sample, direct, 1),
        "grader, everything": measure_grader(everything, options.workers),
    }
    hostile = measure_hostile(options.workers)
    speed = compare_speed(options.quick)
    print_table(results)
    print_speed(speed)
    print(f"hostile answers: {hostile}")
    ours, peer = results["grader, sample"]["per_second"], results["math-verify, a process per item"]["per_second"]
    result = {
        "benchmark": "verify",
        "unit": "answers/s",
        "data": name,
        "ours": ours,
        "peer": peer,
        "ratio": round(ours / peer, 2),
        "target": TARGET,
        "ratio_direct": round(ours / results["math-verify, called directly"]["per_second"], 2),
        "rows": results,
        "hostile": hostile,
        "speed": speed,
        "deadline_seconds": DEADLINE_SECONDS,
        "versions": versions("math-verify", "sympy", "antlr4-python3-runtime"),
        "machine": machine(workers=options.workers),
    }
    print_result(result)


if __name__ == "__main__":
    main()
