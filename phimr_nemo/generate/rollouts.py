"""Problems and a sampler -> a `rollouts` record directory, shard by shard.

A shard holds the rollouts of `shard_size` successive problems and is the unit of retry. Ids and seeds derive
from content alone, so a rerun repeats nothing, a retry duplicates nothing, and shards may be made by different
processes in any order. `settings.json` keeps a directory from mixing the rollouts of two configurations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from phimr_nemo.data.chat import decode_response, render_prompts
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Request, Sampler, SamplingParams
from phimr_nemo.store import (
    conform,
    content_id,
    content_seed,
    finish,
    is_complete,
    rows_to_table,
    shard_is_complete,
    write_json,
    write_shard,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

SETTINGS_FILE: Final = "settings.json"
QUESTION: Final = "{question}"
"""Where a prompt template holds the question; by itself the template that adds nothing."""


def sample_rollouts(
    problems: pa.Table,
    sampler: Sampler,
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
    problems = conform(problems, "problems")
    _check(problems, rollouts_per_problem, shard_size, prompt_template)
    settings = {
        "problems": content_id(*problems.column("id").to_pylist()),
        "rollouts_per_problem": rollouts_per_problem,
        "params": asdict(params),
        "teacher": teacher_name,
        "shard_size": shard_size,
        "stage_seed": stage_seed,
        "prompt_template": prompt_template,
    }
    _keep_settings(out_dir, settings)
    if is_complete(out_dir, "rollouts"):
        return True
    shards = range(-(-problems.num_rows // shard_size))
    total = problems.num_rows * rollouts_per_problem
    with tqdm(total=total, unit="rollout", desc="sampling", dynamic_ncols=True) as bar:
        for index in shards if shard_indices is None else shard_indices:
            part = problems.slice(index * shard_size, shard_size)
            if not shard_is_complete(out_dir, index):
                rollouts = _sample_part(
                    part.to_pylist(),
                    sampler,
                    tokenizer,
                    rollouts_per_problem=rollouts_per_problem,
                    params=params,
                    teacher_name=teacher_name,
                    stage_seed=stage_seed,
                    prompt_template=prompt_template,
                )
                write_shard(out_dir, index, rows_to_table(rollouts, "rollouts"), kind="rollouts")
                bar.set_postfix(tokens=sum(row["tokens"] for row in rollouts))
            bar.update(part.num_rows * rollouts_per_problem)
    if not all(shard_is_complete(out_dir, index) for index in shards):
        return False
    finish(out_dir, kind="rollouts", config=settings, inputs=inputs, counts=_counts(out_dir))
    return True


def _check(problems: pa.Table, rollouts_per_problem: int, shard_size: int, prompt_template: str) -> None:
    for name, value in (("rollouts_per_problem", rollouts_per_problem), ("shard_size", shard_size)):
        if value < 1:
            raise UserError(f"{name} is {value}", rule=f"{name} is at least 1", remedy="correct it")
    if prompt_template.count(QUESTION) != 1:
        raise UserError(
            f"prompt template {prompt_template!r}",
            rule=f"a prompt template holds {QUESTION} once",
            remedy=f"put {QUESTION} where the question belongs",
        )
    if problems.num_rows == 0:
        raise UserError(
            "there are no problems to sample",
            rule="generation needs at least one problem",
            remedy="look at the problems file and at its limit",
        )
    ids = problems.column("id").to_pylist()
    if len(set(ids)) < len(ids):
        repeated = next(identity for identity in ids if ids.count(identity) > 1)
        raise UserError(
            f"problem id {repeated!r} occurs {ids.count(repeated)} times",
            rule="each problem occurs once: seeds derive from ids, so a repeated one repeats its responses",
            remedy="remove the duplicates and ask for more rollouts_per_problem instead",
        )


def _keep_settings(out_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or compare with those that the directory was begun with."""
    path = out_dir / SETTINGS_FILE
    if not path.is_file():
        write_json(path, dict(settings))
        return
    earlier = json.loads(path.read_text("utf-8"))
    changed = sorted(name for name in settings if earlier.get(name) != settings[name])
    if changed:
        values = ", ".join(f"{name} {earlier.get(name)!r} -> {settings[name]!r}" for name in changed)
        raise UserError(
            f"{out_dir} was begun with other settings: {values}",
            rule="the rollouts of one directory share one configuration",
            remedy="choose another output directory, or remove this one",
        )


def _sample_part(
    problems: Sequence[Mapping[str, Any]],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rollouts_per_problem: int,
    params: SamplingParams,
    teacher_name: str,
    stage_seed: int,
    prompt_template: str,
) -> list[dict[str, Any]]:
    """The rollouts of some problems, as rows of kind "rollouts" in the problems' order."""
    before, after = prompt_template.split(QUESTION)
    prompts = render_prompts(tokenizer, [before + problem["question"] + after for problem in problems])
    requests = []
    for problem, prompt in zip(problems, prompts, strict=True):
        for sample_index in range(rollouts_per_problem):
            parts = (problem["id"], teacher_name, str(stage_seed), str(sample_index))
            requests.append(Request(content_id("rollout", *parts), tuple(prompt), content_seed(*parts)))
    completions = sampler.sample(requests, params)
    rows = []
    for number, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        problem = problems[number // rollouts_per_problem]
        rows.append(
            {
                "id": request.id,
                "problem_id": problem["id"],
                "question": problem["question"],
                "answer": problem["answer"],
                "response": _text(tokenizer, completion),
                "teacher": teacher_name,
                "sample_index": number % rollouts_per_problem,
                "seed": request.seed,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.token_ids),
                "domain": problem["domain"],
                "difficulty": problem["difficulty"],
                "metadata": problem["metadata"],
            }
        )
    return rows


def _text(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    ids = completion.token_ids
    return decode_response(tokenizer, ids[:-1] if completion.finish_reason == "stop" else ids)


def _counts(out_dir: Path) -> dict[str, int]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts = {"rollouts": 0, "stop": 0, "length": 0, "tokens": 0}
    for path in sorted(out_dir.glob("part-*.parquet")):
        shard = pq.read_table(path, columns=["finish_reason", "tokens"])
        counts["rollouts"] += shard.num_rows
        counts["tokens"] += pc.sum(shard.column("tokens")).as_py()
        for reason in shard.column("finish_reason").to_pylist():
            counts[reason] += 1
    return counts
