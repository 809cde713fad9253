"""Transformer Engine's scaling state in a checkpoint, read without running anything that it names.

Every layer of Transformer Engine keeps an `_extra_state` in a checkpoint: an empty tensor, or, with FP8, a pickle
inside a tensor, which it unpickles itself when the model is loaded, whatever the number format of the run. So a
tensor that is not empty is refused without FP8; with FP8 it is read here with the few names that such a state needs,
and what was read is written anew in its place.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from phimr_nemo.errors import UserError

KEY: Final = "_extra_state"
MAX_STATE_BYTES: Final = 64 << 20
"""A layer's history of 1,024 steps takes kilobytes."""

_RECIPES: Final = "transformer_engine.common.recipe"
KNOWN: Final = frozenset(
    {
        *(
            (_RECIPES, name)
            for name in (
                "DelayedScaling",
                "Float8CurrentScaling",
                "Float8BlockScaling",
                "MXFP8BlockScaling",
                "Format",
                "_FormatHelper",
                "MMParams",
                "QParams",
            )
        ),
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_tensor_v2"),
    }
)
"""What Transformer Engine 2's states are made of; torch's tensors come on top, as plain data."""


class _State(pickle.Unpickler):
    """Builds what a scaling state is made of, and ends at the first other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # A tensor inside a pickle is a file of torch's in it, which torch itself would read without restriction.
            return _plain_storage
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _plain_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def read_safely(state: MutableMapping[Any, Any] | list[Any], *, fp8: bool, checkpoint: Path) -> None:
    """Make every `_extra_state` in a loaded checkpoint harmless, in place, before a model is given it.

    Args:
        state: what was loaded, nested as it is.
        fp8: whether this run computes in 8 bits and so needs them.
        checkpoint: where from, for a message.

    Raises:
        UserError: one holds something without FP8, or something that is no scaling state.
    """
    if isinstance(state, MutableMapping):
        for key, value in list(state.items()):
            if isinstance(key, str) and KEY in key and not isinstance(value, MutableMapping):
                state[key] = _harmless(value, key, fp8, checkpoint)
    for value in state.values() if isinstance(state, MutableMapping) else state:
        if isinstance(value, MutableMapping | list):
            read_safely(value, fp8=fp8, checkpoint=checkpoint)


def _harmless(value: Any, key: str, fp8: bool, checkpoint: Path) -> Tensor | None:
    if value is None or (isinstance(value, Tensor) and value.numel() == 0):
        return value
    if not fp8:
        raise _refused(
            checkpoint, key, "it is not empty, and this run has no FP8", "restore the run's own checkpoint"
        )
    remedy = "continue from a checkpoint that Transformer Engine 2 wrote, or from the run's export as a new base"
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise _refused(checkpoint, key, f"it is a {type(value).__name__} and no tensor of bytes", remedy)
    if value.numel() > MAX_STATE_BYTES:
        raise _refused(checkpoint, key, f"it has {value.numel()} bytes", remedy)
    try:
        content = _State(io.BytesIO(value.detach().cpu().numpy().tobytes())).load()
        if not isinstance(content, Mapping | None):
            raise pickle.UnpicklingError(f"it is a {type(content).__name__} and no mapping")
    except Exception as error:  # a hostile or damaged pickle can fail in any way
        raise _refused(checkpoint, key, str(error) or type(error).__name__, remedy) from error
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def _refused(checkpoint: Path, key: str, found: str, remedy: str) -> UserError:
    return UserError(
        f"{checkpoint} holds {key}, which is not read: {found}",
        rule="Transformer Engine's state is empty, and with FP8 a recipe, numbers and tensors",
        remedy=remedy,
    )
