"""The last pass of `prepare`: candidates with their text into record directories, in order of sources and rows."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from phimr_nemo.config import PrepareConfig
from phimr_nemo.data.prepare.annotate import Annotations, Annotator, count_labels
from phimr_nemo.data.prepare.candidates import SHOWN_CHARS, Work, candidate_tables, digest
from phimr_nemo.data.prepare.dedup import EXACT, EXACT_OTHER_ANSWER, KEPT, NEAR, Duplicates
from phimr_nemo.data.prepare.golds import Golds
from phimr_nemo.data.prepare.written import PROBLEMS, marked, settled
from phimr_nemo.data.sources.recorded import TOKENS_UNKNOWN
from phimr_nemo.store.atomic import atomic_file
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.progress import track
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.shards import read_shard, rows_to_table, shard_is_complete, write_shard

# A shard of rollouts ends at `shard_size` rows or at so many characters: responses are long.
ROLLOUT_SHARD_CHARS: Final = 256 << 20
DROP_REASONS: Final = {
    EXACT: "exact duplicate",
    EXACT_OTHER_ANSWER: "exact duplicate with another answer",
    NEAR: "near duplicate",
}
DUPLICATE_TRAJECTORY: Final = "trajectories that repeat another of the same problem"


@dataclass(frozen=True)
class Decided:
    """What was decided over all candidates.

    Attributes:
        duplicates: which of them stand for which.
        golds: answers that are not a candidate's own.
        labels: domain and difficulty.
    """

    duplicates: Duplicates
    golds: Golds
    labels: Annotations


def _candidates(works: Sequence[Work], columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Every candidate with its index over all sources and the number of its source."""
    index = 0
    for source, table in candidate_tables(works, columns):
        for row in table.to_pylist():
            yield index, source, row
            index += 1


def write_problems(
    config: PrepareConfig,
    works: Sequence[Work],
    decided: Decided,
    annotate: Annotator,
    counts: Counter[str],
    made_from: MadeFrom,
) -> None:
    """The kept candidates as problems, annotated shard by shard; labels and `counts` take what comes of it."""
    duplicates, golds, labels = decided.duplicates, decided.golds, decided.labels
    directory = config.run.output / PROBLEMS
    columns = ["id", "question", "answer", "solution", "domain", "difficulty", "metadata"]
    reasons = duplicates.reason.tolist()
    part: list[dict[str, Any]] = []
    indices: list[int] = []
    shard = 0
    candidates = _candidates(works, columns)
    for index, source, row in track(candidates, total=len(reasons), title="problems", unit="candidate"):
        name = config.sources[source].name
        if reasons[index] != KEPT:
            counts[f"dropped: {DROP_REASONS[reasons[index]]}"] += 1
            counts[f"{name}: dropped: {DROP_REASONS[reasons[index]]}"] += 1
            continue
        counts[f"{name}: problems"] += 1
        domain, difficulty = labels.get(index)
        row |= settled(row, index, golds)
        part.append({**row, "source": name, "domain": domain, "difficulty": difficulty})
        indices.append(index)
        if len(part) == config.shard_size:
            counts.update(_finish_shard(directory, shard, part, indices, annotate, labels, made_from))
            part, indices, shard = [], [], shard + 1
    if part:
        counts.update(_finish_shard(directory, shard, part, indices, annotate, labels, made_from))
    counts.update(annotate.facts())


def _finish_shard(
    directory: Path,
    shard: int,
    rows: list[dict[str, Any]],
    indices: list[int],
    annotate: Annotator,
    labels: Annotations,
    made_from: MadeFrom,
) -> Counter[str]:
    """Annotate and write a shard of problems, or take what an earlier run wrote; counts of its labels."""
    if not shard_is_complete(directory, shard, made_from):
        annotate.fill(rows)
        write_shard(directory, shard, rows_to_table(rows, "problems"), kind="problems", made_from=made_from)
    else:
        rows = read_shard(directory, shard, ["domain", "difficulty", "metadata"]).to_pylist()
    for index, row in zip(indices, rows, strict=True):
        labels.set(index, row["domain"], row["difficulty"])
    return count_labels(rows)


