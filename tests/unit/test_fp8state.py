"""Transformer Engine's state in a checkpoint: refused without FP8, and read without running anything with it."""

from __future__ import annotations

import io
import os
import pickle
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from phimr_nemo.errors import UserError
from phimr_nemo.model.files.fp8state import MAX_STATE_BYTES, read_safely

RECIPES = "transformer_engine.common.recipe"
KEY = "decoder.layers.0.self_attention.linear_qkv._extra_state"
CHECKPOINT = Path("step=3")


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(Enum):
    HYBRID = _FormatHelper(448.0, 57344.0)


@dataclass
class DelayedScaling:
    """Transformer Engine's, by the fields that 2.5 writes."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str = "max"
    extra: dict[str, Any] = field(default_factory=dict)


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the recipes' names, where Transformer Engine is not installed and where it is."""
    for name in ("transformer_engine", "transformer_engine.common", RECIPES):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for kind in (_FormatHelper, Format, DelayedScaling):
        monkeypatch.setattr(kind, "__module__", RECIPES)
        monkeypatch.setattr(sys.modules[RECIPES], kind.__name__, kind, raising=False)


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def state(**further: Any) -> dict[str, Any]:
    """As `get_extra_state` makes it with delayed scaling."""
    return {
        "recipe": DelayedScaling(),
        "scale_fwd": torch.tensor([1.0, 2.0, 4.0]),
        "amax_history_fwd": torch.arange(12.0).view(4, 3),
        "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True, "names": ["a"], "pair": (1, 2.5)},
        **further,
    }


def loaded(value: Any) -> dict[str, Any]:
    return {"model": {"weight": torch.ones(2), KEY: value}, "chunks": [{KEY: None}], "step": 3}


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("empty", [None, torch.empty(0, dtype=torch.uint8)])
def test_an_empty_state_stays(empty: Any, fp8: bool) -> None:
    checkpoint = loaded(empty)
    read_safely(checkpoint, fp8=fp8, checkpoint=CHECKPOINT)
    assert checkpoint["model"][KEY] is empty


@pytest.mark.parametrize(
    "value",
    [
        as_tensor(pickle.dumps(state())),
        as_tensor(b"x"),
        torch.ones(1),
        io.BytesIO(b"pickle"),
        io.BytesIO(),
        b"pickle",
        [1],
    ],
    ids=["state", "byte", "number", "file", "empty file", "bytes", "list"],
)
def test_without_fp8_any_other_is_refused(value: Any) -> None:
    for checkpoint in (loaded(value), {"model": [{"deeper": {KEY: value}}]}):
        with pytest.raises(UserError, match="no FP8"):
            read_safely(checkpoint, fp8=False, checkpoint=CHECKPOINT)


def test_with_fp8_a_state_arrives_as_it_was() -> None:
    checkpoint = loaded(as_tensor(pickle.dumps(state())))
    read_safely(checkpoint, fp8=True, checkpoint=CHECKPOINT)
    # As Transformer Engine reads it.
    found, written = pickle.loads(checkpoint["model"][KEY].numpy().tobytes()), state()
    assert (found.keys(), found["recipe"]) == (written.keys(), written["recipe"])
    assert found["recipe"].fp8_format is Format.HYBRID
    assert found["extra_fp8_variables"] == written["extra_fp8_variables"]
    assert all(torch.equal(found[name], written[name]) for name in ("scale_fwd", "amax_history_fwd"))


def hidden_in_a_tensor(place: Path) -> bytes:
    """A tensor's file inside the pickle, with a payload in it: torch reads those without restriction."""
    file = io.BytesIO()
    torch.save(Payload(place), file)

    class Nested:
        def __reduce__(self) -> tuple[Any, tuple[bytes]]:
            return torch.storage._load_from_bytes, (file.getvalue(),)

    return pickle.dumps(state(scale_bwd=Nested()))


@pytest.mark.parametrize("how", ["plainly", "in the recipe", "in a tensor", "in protocol 0"])
def test_with_fp8_nothing_that_a_state_names_is_run(how: str, tmp_path: Path) -> None:
    place = tmp_path / "pwned"
    data = {
        "plainly": lambda: pickle.dumps(state(scale_bwd=Payload(place))),
        "in the recipe": lambda: pickle.dumps(state(recipe=DelayedScaling(extra={"f": Payload(place)}))),
        "in a tensor": lambda: hidden_in_a_tensor(place),
        "in protocol 0": lambda: pickle.dumps(state(scale_bwd=Payload(place)), 0),
    }[how]()
    with pytest.raises(UserError, match="not read"):
        read_safely(loaded(as_tensor(data)), fp8=True, checkpoint=CHECKPOINT)
    assert not place.exists()
    # The test means something: what Transformer Engine does with these bytes runs it.
    pickle.loads(data)
    assert place.exists()


@pytest.mark.parametrize("named", [eval, os.system, torch.load, torch.hub.load, pickle.loads, getattr])
def test_no_function_can_be_named(named: Any) -> None:
    with pytest.raises(UserError, match="it names"):
        read_safely(loaded(as_tensor(pickle.dumps(state(x=named)))), fp8=True, checkpoint=CHECKPOINT)


@pytest.mark.parametrize("kept", [1, 10, 100, 300])
def test_a_cut_state_is_refused(kept: int) -> None:
    with pytest.raises(UserError, match="not read"):
        read_safely(loaded(as_tensor(pickle.dumps(state())[:kept])), fp8=True, checkpoint=CHECKPOINT)


def test_what_is_no_state_is_refused() -> None:
    for value in (as_tensor(pickle.dumps([1])), io.BytesIO(b"x"), torch.ones(3), as_tensor(b"x").view(1, 1)):
        with pytest.raises(UserError, match="not read"):
            read_safely(loaded(value), fp8=True, checkpoint=CHECKPOINT)
    huge = torch.empty(MAX_STATE_BYTES + 1, dtype=torch.uint8)
    with pytest.raises(UserError, match=f"{MAX_STATE_BYTES + 1} bytes"):
        read_safely(loaded(huge), fp8=True, checkpoint=CHECKPOINT)
