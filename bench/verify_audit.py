"""Errors of answer graders on pairs whose truth is known by construction: false positives and negatives by class.

    python bench/verify_audit.py [--quick] [--golds DIR] [--pairs 100000] [--graders NAME ...] [--findings FILE]

Every class (bench/audit_classes.py) makes right answers written otherwise and wrong ones changed by as little as can
be; an independent reader (bench/audit_truth.py) confirms every truth before a grader sees it. DIR holds problem files
whose gold answers are graded against themselves, rewritten and changed. Each grader runs in a process of its own,
those of other packages in virtual environments made for this (--environments); slow ones get a share of every class,
the same pairs for all. A false negative is a right answer that is not accepted, whether rejected, unread or given up.
Rates are per second of processor time, started workers included. FILE gets our grader's errors as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from audit_classes import CLASSES, Pair, make_pairs
from audit_golds import KIND as GOLDS
from audit_golds import gold_pairs
from audit_graders import ITEM_SECONDS, OURS, PEERS, environment
from common import ONE_THREAD, machine, print_result, versions

REPOSITORY: Final = Path(__file__).resolve().parents[1]
PAIRS: Final = 100_000
QUICK_PAIRS: Final = 1_200
STILL_SECONDS: Final = 60.0
"""Wall time without a new verdict after which a grader's process is killed and its pair counts as given up."""
POLL_SECONDS: Final = 0.5
MOST_RESTARTS: Final = 200
TARGET_FALSE_POSITIVES: Final = 1e-4
TARGET_FALSE_NEGATIVES: Final = 1e-3
Counts = dict[str, Counter[str]]
"""Class -> right, wrong, false_positives, false_negatives, given_up."""


def all_pairs(count: int, seed: int) -> list[Pair]:
    """At least `count` pairs, as many of each class; a class that is exhausted leaves its rest to the others."""
    share = -(-count // len(CLASSES))
    pairs = {kind: list(make_pairs(kind, share, seed)) for kind in CLASSES}
    while (missing := count - sum(map(len, pairs.values()))) > 0:
        full = [kind for kind, made in pairs.items() if len(made) == share]
        share += -(-missing // len(full))
        pairs |= {kind: list(make_pairs(kind, share, seed)) for kind in full}
    return [pair for made in pairs.values() for pair in made]


def sample(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """A share of every class, in the order of the pairs; the smaller one is part of the larger."""
    chosen = random.Random(seed).sample(range(len(pairs)), len(pairs))
    classes = Counter(pair.kind for pair in pairs)
    taken: Counter[str] = Counter()
    places = []
    for place in chosen:
        kind = pairs[place].kind
        if taken[kind] < share * classes[kind]:
            taken[kind] += 1
            places.append(place)
    return [pairs[place] for place in sorted(places)]


def share_of(name: str, scale: float) -> float:
    """The share of every class that a peer gets; quick ones get all whatever the scale."""
    share = PEERS[name].share
    return share if share == 1.0 else share * scale


def run_grader(name: str, pairs: Sequence[Pair], environments: Path) -> tuple[list[dict[str, Any]], float]:
    """The verdicts of a grader in its own process, and its processor time.

    A process that shows no verdict for `STILL_SECONDS`, or dies, is started again behind the pair it died on.

    Raises:
        RuntimeError: it cannot start, or dies again and again.
    """
    python = Path(sys.executable) if name == OURS else environment(name, environments)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "pairs.jsonl"), Path(folder, "verdicts.jsonl")
        keys = ("gold", "answer", "response")
        given.write_text("".join(json.dumps({k: asdict(p)[k] for k in keys}) + "\n" for p in pairs), "utf-8")
        found.touch()
        program = Path(__file__).with_name("audit_graders.py")
        for _ in range(MOST_RESTARTS):
            error = _watch([str(python), str(program), name, str(given), str(found)], found)
            lines = found.read_text("utf-8").splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):
                lines = lines[:-1]
            if len(lines) >= len(pairs):
                break
            if not lines:
                raise RuntimeError(f"{name} does not start: {error}")
            found.write_text(
                "".join(lines) + json.dumps({"accepted": None, "why": "died", "seconds": 0.0}) + "\n", "utf-8"
            )
        verdicts = [json.loads(line) for line in found.read_text("utf-8").splitlines()]
    if len(verdicts) < len(pairs):
        raise RuntimeError(f"{name} died {MOST_RESTARTS} times")
    return verdicts, processor_seconds([verdict["seconds"] for verdict in verdicts])


def _watch(command: list[str], found: Path) -> str:
    """Run until it ends or stands still; its error output."""
    environ = {**ONE_THREAD, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "HOME": tempfile.gettempdir()}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environ)
        size, since = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = found.stat().st_size
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > STILL_SECONDS:
                process.kill()
                process.wait()
        errors.seek(0)
        return errors.read()[-2000:]


def processor_seconds(cumulative: Sequence[float]) -> float:
    """The sum over processes of what each had used at its end; a counter that falls is another process's."""
    peaks = [before for before, after in pairwise(cumulative) if after < before]
    return sum(peaks) + (cumulative[-1] if cumulative else 0.0)


