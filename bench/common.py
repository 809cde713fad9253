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
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    installed = {distribution.name.lower().replace("_", "-") for distribution in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages if name in installed},
    }


def machine(**facts: object) -> dict[str, object]:
    """What the figures were measured on."""
    return {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system(), **facts}


def print_result(result: Mapping[str, Any]) -> None:
    """The last line of every program here."""
    print("RESULT " + json.dumps(result))


def status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, the resident set, or VmHWM, its peak (Linux)."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"/proc/self/status has no {field}: memory on the CPU is measured on Linux only")


def in_child(program: str, arguments: Sequence[str], environment: Mapping[str, str] = ONE_THREAD) -> dict[str, Any]:
    """The JSON object that `program` prints last when it is run with `arguments` in a process of its own."""
    command = [sys.executable, program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode != 0:
        raise RuntimeError(f"measuring {' '.join(arguments)} failed:\n{done.stderr[-SHOWN_ERROR:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
