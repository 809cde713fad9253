"""A sample of the responses of every n-th step, with their prompts, rewards and verdicts, kept for people to read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phimr_nemo.align.grpo.rollouts import Prompt, Rollout, groups_of
from phimr_nemo.config.grpo import MonitorConfig
from phimr_nemo.data.chat import decode_response
from phimr_nemo.store.content import content_seed
from phimr_nemo.store.responses import write_responses
from phimr_nemo.training.tracking import RunLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TABLE = "responses"
"""The W&B table's name."""


def response_rows(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    kept: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    step: int,
    count: int,
) -> list[dict[str, Any]]:
    """Whole groups of a round's responses, chosen at random by the step, best rewards first within a group.

    Args:
        rollouts: of the round.
        prompts: of the run.
        kept: numbers of the rollouts that are trained on.
        tokenizer: turns tokens into text.
        step: that trains on them, from 1.
        count: responses at most, but one whole group at least.
    """
    groups = groups_of(rollouts)
    order = (
        np.random.Generator(np.random.Philox(key=content_seed(TABLE, str(step)))).permutation(len(groups)).tolist()
    )
    rows: list[dict[str, Any]] = []
    for group in (groups[place] for place in order):
        if rows and len(rows) + len(group) > count:
            break
        for number in sorted(group, key=lambda number: -rollouts[number].reward):
            rollout, prompt = rollouts[number], prompts[rollouts[number].prompt]
            rows.append(
                {
                    "step": step,
                    "prompt_id": prompt.id,
                    "question": prompt.question,
                    "answer": prompt.answer,
                    "sample": rollout.sample,
                    "response": decode_response(tokenizer, rollout.token_ids),
                    "verdict": rollout.verdict,
                    "reward": rollout.reward,
                    "tokens": len(rollout.token_ids),
                    "truncated": rollout.is_truncated,
                    "trained": number in kept,
                }
            )
    return rows


class KeptResponses:
    """Writes the sample of a step where one is due, on process 0.

    Args:
        directory: the run's.
        config: how often, and how many.
        log: the run's; None on other processes than 0.
    """

    def __init__(self, directory: Path, config: MonitorConfig, log: RunLog | None) -> None:
        self._directory, self._config, self._log = directory, config, log

    def keep(
        self,
        rollouts: Sequence[Rollout],
        prompts: Sequence[Prompt],
        kept: Collection[int],
        tokenizer: PreTrainedTokenizerBase,
        step: int,
    ) -> None:
        """Keep a sample of the rollouts that step `step` (from 1) trains on, if it is time."""
        every = self._config.responses_every
        if self._log is None or not every or step % every:
            return
        rows = response_rows(rollouts, prompts, kept, tokenizer, step=step, count=self._config.responses)
        write_responses(self._directory, step, rows)
        self._log.write_table(step, TABLE, rows)
