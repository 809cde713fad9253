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

import numpy as np

from phimr_nemo.data.curate.shape import LENGTH_BINS, length_bins
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.statistics import majority_at_k, mean_and_clustered_error, pass_at_k
from phimr_nemo.generate.engines import write_rollouts
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.provenance import MADE_FROM, MadeFrom, content_of, read_made_from
from phimr_nemo.store.records import UNGRADED_VERDICTS
from phimr_nemo.store.runs import RESULTS_FILE
from phimr_nemo.store.shards import iter_shards, read_manifest, read_table
from phimr_nemo.verify import GRADER_VERSION
from phimr_nemo.verify.plug import plugged_name
from phimr_nemo.verify.stage import verify_rollouts

if TYPE_CHECKING:
    import pyarrow as pa

    from phimr_nemo.config import EvaluateConfig

VERDICTS: Final = "verdicts"
MODEL: Final = "model"
"""The evaluated model among the inputs."""
NO_DIFFICULTY: Final = "unknown"
SCORED_COLUMNS: Final = ("problem_id", "difficulty", "verdict", "extracted", "finish_reason", "tokens")
QUANTILES: Final = (0.1, 0.5, 0.9, 0.99, 1.0)
SHARES: Final = ("truncated", "stopped", "unparsable", "ungraded")


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
class Lengths:
    """Responses by length in tokens, of those whose tokens are known.

    Attributes:
        known: how many they are.
        quantiles: share of responses -> length that so many do not exceed.
        correct, wrong: mean length of correct and of all other responses; NaN where there are none.
        bins: responses in each length class of :mod:`phimr_nemo.data.curate.shape`.
    """

    known: int
    quantiles: Mapping[float, float]
    correct: float
    wrong: float
    bins: tuple[int, ...]


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
        ungraded: share on which the grader timed out, failed or could not read the gold answer; not correct.
        mean_tokens: mean response length in tokens; NaN where nobody counted them.
        by_difficulty: score within each difficulty.
        per_question: problem id -> accuracy, for paired comparisons.
        majority_at_k: k -> maj@k of k responses drawn from those there are, for the same k as `pass_at_k`.
        lengths: of the responses; None where nobody counted tokens.
        gold_unreadable: share whose gold answer the grader cannot read, a part of `ungraded`.
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
    majority_at_k: Mapping[int, float]
    lengths: Lengths | None
    gold_unreadable: float = 0.0


def evaluate_model(config: EvaluateConfig, problems: pa.Table, facts: Mapping[str, Any]) -> Result:
    """Sample responses to problems, grade them and write `rollouts/`, `verdicts/` and `results.json`.

    An interrupted evaluation continues; the weights' hash is part of its settings, so a changed model is an error and
    never an old score.

    Args:
        config: the evaluation.
        problems: a table of kind "problems".
        facts: go into the settings of `results.json`.

    Raises:
        UserError: an unreadable model, bad problems, a directory begun with other settings, or a model that answers
            nothing at all.
    """
    rollouts_dir, verdicts_dir = config.run.output / "rollouts", config.run.output / VERDICTS
    write_rollouts(
        config.engine,
        config.model,
        config,
        problems,
        rollouts_dir,
        longrope=config.longrope,
        samples=config.samples,
        shard_size=config.shard_questions,
        seed=config.run.seed,
        inputs={} if config.model is None else {MODEL: content_of(config.model)},
    )
    verify_rollouts(rollouts_dir, verdicts_dir, workers=config.workers, function=config.grader)
    _check_not_silent(verdicts_dir)
    result = summarise(read_table(verdicts_dir, "verdicts", SCORED_COLUMNS))
    sampled = read_manifest(rollouts_dir, "rollouts").made_from
    grader = GRADER_VERSION if config.grader is None else plugged_name(config.grader)
    made_from = MadeFrom(sampled.inputs, {**sampled.config, "grader": grader})
    settings = {**sampled.config, **sampled.inputs, "model": str(config.model), **facts}
    write_result(config.run.output / RESULTS_FILE, result, settings, grader=grader, made_from=made_from)
    return result


def _check_not_silent(verdicts_dir: Path) -> None:
    """Refuse responses that all ended before their first word."""
    counts = read_manifest(verdicts_dir, "verdicts").counts
    rows = sum(counts.values())
    if counts.get("unparsable") != rows:
        return
    for shard in iter_shards(verdicts_dir, "verdicts", ["response", "finish_reason"]):
        ended = zip(shard["response"].to_pylist(), shard["finish_reason"].to_pylist(), strict=True)
        if any(response.strip() or reason != "stop" for response, reason in ended):
            return
    raise UserError(
        f"all {rows} responses in {verdicts_dir} are empty",
        rule="a model that is evaluated answers something: a score of zero would say nothing about it",
        remedy="check that the directory's chat template and end tokens are the model's, or the server's model "
        "(phimr sample DIR QUESTION shows a reply); then remove the output directory",
    )


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
    draws = _powers_of_two(samples)
    majority = [
        majority_at_k([row["extracted"] for row in group], correct[question], [*draws, len(group)])
        for question, group in by_question.items()
    ]

    def share(column: str, *values: str) -> float:
        return sum(row[column] in values for row in rows) / len(rows)

    return Result(
        questions=overall.questions,
        samples=samples,
        pass1=overall.pass1,
        stderr=overall.stderr,
        pass_at_k={k: sum(pass_at_k(len(v), sum(v), k) for v in correct.values()) / len(correct) for k in draws},
        majority=sum(scores[len(group)] for scores, group in zip(majority, correct.values(), strict=True))
        / len(majority),
        truncated=share("finish_reason", "length"),
        stopped=share("finish_reason", "stop"),
        unparsable=share("verdict", "unparsable"),
        ungraded=share("verdict", *UNGRADED_VERDICTS),
        mean_tokens=_mean([row["tokens"] for row in rows if row["tokens"] >= 0]),
        by_difficulty={name: _score(group) for name, group in sorted(groups.items())},
        per_question={question: sum(values) / len(values) for question, values in correct.items()},
        majority_at_k={k: sum(scores[k] for scores in majority) / len(majority) for k in draws},
        lengths=_lengths(rows),
        gold_unreadable=share("verdict", "gold_unreadable"),
    )


