"""Problems and an engine in this process -> a `rollouts` record directory, shard by shard (see plan.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.data.chat import render_prompts, response_text
from phimr_nemo.data.parallel import ALONE, Team
from phimr_nemo.generate.plan import Plan, Planned, rollout_counts
from phimr_nemo.generate.sampler import Completion, Engine, Request, SamplingParams
from phimr_nemo.store.progress import Progress
from phimr_nemo.store.provenance import begin
from phimr_nemo.store.shards import finish, is_complete, rows_to_table, shard_is_complete, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING: Final[Mapping[str, str]] = {}
LEAST_SECONDS: Final = 1e-6
"""Of a rate's time: a coarse clock may not move while an engine of a test answers."""


def sample_rollouts(
    plan: Plan,
    sampler: Engine,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    *,
    params: SamplingParams,
    shard_indices: Sequence[int] | None = None,
    inputs: Mapping[str, str] = NOTHING,
    team: Team = ALONE,
) -> bool:
    """Sample several responses to every problem into a record directory of kind "rollouts".

    Args:
        plan: which rollouts of which problems.
        sampler: draws the responses.
        tokenizer: the sampled model's tokenizer.
        out_dir: the record directory; finished shards in it are kept.
        params: how tokens are drawn.
        shard_indices: make only these shards (for an array of processes); all when None.
        inputs: what the problems were read from and the rest of the model, by content.
        team: the processes that share the shards.

    Returns:
        Whether all shards are there; the manifest is then written.

    Raises:
        UserError: the directory was begun with other settings, or the sampler refuses a prompt.
    """
    made_from = plan.made_from(inputs, params=asdict(params))
    begin(out_dir, made_from)
    if is_complete(out_dir, "rollouts"):
        return True
    mine = plan.shards if shard_indices is None else shard_indices
    with Progress(sum(map(plan.count, mine)), title="sampling", unit="rollout") as progress:
        left = {index for index in mine if not shard_is_complete(out_dir, index, made_from)}
        progress.found_done(sum(plan.count(index) for index in mine if index not in left))
        for index in team.free_shards(out_dir, mine, lambda _: made_from).one_by_one():
            began = time.monotonic()
            rollouts = _sample_shard(plan.shard(index), sampler, tokenizer, params, plan.teacher)
            seconds = time.monotonic() - began
            table = rows_to_table(rollouts, "rollouts")
            write_shard(out_dir, index, table, kind="rollouts", made_from=made_from)
            tokens = sum(row["tokens"] for row in rollouts)
            progress.show({"tok/s": f"{tokens / max(seconds, LEAST_SECONDS):,.0f}"})
            progress.update(plan.count(index))
            left.discard(index)
        if left:  # what others of the array make or hold
            progress.update(sum(map(plan.count, left)))
    if not all(shard_is_complete(out_dir, index, made_from) for index in plan.shards):
        return False
    finish(out_dir, kind="rollouts", **made_from.to_json(), counts=rollout_counts(out_dir))
    return True


def _sample_shard(
    planned: Sequence[Planned],
    sampler: Engine,
    tokenizer: PreTrainedTokenizerBase,
    params: SamplingParams,
    teacher: str,
) -> list[dict[str, Any]]:
    """The rollouts of a shard, as rows of kind "rollouts"."""
    # The samples of one problem share its prompt, which is tokenised once.
    texts = list(dict.fromkeys(item.prompt for item in planned))
    prompts = dict(zip(texts, map(tuple, render_prompts(tokenizer, texts)), strict=True))
    completions = sampler.sample([Request(item.id, prompts[item.prompt], item.seed) for item in planned], params)
    return [
        item.row(
            _text(tokenizer, prompts[item.prompt], completion),
            teacher=teacher,
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
        )
        for item, completion in zip(planned, completions, strict=True)
    ]


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], completion: Completion) -> str:
    ids = completion.token_ids
    # Other families' models end with other tokens than those that `response_text` knows.
    return response_text(tokenizer, prompt, ids[:-1] if completion.finish_reason == "stop" else ids)
