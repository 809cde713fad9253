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


def rollout_training(result: Mapping[str, Any]) -> list[Row]:
    """GRPO's CPU seconds a step."""
    seconds, right = result["cpu_seconds_a_step"], result["right_by_quarter"]
    if "trl" not in seconds:
        return []
    ours, theirs = (f"{seconds[side]['step']:.2f} ({right[side][-1]:.3f})" for side in ("ours", "trl"))
    what = "GRPO, tiny model: CPU-seconds per step (correct in the last quarter)"
    return [(what, ours, f"{result['peer']} {theirs}", f"{result['ratio']:.2f}")]


def forward_and_backward(result: Mapping[str, Any]) -> list[Row]:
    """Speed and memory of a step's two passes."""
    what = f"forward and backward, {result['parameters'] / MILLION:.0f} M parameters"
    return [
        (f"{what}: {result['unit']}", f"{result['ours']:,.0f}", f"transformers {result['peer']:,.0f}", _two(result)),
        (
            f"{what}: peak memory",
            f"{result['ours_peak_mib']:,.0f} MiB",
            f"transformers {result['peer_peak_mib']:,.0f} MiB",
            _two(result, "ratio_peak"),
        ),
    ]


def log_probabilities(result: Mapping[str, Any]) -> list[Row]:
    """Their memory, with their gradients."""
    what = f"log-probabilities and their gradients, {result['tokens']:,} x {result['vocabulary']:,}: peak memory"
    read = result["peer_peak_extrapolated_from_tokens"]
    extrapolated = f", extrapolated from {read:,} tokens" if read else ""
    ours, theirs = (f"{result[f'{side}_peak_mib']:,.0f} MiB" for side in ("ours", "peer"))
    return [(what, ours, f"{result['peer']} {theirs}{extrapolated}", f"{result['ratio']:.3f}")]


def sampling(result: Mapping[str, Any]) -> list[Row]:
    """The built-in engine against transformers."""
    return [
        (
            f"rollouts of {result['sequences']} sequences, {title} lengths: tokens/s",
            f"{result[f'ours{key}']:,}",
            f"transformers.generate {result[f'peer{key}']:,}",
            _two(result, f"ratio{key}"),
        )
        for title, key in (("long-tailed", ""), ("equal", "_equal"))
    ]


def engines(result: Mapping[str, Any]) -> list[Row]:
    """The built-in engine against vLLM."""
    facts = result["machine"]
    return [
        (
            f"rollouts, {case}, {facts['dtype']}, {facts['threads']} threads: tokens/s (per CPU-second)",
            f"{found['ours_wall']:,} ({found['ours_cpu']:,})",
            f"vLLM's CPU build {found['vllm_wall']:,} ({found['vllm_cpu']:,})",
            f"{_two(found, 'ratio_wall')} ({_two(found, 'ratio_cpu')})",
        )
        for case, found in result["cases"].items()
    ]


def packing(result: Mapping[str, Any]) -> list[Row]:
    """Time to pack, and what is wasted."""
    sides = []
    if "trl" in result:
        sides.append(("TRL bfd", result["ours"], result["trl"], _two(result)))
    if "nemo_at_fewer" in result:
        few = result["nemo_at_fewer"]
        sides.append(("NeMo first_fit_decreasing", few["ours"], few["nemo"], _two(result, "nemo_ratio")))
    rows = []
    for name, ours, theirs, ratio in sides:
        what = f"packing {ours['documents']:,} documents into rows of {result['capacity']:,}: CPU-seconds (wasted)"
        mine, other = (f"{one['seconds']:.3g} ({100 * one['waste']:.3f} %)" for one in (ours, theirs))
        rows.append((what, mine, f"{name} {other}", ratio))
    return rows


def repeated(result: Mapping[str, Any]) -> list[Row]:
    """Time to know a response's repetition."""
    what = f"repetition of responses of {result['characters']:,} characters: CPU-milliseconds each"
    peer = result["peer"]
    return [(what, f"{result['ours']:.2f}", f"{peer['name']} {peer['milliseconds']:.2f}", _two(result))]


def _two(result: Mapping[str, Any], key: str = "ratio") -> str:
    """A ratio with two decimals."""
    return f"{result[key]:.2f}"


MILLION = 1e6
ROWS: Mapping[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "train": training,
    "train-bf16": training,
    "dpo": preferences,
    "grpo": rollout_training,
    "forward": forward_and_backward,
    "logprobs": log_probabilities,
    "rollouts": sampling,
    "engines": engines,
    "pack": packing,
    "repetition": repeated,
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
        f"{found['date']}, {machine['cores']} cores of {machine['processor']} ({features})"
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
