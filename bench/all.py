"""Every benchmark of the CPU in one go, into one file: `make bench`.

    python bench/all.py [--quick] [--only train dpo] [--minutes 20] [--out bench/results]

Runs the programs below one after another, each in a process of its own and for `--minutes` at most, and writes
`<date>-bench.json`: what each printed as its RESULT, its command, its CPU and wall seconds, and the machine. One that
fails or takes longer is written down as that, and the others go on. `python bench/performance_table.py` makes the
table of docs/performance.md of the newest such file.

TRL comes from a directory of its own (see docs/performance.md); without it the other sides are measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ONE_THREAD, SHOWN_ERROR, machine

BENCH = Path(__file__).resolve().parent
PROGRAMS = {
    "train": ["--documents", "300", "--repeats", "1"],
    "train-bf16": ["--documents", "300", "--repeats", "1", "--dtype", "bf16"],
    "dpo": [],
    "grpo": ["--steps", "12", "--repeats", "1"],
    "forward": ["--quick"],
    "logprobs": ["--quick"],
    "rollouts": [],
    "engines": ["--samples", "2", "--new-tokens", "128", "--repeats", "1"],
    "pack": [],
    "repetition": [],
    "startup": ["--quick"],
}
"""Name, whose part before a dash is the program's, and its options."""
MARK = "RESULT "


def run(name: str, options: Sequence[str], limit: float) -> dict[str, Any]:
    """One program's result, or what went wrong."""
    program = name.split("-")[0]
    command = [sys.executable, str(BENCH / f"{program}.py"), *options]
    shown = f"bench/{program}.py {' '.join(options)}".strip()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit, env={**os.environ, **ONE_THREAD}
        )
    except subprocess.TimeoutExpired:
        return {"command": shown, "failed": f"longer than {limit:.0f} s"}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    print(done.stdout, flush=True)
    results = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode != 0 or not results:
        return {"command": shown, "failed": done.stderr[-SHOWN_ERROR:], **seconds}
    return {"command": shown, "result": json.loads(results[-1]), **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--quick", action="store_true", help="the short form of each program")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each program at most")
    parser.add_argument("--out", type=Path, default=BENCH / "results")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    target = options.out / f"{today}-bench.json"
    runs: dict[str, Any] = {}
    for name in options.only:
        given = PROGRAMS[name]
        if options.quick and "--quick" not in given:
            given = ["--quick", *(["--dtype", "bf16"] if name == "train-bf16" else [])]
        print(f"# {name}", flush=True)
        runs[name] = run(name, given, 60 * options.minutes)
        written = {"date": today, "machine": machine(), "runs": runs}
        target.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    failed = [name for name, found in runs.items() if "failed" in found]
    print(f"written: {target}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
