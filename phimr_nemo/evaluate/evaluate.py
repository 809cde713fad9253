"""A model's score on problems: sample, grade, and state the result with its uncertainty.

Every response and verdict stays on disk beside the result, so a score can be looked into and regraded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.evaluate.statistics import majority_score, mean_and_clustered_error, pass_at_k
from phimr_nemo.generate.backends import open_local
from phimr_nemo.generate.rollouts import QUESTION, sample_rollouts
from phimr_nemo.generate.sampler import SamplingParams
from phimr_nemo.store import (
    read_manifest,
    read_table,
    write_json,
)
from phimr_nemo.verify import GRADER_VERSION
from phimr_nemo.verify.stage import verify_rollouts

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from phimr_nemo.config import LongRopePolicy

RESULTS_FILE: Final = "results.json"
SHARD_QUESTIONS: Final = 256
NO_DIFFICULTY: Final = "unknown"
SCORED_COLUMNS: Final = ("problem_id", "difficulty", "verdict", "extracted", "finish_reason", "tokens")


@dataclass(frozen=True)
class Score:
    """pass@1 over some questions.

    Attributes:
        questions: how many.
        pass1: mean accuracy of a single response.
        stderr: its standard error, clustered by question; NaN for one question.
    """

    questions: int
    pass1: float
    stderr: float


@dataclass(frozen=True)
class Result:
    """What an evaluation found. Shares are of all responses.

    Attributes:
        questions: questions asked.
        samples: responses to each question (the fewest, should they differ).
        pass1: mean accuracy of a single response.
        stderr: standard error of `pass1`, clustered by question; NaN for one question.
        pass_at_k: k -> unbiased pass@k, for powers of two up to `samples`, and `samples`.
        majority: accuracy of the most frequent answer among all responses to a question (maj@samples).
        truncated: share that ran into the token limit.
        stopped: share that ended by itself.
        unparsable: share without a final answer that could be read.
        ungraded: share on which the grader timed out or failed; they count as not correct.
        mean_tokens: mean response length in tokens.
        by_difficulty: score within each difficulty.
        per_question: problem id -> accuracy, for paired comparisons.
    """

    questions: int
    samples: int
    pass1: float
    stderr: float
    pass_at_k: Mapping[int, float]
    majority: float
    truncated: float
    stopped: float
    unparsable: float
    ungraded: float
    mean_tokens: float
    by_difficulty: Mapping[str, Score]
    per_question: Mapping[str, float]


def evaluate_model(
    model_dir: Path,
    problems: pa.Table,
    *,
    samples: int,
    params: SamplingParams,
    out_dir: Path,
    workers: int,
    seed: int = 0,
    max_batch: int = 256,
    prompt_template: str = QUESTION,
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original",
    dtype: torch.dtype | None = None,
) -> Result:
    """Sample responses to problems, grade them and write `rollouts/`, `verdicts/` and `results.json`.

    A finished evaluation in `out_dir` is read, an interrupted one continues; the weights' hash is part of its
    settings, so a changed model is an error and never an old score.

    Args:
        model_dir: a Hugging Face directory.
        problems: a table of kind "problems".
        samples: responses to each.
        params: how tokens are drawn.
        out_dir: where everything goes.
        workers: grader processes.
        seed: of the sampling.
        max_batch: sequences computed together.
        prompt_template: the user's turn, with `{question}` in it once.
        longrope: the training run's policy; the longest sequence is the longest prompt plus `max_new_tokens`.
        dtype: what to compute in; float32 when None.

    Raises:
        UserError: an unreadable model, bad problems, or a directory begun with other settings.
    """
    rollouts_dir = out_dir / "rollouts"
    turns = [prompt_template.replace(QUESTION, question) for question in problems["question"].to_pylist()]
    sampler, weights_hash = open_local(
        model_dir,
        turns,
        max_new_tokens=params.max_new_tokens,
        max_batch=max_batch,
        longrope=longrope,
        dtype=dtype,
    )
    try:
        sample_rollouts(
            problems,
            sampler,
            load_tokenizer(model_dir),
            rollouts_dir,
            rollouts_per_problem=samples,
            params=params,
            teacher_name=weights_hash,
            shard_size=SHARD_QUESTIONS,
            stage_seed=seed,
            prompt_template=prompt_template,
        )
    finally:
        sampler.close()
    verify_rollouts(rollouts_dir, out_dir / "verdicts", workers=workers, config={"evaluates": str(rollouts_dir)})
    result = summarise(read_table(out_dir / "verdicts", "verdicts", SCORED_COLUMNS))
    settings = dict(read_manifest(rollouts_dir, "rollouts").config)
    write_result(out_dir / RESULTS_FILE, result, {**settings, "model": str(model_dir)})
    return result


def summarise(verdicts: pa.Table) -> Result:
    """Score graded responses.

    Args:
        verdicts: at least the `SCORED_COLUMNS` of kind "verdicts", at least one row.

    Raises:
        ValueError: the table is empty.
    """
    rows = verdicts.to_pylist()
    by_question: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_question.setdefault(row["problem_id"], []).append(row)
    correct = {q: [row["verdict"] == "correct" for row in group] for q, group in by_question.items()}
    overall = _score(correct)
    samples = min(len(values) for values in correct.values())
    groups: dict[str, dict[str, Sequence[bool]]] = {}
    for question, group in by_question.items():
        difficulty = group[0]["difficulty"] or NO_DIFFICULTY
        groups.setdefault(difficulty, {})[question] = correct[question]
    majority = [
        majority_score([row["extracted"] for row in group], correct[question])
        for question, group in by_question.items()
    ]

    def share(column: str, *values: str) -> float:
        return sum(row[column] in values for row in rows) / len(rows)

    return Result(
        questions=overall.questions,
        samples=samples,
        pass1=overall.pass1,
        stderr=overall.stderr,
        pass_at_k={
            k: sum(pass_at_k(len(v), sum(v), k) for v in correct.values()) / len(correct)
            for k in _powers_of_two(samples)
        },
        majority=sum(majority) / len(majority),
        truncated=share("finish_reason", "length"),
        stopped=share("finish_reason", "stop"),
        unparsable=share("verdict", "unparsable"),
        ungraded=share("verdict", "timeout", "error"),
        mean_tokens=sum(row["tokens"] for row in rows) / len(rows),
        by_difficulty={name: _score(group) for name, group in sorted(groups.items())},
        per_question={question: sum(values) / len(values) for question, values in correct.items()},
    )


def _score(correct: Mapping[str, Sequence[bool]]) -> Score:
    return Score(len(correct), *mean_and_clustered_error(correct))


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit, and the limit itself."""
    return sorted({2**power for power in range(limit.bit_length())} | {limit})


def write_result(path: Path, result: Result, settings: Mapping[str, Any]) -> None:
    """Write `results.json`: the result's fields and its `settings`; NaN becomes null."""
    values = asdict(result)
    values["pass_at_k"] = {str(k): value for k, value in result.pass_at_k.items()}
    write_json(path, _without_nan({**values, "settings": dict(settings), "grader": GRADER_VERSION}))


def read_result(path: Path) -> Result:
    """Read what :func:`write_result` wrote."""
    values = json.loads(path.read_text("utf-8"))

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Result(
        **{
            **{name: values[name] for name in Result.__dataclass_fields__},
            "stderr": number(values["stderr"]),
            "pass_at_k": {int(k): value for k, value in values["pass_at_k"].items()},
            "by_difficulty": {
                name: Score(score["questions"], score["pass1"], number(score["stderr"]))
                for name, score in values["by_difficulty"].items()
            },
        }
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return value
