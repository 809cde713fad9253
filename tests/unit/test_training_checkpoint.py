"""Which checkpoint a run continues from, keeps and exports, with directories that only look like checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch.distributed as dist

from phimr_nemo.config import CheckpointConfig
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import METRICS_FILE
from phimr_nemo.training.early_stopping import Judge, Measured
from phimr_nemo.training.metrics import metrics_of
from phimr_nemo.training.seal import checkpoint_name, is_sealed, write_seal

STEPS = 6


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(directory: Path, step: int) -> Path:
    path = directory / "checkpoints" / checkpoint_name(step)
    path.mkdir(parents=True)
    (path / "shard").write_bytes(bytes([step]) * 100)
    write_seal(path, {})
    return path


def damage(path: Path) -> None:
    (path / "shard").write_bytes(b"\xff" * 100)


def store(directory: Path, losses: Mapping[int, float], *, keep: int = 1, best: bool = True):  # type: ignore[no-untyped-def]
    from phimr_nemo.training.checkpoint import CheckpointStore

    lines = [json.dumps({"step": step, "val_loss": loss}) for step, loss in losses.items()]
    (directory / METRICS_FILE).write_text("\n".join(lines), "utf-8")
    judge = Judge(directory, metrics_of("sft")["val_loss"], None, every=1, last=STEPS)
    return CheckpointStore(directory / "checkpoints", CheckpointConfig(every=1, keep=keep, best=best), judge)


def test_the_newest_whole_one_is_continued_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, flipped, unsealed = (make(tmp_path, step) for step in (2, 3, 4))
    damage(flipped)
    (unsealed / "SEAL.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path, {}).newest_whole() == good
    said = [record.getMessage() for record in caplog.records]
    assert [str(path) in message for path, message in zip((unsealed, flipped), said, strict=True)] == [True, True]


def test_a_run_without_a_finished_checkpoint_starts(tmp_path: Path) -> None:
    assert store(tmp_path, {}).newest_whole() is None
    (make(tmp_path, 1) / "SEAL.json").unlink()
    assert store(tmp_path, {}).newest_whole() is None


def test_a_run_of_damaged_ones_ends(tmp_path: Path) -> None:
    for step in (1, 2):
        damage(make(tmp_path, step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole") as caught:
        store(tmp_path, {}).newest_whole()
    assert all(checkpoint_name(step) in caught.value.problem for step in (1, 2))


def test_a_damaged_best_is_named_and_the_next_best_is_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = {step: make(tmp_path, step) for step in (2, 4, 6)}
    losses = {1: 0.5, 2: 1.0, 4: 2.0, 6: 3.0}
    # The best measurement of all has no checkpoint any more.
    assert store(tmp_path, losses).best_whole(STEPS) == Measured(2, 1.0)
    assert store(tmp_path, losses, best=False).best_whole(STEPS) is None
    damage(paths[2])
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path, losses).best_whole(STEPS) == Measured(4, 2.0)
    assert str(paths[2]) in caplog.text


def test_without_a_measurement_the_last_step_is_the_best_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, STEPS)
    with caplog.at_level(logging.WARNING):
        assert store(tmp_path, {}).best_whole(STEPS) is None
    assert "never measured" in caplog.text


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    """Against brute force, for every place of the best one."""
    for place in range(1, STEPS + 1):
        directory = tmp_path / str(place)
        paths = {step: make(directory, step) for step in range(1, STEPS + 1)}
        losses = {step: float(abs(step - place)) for step in paths}
        kept = store(directory, losses, keep=2)
        kept._mark_best(STEPS)
        kept._prune(STEPS)
        assert kept.steps() == sorted({STEPS, STEPS - 1, place})
        assert kept.is_best(STEPS) == (place == STEPS)
        assert all(is_sealed(paths[step]) for step in kept.steps())


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    whole, half = make(tmp_path, 1), make(tmp_path, 2)
    (half / "SEAL.json").unlink()
    left_over = tmp_path / "checkpoints" / ".step=2.sums-00000.json"
    left_over.write_text("{}", "utf-8")
    store(tmp_path, {}).clear_unfinished()
    assert sorted((tmp_path / "checkpoints").iterdir()) == [whole]


def test_a_damaged_one_takes_no_place_among_those_that_are_kept(tmp_path: Path) -> None:
    """2 is continued from, 3 is damaged, 5 is new: two are kept, and 3 is none of them."""
    for step in (1, 2, 3):
        make(tmp_path, step)
    damage(tmp_path / "checkpoints" / checkpoint_name(3))
    kept = store(tmp_path, {}, keep=2, best=False)
    assert kept.newest_whole() == kept.path(2)
    make(tmp_path, 5)
    kept._prune(5)
    assert kept.steps() == [2, 5]


class NoPolicy:
    """What a restore asks of a policy, and what it handed over."""

    given: object = None

    def sharded_state_dict(self, *, is_loading: bool) -> dict[str, object]:
        return {"is_loading": is_loading}

    def load_state_dict(self, state: object) -> None:
        self.given = state


def test_no_stage_hands_over_a_state_that_transformer_engine_would_unpickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways in which a checkpoint is loaded: Lightning's for stages 1 and 2, Aligner's for 3 and 4."""
    import torch
    from nemo.lightning.io.pl import MegatronCheckpointIO

    from phimr_nemo.align import checkpoint as align
    from phimr_nemo.supervised import checkpointing as supervised

    states = {"model": {"layer._extra_state": torch.ones(1, dtype=torch.uint8)}, "identity": {}, "trainer": {}}
    make(tmp_path, 2)
    for module in (align, supervised):
        monkeypatch.setattr(module, "only_plain_data", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(align.dist_checkpointing, "load_common_state_dict", lambda _: states)
    monkeypatch.setattr(align.dist_checkpointing, "load", lambda *_: states)
    monkeypatch.setattr(MegatronCheckpointIO, "load_checkpoint", lambda *_, **__: states)
    policy = NoPolicy()
    with pytest.raises(UserError, match="no FP8"):
        align.TrainerCheckpoints(store(tmp_path, {}), policy, None, {}).restore()  # type: ignore[arg-type]
    assert policy.given is None
    for fp8, found in ((False, "no FP8"), (True, "not read")):
        with pytest.raises(UserError, match=found):
            supervised.StoreIO(store(tmp_path, {}), fp8=fp8).load_checkpoint(tmp_path)
