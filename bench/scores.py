"""Our scores beside lighteval's on the same stored responses, and every response on which the two differ.

    python bench/scores.py runs/evaluation --peer DIR
    python bench/scores.py rollouts.jsonl.gz --answer gold --group dataset --peer DIR --out differences.jsonl

The first argument is the output of `phimr evaluate`, or a file of rows with a response and an answer. lighteval (as
it scores MATH-500: its extractive match over plain and LaTeX expressions, to six digits) lives in a directory of its
own, because it needs other versions of what the grader uses:

    pip install --no-deps --target DIR lighteval==0.13.0 latex2sympy2_extended==1.0.6 antlr4-python3-runtime==4.13.2 \
        pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet

`--every N` takes every Nth row, `--quick` every 20th. The last line is RESULT with a JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ONE_THREAD, machine, print_result, versions

from phimr_nemo.data.sources.rawfiles import read_rows
from phimr_nemo.store.shards import read_table
from phimr_nemo.verify import GRADER_VERSION, Grader

QUICK_EVERY = 20
SHOWN = 20
SHOWN_CHARACTERS = 60
KEPT_CHARACTERS = 400
PEER_DIGITS = 6
COLUMNS = ("response", "answer", "finish_reason")


def read_input(path: Path, response: str, answer: str, group: str | None) -> list[dict[str, str]]:
    """Rows with `response`, `answer` and `group`."""
    if path.is_dir():
        rows = read_table(path / "verdicts", "verdicts", COLUMNS).to_pylist()
        return [{**row, "group": path.name} for row in rows]
    return [
        {"response": str(row[response]), "answer": str(row[answer]), "group": str(row[group]) if group else path.name}
        for _, row in read_rows(path)
    ]


def ours(rows: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, Any]], float]:
    """What the project's grader says of each row, and the seconds it took."""
    started = time.perf_counter()
    with Grader(workers=1) as grader:
        verdicts = grader.grade_many(
            [(row["response"], row["answer"]) for row in rows], [row.get("finish_reason") == "length" for row in rows]
        )
    seconds = time.perf_counter() - started
    return [{"verdict": one.verdict, "extracted": one.extracted, "reason": one.reason} for one in verdicts], seconds


def theirs(rows: Sequence[Mapping[str, str]], peer: Path) -> tuple[list[dict[str, Any]], float]:
    """What lighteval says, from a process that finds it first."""
    import os

    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory) / "asked.json", Path(directory) / "answered.json"
        asked.write_text(json.dumps(list(rows)), "utf-8")
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(peer)}
        command = [sys.executable, __file__, str(asked), "--as-peer", str(answered)]
        subprocess.run(command, check=True, env=environment)
        values = json.loads(answered.read_text("utf-8"))
    return values["rows"], values["seconds"]


def as_peer(asked: Path, answered: Path) -> None:
    """The process of :func:`theirs`."""
    import logging

    from lighteval.metrics.dynamic_metrics import MultilingualExtractiveMatchMetric
    from lighteval.metrics.utils.extractive_match_utils import ExprExtractionConfig, LatexExtractionConfig
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    logging.disable(logging.WARNING)
    targets = [ExprExtractionConfig(), LatexExtractionConfig()]
    metric = MultilingualExtractiveMatchMetric(
        gold_extraction_target=targets, pred_extraction_target=targets, precision=PEER_DIGITS
    )
    found = []
    started = time.perf_counter()
    for row in json.loads(asked.read_text("utf-8")):
        # Its reference answers are text, in which LaTeX is marked and plain numbers are not: it may take either.
        answer = row["answer"].strip("$")
        doc = Doc(query="", choices=[f"${answer}$", answer], gold_index=[0, 1])
        score = metric.compute(doc=doc, model_response=ModelResponse(text=[row["response"]]))
        extracted = (doc.specific or {}).get("extracted_predictions", [])
        found.append({"correct": score > 0, "extracted": [text[:KEPT_CHARACTERS] for text in extracted]})
    seconds = time.perf_counter() - started
    answered.write_text(json.dumps({"rows": found, "seconds": seconds}), "utf-8")


def compare(path: Path, peer: Path, options: argparse.Namespace) -> None:
    """Print scores by group, the responses on which the graders differ, and the RESULT line."""
    rows = read_input(path, options.response, options.answer, options.group)
    rows = rows[:: QUICK_EVERY if options.quick else options.every]
    own, own_seconds = ours(rows)
    other, other_seconds = theirs(rows, peer)
    both = list(zip(rows, own, other, strict=True))
    print("| group | responses | ours (%) | lighteval (%) | ours alone | lighteval alone |")
    print("|---|---:|---:|---:|---:|---:|")
    for group in (*sorted({row["group"] for row in rows}), None):
        part = [(a["verdict"] == "correct", b["correct"]) for row, a, b in both if group in (None, row["group"])]
        shares = [100 * sum(values) / len(part) for values in zip(*part, strict=True)]
        alone = (sum(a and not b for a, b in part), sum(b and not a for a, b in part))
        print(f"| {group or 'all'} | {len(part)} | {shares[0]:.2f} | {shares[1]:.2f} | {alone[0]} | {alone[1]} |")
    differing: list[dict[str, Any]] = [
        {
            "group": row["group"],
            "answer": row["answer"],
            "ours": a,
            "lighteval": b,
            "end": row["response"][-KEPT_CHARACTERS:],
        }
        for row, a, b in both
        if (a["verdict"] == "correct") != b["correct"]
    ]
    for one in differing[:SHOWN]:
        side = "ours" if one["ours"]["verdict"] == "correct" else "lighteval"
        extracted = one["ours"]["extracted"][:SHOWN_CHARACTERS]
        found = one["lighteval"]["extracted"]
        print(f"only {side} accepts: {one['answer'][:SHOWN_CHARACTERS]!r} for {extracted!r}, {found}")
    if options.out is not None:
        options.out.write_text("".join(json.dumps(one) + "\n" for one in differing), "utf-8")
    own_score, other_score = (
        sum(one["verdict"] == "correct" for one in own) / len(rows),
        sum(one["correct"] for one in other) / len(rows),
    )
    print_result(
        {
            "bench": "scores",
            "responses": len(rows),
            "ours": round(own_score, 5),
            "peer": round(other_score, 5),
            "ratio": round(own_score / other_score, 5) if other_score else None,
            "agreement": round(1 - len(differing) / len(rows), 5),
            "ours_alone": sum(one["ours"]["verdict"] == "correct" for one in differing),
            "peer_alone": sum(one["ours"]["verdict"] != "correct" for one in differing),
            "seconds": {"ours": round(own_seconds, 1), "peer": round(other_seconds, 1)},
            "versions": {**versions("math-verify", "sympy"), "lighteval": "0.13.0", "grader": GRADER_VERSION},
            "machine": machine(threads=1),
        }
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Our scores beside lighteval's.")
    parser.add_argument("input", type=Path)
    parser.add_argument("--peer", type=Path, help="directory with lighteval")
    parser.add_argument("--response", default="response")
    parser.add_argument("--answer", default="answer")
    parser.add_argument("--group")
    parser.add_argument("--out", type=Path, help="JSON lines of the differing responses")
    parser.add_argument("--every", type=int, default=1, help="take every Nth row")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--as-peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_peer is not None:
        as_peer(options.input, options.as_peer)
    elif options.peer is None or not (options.peer / "lighteval").is_dir():
        parser.exit(2, f"lighteval is not in {options.peer}: see the top of {Path(__file__).name}\n")
    else:
        compare(options.input, options.peer, options)


if __name__ == "__main__":
    main()
