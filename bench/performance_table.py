"""The measured table of docs/performance.md, made of the newest `bench/results/*-bench.json`.

    python bench/performance_table.py [--check]

Writes it between two marks; `--check` only tells whether the document has it. So no figure of it is typed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import between

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures: begin, by bench/performance_table.py -->", "<!-- figures: end -->"
NOTHING = "`make bench` has not been recorded yet."
NAMES = {
    "padded": "transformers Trainer, padded",
    "grouped": "Trainer grouped by length",
    "trl": "TRL packed",
}
Row = tuple[str, str, str, str]
"""What, ours, the baseline, the ratio."""


def training(result: Mapping[str, Any]) -> list[Row]:
    """Tokens a CPU second against each side, and the time to an equal loss."""
    rates, losses, times = result["tokens_per_second"], result["held_out_loss"], result["seconds_to_equal_loss"]
    sizes = result["sizes"]
    what = f"training, {sizes['documents']} documents of up to {sizes['longest']} tokens, {sizes['dtype']}"
    rows = []
    for side in (side for side in rates if side != "ours"):
        ours, theirs = (f"{rates[name]:,.0f} ({losses[name]:.3f})" for name in ("ours", side))
        ratio = f"{result['ratios'][side]:.2f}"
        rows.append(
            (f"{what}: tokens per CPU-second (loss on held-out documents)", ours, f"{NAMES[side]} {theirs}", ratio)
        )
    if result.get("ratio_to_equal_loss"):
        first = min((side for side in times if side != "ours" and times[side]), key=times.__getitem__)
        rows.append(
            (
                f"{what}: CPU-seconds to a held-out loss of {result['equal_loss']:.3f}",
                f"{times['ours']:.1f}",
                f"{NAMES[first]} {times[first]:.1f}",
                f"{result['ratio_to_equal_loss']:.2f}",
            )
        )
    return rows


def preferences(result: Mapping[str, Any]) -> list[Row]:
    """DPO's pairs a CPU second by lengths."""
    rates = result["pairs_per_cpu_second"]
    return [
        (
            f"DPO, {title} lengths, packed: pairs per CPU-second",
            f"{rates[kind]['packed']:.1f}",
            f"TRL DPOTrainer {rates[kind]['trl']:.1f}",
            f"{rates[f'ratio_{kind}']:.2f}",
        )
        for kind, title in (("longtail", "long-tailed"), ("uniform", "equal"))
        if "trl" in rates[kind]
    ]


ROWS: Mapping[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "train": training,
    "train-bf16": training,
    "dpo": preferences,
}
"""Which runs have lines in the table; the others' figures are in the file."""


def newest() -> Path | None:
    """The file of the last date."""
    return max((ROOT / "bench" / "results").glob("*-bench.json"), default=None)


def table(path: Path | None) -> str:
    """The lines between the marks."""
    if path is None:
        return NOTHING
    found = json.loads(path.read_text("utf-8"))
    machine = found["machine"]
    features = ", ".join(machine["features"]) or "no wide instructions"
    lines = [
        f"{found['date']}, {machine['cores']} cores of {machine['processor']} ({features}), one thread a side"
        f" ([all figures](../bench/results/{path.name})):",
        "",
        "| what | ours | baseline | ratio | command |",
        "|---|---:|---:|---:|---|",
    ]
    for name, run in found["runs"].items():
        if name in ROWS and "result" in run:
            lines += [f"| {' | '.join(row)} | `{run['command']}` |" for row in ROWS[name](run["result"])]
    return "\n".join(lines)


def document(text: str, path: Path | None) -> str:
    """The document with the table between its marks.

    Raises:
        ValueError: it has no marks.
    """
    return between(text, BEGIN, END, table(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the document differs")
    options = parser.parse_args()
    path = newest()
    text = DOCUMENT.read_text("utf-8")
    made = document(text, path)
    if options.check:
        sys.exit(
            0 if made == text else f"{DOCUMENT.name} has not the figures of {path}: python bench/performance_table.py"
        )
    DOCUMENT.write_text(made, "utf-8")


if __name__ == "__main__":
    main()
