"""What the programs here share: processes of their own for each side, memory, versions, and the RESULT line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
KIB = 2**10
SHOWN_ERROR = 3000
"""Characters of a failed process's error output."""
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
"""Instruction sets that matrix products are fast or slow by, as Linux names them."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    installed = {distribution.name.lower().replace("_", "-") for distribution in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages if name in installed},
    }


def processor() -> tuple[str, list[str]]:
    """The processor's name, and which wide or low-precision instructions it has (Linux; elsewhere the kind alone)."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine(), []
    values = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
    fields = {name.strip(): value.strip() for name, value in values.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.machine()), [name for name in FEATURES if name in flags]


def machine(**facts: object) -> dict[str, object]:
    """What the figures were measured on."""
    name, features = processor()
    what = {"processor": name, "features": features, "cores": os.cpu_count(), "system": platform.system()}
    return {**what, **facts}


def print_result(result: Mapping[str, Any]) -> None:
    """The last line of every program here."""
    print("RESULT " + json.dumps(result))


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, the resident set, or VmHWM, its peak (Linux)."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"/proc/self/status has no {field}: memory on the CPU is measured on Linux only")


def between(text: str, begin: str, end: str, lines: str) -> str:
    """A document with lines between its marks.

    Raises:
        ValueError: it has no marks.
    """
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise ValueError(f"no marks {begin!r} and {end!r}")
    return f"{before}{begin}\n{lines}\n{end}{after}"


def in_child(program: str, arguments: Sequence[str], environment: Mapping[str, str] = ONE_THREAD) -> dict[str, Any]:
    """The JSON object that `program` prints last when it is run with `arguments` in a process of its own."""
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode != 0:
        raise RuntimeError(f"measuring {' '.join(arguments)} failed:\n{done.stderr[-SHOWN_ERROR:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
