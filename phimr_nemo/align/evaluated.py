"""pass@1 while DPO trains: the first process samples the policy's weights with an engine of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch.distributed as dist

from phimr_nemo.align.measuring import Measure
from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import DPOConfig
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.training import platform
from phimr_nemo.training.distributed import wait_for_all

if TYPE_CHECKING:
    from phimr_nemo.evaluate.held_out import HeldOut, OwnEngine


class Evaluated:
    """The evaluation of a run, if it has one.

    Args:
        config: of the run.
        run: its directory.
        policy: what is trained.
        trained: the questions that it is trained on.

    Raises:
        UserError: an unreadable problems file, or questions that are trained on.
    """

    def __init__(self, config: DPOConfig, run: RunDirectory, policy: MegatronPolicy, trained: Iterable[str]) -> None:
        self._policy, asked = policy, config.evaluation
        self._config = asked
        self._held_out: HeldOut | None = None
        self._engine: OwnEngine | None = None
        if asked is not None:
            # What samples and grades is loaded where it is used.
            from phimr_nemo.evaluate.held_out import HeldOut, OwnEngine

            self._held_out = HeldOut(run.path, asked, base=config.base, seed=config.run.seed)
            self._held_out.check_apart(trained, config.pairs)
            self._engine = OwnEngine(asked, config.base, config.model, config.sequence_length, platform.device())

    def measures(self) -> list[Measure]:
        """Its measurement; none without an evaluation."""
        return [] if self._config is None else [Measure(self._config.every, "pass1", self._pass1)]

    def _pass1(self, step: int) -> dict[str, float]:
        assert self._held_out is not None
        assert self._engine is not None
        tensors = self._policy.weights()
        found: dict[str, float] = {}
        if dist.get_rank() == 0:
            found = self._held_out.score(self._engine.sample(self._held_out, tensors, step), step)
        else:
            for _ in tensors:
                continue
        wait_for_all(f"problems are answered at step {step}")
        return found

    def close(self) -> None:
        """Close what the engine holds."""
        if self._engine is not None:
            self._engine.close()
