"""What starting costs: `phimr --help`, every stage's dry run, the first training step; beside NeMo's plain import.

    python bench/startup.py [--quick] [--before DIRECTORY]

CPU seconds (user and system, of the process and those that it has waited for) and wall-clock seconds, of processes of
their own with one thread, the least of a few runs. A training stage is stopped when its first step stands in its
metrics, with few and short rollouts. DIRECTORY is another checkout, whose code is measured on the same inputs.
`import nemo.collections.llm`, the peer, trains nothing yet.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil
from common import ONE_THREAD, SHOWN_ERROR, machine, print_result, versions

TREE: Final = Path(__file__).resolve().parents[1]
PROBLEMS: Final = 200
RUNS: Final = {False: 3, True: 1}
POLL_SECONDS: Final = 0.01
METRICS: Final = "metrics.jsonl"
PEER: Final = "import nemo.collections.llm"
IMPORTS: Final = ("import torch", PEER)
STAGES: Final = (
    *("base", "prepare", "generate", "verify", "curate", "pack"),
    *("midtrain", "sft", "dpo", "grpo", "evaluate", "export"),
)
SHOWN_QUICK: Final = ("midtrain", "grpo")
SMALLEST_GRPO: Final = ("prompts_per_step=2", "group_size=2", "max_new_tokens=8")

Cost = tuple[float, float]
"""CPU seconds, wall-clock seconds."""


def phimr(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "phimr_nemo.cli", *arguments]


def stage(name: str, *arguments: str, preset: str = "tiny") -> list[str]:
    return phimr(name, "--config", f"conf/{name}/{preset}.yaml", *arguments)


def start(command: Sequence[str], tree: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(tree)}
    return subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def spent(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def cost(command: Sequence[str], tree: Path, first_line_of: Path | None = None) -> Cost:
    """What a command costs to its end, or until a file has its first line.

    Raises:
        RuntimeError: it failed, or ended without that line.
    """
    started, before = time.monotonic(), psutil.Process().cpu_times()
    process = start(command, tree)
    watched = psutil.Process(process.pid)
    while first_line_of is not None and process.poll() is None:
        if first_line_of.is_file() and b"\n" in first_line_of.read_bytes():
            result = (spent(watched), time.monotonic() - started)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return result
        time.sleep(POLL_SECONDS)
    errors = process.communicate()[1]
    if process.returncode != 0 or first_line_of is not None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-SHOWN_ERROR:]}")
    after = psutil.Process().cpu_times()
    children = after.children_user + after.children_system - before.children_user - before.children_system
    return float(children), time.monotonic() - started


def least(costs: Sequence[Cost]) -> Cost:
    return min(costs, key=lambda pair: pair[0])


def make_inputs(root: Path) -> None:
    """The tiny recipe's data and starting model, for every stage that is measured."""
    steps = {
        "base": stage("base"),
        "rollouts": stage("generate", f"problems.count={PROBLEMS}"),
        "verdicts": stage("verify", f"rollouts={root / 'rollouts'}"),
        "curated": stage("curate", f"verdicts={root / 'verdicts'}"),
        "rows": stage("pack", f"conversations={root / 'curated' / 'midtrain'}", f"tokenizer={root / 'base' / 'hf'}"),
        "preferences": stage("curate", f"verdicts={root / 'verdicts'}", preset="tiny-rollouts"),
    }
    for name, command in steps.items():
        cost([*command, f"run.output={root / name}"], TREE)


def first_steps(root: Path) -> Mapping[str, list[str]]:
    base = f"base={root / 'base' / 'hf'}"
    return {
        "midtrain": stage("midtrain", base, f"data={root / 'rows'}", "run.log_every=1"),
        "sft": stage("sft", base, f"data={root / 'curated' / 'sft'}", "run.log_every=1"),
        "dpo": stage("dpo", base, f"pairs={root / 'preferences' / 'pairs'}"),
        "grpo": stage("grpo", base, f"prompts={root / 'preferences' / 'prompts'}", *SMALLEST_GRPO),
    }


def whole_steps(root: Path) -> Mapping[str, list[str]]:
    model = root / "base" / "hf"
    few = ("problems.count=2", "teacher.max_new_tokens=8")
    return {
        "verify": stage("verify", f"rollouts={root / 'rollouts'}"),
        "pack": stage("pack", f"conversations={root / 'curated' / 'midtrain'}", f"tokenizer={model}"),
        "generate, a model": stage("generate", f"teacher.path={model}", *few, preset="tiny-rollouts"),
        "evaluate": stage("evaluate", f"model={model}", "problems.count=2", "samples=1", "row=bench"),
    }


def measure(tree: Path, root: Path, *, quick: bool) -> dict[str, Cost]:
    """Row of the table -> its cost."""
    runs = range(RUNS[quick])
    rows = {line: least([cost([sys.executable, "-c", line], tree) for _ in runs]) for line in IMPORTS}
    rows["phimr --help"] = least([cost(phimr("--help"), tree) for _ in runs])
    shown = SHOWN_QUICK if quick else STAGES
    for name in shown:
        rows[f"phimr {name} --dry-run"] = least([cost([*stage(name), "--dry-run"], tree) for _ in runs])
    for name, command in first_steps(root).items():
        if name in shown:
            outputs = [Path(tempfile.mkdtemp(dir=root)) / name for _ in runs]
            found = [cost([*command, f"run.output={output}"], tree, output / METRICS) for output in outputs]
            rows[f"{name}: first step"] = least(found)
    for name, command in {} if quick else whole_steps(root).items():
        outputs = [Path(tempfile.mkdtemp(dir=root)) / "out" for _ in runs]
        rows[f"{name}: a few problems"] = least([cost([*command, f"run.output={out}"], tree) for out in outputs])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one run of a few rows")
    parser.add_argument("--before", type=Path, help="another checkout whose code is measured as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_inputs(root)
        rows = measure(TREE, root, quick=arguments.quick)
        before = {} if arguments.before is None else measure(arguments.before.resolve(), root, quick=arguments.quick)
    print("| what | CPU seconds | wall-clock seconds | before: CPU seconds |\n|---|---:|---:|---:|")
    for name, (processor, wall) in rows.items():
        print(f"| {name} | {processor:.2f} | {wall:.2f} | {f'{before[name][0]:.2f}' if before else ''} |")
    ours, peer = rows["midtrain: first step"][0], rows[PEER][0]
    print_result(
        {
            "what": "CPU seconds to mid-training's first step, against a plain import of nemo.collections.llm",
            "ours": round(ours, 2),
            "peer": round(peer, 2),
            "ratio": round(peer / ours, 2),
            "rows": {name: [round(value, 2) for value in pair] for name, pair in rows.items()},
            "before": {name: [round(value, 2) for value in pair] for name, pair in before.items()},
            "versions": versions(
                "torch", "nemo-toolkit", "nemo-aligner", "megatron-core", "lightning", "transformers"
            ),
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    main()
