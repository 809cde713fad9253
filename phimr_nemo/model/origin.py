"""What a model directory says of its own making: a field of ours in config.json, which travels with the weights.

Libraries that do not know the field keep it (transformers writes it back when it saves a model). What stands there is
input like any other: what is not of the expected kind counts as absent. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, get_args

from phimr_nemo.config import LongRopePolicy
from phimr_nemo.model.architecture import CONFIG_FILE
from phimr_nemo.store.unpacking import read_json

ORIGIN_FIELD: Final = "phimr_nemo"


@dataclass(frozen=True)
class Origin:
    """How a model was made; None where that is not known.

    Attributes:
        sequence_length: longest sequence of the last training run (tokens).
        longrope: its policy for LongRoPE's factors.
        knows: what the model can be asked, in one or two sentences for people.
        single_turn: whether it has never seen a conversation of several questions; stages hand it on.
    """

    sequence_length: int | None = None
    longrope: LongRopePolicy | None = None
    knows: str | None = None
    single_turn: bool | None = None

    def to_config(self) -> dict[str, Any]:
        """The field for config.json; {} when nothing is known."""
        stated = {item.name: getattr(self, item.name) for item in fields(self)}
        known = {name: value for name, value in stated.items() if value is not None}
        return {ORIGIN_FIELD: known} if known else {}


def read_origin(directory: Path) -> Origin:
    """What a model directory says of its making; an empty :class:`Origin` for models from elsewhere."""
    try:
        config = read_json(directory / CONFIG_FILE)
    except (OSError, ValueError):
        return Origin()
    stated = config.get(ORIGIN_FIELD) if isinstance(config, Mapping) else None
    if not isinstance(stated, Mapping):
        return Origin()
    length, policy, knows, single_turn = (stated.get(item.name) for item in fields(Origin))
    is_length = isinstance(length, int) and not isinstance(length, bool) and length >= 1
    return Origin(
        sequence_length=length if is_length else None,
        longrope=policy if policy in get_args(LongRopePolicy) else None,
        knows=knows if isinstance(knows, str) else None,
        single_turn=single_turn if isinstance(single_turn, bool) else None,
    )


def trained_from(base: Path, sequence_length: int, longrope: LongRopePolicy) -> Origin:
    """The origin of what a training run makes of `base`: this project trains on single questions."""
    return Origin(sequence_length, longrope, single_turn=read_origin(base).single_turn)
