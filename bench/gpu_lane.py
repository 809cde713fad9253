"""What is to be known on a GPU, in twelve minutes: independent parts in order of value, each with a limit of its own.

    python bench/gpu_lane.py [--out DIR] [--parts train-bf16 logprobs] [--seconds 720] [--rehearse]

It needs a CUDA device and an interpreter with torch for it; what else a part needs it says (`PARTS`). Every part is a
process of its own. What it found is written when it ends, before the next one starts: DIR/<part>.json and the text of
DIR/summary.txt; DIR/<part>.log has what it printed. A part that fails, runs out of time or lacks a package is
recorded as that, with the reason and with the results that it had printed by then, and the rest goes on. The limits
add up to the total, so every part gets its own; what one leaves over is not given to others.

`--rehearse` runs the same parts on the CPU with small sizes: a test of the plan, not a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from common import print_result, versions

HERE: Final = Path(__file__).resolve().parent
REPOSITORY: Final = HERE.parent
TOTAL_SECONDS: Final = 720.0
LEAST_SECONDS: Final = 5.0
"""A part is not started with less."""
PROBE_SECONDS: Final = 60.0
REASON_CHARACTERS: Final = 600
PACKAGES: Final = ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "nemo-toolkit", "numpy")
MISSING: Final = re.compile(r"^ModuleNotFoundError: No module named '([\w.]+)'", re.MULTILINE)
PROBE: Final = """
import json, torch
there = torch.cuda.is_available()
properties = torch.cuda.get_device_properties(0) if there else None
print(json.dumps({
    "device": torch.cuda.get_device_name() if there else "cpu",
    "devices": torch.cuda.device_count(),
    "memory_gib": round(properties.total_memory / 2**30, 1) if there else None,
    "capability": list(torch.cuda.get_device_capability()) if there else None,
    "cuda": torch.version.cuda,
}))
"""

Status = Literal["ok", "failed", "out of time", "lacks a package", "not started"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One independent piece of the lane.

    Attributes:
        name: of its files.
        seconds: its limit.
        command: what is run, after the interpreter; `--rehearse` is added in a rehearsal.
        needs: top-level modules without which it is not started.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def _own(name: str, seconds: float, *needs: str) -> Part:
    return Part(name, seconds, (str(HERE / "gpu_parts.py"), name), ("torch", *needs))


PARTS: Final = (
    _own("parity-te-bf16", 75, "megatron", "transformers", "transformer_engine"),
    _own("train-bf16", 150, "megatron"),
    _own("train-fp8", 120, "megatron", "transformer_engine"),
    _own("logprobs", 45),
    _own("sampler", 75),
    _own("recipe", 105, "megatron", "nemo"),
    _own("parity-bf16", 60, "megatron", "transformers"),
    _own("device-tests", 90, "megatron", "transformers", "pytest"),
)
"""In order of value."""


def machine_facts() -> dict[str, Any]:
    """The device, and versions of what is installed."""
    facts: dict[str, Any] = {"versions": versions(*PACKAGES), "device": "unknown"}
    try:
        probe = [sys.executable, "-c", PROBE]
        done = subprocess.run(probe, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True)
        facts.update(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        facts["probe"] = _tail(getattr(error, "stderr", None) or str(error))
    return facts


def run_parts(
    parts: Sequence[Part], out: Path, *, total: float, rehearse: bool, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Run the parts one after the other and leave a record of each in `out`.

    Args:
        parts: in the order in which they run.
        out: where the records go; made if it is not there, and replaced file by file.
        total: seconds for all of them.
        rehearse: on the CPU, with small sizes.
        facts: of the machine, for every record.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + total
    records: list[dict[str, Any]] = []
    for part in parts:
        left = ends - time.monotonic()
        record = {
            "part": part.name,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "limit_seconds": min(part.seconds, max(left, 0.0)),
            "rehearsal": rehearse,
            **run_part(part, out / f"{part.name}.log", left, rehearse),
            "machine": facts,
        }
        records.append(record)
        _write(out / f"{part.name}.json", json.dumps(record, indent=1) + "\n")
        _write(out / "summary.txt", summary(records, facts, rehearse))
        print(_line(record), flush=True)
    return records


def run_part(part: Part, log: Path, left: float, rehearse: bool) -> dict[str, Any]:
    """One part in a process group of its own: its status, reason, seconds and result."""
    log.write_text("")
    absent = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if absent:
        return _ended("lacks a package", ", ".join(absent), 0.0, {})
    if left < LEAST_SECONDS:
        return _ended("not started", f"{max(left, 0):.0f} s of the total were left", 0.0, {})
    command = [sys.executable, *part.command, *(["--rehearse"] if rehearse else [])]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=_environment(),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(min(part.seconds, left))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # What it has started itself goes with it, also where this program is interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - started
    text = log.read_text(errors="replace")
    result = results_in(text)
    if code is None:
        return _ended("out of time", f"stopped after {seconds:.0f} s", seconds, result)
    if code != 0:
        missing = MISSING.findall(text)
        if missing:
            return _ended("lacks a package", missing[-1], seconds, result)
        return _ended("failed", f"exit status {code}: {_tail(text)}", seconds, result)
    if not result:
        return _ended("failed", f"no result: {_tail(text)}", seconds, result)
    return _ended("ok", "", seconds, result)


def results_in(text: str) -> dict[str, Any]:
    """What the RESULT lines of a part say together; a later one adds to and replaces an earlier one's keys."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if line.startswith("RESULT "):
            # The last line of a process that was stopped may be half a line.
            with contextlib.suppress(ValueError):
                found.update(json.loads(line.removeprefix("RESULT ")))
    return found


