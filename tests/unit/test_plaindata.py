"""Checkpoints that are continued from: their index is compared with what Megatron writes before torch reads it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from phimr_nemo.errors import UserError
from phimr_nemo.model.files.plaindata import FORCE_PLAIN, check_index, only_plain_data


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As torch writes it, with a tensor and a number."""
    directory = tmp_path / "checkpoint"
    dcp.save({"weight": torch.arange(6.0), "step": 3}, checkpoint_id=directory, no_dist=True)
    torch.save({"step": 3, "rng": torch.zeros(4, dtype=torch.uint8)}, directory / "common.pt")
    return directory


def load(directory: Path) -> Any:
    """In the two ways in which Megatron reads."""
    state = {"weight": torch.zeros(6), "step": 0}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state, torch.load(directory / "common.pt", weights_only=False)


def test_what_was_saved_is_loaded(checkpoint: Path) -> None:
    with only_plain_data(checkpoint):
        state, common = load(checkpoint)
    assert torch.equal(state["weight"], torch.arange(6.0))
    assert (state["step"], common["step"]) == (3, 3)
    assert FORCE_PLAIN not in os.environ


def test_a_hostile_index_is_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    index.planner_data = Payload(tmp_path / "pwned")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"posix\.mkdir"), only_plain_data(checkpoint):
        load(checkpoint)
    assert not (tmp_path / "pwned").exists()
    # The test means something: torch alone runs it.
    load(checkpoint)
    assert (tmp_path / "pwned").exists()


def test_a_hostile_state_is_refused_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"step": Payload(tmp_path / "pwned")}, checkpoint / "common.pt")
    with pytest.raises(UserError, match="plain data"), only_plain_data(checkpoint):
        load(checkpoint)
    assert not (tmp_path / "pwned").exists()
    load(checkpoint)
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "named", [eval, os.system, __import__, pickle.loads, torch.load, torch.serialization.load, getattr]
)
def test_no_function_can_be_named_in_any_protocol(named: Any, protocol: int, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"key": named}, protocol))
    with pytest.raises(UserError, match="it names"):
        check_index(tmp_path / ".metadata")


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 400])
def test_a_cut_index_is_refused(kept: int, checkpoint: Path) -> None:
    index = checkpoint / ".metadata"
    index.write_bytes(index.read_bytes()[:kept])
    with pytest.raises(UserError, match="plain data"):
        check_index(index)


def test_a_variable_that_was_set_stays_set(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_PLAIN, "0")
    with only_plain_data(checkpoint):
        assert os.environ[FORCE_PLAIN] == "1"
    assert os.environ[FORCE_PLAIN] == "0"
