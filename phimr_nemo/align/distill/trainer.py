"""Distillation on the loop of rounds: every response is trained on, by what the teacher thinks of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from phimr_nemo.align.distill.objective import DistillObjective
from phimr_nemo.align.grpo.loop import RoundsTrainer
from phimr_nemo.align.grpo.rollouts import Rollout, gathered, graded_rollouts, response_metrics, verdict_metrics
from phimr_nemo.config import DistillConfig
from phimr_nemo.generate.sampler import Completion


class DistillTrainer(RoundsTrainer):
    """The teacher's scores in the place of rewards; verdicts, where there are any, are logged and no more."""

    config: DistillConfig

    def _judged(self, prompt_of: Mapping[int, int], completions: Sequence[Completion]) -> list[Rollout]:
        """All processes' responses, with verdicts if there is a grader (collective)."""
        graded = self._verdicts(prompt_of, completions)
        return gathered(graded_rollouts(completions, graded, prompt_of, lambda _: {}))

    def _completed(
        self,
        dataset: Any,  # noqa: ARG002
        slots: Sequence[int],
        rollouts: list[Rollout],
    ) -> tuple[int, dict[str, float]]:
        """Prompts sampled, and what their responses are like."""
        verdicts = {} if self.grader is None else verdict_metrics(rollouts)
        return len(slots), {**verdicts, **response_metrics(rollouts)}

    def generate_reinforce_data(self, rollout_batch: list[Rollout]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Lay out this rank's part of every update, and what the teacher says of its tokens if it is needed."""
        self._rollouts = rollout_batch
        every = range(len(rollout_batch))
        self.kept_responses.keep(rollout_batch, self.prompts.prompts, every, self.tokenizer, self.step + 1)
        rows = self._rows(rollout_batch, [0.0] * len(rollout_batch))
        if not self.config.weighs_tokens:
            return rows, {}
        objective: DistillObjective = self.model.objective
        with self.timer("logprobs"):
            if self.config.updates > 1:
                rows["old_logprobs"] = self.model.batch_log_probs(rows)
            micros = objective.plain_micro_batches(rows)
            rows["teacher_logprobs"] = objective.teacher.log_probs(rows, micros, self.model.temperature)
        return rows, {}