def summary(records: Sequence[dict[str, Any]], facts: dict[str, Any], rehearse: bool) -> str:
    """What a person reads."""
    head = ["A rehearsal on the CPU with small sizes: no measurement.", ""] if rehearse else []
    head += [f"{facts['device']}; " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())]
    lines: list[str] = []
    for record in records:
        lines += ["", f"{record['date']}  {_line(record)}"]
        lines += [f"  {name}: {value}" for name, value in record["result"].items()]
    return "\n".join([*head, *lines]) + "\n"


def _line(record: dict[str, Any]) -> str:
    reason = f": {record['reason'].splitlines()[-1]}" if record["reason"] else ""
    return f"{record['part']}: {record['status']} ({record['seconds']:.0f} s){reason}"


def _ended(status: Status, reason: str, seconds: float, result: dict[str, Any]) -> dict[str, Any]:
    return {"status": status, "reason": reason, "seconds": round(seconds, 1), "result": result}


def _tail(text: str) -> str:
    return text.strip()[-REASON_CHARACTERS:]


def _write(path: Path, text: str) -> None:
    """Whole or not at all: the lane may be stopped at any time."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def _environment() -> dict[str, str]:
    """This source tree and the interpreter's path, offline."""
    path = os.pathsep.join([str(REPOSITORY), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
    return {**os.environ, **quiet, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, help="default: bench/results/gpu-<date>")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="some of them only")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes")
    options = parser.parse_args()
    facts = machine_facts()
    if not options.rehearse and facts.get("devices", 0) == 0:
        raise SystemExit(f"{sys.executable} finds no CUDA device ({facts.get('probe', facts['device'])})")
    out = options.out or HERE / "results" / f"gpu-{datetime.date.today().isoformat()}"
    parts = [part for part in PARTS if part.name in options.parts]
    records = run_parts(parts, out, total=options.seconds, rehearse=options.rehearse, facts=facts)
    print(f"records in {out}")
    print_result({"bench": "gpu_lane", "parts": {record["part"]: record["status"] for record in records}})


if __name__ == "__main__":
    main()
