"""The checkpoint store as NeMo-Aligner's trainers call it: policy, trainer's counters, and what must not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from megatron.core import dist_checkpointing

from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.errors import UserError
from phimr_nemo.model.files.checkpoints import NEMO_WEIGHTS
from phimr_nemo.model.files.fp8state import read_safely
from phimr_nemo.model.files.plaindata import only_plain_data
from phimr_nemo.training.checkpoint import CheckpointStore
from phimr_nemo.training.guard import BatchGuard

TRAINER_COUNTERS: Final = ("step", "consumed_samples", "epoch", "reinforce_optimization_step")


class TrainerCheckpoints:
    """NeMo-Aligner's `ckpt_callback`.

    Args:
        store: of the run.
        policy: what is saved and loaded: model, optimizer, schedule.
        guard: saved with it.
        identity: what must be the same when the run is resumed, by name.
    """

    def __init__(
        self, store: CheckpointStore, policy: MegatronPolicy, guard: BatchGuard, identity: Mapping[str, str]
    ) -> None:
        self.store, self._policy, self._guard, self._identity = store, policy, guard, dict(identity)

    def custom_save(self, monitor_candidates: Mapping[str, Any], is_train_end: bool = False) -> None:  # noqa: ARG002
        """Save after a step (collective). The trainer's counters come in among the metrics.

        Raises:
            OSError: the disk is full or the place cannot be written.
        """
        counters = {name: int(monitor_candidates[name]) for name in TRAINER_COUNTERS if name in monitor_candidates}
        state = {
            **self._policy.sharded_state_dict(),
            "trainer": counters,
            "guard": self._guard.state_dict(),
            "identity": self._identity,
        }
        self.store.write(counters["step"], state)

    def restore(self) -> dict[str, int]:
        """Load the newest whole checkpoint, in whatever layout it was saved (collective).

        Returns:
            The trainer's counters for `load_state_dict`; all 0 when there is no checkpoint.

        Raises:
            UserError: none is whole; it belongs to a run with another base or other data, or is no plain data.
        """
        path = self.store.newest_whole()
        self.store.clear_unfinished()
        if path is None:
            return dict.fromkeys(TRAINER_COUNTERS, 0)
        weights = path / NEMO_WEIGHTS
        with only_plain_data(weights):
            saved = dist_checkpointing.load_common_state_dict(str(weights))["identity"]
            self._check_identity(str(path), saved)
            state = dist_checkpointing.load(self._policy.sharded_state_dict(is_loading=True), str(weights))
        # The alignment stages compute without FP8.
        read_safely(state, fp8=False, checkpoint=path)
        self._policy.load_state_dict(state)
        self._guard.load_state_dict(state["guard"])
        return dict(state["trainer"])

    def _check_identity(self, path: str, saved: Mapping[str, str]) -> None:
        names = sorted(saved.keys() | self._identity.keys())
        changed = [name for name in names if saved.get(name) != self._identity.get(name)]
        if changed:
            differences = ", ".join(f"{n}: {saved.get(n)} -> {self._identity.get(n)}" for n in changed)
            raise UserError(
                f"{path} belongs to another run ({differences})",
                rule="a run is resumed with the base and the data that it began with",
                remedy="restore them, or choose another run.output",
            )