def rollouts_of(
    works: Sequence[Work],
    decided: Decided,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    """The trajectories of all candidates as rollouts; those of a duplicate belong to the problem that was kept.

    Each has the answer of its own source (see :mod:`.golds`).
    """
    duplicates, golds, labels = decided.duplicates, decided.golds, decided.labels
    names = {work.source: work.config.name for work in works}
    kept = duplicates.kept.tolist()
    stand_ins = {kept[index] for index in np.flatnonzero(duplicates.reason != KEPT).tolist()} | golds.answers.keys()
    problems = {
        index: content_id("problem", row["question"], golds.answers.get(index, row["answer"]))
        for index, _, row in _candidates(works, ["question", "answer"])
        if index in stand_ins
    }
    # By a digest, not by (problem, teacher): a third of the memory, and there are millions.
    samples: Counter[int] = Counter()
    seen: set[int] = set()
    columns = ["id", "question", "answer", "trajectories"]
    for index, source, row in _candidates(works, columns):
        problem = kept[index]
        problem_id = problems.get(problem, row["id"])
        answer, kind = golds.own.get(index, row["answer"]), golds.kinds.get(index)
        domain, difficulty = labels.get(problem)
        for one in row["trajectories"]:
            response_digest = digest(f"{problem} {answer} {one['response']}")
            if response_digest in seen:
                counts[f"dropped: {DUPLICATE_TRAJECTORY}"] += 1
                continue
            seen.add(response_digest)
            teacher = one["teacher"]
            key = digest(f"{problem} {teacher}")
            sample = samples[key]
            samples[key] += 1
            counts[one["finish_reason"]] += 1
            if kind is not None:
                counts[f"gold: {kind}"] += 1
            yield {
                "id": content_id("rollout", problem_id, teacher, "recorded", str(sample)),
                "problem_id": problem_id,
                "question": row["question"],
                "answer": answer,
                "response": one["response"],
                "teacher": teacher,
                "sample_index": sample,
                "seed": content_seed("recorded", problem_id, teacher, str(sample)),
                "finish_reason": one["finish_reason"],
                "tokens": TOKENS_UNKNOWN,
                "domain": domain,
                "difficulty": difficulty,
                "source": names[source],
                "metadata": marked(one["labels"], kind),
            }


def write_rollouts(directory: Path, size: int, rows: Iterable[dict[str, Any]], made_from: MadeFrom) -> None:
    """Rows into shards of at most `size` rows and `ROLLOUT_SHARD_CHARS` characters of responses."""
    part: list[dict[str, Any]] = []
    chars = shard = 0
    for row in track(rows, title="rollouts", unit="row"):
        if part and (len(part) == size or chars + len(row["response"]) > ROLLOUT_SHARD_CHARS):
            _write_rollout_shard(directory, shard, part, made_from)
            part, chars, shard = [], 0, shard + 1
        part.append(row)
        chars += len(row["response"])
    if part:
        _write_rollout_shard(directory, shard, part, made_from)


def _write_rollout_shard(directory: Path, shard: int, rows: list[dict[str, Any]], made_from: MadeFrom) -> None:
    if not shard_is_complete(directory, shard, made_from):
        write_shard(directory, shard, rows_to_table(rows, "rollouts"), kind="rollouts", made_from=made_from)


def write_drops(path: Path, works: Sequence[Work], duplicates: Duplicates) -> None:
    """One JSON line for every row that was dropped."""
    names = {work.source: work.config.name for work in works}
    stand_ins = set(duplicates.kept[duplicates.reason != KEPT].tolist())
    kept = {
        index: {
            "kept": row["id"],
            "kept_source": names[source],
            "match": row["question"][:SHOWN_CHARS],
            "match_answer": row["answer"],
        }
        for index, source, row in _candidates(works, ["id", "question", "answer"])
        if index in stand_ins
    }
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as drops:
        for work in works:
            with work.drops.open(encoding="utf-8") as lines:
                shutil.copyfileobj(lines, drops)
        for index, source, row in _candidates(works, ["place", "question", "answer"]):
            reason = int(duplicates.reason[index])
            if reason == KEPT:
                continue
            drop = {
                "source": names[source],
                "place": row["place"],
                "reason": DROP_REASONS[reason],
                "question": row["question"][:SHOWN_CHARS],
                "answer": row["answer"],
                "overlap": round(float(duplicates.similarity[index]), 3),
                **kept[int(duplicates.kept[index])],
            }
            drops.write(json.dumps(drop, ensure_ascii=False) + "\n")
