"""One round of GRPO rollouts: prompts in, graded responses out, and their form as training rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from phimr_nemo.align.grpo.rewards import CORRECT, Graded, is_graded
from phimr_nemo.align.grpo.stabilisers import oversampled, uniform_prompts
from phimr_nemo.config import GRPOConfig, RoundsConfig
from phimr_nemo.config.engine import QUESTION
from phimr_nemo.data.chat import render_prompts
from phimr_nemo.data.repetition import REPETITIVE_ABOVE, repetition
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Request
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.store.content import content_seed
from phimr_nemo.store.shards import read_table
from phimr_nemo.training.distributed import wait_for_all
from phimr_nemo.training.metrics import PASS_RATE_BINS, PASS_RATE_NAMES
from phimr_nemo.verify.extract import gold_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPETITION_CHARS: Final = 8_000
"""A loop is at the end of a response; more than its end would keep the GPUs waiting."""


@dataclass(frozen=True)
class Prompt:
    """A problem to be solved by the policy."""

    id: str
    answer: str
    token_ids: tuple[int, ...]
    is_hard: bool
    question: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of a run, the numbers of one epoch of them, and why others were left out."""

    prompts: Sequence[Prompt]
    epoch: Sequence[int]
    dropped_uneven: int
    dropped_long: int


@dataclass(frozen=True)
class Rollout:
    """One graded response.

    Attributes:
        slot: number of its prompt in the whole run's stream of prompts; a group is the rollouts of a slot.
        sample: number within the group.
        prompt: number of the prompt.
        token_ids: the response, its stop token included.
        logprobs: the sampler's log-probability of each token at the round's temperature (nats).
        is_truncated: it ended at the length limit.
        is_correct: the grader's verdict.
        verdict: in its own word.
        is_graded: False where the grader gave up; such a response takes part in nothing.
        reason: why it did.
        reward_parts: what its reward is the sum of, by name.
        repetition: share of the end of its text that repeats what stands earlier there.
        versions: of the weights that sampled each token: the step that began with them. Empty if the sampler did not
            say.
    """

    slot: int
    sample: int
    prompt: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_truncated: bool
    is_correct: bool
    is_graded: bool = True
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    repetition: float = 0.0
    versions: tuple[int, ...] = ()
    reason: str = ""
    verdict: str = ""

    @property
    def reward(self) -> float:
        """The sum of its parts."""
        return sum(self.reward_parts.values())


def load_prompts(directory: Path, tokenizer: PreTrainedTokenizerBase, config: RoundsConfig) -> PromptSet:
    """Read and tokenise a `prompts` record directory; for GRPO, with the stabilisers that act on prompts.

    A prompt that leaves less than `max_new_tokens` of `sequence_length` to its response is dropped.

    Raises:
        UserError: the directory is not finished, a question spells a special token, a prompt that is graded has no
            answer, or no prompt is left.
    """
    rows = read_table(directory, "prompts").to_pylist()
    if config.verify_workers:
        _check_answers(directory, rows)
    even: Sequence[int] = range(len(rows))
    if isinstance(config, GRPOConfig):
        even = uniform_prompts([row["length_spread"] for row in rows], config.prompt_optimization)
    token_ids = render_prompts(tokenizer, [config.prompt.replace(QUESTION, rows[i]["question"]) for i in even])
    room = config.sequence_length - config.max_new_tokens
    prompts = [
        Prompt(rows[i]["id"], rows[i]["answer"], tuple(ids), rows[i]["hard"], rows[i]["question"])
        for i, ids in zip(even, token_ids, strict=True)
        if len(ids) <= room
    ]
    if not prompts:
        uneven = ""
        if isinstance(config, GRPOConfig):
            spread = config.prompt_optimization.max_length_spread
            uneven = f"prompt_optimization.max_length_spread={spread} drops {len(rows) - len(even)}; of the other "
        raise UserError(
            f"none of the {len(rows)} prompts in {directory} is usable: {uneven}{len(even)} "
            f"all are longer than sequence_length - max_new_tokens = {room} tokens",
            rule="a prompt has a small enough length spread and leaves max_new_tokens of sequence_length",
            remedy=_more_prompts(len(rows), len(even)),
        )
    epoch: Sequence[int] = range(len(prompts))
    if isinstance(config, GRPOConfig):
        epoch = oversampled([prompt.is_hard for prompt in prompts], config.rebalance)
    return PromptSet(prompts, epoch, len(rows) - len(even), len(even) - len(prompts))


