"""A batch that would do harm is not trained on: loss or gradient that is not finite, and spikes of one of them.

The decision falls between the gradients and the update, from numbers that every rank has, so all ranks decide alike.
A skipped batch counts as a step (data and learning rate move on), and changes no weight and no optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import torch
import torch.distributed as dist

from phimr_nemo.config import GuardConfig
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import write_json
from phimr_nemo.training import platform

MOST_SKIPS_IN_A_ROW: Final = 10
"""After so many the data is not what is wrong."""

MOST_OVERFLOWS_IN_A_ROW: Final = 12
"""The loss scale has then fallen from its start to 1, and it is not what is wrong."""

GUARD_DIRECTORY: Final = "guard"

Action = Literal["train", "skip", "stop", "warn"]


@dataclass(frozen=True)
class Finding:
    """What the guard makes of a step.

    Attributes:
        action: what happens to the batch.
        reason: why, for a person; empty when nothing is wrong.
    """

    action: Action
    reason: str


def judge(loss: float, grad_norm: float, accepted: Sequence[float], config: GuardConfig) -> Finding:
    """Decide on a batch.

    Args:
        loss: its loss.
        grad_norm: the global gradient norm, before clipping.
        accepted: what the spike rule looks at, of the last batches that were trained on, oldest first.
        config: the rules.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return Finding(config.on_nan, f"loss {loss}, gradient norm {grad_norm}: not finite")
    if config.spike_factor is None or len(accepted) < config.spike_window:
        return Finding("train", "")
    usual, value = median(accepted[-config.spike_window :]), watched(loss, grad_norm, config)
    if value > config.spike_factor * usual:
        of = f"{config.spike_factor} x {usual:.4f}, the median of {config.spike_window} batches"
        return Finding(config.on_spike, f"{config.spike_of} {value:.4f} > {of}")
    return Finding("train", "")


def watched(loss: float, grad_norm: float, config: GuardConfig) -> float:
    """Return the value that the spike rule looks at."""
    return loss if config.spike_of == "loss" else grad_norm


class BatchGuard:
    """Puts :func:`judge` in front of the optimizer, and keeps a record of every batch that it does not like.

    Args:
        directory: the run directory; records go to `guard/step-N.json` there.
        config: the rules.
        describe: optimizer step (from 1) -> the rows of its batch, for the record.
    """

    def __init__(self, directory: Path, config: GuardConfig, describe: Callable[[int], list[dict[str, Any]]]) -> None:
        self.directory, self.config, self.describe = directory / GUARD_DIRECTORY, config, describe
        self._accepted: list[float] = []
        self._skipped_in_a_row = 0
        self._overflows_in_a_row = 0
        self._skipped = 0
        self._loss: torch.Tensor | float = 0.0

    @property
    def skipped(self) -> int:
        """Batches skipped so far."""
        return self._skipped

    def attach(self, megatron: Any, step: Callable[[], int]) -> None:
        """Stand between gradients and update: Megatron computes the norm, clips, then calls the update.

        Args:
            megatron: Megatron's optimizer.
            step: the number of the optimizer step that is under way (from 1).
        """
        norm, update, prepare = megatron.get_grad_norm, megatron.step_with_ready_grads, megatron.prepare_grads
        seen: list[Any] = [None]

        def get_grad_norm() -> Any:
            seen[0] = norm()
            return seen[0]

        def step_with_ready_grads() -> bool:
            return bool(update()) if self._allows(step(), float(seen[0])) else False

        def prepare_grads() -> bool:
            # In fp16 Megatron leaves out a step that overflows, and asks for no norm.
            overflowed = bool(prepare())
            self._overflows_in_a_row = self._overflows_in_a_row + 1 if overflowed else 0
            if self._overflows_in_a_row > MOST_OVERFLOWS_IN_A_ROW:
                self._stop(step(), Finding("stop", f"{self._overflows_in_a_row} steps in a row overflow fp16"))
            return overflowed

        megatron.prepare_grads = prepare_grads
        megatron.get_grad_norm = get_grad_norm
        megatron.step_with_ready_grads = step_with_ready_grads

    def note_loss(self, loss: torch.Tensor | float) -> None:
        """Remember the loss of the batch under way; process for process the same, or 0 where it is not known."""
        self._loss = loss

    def _allows(self, step: int, grad_norm: float) -> bool:
        """Whether the optimizer may use this step's gradients (collective).

        Raises:
            UserError: the rules say that the run shall stop.
        """
        loss, grad_norm = self._agreed(grad_norm)
        finding = judge(loss, grad_norm, self._accepted, self.config)
        if finding.reason and dist.get_rank() == 0:
            self._record(step, loss, grad_norm, finding)
        if finding.action in ("train", "warn"):
            value = watched(loss, grad_norm, self.config)
            if math.isfinite(value):
                self._accepted = [*self._accepted, value][-self.config.spike_window :]
            self._skipped_in_a_row = 0
            return True
        if finding.action == "skip" and self._skipped_in_a_row < MOST_SKIPS_IN_A_ROW:
            self._skipped_in_a_row += 1
            self._skipped += 1
            return False
        self._stop(step, finding)
        return False

    def _stop(self, step: int, finding: Finding) -> None:
        rule, many = "guard.on_nan and guard.on_spike say what happens to such a batch", ""
        if finding.action == "skip":
            rule, many = f"at most {MOST_SKIPS_IN_A_ROW} batches in a row are skipped", ", as the batches before it"
        raise UserError(
            f"the batch of step {step} is not trained on{many} ({finding.reason})",
            rule=rule,
            remedy=f"look at its rows in {self.directory / _record_name(step)}; the run continues from its last "
            "checkpoint, with guard.on_nan=skip or guard.on_spike=skip without this batch; if many are "
            "like it, lower optim.lr",
        )

    def _agreed(self, grad_norm: float) -> tuple[float, float]:
        """Loss and gradient norm as all ranks see them: NaN where any rank has a number that is not finite."""
        # Where only the last pipeline stage knows the loss, and the others have 0, it is not negative.
        loss = float(self._loss)
        values = [loss, grad_norm]
        broken = [0.0 if math.isfinite(value) else 1.0 for value in values]
        finite = [value if math.isfinite(value) else 0.0 for value in values]
        together = torch.tensor([*broken, *finite], dtype=torch.float64, device=platform.device())
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        *flags, agreed_loss, agreed_norm = together.tolist()
        return (math.nan if flags[0] else agreed_loss, math.nan if flags[1] else agreed_norm)

    def _record(self, step: int, loss: float, grad_norm: float, finding: Finding) -> None:
        write_json(
            self.directory / _record_name(step),
            {
                "step": step,
                "loss": str(loss),
                "grad_norm": str(grad_norm),
                **asdict(finding),
                "rows": self.describe(step),
            },
        )

    # Stored and restored with every checkpoint.
    def state_dict(self) -> dict[str, Any]:
        """The values that the spike rule looks at, and how many batches were skipped."""
        return {
            "accepted": self._accepted,
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        self._accepted = list(state_dict["accepted"])
        self._skipped = state_dict["skipped"]
        self._skipped_in_a_row = state_dict["skipped_in_a_row"]


def _record_name(step: int) -> str:
    return f"step-{step:08d}.json"
