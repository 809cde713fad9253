"""A stage's tiny preset with some overrides, and nothing left open."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import STAGES, load_config

PRESET: Final = {stage: "paper" if stage == "prepare" else "tiny" for stage in STAGES}
OPEN: Final = {"prepare": ["sources=[{name: a, path: a.jsonl}]", "decontamination=null"], "midtrain": ["base=base"]}


def load(stage: str, *overrides: str) -> Any:
    """The configuration of a stage."""
    path = Path("conf") / stage / f"{PRESET[stage]}.yaml"
    return load_config(STAGES[stage], path, [*OPEN.get(stage, ()), *overrides])
