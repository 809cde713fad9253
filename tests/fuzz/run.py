"""The long form of fuzzing: atheris, guided by the coverage of phimr_nemo, one process a target.

    python tests/fuzz/run.py --seconds 60 [--targets answer,config] [--keep]

Ends with a table: seconds, executions and crashes of each target. An input that crashes is saved beside the table's
name in the working directory and makes the exit code 1. `--keep` adds the inputs that reached new code to the corpus.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_targets

MAX_LENGTH = 4096
MAX_KEPT = 40
MAX_KEPT_BYTES = 600
TIMEOUT_SECONDS = 30
MEMORY_MB = 3072
GRACE_SECONDS = 600
DONE = re.compile(r"Done (\d+) runs in (\d+) second")
COVERED = re.compile(r"cov: (\d+)")


@dataclass(frozen=True)
class Result:
    """One target's run."""

    target: str
    seconds: int
    executions: int
    coverage: int
    crashes: int


def child(name: str, directory: Path, seconds: int) -> None:
    """Fuzz one target in this process; it never returns."""
    import atheris

    with atheris.instrument_imports(include=["phimr_nemo"]):
        target = fuzz_targets.TARGETS[name]()
        # What libraries import at their first use must not count as the time of an input.
        for data in fuzz_targets.read_corpus(name):
            target(data)
    # An index can ask for any amount of memory: a MemoryError, where the machine would begin to swap.
    limit = 2 * MEMORY_MB << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    atheris.Setup(
        [
            name,
            str(directory),
            f"-max_total_time={seconds}",
            f"-max_len={MAX_LENGTH}",
            f"-timeout={TIMEOUT_SECONDS}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-artifact_prefix={directory.parent}/",
            "-print_final_stats=0",
        ],
        target,
    )
    atheris.Fuzz()


def fuzz(name: str, seconds: int, *, keep: bool) -> Result:
    """Fuzz one target in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "corpus"
        directory.mkdir()
        known = fuzz_targets.read_corpus(name)
        for number, data in enumerate(known):
            (directory / str(number)).write_bytes(data)
        done = subprocess.run(
            [sys.executable, __file__, "--child", name, "--directory", str(directory), "--seconds", str(seconds)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds + GRACE_SECONDS,
            check=False,
            env={**os.environ, "TMPDIR": scratch},
        )
        crashes = sorted(Path(scratch).glob("crash-*")) + sorted(Path(scratch).glob("timeout-*"))
        for crash in crashes:
            kept = Path(f"fuzz-{name}-{crash.name}")
            kept.write_bytes(crash.read_bytes())
            print(f"{name}: {kept}\n{done.stderr[-3000:]}", file=sys.stderr)
        if keep:
            new = [path.read_bytes() for path in directory.iterdir() if not path.name.isdigit()]
            small = sorted((data for data in new if len(data) <= MAX_KEPT_BYTES), key=len)
            fuzz_targets.write_corpus(name, known + small[: max(0, MAX_KEPT - len(known))])
    runs = DONE.search(done.stderr)
    if runs is None and not crashes:
        raise RuntimeError(f"{name} did not run:\n{done.stderr[-3000:]}")
    covered = COVERED.findall(done.stderr)
    executions = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
    return Result(
        target=name,
        seconds=int(runs.group(2)) if runs else seconds,
        executions=int(runs.group(1)) if runs else int(executions[-1] if executions else 0),
        coverage=int(covered[-1]) if covered else 0,
        crashes=len(crashes),
    )


def main() -> int:
    """Fuzz the targets one after the other; the exit code is 1 when one crashed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--targets", default=",".join(fuzz_targets.TARGETS))
    parser.add_argument("--keep", action="store_true", help="add inputs that reached new code to the corpus")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.directory, options.seconds)
    results = []
    print("| target | seconds | executions | edges reached | crashes |\n|---|---:|---:|---:|---:|")
    for name in options.targets.split(","):
        result = fuzz(name, options.seconds, keep=options.keep)
        results.append(result)
        numbers = f"{result.seconds} | {result.executions:,} | {result.coverage:,} | {result.crashes}"
        print(f"| {name} | {numbers} |", flush=True)
    return int(any(result.crashes for result in results))


if __name__ == "__main__":
    sys.exit(main())
