"""Whether this machine, or the job on it, has NVIDIA GPUs, as far as can be told without torch."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping
from typing import Final

HIDDEN: Final = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES by which a user says: on the CPU."""
ALLOTTED: Final = ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


def has_gpu_driver() -> bool:
    """Whether an NVIDIA driver shows itself; without one torch need not be asked."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def promised_gpus(environment: Mapping[str, str] | None = None) -> str:
    """What says that there are GPUs to compute on, as a phrase; empty where nothing does, or where they are hidden.

    Args:
        environment: of the process; None = this one's.
    """
    values = os.environ if environment is None else environment
    if values.get("CUDA_VISIBLE_DEVICES", "unset").strip() in HIDDEN:
        return ""
    allotted = next((name for name in ALLOTTED if values.get(name, "0").strip() not in ("", "0")), None)
    if allotted is not None:
        return f"{allotted}={values[allotted]}"
    return "an NVIDIA driver" if has_gpu_driver() else ""
