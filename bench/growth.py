"""How a training step's cost grows: tokens a CPU-second, memory; by length, batch, vocabulary, layers, processes.

    python bench/growth.py [--quick] [--dtype bfloat16] [--out bench/results]

One number grows, the others stay at `START`. Each point is a process of its own with one thread, which takes the
median of a few forward and backward passes of the model that every stage trains (loss of every next token and its
gradients, no optimizer) and, in turn with them, of the bare matrix products of the same shapes: what the processor
allows if everything but the weights' products were free. Attention's own products are not among them, so a long row
cannot reach this limit. Memory is the growth of the peak resident set from the loaded model on.

`processes` are data-parallel ranks of `phimr midtrain` on the tiny preset, one a core: tokens a second by the clock,
beside as many times one rank's. The other numbers are CPU seconds, which other work on the machine disturbs less.

A slope is that of a line through the logarithms, by least squares: 1 means that twice the size costs twice as much.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from common import MIB, ONE_THREAD, SHOWN_ERROR, in_child, machine, print_result, status_bytes, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from phimr_nemo.model.architecture import Architecture

TREE: Final = Path(__file__).resolve().parents[1]
START: Final = {"length": 512, "batch": 2, "vocabulary": 8192, "layers": 4}
GROWING: Final[Mapping[str, Sequence[int]]] = {
    "length": (64, 128, 256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8),
    "vocabulary": (2048, 8192, 32768, 131072),
    "layers": (1, 2, 4, 8, 16),
}
QUICK: Final[Mapping[str, Sequence[int]]] = {name: sizes[:2] for name, sizes in GROWING.items()}
UNITS: Final = {
    "length": "tokens per row",
    "batch": "rows",
    "vocabulary": "tokens of the vocabulary",
    "layers": "layers",
    "processes": "data-parallel ranks",
}
REPEATS: Final = 3
HIDDEN: Final = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 6, "num_key_value_heads": 2}
PASSES: Final = 3
"""Products of a weight in a step: the output, the gradient of its input, its own gradient."""
PROBLEMS: Final = 1500
STEPS_LEFT_OUT: Final = 2
Point = dict[str, float]
"""`size`; `ours`, `limit`: tokens/s; `memory`: MiB."""


def architecture(sizes: Mapping[str, int]) -> Architecture:
    """Phi-4-mini's architecture, narrower, with these numbers of layers and tokens."""
    from forward import architecture as preset

    changed: dict[str, Any] = {
        **HIDDEN,
        "vocab_size": sizes["vocabulary"],
        "num_hidden_layers": sizes["layers"],
    }
    return dataclasses.replace(preset("cpu"), **changed)


def product_shapes(arch: Architecture) -> list[tuple[int, int]]:
    """(inputs, outputs) of every weight matrix that a token is multiplied by."""
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    layer = [
        (arch.hidden_size, queries + 2 * keys),
        (queries, arch.hidden_size),
        (arch.hidden_size, 2 * arch.intermediate_size),
        (arch.intermediate_size, arch.hidden_size),
    ]
    return layer * arch.num_hidden_layers + [(arch.hidden_size, arch.vocab_size)]


def cpu_seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(sizes: Mapping[str, int], dtype: str) -> Point:
    """One point, in this process."""
    import torch
    from forward import SEED, build_ours, make_model

    arch = architecture(sizes)
    tokens = sizes["batch"] * sizes["length"]
    options = argparse.Namespace(dtype=dtype, device="cpu", fp8=False, length=sizes["length"])
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch) / "hf", arch, dtype)
        loss_of = build_ours(Path(scratch) / "hf", options)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1, arch.vocab_size, (sizes["batch"], sizes["length"]), generator=generator)

    def step() -> None:
        loss_of(ids).backward()

    kept: dict[tuple[int, int], list[Any]] = {}
    for inputs, outputs in product_shapes(arch):
        kind = getattr(torch, dtype)
        kept.setdefault(
            (inputs, outputs), [torch.ones(shape, dtype=kind) for shape in ((tokens, inputs), (outputs, inputs))]
        )

    def products() -> None:
        for shape in product_shapes(arch):
            x, weight = kept[shape]
            y = x @ weight.T
            _ = y @ weight
            _ = y.T @ x

    before = status_bytes("VmHWM")
    step()
    memory = status_bytes("VmHWM") - before
    products()
    pairs = [(cpu_seconds(step), cpu_seconds(products)) for _ in range(REPEATS)]
    ours, limit = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"ours": tokens / ours, "limit": tokens / limit, "memory": memory / MIB}


def grown(name: str, sizes: Sequence[int], dtype: str) -> list[Point]:
    """The points of one number, each from a process of its own."""
    points = []
    for size in sizes:
        found = in_child(__file__, ["--child", json.dumps({**START, name: size}), dtype])
        points.append({"size": float(size), **found})
        print(
            f"{name} {size}: {found['ours']:,.0f} of {found['limit']:,.0f} tokens/CPU-s, {found['memory']:,.0f} MiB"
        )
    return points


