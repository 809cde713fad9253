"""The loop of rounds as a subclass of NeMo-Aligner's ReinforceTrainer: three overrides, around upstream's `fit`.

What is overridden, and why (nemo-aligner 0.7.0, algorithms/reinforce.py):

- `_run_inference`: upstream gives every data-parallel rank the whole global batch to train on, counts rollouts
  where its sampler counts prompts, and calls the generator once per rollout of a group.
- `generate_reinforce_data`: what a stage trains on is its own: see its trainer.
- `run_training`: an optimizer step without a single row is skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from phimr_nemo.align.compat import ReinforceTrainer
from phimr_nemo.align.grpo.grading import GradesAnswers, graded_completions
from phimr_nemo.align.grpo.responses import KeptResponses
from phimr_nemo.align.grpo.rewards import Graded
from phimr_nemo.align.grpo.rollouts import (
    PromptSet,
    Rollout,
    rollout_requests,
    training_rows,
)
from phimr_nemo.align.grpo.rounds import Rounds
from phimr_nemo.align.grpo.stabilisers import annealed_temperature
from phimr_nemo.align.microbatch import deal_rows
from phimr_nemo.config import RoundsConfig
from phimr_nemo.generate.ahead import Round, slot_of
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.store.content import content_seed
from phimr_nemo.training import platform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RoundInterrupted(Exception):
    """The run was told to stop while a round was sampled; resumed, it samples the same round again."""


class RoundsTrainer(ReinforceTrainer):
    """Upstream's trainer with rollouts from a :class:`Sampler`; a stage says what becomes of them.

    Args:
        config: the stage's configuration.
        prompts: prompts and their epoch.
        rounds: samples responses with the policy's weights.
        grader: grades responses in processes that can be killed; None where the stage grades nothing.
        tokenizer: turns responses into text.
        kept_responses: writes some of them down.
        upstream: the other arguments of ReinforceTrainer.

    Attributes:
        pass_rates: prompt -> share of correct responses when it was last sampled, of the stages that look at it.
    """

    config: RoundsConfig

    def __init__(
        self,
        *,
        config: RoundsConfig,
        prompts: PromptSet,
        rounds: Rounds,
        grader: GradesAnswers | None,
        tokenizer: PreTrainedTokenizerBase,
        kept_responses: KeptResponses,
        **upstream: Any,
    ) -> None:
        super().__init__(**upstream, val_dataloader_builder=None, collate_fn=None, rm=None, batch_iterator_cls=None)
        self.config, self.prompts, self.rounds, self.grader = config, prompts, rounds, grader
        self.tokenizer, self.kept_responses = tokenizer, kept_responses
        self._rollouts: Sequence[Rollout] = ()
        self.pass_rates: dict[int, float] = {}

    def prompts_of_the_round(self) -> list[dict[str, Any]]:
        """Return what names the prompts that the step under way trains on."""
        numbers = sorted({rollout.prompt for rollout in self._rollouts})
        return [{"prompt": number, "id": self.prompts.prompts[number].id} for number in numbers]

    # ---- what a stage does in its own way -------------------------------------------------------------------

    def _judged(self, prompt_of: Mapping[int, int], completions: Sequence[Completion]) -> list[Rollout]:
        """All processes' responses with what the stage knows of them (collective)."""
        raise NotImplementedError

    def _completed(
        self,
        dataset: Any,  # noqa: ARG002  what a stage may sample further prompts from
        slots: Sequence[int],
        rollouts: list[Rollout],  # noqa: ARG002  and to where
    ) -> tuple[int, dict[str, float]]:
        """Prompts sampled in all, further ones among them, and what is logged of the rollouts (collective)."""
        return len(slots), {}

    def _prompt_at(self, place: int) -> int:
        """The number of the prompt that is sampled at a place of the epoch."""
        return self.prompts.epoch[place]

    # ---- rollouts ------------------------------------------------------------------------------------------

    def _run_inference(
        self,
        dataloader_builder: Any,
        consumed_samples: int,
        is_validation: bool,  # noqa: ARG002
    ) -> tuple[list[Rollout], dict[str, Any]]:
        """Sample and judge a round; every process gets all of its rollouts.

        Raises:
            RoundInterrupted: the run was told to stop; nothing has been trained on yet.
            UserError: the reward cannot be computed.
        """
        loader = dataloader_builder(consumed_samples=consumed_samples)
        slots = next(iter(loader.batch_sampler))
        self.model.temperature = annealed_temperature(self.step, self.config.steps, self.config.temperature)
        with self.timer("sync"):
            if not self.rounds.is_ahead(self.step):
                self.rounds.sync(self.step)
        with self.timer("sample"):
            prompt_of, completions = self._sampled(loader.dataset, slots)
        with self.timer("reward"):
            rollouts = self._judged(prompt_of, completions)
        sampled, logged = self._completed(loader.dataset, slots, rollouts)
        self._check_stop()
        metrics = {
            **logged,
            "temperature": self.model.temperature,
            **self.rounds.metrics(self.step, [rollout.versions for rollout in rollouts]),
            # What upstream adds to its count of consumed samples: the sampler counts prompts.
            "rollout_size": sampled,
            "table": {"prompt": "", "response": "", "reward": 0.0},
        }
        return rollouts, metrics

    def _check_stop(self) -> None:
        if self.run_timer.is_finished():
            raise RoundInterrupted(f"stopped in round {self.step}")

    def _sampled(self, dataset: Any, slots: Sequence[int]) -> tuple[Mapping[int, int], list[Completion]]:
        """This process's slots with their prompts' numbers, and their groups' responses.

        A round that was begun has the slots that it was begun with.
        """
        begun = self.rounds.prompts_of(self.step)
        prompt_of = self._mine(dataset, slots) if begun is None else begun
        return prompt_of, self.rounds.sample(self.step, *self._requests(prompt_of, self.step))

    def _mine(self, dataset: Any, slots: Sequence[int]) -> dict[int, int]:
        """This process's slots with their prompts' numbers."""
        # Whole groups to a process, so that each prompt is computed once; all processes sample.
        mine = slots[dist.get_rank() :: dist.get_world_size()]
        return {slot: self._prompt_at(dataset[slot]) for slot in mine}

    def _verdicts(self, prompt_of: Mapping[int, int], completions: Sequence[Completion]) -> list[Graded]:
        """This process's responses with their verdicts; without a grader there are none."""
        slots = [slot_of(completion.request_id) for completion in completions]
        prompts = [self.prompts.prompts[prompt_of[slot]] for slot in slots]
        return graded_completions(self.grader, self.tokenizer, prompts, completions, self.config.max_new_tokens)

    def _requests(self, prompt_of: Mapping[int, int], step: int) -> tuple[list[Request], SamplingParams]:
        """What is asked for step `step`: the groups of these slots."""
        prompts = {slot: self.prompts.prompts[number] for slot, number in prompt_of.items()}
        requests = rollout_requests(prompts, self.config.group_size, str(self.config.run.seed), str(step))
        temperature = annealed_temperature(step, self.config.steps, self.config.temperature)
        return requests, SamplingParams(temperature, top_p=1.0, max_new_tokens=self.config.max_new_tokens)

    def _round(self, prompt_of: Mapping[int, int], step: int) -> Round:
        """Round `step` as it is begun."""
        return Round(prompt_of, *self._requests(prompt_of, step))

    @property
    def _free_slot(self) -> int:
        """The first slot that no round has: those that are sampled ahead have theirs."""
        return self.consumed_samples + len(self.rounds.steps_ahead) * self.config.prompts_per_step

    def _new_round(self, step: int) -> Round:
        """Round `step`, of the next slots."""
        loader = self.train_dataloader_builder(consumed_samples=self._free_slot)
        return self._round(self._mine(loader.dataset, next(iter(loader.batch_sampler))), step)

    def take_up(self) -> None:
        """Continue with the rounds that a stopped run had sampled ahead (collective; after `load_state_dict`)."""
        if self.config.ahead and self.step < self.config.steps:
            self.rounds.restore(self.step, self._round)

    def save(self, extra_candidates: Any = None, is_train_end: bool = False) -> None:
        """Upstream's checkpoint, and then the rounds under way: there may be no time to wait for them."""
        super().save(extra_candidates, is_train_end)
        self.rounds.save(self.step)
        self.rounds.forget(self.ckpt_callback.store.steps())

    # ---- training rows -------------------------------------------------------------------------------------

    def _rows(self, chosen: Sequence[Rollout], advantages: Sequence[float]) -> dict[str, Tensor]:
        """This rank's part of every update, from what all processes train on; an advantage for each response."""
        mine = self._dealt([len(self.prompts.prompts[r.prompt].token_ids) + len(r.token_ids) for r in chosen])
        return training_rows(
            [None if number is None else chosen[number] for number in mine],
            self.prompts.prompts,
            {row: advantages[number] for row, number in enumerate(mine) if number is not None},
            self.model.architecture.pad_token_id,
        )

    def _dealt(self, lengths: Sequence[int]) -> list[int | None]:
        """Numbers of this rank's rows, update after update, each filled with None to the size that `fit` cuts."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        share = self.cfg.model_gbs // ranks
        seed = content_seed("deal", str(self.config.run.seed), str(self.step))
        dealt = deal_rows(lengths, self.config.inner_batches, ranks, seed)
        return [number for part in dealt for number in [*part[rank], *[None] * (share - len(part[rank]))]]

    # ---- updates -------------------------------------------------------------------------------------------

    def run_training(self, dataloader_iter: Iterable[dict[str, Tensor]]) -> tuple[float, dict[str, float]]:
        """Upstream's updates, `passes` times, none for a batch without rows; meanwhile later rounds are sampled."""
        if self.config.ahead:
            self.rounds.begin(self.step, self.config.steps, self._new_round)
        batches = list(dataloader_iter)
        counts = [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches]
        labels = torch.tensor(counts, device=platform.device())
        dist.all_reduce(labels, group=parallel_state.get_data_parallel_group())
        useful = [batch for batch, count in zip(batches, labels.tolist(), strict=True) if count]
        # The learning rate follows the rounds, whatever they bring.
        for _ in range((len(batches) - len(useful)) * self.config.passes):
            self.scheduler.step()
        if not useful:
            return 0.0, {}
        result: tuple[float, dict[str, float]] = super().run_training(iter(useful * self.config.passes))
        return result