def _check_answers(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    missing = [row["id"] for row in rows if not gold_answer(row["answer"] or "")]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(rows)} prompts in {directory} have no answer; the first is {missing[0]!r}",
            rule="a response is rewarded for the correct answer, so each prompt has one",
            remedy="remove these prompts, or add their answers and curate again",
        )


def _more_prompts(prompts: int, even: int) -> str:
    if not prompts:
        return "curate again: the counts of its manifest say which rule dropped the prompts"
    return (
        "raise sequence_length, or curate shorter prompts" if even else "raise prompt_optimization.max_length_spread"
    )


def check_graded(rollouts: Sequence[Rollout], stop_above: float) -> None:
    """Stop where the grader gave up on too many of a round's responses, or on all, on all processes alike.

    Args:
        rollouts: of all processes.
        stop_above: the largest share.

    Raises:
        UserError: the share is larger.
    """
    ungraded = [rollout for rollout in rollouts if not rollout.is_graded]
    if len(ungraded) > stop_above * len(rollouts) or len(ungraded) == len(rollouts):
        raise UserError(
            f"the grader gave up on {len(ungraded)} of {len(rollouts)} responses of a round: {ungraded[0].reason}",
            rule=f"at most monitor.ungraded_stop={stop_above:g} of them: rewards of the rest would be another task",
            remedy="grade a prompt's answer with `phimr verify` to see why, or raise monitor.ungraded_stop; the run "
            "continues at its newest checkpoint with the same command",
        )


def rollout_requests(prompts: Mapping[int, Prompt], group_size: int, *seed: str) -> list[Request]:
    """The requests of whole groups.

    Args:
        prompts: slot -> prompt.
        group_size: responses a prompt.
        seed: what a response's seed depends on besides slot and sample.
    """
    return [
        Request(f"{slot}/{sample}", prompt.token_ids, content_seed("grpo", *seed, str(slot), str(sample)))
        for slot, prompt in prompts.items()
        for sample in range(group_size)
    ]


def graded_rollouts(
    completions: Iterable[Completion],
    graded: Iterable[Graded],
    prompt_of: Mapping[int, int],
    parts: Callable[[Graded], Mapping[str, float]],
) -> list[Rollout]:
    """Completions of :func:`rollout_requests` with their verdicts and rewards.

    Args:
        completions: in the order of the requests.
        graded: what is known of each.
        prompt_of: slot -> prompt number.
        parts: the parts of a response's reward.
    """
    rollouts = []
    for completion, response in zip(completions, graded, strict=True):
        slot, sample = (int(part) for part in completion.request_id.split("/"))
        rollouts.append(
            Rollout(
                slot,
                sample,
                prompt_of[slot],
                completion.token_ids,
                completion.logprobs,
                is_truncated=response.is_truncated,
                is_correct=response.verdict == CORRECT,
                is_graded=is_graded(response.verdict),
                reward_parts=parts(response) if is_graded(response.verdict) else {},
                repetition=repetition(response.response[-REPETITION_CHARS:]),
                versions=completion.versions,
                reason="" if is_graded(response.verdict) else response.reason,
                verdict=response.verdict,
            )
        )
    return rollouts