def count(pairs: Sequence[Pair], verdicts: Sequence[dict[str, Any]]) -> Counts:
    """Errors by class."""
    counts: Counts = {}
    for pair, verdict in zip(pairs, verdicts, strict=True):
        row = counts.setdefault(pair.kind, Counter())
        accepted = verdict["accepted"]
        row["right" if pair.correct else "wrong"] += 1
        row["given_up"] += accepted is None
        row["false_positives"] += bool(accepted) and not pair.correct
        row["false_negatives"] += pair.correct and not accepted
    return counts


def totals(counts: Counts) -> Counter[str]:
    """Over all classes."""
    return sum(counts.values(), Counter())


def findings(pairs: Sequence[Pair], verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our errors, false positives first."""
    errors = [
        {**asdict(pair), "error": "false positive" if accepted else "false negative", "verdict": verdict["why"]}
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if (accepted := bool(verdict["accepted"])) != pair.correct
    ]
    return sorted(errors, key=lambda row: (row["error"] != "false positive", row["kind"], row["change"]))


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Totals a grader, then false positives and false negatives by class in per cent of the wrong and right pairs."""
    print(f"\n{'grader':30}{'pairs':>9}{'false pos.':>12}{'false neg.':>12}{'given up':>10}{'pairs/CPU s':>13}")
    for name, result in results.items():
        total = totals(result["classes"])
        print(
            f"{name:30}{total['right'] + total['wrong']:>9}{_rate(total, 'false_positives', 'wrong'):>12}"
            f"{_rate(total, 'false_negatives', 'right'):>12}{total['given_up']:>10}{result['per_cpu_second']:>13.1f}"
        )
    for error, of in (("false_positives", "wrong"), ("false_negatives", "right")):
        print(f"\n{error.replace('_', ' ')}, % of the {of} answers of a class")
        print(f"{'':28}" + "".join(f"{name[:16]:>17}" for name in results))
        kinds = next(iter(results.values()))["classes"]
        for kind in kinds:
            cells = (_rate(result["classes"].get(kind, Counter()), error, of) for result in results.values())
            print(f"{kind:28}" + "".join(f"{cell:>17}" for cell in cells))


def _rate(row: Counter[str], error: str, of: str) -> str:
    return f"{100 * row[error] / row[of]:.3f}" if row[of] else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="few pairs, ours and math-verify; the figures mean little"
    )
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--golds", type=Path, default=None, help="a folder of problem files")
    parser.add_argument("--graders", nargs="+", choices=[OURS, *PEERS], default=None)
    parser.add_argument("--environments", type=Path, default=REPOSITORY / "runs" / "audit-graders")
    parser.add_argument("--peer-share", type=float, default=1.0, help="of the share that slow graders get")
    parser.add_argument("--findings", type=Path, default=None)
    options = parser.parse_args()
    wanted = options.graders or ([OURS, "math-verify"] if options.quick else [OURS, *PEERS])
    pairs = all_pairs(options.pairs or (QUICK_PAIRS if options.quick else PAIRS), options.seed)
    print(
        f"{len(pairs)} pairs of {len(CLASSES)} classes, every truth confirmed by the independent reader", flush=True
    )
    if options.golds:
        pairs += gold_pairs(options.golds, options.seed)
        print(f"{sum(pair.kind == GOLDS for pair in pairs)} pairs from the golds of {options.golds.name}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name in wanted:
        part = pairs if name == OURS else sample(pairs, share_of(name, options.peer_share), options.seed)
        try:
            verdicts, seconds = run_grader(name, part, options.environments)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            print(f"{name}: left out: {error}", flush=True)
            continue
        counts = count(part, verdicts)
        results[name] = {"classes": counts, "per_cpu_second": len(part) / max(seconds, 1e-9), "cpu_seconds": seconds}
        total = totals(counts)
        wrong, missed = total["false_positives"], total["false_negatives"]
        print(
            f"{name}: {len(part)} pairs, {wrong} accepted wrongly, {missed} right missed, {seconds:.0f} CPU s",
            flush=True,
        )
        if name == OURS and options.findings:
            rows = findings(part, verdicts)
            options.findings.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print_tables(results)
    print_result(_result(results, pairs, options.seed))


def _result(results: dict[str, dict[str, Any]], pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    def errors(name: str) -> dict[str, Any]:
        row = totals(results[name]["classes"])
        return {
            "pairs": row["right"] + row["wrong"],
            "false_positives": row["false_positives"] / max(row["wrong"], 1),
            "false_negatives": row["false_negatives"] / max(row["right"], 1),
            "per_cpu_second": round(results[name]["per_cpu_second"], 1),
        }

    graders = {name: errors(name) for name in results}
    ours, peer = graders.get(OURS, {}), graders.get("math-verify", {})
    return {
        "benchmark": "verify_audit",
        "unit": "share of wrong answers accepted",
        "ours": ours.get("false_positives"),
        "peer": peer.get("false_positives"),
        "ratio": ours["false_positives"] / peer["false_positives"] if ours and peer.get("false_positives") else None,
        "target": TARGET_FALSE_POSITIVES,
        "target_false_negatives": TARGET_FALSE_NEGATIVES,
        "pairs": len(pairs),
        "seed": seed,
        "item_seconds": ITEM_SECONDS,
        "graders": graders,
        "classes": {
            name: {kind: dict(row) for kind, row in result["classes"].items()} for name, result in results.items()
        },
        "versions": {
            **versions("math-verify", "sympy", "mpmath", "latex2sympy2-extended"),
            **{name: PEERS[name].needs[0] for name in results if name in PEERS},
        },
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