def _lengths(rows: Sequence[Mapping[str, Any]]) -> Lengths | None:
    counted = [row for row in rows if row["tokens"] >= 0]
    if not counted:
        return None
    tokens = np.array([row["tokens"] for row in counted])
    bins = np.bincount(length_bins(tokens, tokens), minlength=LENGTH_BINS)
    return Lengths(
        known=len(counted),
        quantiles={q: float(np.quantile(tokens, q, method="inverted_cdf")) for q in QUANTILES},
        correct=_mean([row["tokens"] for row in counted if row["verdict"] == "correct"]),
        wrong=_mean([row["tokens"] for row in counted if row["verdict"] != "correct"]),
        bins=tuple(int(count) for count in bins),
    )


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else math.nan


def _score(correct: Mapping[str, Sequence[bool]]) -> Score:
    return Score(len(correct), *mean_and_clustered_error(correct))


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit, and the limit itself."""
    return sorted({2**power for power in range(limit.bit_length())} | {limit})


def write_result(
    path: Path,
    result: Result,
    settings: Mapping[str, Any],
    *,
    grader: str = GRADER_VERSION,
    made_from: MadeFrom | None = None,
) -> None:
    """Write `results.json`: the result's fields, its `settings`, its grader, what it was made from; NaN is null."""
    values = {**asdict(result), "settings": dict(settings), "grader": grader}
    if made_from is not None:
        values[MADE_FROM] = made_from.to_json()
    write_json(path, _plain(values))


def read_result(path: Path) -> Result:
    """Read what :func:`write_result` wrote.

    Raises:
        UserError: the file is missing or holds something else.
    """
    return _result_of(_read(path), path)


def read_settings(path: Path) -> dict[str, Any]:
    """How the result in a `results.json` was made: row, benchmark, model, problems, sampling, the grader's version.

    Raises:
        UserError: the file is missing or holds something else.
    """
    values = _read(path)
    settings = values.get("settings")
    if not isinstance(settings, dict) or not {"row", "benchmark"} <= settings.keys():
        raise _damaged(path, "its settings name no row and benchmark")
    return {**settings, "grader": str(values.get("grader"))}


def evaluated_model(path: Path) -> str | None:
    """The content of the model whose score is in a `results.json`; None where nobody knows, as behind an endpoint.

    Raises:
        UserError: the file is missing or holds something else.
    """
    made_from = read_made_from(_read(path).get(MADE_FROM))
    return None if made_from is None else made_from.inputs.get(MODEL)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(values, dict):
        raise _damaged(path, "no JSON object")
    return values


def _result_of(values: Mapping[str, Any], path: Path) -> Result:
    try:
        lengths = values["lengths"]
        return Result(
            questions=int(values["questions"]),
            samples=int(values["samples"]),
            pass1=float(values["pass1"]),
            stderr=_number(values["stderr"]),
            pass_at_k={int(k): float(value) for k, value in values["pass_at_k"].items()},
            majority=float(values["majority"]),
            **{name: float(values[name]) for name in SHARES},
            mean_tokens=_number(values["mean_tokens"]),
            by_difficulty={
                str(name): Score(int(score["questions"]), float(score["pass1"]), _number(score["stderr"]))
                for name, score in values["by_difficulty"].items()
            },
            per_question={str(question): float(value) for question, value in values["per_question"].items()},
            majority_at_k={int(k): float(value) for k, value in values["majority_at_k"].items()},
            lengths=None
            if lengths is None
            else Lengths(
                known=int(lengths["known"]),
                quantiles={float(q): float(value) for q, value in lengths["quantiles"].items()},
                correct=_number(lengths["correct"]),
                wrong=_number(lengths["wrong"]),
                bins=tuple(int(count) for count in lengths["bins"]),
            ),
            gold_unreadable=float(values.get("gold_unreadable", 0.0)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, repr(error)) from error


def _damaged(path: Path, error: object) -> UserError:
    return UserError(
        f"{path} holds no result: {error}",
        rule=f"an evaluation that has finished wrote {RESULTS_FILE}",
        remedy="run `phimr evaluate` again with the same configuration: responses and verdicts are kept",
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    """A value for JSON: keys are text, NaN is null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