def gathered(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """All processes' rollouts on every process, in the order of slots and samples (collective)."""
    wait_for_all("responses are graded")
    parts: list[list[Rollout]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, list(rollouts))
    return sorted((rollout for part in parts for rollout in part), key=lambda r: (r.slot, r.sample))


def groups_of(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Rollout numbers of each slot, in the order of slots."""
    groups: dict[int, list[int]] = {}
    for number, rollout in enumerate(rollouts):
        groups.setdefault(rollout.slot, []).append(number)
    return [groups[slot] for slot in sorted(groups)]


def pass_rates_of(rollouts: Sequence[Rollout]) -> dict[int, float]:
    """Share of correct responses among each prompt's graded ones: prompt number -> share."""
    right: dict[int, list[bool]] = {}
    for rollout in rollouts:
        if rollout.is_graded:
            right.setdefault(rollout.prompt, []).append(rollout.is_correct)
    return {prompt: fmean(found) for prompt, found in right.items()}


def pass_rate_bin(correct: int, size: int) -> int:
    """Which of `PASS_RATE_BINS` a group belongs to.

    Args:
        correct: its correct responses.
        size: its responses.
    """
    if correct == size:
        return len(PASS_RATE_BINS) - 1
    return -(-4 * correct // size)


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What a round's rollouts say. Rewards are those of graded responses, of which there is one.

    Returns:
        reward: mean; reward_<part>: mean of each part, where there is more than one; zero_gradient_groups: share of
        groups whose rewards are all equal; and what :func:`verdict_metrics` and :func:`response_metrics` return.
    """
    graded = [rollout for rollout in rollouts if rollout.is_graded]
    equal = [len({graded[i].reward for i in group}) == 1 for group in groups_of(graded)]
    parts = sorted({name for rollout in graded for name in rollout.reward_parts})
    means = {f"reward_{name}": fmean(rollout.reward_parts[name] for rollout in graded) for name in parts}
    return {
        "reward": fmean(rollout.reward for rollout in graded),
        **(means if len(means) > 1 else {}),
        "zero_gradient_groups": fmean(equal),
        **verdict_metrics(rollouts),
        **response_metrics(rollouts),
    }


def verdict_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the grader says of a round.

    Returns:
        ungraded: share of responses that the grader gave up on; of the others, unless there are none, pass_rate:
        share of correct responses, and groups_<bin>: number of groups in each of `PASS_RATE_BINS`.
    """
    graded = [rollout for rollout in rollouts if rollout.is_graded]
    ungraded = {"ungraded": 1.0 - len(graded) / len(rollouts)}
    if not graded:
        return ungraded
    judged = [[graded[i] for i in group] for group in groups_of(graded)]
    bins = [pass_rate_bin(sum(rollout.is_correct for rollout in group), len(group)) for group in judged]
    return {
        **ungraded,
        "pass_rate": fmean(rollout.is_correct for rollout in graded),
        **{name: float(bins.count(number)) for number, name in enumerate(PASS_RATE_NAMES)},
    }


def response_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What a round's responses are like, graded or not.

    Returns:
        response_length: mean, tokens; length_spread: mean over groups of standard deviation over mean of the response
        lengths; truncated: share that hit the length limit; repetition: mean share of a response's end that repeats
        itself; repetitive: share of responses where that is above `REPETITIVE_ABOVE`; entropy: mean of
        -log-probability over all sampled tokens (nats), an unbiased estimate of the sampling distribution's.
    """
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    spreads = [pstdev(lengths[i] for i in group) / fmean(lengths[i] for i in group) for group in groups_of(rollouts)]
    return {
        "response_length": fmean(lengths),
        "length_spread": fmean(spreads),
        "truncated": fmean(rollout.is_truncated for rollout in rollouts),
        "repetition": fmean(rollout.repetition for rollout in rollouts),
        "repetitive": fmean(rollout.repetition > REPETITIVE_ABOVE for rollout in rollouts),
        "entropy": -sum(sum(rollout.logprobs) for rollout in rollouts) / sum(lengths),
    }


def training_rows(
    rollouts: Sequence[Rollout | None], prompts: Sequence[Prompt], advantages: Mapping[int, float], pad_id: int
) -> dict[str, Tensor]:
    """Responses behind their prompts, padded to the longest.

    Args:
        rollouts: None makes a row without labels, which takes part in nothing.
        prompts: of the run.
        advantages: row number -> advantage.
        pad_id: token of the padding.

    Returns:
        `response_tokens` int64 [n, s] (the inputs), `labels` int64 [n, s] (the next tokens, -100 before the
        response and after it), `sampler_logprobs` float32 [n, s] (at the labels' places), `advantages` float32 [n].
    """
    width = max(
        (len(prompts[r.prompt].token_ids) + len(r.token_ids) - 1 for r in rollouts if r is not None), default=1
    )
    tokens = torch.full((len(rollouts), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(rollouts), width), IGNORED_LABEL, dtype=torch.int64)
    sampled = torch.zeros((len(rollouts), width), dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        if rollout is None:
            continue
        question = prompts[rollout.prompt].token_ids
        whole = torch.tensor([*question, *rollout.token_ids])
        first, last = len(question) - 1, len(whole) - 1
        tokens[row, :last] = whole[:-1]
        labels[row, first:last] = whole[len(question) :]
        sampled[row, first:last] = torch.tensor(rollout.logprobs)
    values = torch.tensor([advantages.get(row, 0.0) for row in range(len(rollouts))], dtype=torch.float32)
    return {"response_tokens": tokens, "labels": labels, "sampler_logprobs": sampled, "advantages": values}
