"""GRPO on the loop of rounds: responses are graded, chosen by the stabilisers, and weighed by their advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from phimr_nemo.align.grpo.loop import RoundsTrainer
from phimr_nemo.align.grpo.objective import advantages_of
from phimr_nemo.align.grpo.rewards import Graded, import_rewards, reward_parts
from phimr_nemo.align.grpo.rollouts import (
    Rollout,
    check_graded,
    gathered,
    graded_rollouts,
    pass_rates_of,
    rollout_metrics,
)
from phimr_nemo.align.grpo.selection import selected
from phimr_nemo.align.grpo.stabilisers import refill_size, unsolved
from phimr_nemo.config import GRPOConfig
from phimr_nemo.generate.sampler import Completion


class GRPOTrainer(RoundsTrainer):
    """Rewards from a grader, and advantages within groups in the place of upstream's leave-one-out baseline."""

    config: GRPOConfig

    def __init__(self, *, config: GRPOConfig, **others: Any) -> None:
        super().__init__(config=config, **others)
        self._functions = import_rewards(config.reward)

    # ---- rollouts ------------------------------------------------------------------------------------------

    def _completed(self, dataset: Any, slots: Sequence[int], rollouts: list[Rollout]) -> tuple[int, dict[str, float]]:
        """Refill the round; what is logged of it, after a look at what the grader gave up on."""
        with self.timer("refill"):
            refills, sampled = self._refill(dataset, slots, rollouts)
        self._check_stop()
        check_graded(rollouts, self.config.monitor.ungraded_stop)
        self.pass_rates |= pass_rates_of(rollouts)
        return sampled, {**rollout_metrics(rollouts), "refills": refills, "solved_prompts": self._solved()}

    def _refill(self, dataset: Any, slots: Sequence[int], rollouts: list[Rollout]) -> tuple[int, int]:
        """Sample in the place of dropped prompts, into `rollouts`; further rounds, and prompts sampled in all."""
        wanted, first, sampled = self.config.prompts_per_step, self._free_slot, len(slots)
        for refills in range(self.config.refills):
            self._check_stop()
            size = refill_size(wanted, selected(rollouts, self.config, self.step).prompts, sampled, wanted)
            if not size:
                return refills, sampled
            more = range(first + sampled, first + sampled + size)
            rollouts.extend(self._judged(*self._sampled(dataset, more)))
            sampled += size
        return self.config.refills, sampled

    def _solved(self) -> int:
        bound = self.config.curriculum.solved_from
        return 0 if bound is None else sum(rate >= bound for rate in self.pass_rates.values())

    def _prompt_at(self, place: int) -> int:
        """The first prompt from a place of the epoch on that is not solved."""
        return unsolved(self.prompts.epoch, place, self.pass_rates, self.config.curriculum)

    def _judged(self, prompt_of: Mapping[int, int], completions: Sequence[Completion]) -> list[Rollout]:
        """All processes' responses with their verdicts and rewards (collective)."""
        graded = self._verdicts(prompt_of, completions)
        return gathered(graded_rollouts(completions, graded, prompt_of, self._reward_parts))

    def _reward_parts(self, graded: Graded) -> dict[str, float]:
        return reward_parts(graded, self.config.reward, self._functions, self.config.overlong)

    # ---- training rows -------------------------------------------------------------------------------------

    def generate_reinforce_data(self, rollout_batch: list[Rollout]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Choose the rows to train on, give them advantages, and lay out this rank's part of every update."""
        self._rollouts = rollout_batch
        selection = selected(rollout_batch, self.config, self.step)
        kept = set(selection.kept)
        self.kept_responses.keep(rollout_batch, self.prompts.prompts, kept, self.tokenizer, self.step + 1)
        chosen = [rollout_batch[i] for i in selection.kept]
        groups = torch.tensor([rollout.slot for rollout in chosen], dtype=torch.int64)
        rewards = torch.tensor([rollout.reward for rollout in chosen], dtype=torch.float32)
        advantages = advantages_of(self.config)(rewards, groups).tolist()
        rows = self._rows(chosen, advantages)
        with self.timer("logprobs"):
            if self.config.updates > 1:
                rows["old_logprobs"] = self.model.batch_log_probs(rows)
            if self.config.kl > 0:
                with self.model.as_reference():
                    rows["reference_logprobs"] = self.model.batch_log_probs(rows)
        taught = len(chosen) if self.config.kl or self.config.entropy_bonus else sum(map(bool, advantages))
        return rows, {**selection.metrics(len(rollout_batch)), "with_gradient": taught / len(rollout_batch)}
