"""Which rollouts of which problems, shard by shard: ids, seeds and prompts that follow from content alone.

A shard holds the rollouts of `shard_size` successive problems and is the unit of retry, so a rerun repeats nothing,
a retry duplicates nothing, and shards may be made by different processes in any order. What a directory is begun from
(:func:`phimr_nemo.store.provenance.begin`) keeps it from mixing the rollouts of two plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config.engine import QUESTION
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.records import FinishReason

if TYPE_CHECKING:
    import pyarrow as pa

TOKENS_UNKNOWN: Final = -1


@dataclass(frozen=True)
class Planned:
    """A rollout before there is a response.

    Attributes:
        id, seed: follow from the problem, the teacher, the stage's seed and the number of the sample.
        sample_index: the number of the sample among those of its problem.
        prompt: the user's turn.
        problem: the row of kind "problems".
    """

    id: str
    seed: int
    sample_index: int
    prompt: str
    problem: Mapping[str, Any]

    def row(self, response: str, *, teacher: str, finish_reason: FinishReason, tokens: int) -> dict[str, Any]:
        """The rollout as a row of kind "rollouts"; `tokens` of the response, `TOKENS_UNKNOWN` if nobody counted."""
        return {
            "id": self.id,
            "problem_id": self.problem["id"],
            "question": self.problem["question"],
            "answer": self.problem["answer"],
            "response": response,
            "teacher": teacher,
            "sample_index": self.sample_index,
            "seed": self.seed,
            "finish_reason": finish_reason,
            "tokens": tokens,
            "domain": self.problem["domain"],
            "difficulty": self.problem["difficulty"],
            "source": self.problem["source"],
            "metadata": self.problem["metadata"],
        }


@dataclass(frozen=True)
class Plan:
    """All rollouts of a step.

    Attributes:
        problems: a table of kind "problems" with distinct ids.
        rollouts_per_problem: responses to each problem.
        shard_size: problems a shard.
        teacher: names the sampled model; a part of ids and seeds.
        stage_seed: another one gives other responses.
        prompt_template: the user's turn, with `{question}` in it once.

    Raises:
        UserError: there are no problems, or ids repeat.
    """

    problems: pa.Table
    rollouts_per_problem: int
    shard_size: int
    teacher: str
    stage_seed: int
    prompt_template: str = QUESTION

    def __post_init__(self) -> None:
        _check_problems(self.problems)

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(-(-self.problems.num_rows // self.shard_size))

    def made_from(self, inputs: Mapping[str, str], **settings: Any) -> MadeFrom:
        """What the rollouts of one directory have in common.

        Args:
            inputs: what the problems were read from and the rest of the sampled model, by content.
            settings: of what samples.
        """
        return MadeFrom(
            {**inputs, "problems": content_id(*self.problems.column("id").to_pylist()), "teacher": self.teacher},
            {
                "rollouts_per_problem": self.rollouts_per_problem,
                "shard_size": self.shard_size,
                "stage_seed": self.stage_seed,
                "prompt_template": self.prompt_template,
                **settings,
            },
        )

    def count(self, index: int) -> int:
        """How many rollouts shard `index` has."""
        start = index * self.shard_size
        return min(self.shard_size, self.problems.num_rows - start) * self.rollouts_per_problem

    def shard(self, index: int) -> list[Planned]:
        """The rollouts of shard `index`, those of one problem together, in the problems' order."""
        before, after = self.prompt_template.split(QUESTION)
        planned = []
        for problem in self.problems.slice(index * self.shard_size, self.shard_size).to_pylist():
            for sample_index in range(self.rollouts_per_problem):
                parts = (problem["id"], self.teacher, str(self.stage_seed), str(sample_index))
                prompt = before + problem["question"] + after
                planned.append(
                    Planned(content_id("rollout", *parts), content_seed(*parts), sample_index, prompt, problem)
                )
        return planned


def _check_problems(problems: pa.Table) -> None:
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


def rollout_counts(out_dir: Path) -> dict[str, int]:
    """Rollouts by finish reason and their tokens, over all shards; where nobody counted tokens, how many rollouts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    counts = {"rollouts": 0, "stop": 0, "length": 0, "tokens": 0}
    unknown = 0
    for path in sorted(out_dir.glob("part-*.parquet")):
        shard = pq.read_table(path, columns=["finish_reason", "tokens"])
        known = shard.filter(pc.not_equal(shard.column("tokens"), TOKENS_UNKNOWN))
        counts["rollouts"] += shard.num_rows
        counts["tokens"] += pc.sum(known.column("tokens")).as_py() or 0
        unknown += shard.num_rows - known.num_rows
        for reason in shard.column("finish_reason").to_pylist():
            counts[reason] += 1
    return {**counts, **({"of_unknown_tokens": unknown} if unknown else {})}
