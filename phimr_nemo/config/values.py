"""Kinds of values that keys of a configuration take, each with its rule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from phimr_nemo.config.rules import KEY, RuleBroken
from phimr_nemo.errors import LONGEST_NAME, LONGEST_PATH, path_too_long

LARGEST_NUMBER: Final = 2**53
"""Whole numbers up to here are exact everywhere, in JSON too."""
ROOM_BELOW: Final = 195
ROOM_OF_NAME: Final = 25
"""Bytes of a path and of a name that the files of a run and their temporary names need."""
LARGEST_SEED: Final = 2**32 - 1


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise RuleBroken(f"{KEY}={value}", rule=f"{KEY} is a number", remedy=f"for example {KEY}=1")
    return value


def _a_path(value: Any) -> Any:
    text = str(value) if isinstance(value, str | Path) else "?"
    fault = "is empty" if not text else "holds a zero byte" if "\0" in text else ""
    if fault:
        raise RuleBroken(
            f"{KEY} {fault}", rule=f"{KEY} names a file or directory", remedy=f"for example {KEY}=runs/x"
        )
    if _is_too_long(text):
        refused = path_too_long(text)
        raise RuleBroken(f"{KEY}: {refused.problem}", rule=refused.rule, remedy=refused.remedy)
    return value


def _is_too_long(path: str) -> bool:
    """Whether no file system takes a path, with what a run writes below it."""
    names = max((len(os.fsencode(name)) for name in path.split("/")), default=0)
    return len(os.fsencode(path)) > LONGEST_PATH - ROOM_BELOW or names > LONGEST_NAME - ROOM_OF_NAME


IsNumber = BeforeValidator(_no_truth_value)
"""YAML's `true` and `yes` are no numbers; pydantic would take them for 1."""
Positive = Annotated[int, Field(ge=1, le=LARGEST_NUMBER), IsNumber]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST_NUMBER), IsNumber]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED), IsNumber]
Number = Annotated[float, IsNumber]
Share = Annotated[float, Field(ge=0.0, le=1.0), IsNumber]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0), IsNumber]
AboveZero = Annotated[float, Field(gt=0.0), IsNumber]
AtLeastZero = Annotated[float, Field(ge=0.0), IsNumber]
AtLeastOne = Annotated[float, Field(ge=1.0), IsNumber]
AboveOne = Annotated[float, Field(gt=1.0), IsNumber]
Decay = Annotated[float, Field(ge=0.0, lt=1.0), IsNumber]
Name = Annotated[str, Field(min_length=1)]
Place = Annotated[Path, BeforeValidator(_a_path)]
