"""Problems and an engine in this process -> a `rollouts` record directory, shard by shard (see plan.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from phimr_nemo.data.chat import decode_response, render_prompts
from phimr_nemo.generate.plan import QUESTION, Plan, Planned, keep_settings, rollout_counts
from phimr_nemo.generate.sampler import Completion, Engine, Request, SamplingParams
from phimr_nemo.store.shards import conform, finish, is_complete, rows_to_table, shard_is_complete, write_shard
from phimr_nemo.text.thinking import OPEN

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

OPENING_TOKENS: Final = 16
"""More than any tokenizer needs for a think tag and a line break."""


def sample_rollouts(
    problems: pa.Table,
    sampler: Engine,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: Path,
    *,
    rollouts_per_problem: int,
    params: SamplingParams,
    teacher_name: str,
    shard_size: int,
    stage_seed: int,
    prompt_template: str = QUESTION,
    shard_indices: Sequence[int] | None = None,
    inputs: Sequence[Path] = (),
) -> bool:
    """Sample several responses to every problem into a record directory of kind "rollouts".

    Args:
        problems: a table of kind "problems" with distinct ids.
        sampler: draws the responses.
        tokenizer: the sampled model's tokenizer.
        out_dir: the record directory; finished shards in it are kept.
        rollouts_per_problem: responses to each problem.
        params: how tokens are drawn.
        teacher_name: names the sampled model; a part of ids and seeds.
        shard_size: problems a shard.
        stage_seed: another one gives other responses.
        prompt_template: the user's turn, with `{question}` in it once.
        shard_indices: make only these shards (for an array of processes); all when None.
        inputs: what the problems were read from, for the manifest.

    Returns:
        Whether all shards are there; the manifest is then written.

    Raises:
        UserError: there are no problems, ids repeat, a number is not positive, the template holds no question,
            the directory was begun with other settings, or the sampler refuses a prompt.
    """
    plan = Plan(
        problems=conform(problems, "problems"),
        rollouts_per_problem=rollouts_per_problem,
        shard_size=shard_size,
        teacher=teacher_name,
        stage_seed=stage_seed,
        prompt_template=prompt_template,
    )
    settings = {**plan.settings, "params": asdict(params)}
    keep_settings(out_dir, settings)
    if is_complete(out_dir, "rollouts"):
        return True
    mine = plan.shards if shard_indices is None else shard_indices
    with tqdm(total=sum(map(plan.count, mine)), unit="rollout", desc="sampling", dynamic_ncols=True) as bar:
        for index in mine:
            if not shard_is_complete(out_dir, index):
                rollouts = _sample_shard(plan.shard(index), sampler, tokenizer, params, teacher_name)
                write_shard(out_dir, index, rows_to_table(rollouts, "rollouts"), kind="rollouts")
                bar.set_postfix(tokens=sum(row["tokens"] for row in rollouts))
            bar.update(plan.count(index))
    if not all(shard_is_complete(out_dir, index) for index in plan.shards):
        return False
    finish(out_dir, kind="rollouts", config=settings, inputs=inputs, counts=rollout_counts(out_dir))
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
    openings = {text: opening(tokenizer, prompts[text]) for text in texts}
    completions = sampler.sample([Request(item.id, prompts[item.prompt], item.seed) for item in planned], params)
    return [
        item.row(
            openings[item.prompt] + _text(tokenizer, completion),
            teacher=teacher,
            finish_reason=completion.finish_reason,
            tokens=len(completion.token_ids),
        )
        for item, completion in zip(planned, completions, strict=True)
    ]


def _text(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    ids = completion.token_ids
    return decode_response(tokenizer, ids[:-1] if completion.finish_reason == "stop" else ids)


def opening(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The think tag that some chat templates open at the end of the prompt: it belongs to the response."""
    tail = tokenizer.decode(list(prompt_ids[-OPENING_TOKENS:]), clean_up_tokenization_spaces=False)
    return f"{OPEN}\n" if tail.rstrip().endswith(OPEN) else ""