def phimr(*arguments: str) -> None:
    """Raises:
    RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "phimr_nemo.cli", *arguments]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(TREE)}
    done = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"phimr {' '.join(arguments)} failed:\n{done.stderr[-SHOWN_ERROR:]}")


def ranks(counts: Sequence[int]) -> list[Point]:
    """Tokens a second by the clock of mid-training on so many data-parallel ranks, and so many times one rank's."""
    from phimr_nemo.store.runs import read_metrics

    points: list[Point] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)

        def stage(name: str, kind: str, *overrides: str) -> None:
            phimr(kind, "--config", f"conf/{kind}/tiny.yaml", f"run.output={root / name}", *overrides)

        stage("base", "base")
        stage("rollouts", "generate", f"problems.count={PROBLEMS}")
        stage("verdicts", "verify", f"rollouts={root / 'rollouts'}")
        stage("curated", "curate", f"verdicts={root / 'verdicts'}")
        rows = (f"conversations={root / 'curated' / 'midtrain'}", f"tokenizer={root / 'base' / 'hf'}")
        stage("rows", "pack", *rows)
        inputs = (f"base={root / 'base' / 'hf'}", f"data={root / 'rows'}", "epochs=1", "run.log_every=1")
        for count in counts:
            name = f"ranks-{count}"
            stage(name, "midtrain", *inputs, f"parallel.data={count}")
            speeds = [row["tokens_per_second_per_gpu"] * count for row in read_metrics(root / name)]
            ours = statistics.median(speeds[STEPS_LEFT_OUT:])
            limit = ours * count if not points else points[0]["ours"] * count
            points.append({"size": float(count), "ours": ours, "limit": limit})
            print(f"processes {count}: {ours:,.0f} of {limit:,.0f} tokens/s")
    return points


def slope(points: Sequence[Point], cost: Callable[[Point], float]) -> float:
    """Of log(cost) over log(size), least squares."""
    sizes, costs = np.log([point["size"] for point in points]), np.log([cost(point) for point in points])
    return float(np.polyfit(sizes, costs, 1)[0])


def slopes(name: str, points: Sequence[Point]) -> dict[str, float]:
    """How a step's seconds and memory grow, and what share of the limit is reached at the largest size."""
    of_step = 1.0 if name in ("length", "batch") else 0.0
    last = points[-1]
    found = {"share of the limit": last["ours"] / last["limit"]}
    if name != "processes":
        found["seconds"] = slope(points, lambda point: point["size"] ** of_step / point["ours"])
        found["limit's seconds"] = slope(points, lambda point: point["size"] ** of_step / point["limit"])
        found["memory"] = slope(points, lambda point: point["memory"])
    return found


def picture(curves: Mapping[str, Sequence[Point]], unit: str) -> Figure:
    """A column a number: tokens a second beside the limit above, memory below."""
    from matplotlib.figure import Figure

    from phimr_nemo.report.picture import BAR_COLOR, TEXT_COLOR, tidy

    width, height = 3.1, 5.6
    figure = Figure(figsize=(width * len(curves), height), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, points) in enumerate(curves.items()):
        sizes = [point["size"] for point in points]
        above, below = axes[0][column], axes[1][column]
        above.plot(sizes, [point["limit"] for point in points], "--", color=TEXT_COLOR, label="limit")
        above.plot(sizes, [point["ours"] for point in points], "o-", color=BAR_COLOR, label="a training step")
        above.set_title(name)
        above.set_ylim(bottom=0)
        if name == "processes":
            above.set_ylabel("tokens/s")
            above.set_xticks(sizes)
            below.set_axis_off()
        else:
            below.plot(sizes, [point["memory"] for point in points], "o-", color=BAR_COLOR)
            below.set_ylim(bottom=0)
            for one in (above, below):
                one.set_xscale("log", base=2)
                one.set_xticks([sizes[0], sizes[-1]], [f"{sizes[0]:,.0f}", f"{sizes[-1]:,.0f}"])
            below.set_xlabel(UNITS[name])
            tidy(below)
        above.set_xlabel(UNITS[name])
        tidy(above)
    axes[0][0].set_ylabel(f"tokens/{unit}")
    axes[1][0].set_ylabel("peak memory of a step, MiB")
    axes[0][0].legend(frameon=False)
    return figure


def table(curves: Mapping[str, Sequence[Point]]) -> str:
    """A row a number: sizes, tokens a second at both ends, the share of the limit there, slopes."""
    lines = [
        "| what grows | from, to | tokens/s, from, to | share of the limit, from, to | slope of a step's seconds | "
        "the limit's | of its memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, points in curves.items():
        first, last, found = points[0], points[-1], slopes(name, points)
        ends = f"{first['ours']:,.0f}, {last['ours']:,.0f}"
        shares = f"{first['ours'] / first['limit']:.2f}, {last['ours'] / last['limit']:.2f}"
        shown = [f"{found[key]:.2f}" if key in found else "" for key in ("seconds", "limit's seconds", "memory")]
        lines.append(
            f"| {name} | {first['size']:,.0f}, {last['size']:,.0f} | {ends} | {shares} | {' | '.join(shown)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes of each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="where <date>-growth.json and .png go; default: nowhere")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(json.loads(options.child[0]), options.child[1])))
        return
    sizes = QUICK if options.quick else GROWING
    curves = {name: grown(name, sizes[name], options.dtype) for name in sizes}
    cores = os.cpu_count() or 1
    counts = [count for count in (1, 2, 4, 8, 16) if count <= cores]
    curves["processes"] = ranks(counts)
    print(table(curves))
    result = {
        "bench": "growth",
        "curves": curves,
        "slopes": {name: slopes(name, points) for name, points in curves.items()},
        "start": START,
        "versions": versions("torch", "megatron-core", "nemo-toolkit"),
        "machine": machine(dtype=options.dtype, threads=ONE_THREAD["OMP_NUM_THREADS"]),
    }
    if options.out is not None:
        from phimr_nemo.report.picture import save_png

        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{today}-growth.json").write_text(json.dumps(result, indent=1) + "\n")
        save_png(picture(curves, "CPU-second"), options.out / f"{today}-growth.png", dpi=110)
    print_result(result)


if __name__ == "__main__":
    main()
