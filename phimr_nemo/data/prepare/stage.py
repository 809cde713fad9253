"""The stage `prepare`: sources -> problems, and rollouts from the sources that bring trajectories.

Three passes, each in bounded memory. Sources into candidates, one after another (:mod:`.candidates`). Duplicates from
a few hundred bytes a candidate (:mod:`.dedup`). Then candidates into record directories, shard by shard::

    problems/     record directory of kind "problems"
    rollouts/     record directory of kind "rollouts", if any source brings trajectories
    drops.jsonl   every row that was dropped: source, place, reason, and for which row or evaluation question
    conflicts.jsonl   every question whose sources have several answers, and what was settled
    candidates/   intermediate, removed at the end
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from phimr_nemo.config import DecontaminationConfig, PrepareConfig, SourceConfig
from phimr_nemo.data.parallel import Team, team_of
from phimr_nemo.data.prepare.annotate import Annotations, Annotator, count_labels
from phimr_nemo.data.prepare.candidates import (
    COUNTS_FILE,
    DROPS_FILE,
    SHOWN_CHARS,
    candidate_shards,
    collect,
    counts_of,
    digest,
)
from phimr_nemo.data.prepare.decontaminate import EvaluationIndex, read_index
from phimr_nemo.data.prepare.dedup import (
    EXACT,
    EXACT_OTHER_ANSWER,
    KEPT,
    NEAR,
    Duplicates,
    Facts,
    find_duplicates,
)
from phimr_nemo.data.prepare.golds import Golds, settle_golds
from phimr_nemo.data.prepare.written import (
    CONFLICTS_FILE,
    PROBLEMS,
    ROLLOUTS,
    begin_once,
    examples_of,
    is_prepared_in,
    made_from_of,
    marked,
    settled,
    write_conflicts,
)
from phimr_nemo.data.sources.recorded import TOKENS_UNKNOWN
from phimr_nemo.endpoint import OpensModel
from phimr_nemo.store.atomic import atomic_file
from phimr_nemo.store.check import open_for
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.lease import FreeUnits
from phimr_nemo.store.progress import track
from phimr_nemo.store.provenance import BEGUN_FILE, MadeFrom, begun_from
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import (
    finish,
    is_complete,
    read_manifest,
    read_shard,
    rows_to_table,
    shard_is_complete,
    write_shard,
)

if TYPE_CHECKING:
    import numpy.typing as npt

CANDIDATES: Final = "candidates"
ANNOTATIONS: Final = "annotations"
NOTHING: Final = MadeFrom({}, {})
SIGNATURES: Final = "signatures.npy"
# A shard of rollouts ends at `shard_size` rows or at so many characters: responses are long.
ROLLOUT_SHARD_CHARS: Final = 256 << 20
DROP_REASONS: Final = {
    EXACT: "exact duplicate",
    EXACT_OTHER_ANSWER: "exact duplicate with another answer",
    NEAR: "near duplicate",
}

DUPLICATE_TRAJECTORY: Final = "trajectories that repeat another of the same problem"


def run_prepare(config: PrepareConfig, open_model: OpensModel) -> dict[str, Any]:
    """Write problems, rollouts and the list of what was dropped; what is finished is kept.

    Args:
        config: of the stage.
        open_model: opens the annotator, where there is one.

    Returns:
        Rows of both record directories and all counts.

    Raises:
        UserError: a source or an evaluation set cannot be read, or none of a source's rows is usable.
    """
    output = config.run.output
    wanted: list[tuple[str, Kind]] = [(PROBLEMS, "problems")]
    made_from = made_from_of(config)
    if begun_from(output) != made_from or not is_prepared_in(output):
        with team_of(config.shard, output) as team:
            begin_once(output, made_from, team, _forget)
            _prepare(config, made_from, team, open_model)
    if (output / CANDIDATES).is_dir():
        # All tasks of an array come here.
        shutil.rmtree(output / CANDIDATES, ignore_errors=True)
    if is_complete(output / ROLLOUTS, "rollouts"):
        wanted.append((ROLLOUTS, "rollouts"))
    manifests = {name: read_manifest(output / name, kind) for name, kind in wanted}
    rows = {name: manifest.rows for name, manifest in manifests.items()}
    return rows | dict(manifests[PROBLEMS].counts)


def _forget(output: Path) -> None:
    """Remove what was made from other sources or settings; replies of an annotator are kept by their questions."""
    (output / BEGUN_FILE).unlink(missing_ok=True)
    for name in (PROBLEMS, ROLLOUTS):
        open_for(output / name, NOTHING, 0)
    if (output / CANDIDATES).is_dir():
        shutil.rmtree(output / CANDIDATES)


def _prepare(config: PrepareConfig, made_from: MadeFrom, team: Team, open_model: OpensModel) -> None:
    """The processes of an array share the sources; the first that finds all of them read does the rest alone."""
    output = config.run.output
    directories = [output / CANDIDATES / f"source-{number:03d}" for number in range(len(config.sources))]

    def is_prepared(_: object) -> bool:
        return is_prepared_in(output)

    team.share(
        partial(_collect, config),
        list(zip(config.sources, directories, strict=True)),
        is_done=lambda item: (item[1] / COUNTS_FILE).is_file() or is_prepared(item),
        workers=config.workers,
        title="sources",
    )
    for _ in FreeUnits([0], team.leases, name="reduce", is_done=is_prepared, wait=True).one_by_one():
        _reduce(config, made_from, directories, open_model)


def _collect(config: PrepareConfig, item: tuple[SourceConfig, Path]) -> None:
    permutations = config.near_duplicates.permutations if config.near_duplicates else 0
    collect(*item, permutations=permutations, evaluation=_evaluation(config.decontamination))


@lru_cache(maxsize=1)
def _evaluation(config: DecontaminationConfig | None) -> EvaluationIndex | None:
    """The evaluation questions, read once a process."""
    return read_index(config) if config is not None else None


def _reduce(config: PrepareConfig, made_from: MadeFrom, directories: list[Path], open_model: OpensModel) -> None:
    """What is decided over all sources, and the record directories."""
    output = config.run.output
    permutations = config.near_duplicates.permutations if config.near_duplicates else 0
    counts: Counter[str] = Counter()
    for source, directory in zip(config.sources, directories, strict=True):
        for name, count in counts_of(directory).items():
            counts[name] += count
            counts[f"{source.name}: {name}"] += count
    facts = _facts(directories, permutations, output / CANDIDATES / SIGNATURES)
    duplicates = find_duplicates(facts, config.near_duplicates)
    names = [source.name for source in config.sources]
    golds = settle_golds(directories, names, facts, duplicates, config.golds)
    counts.update(golds.counts)
    labels = Annotations(directories, duplicates)
    with Annotator(config.annotation, output / ANNOTATIONS, open_model) as annotate:
        _write_problems(config, directories, duplicates, golds, labels, annotate, counts, made_from)
    if counts["trajectories"]:
        rollouts = Counter[str]()
        rows = _rollouts(directories, names, duplicates, golds, labels, rollouts)
        _write_shards(output / ROLLOUTS, "rollouts", config.shard_size, rows, made_from)
        finish(output / ROLLOUTS, kind="rollouts", **made_from.to_json(), counts=rollouts)
        counts.update(rollouts)
    _write_drops(config, directories, duplicates)
    write_conflicts(output / CONFLICTS_FILE, directories, names, golds)
    # The problems are finished last: with them the whole stage is.
    examples = examples_of(output / DROPS_FILE)
    finish(output / PROBLEMS, kind="problems", **made_from.to_json(), counts=counts, examples=examples)


def _facts(directories: list[Path], permutations: int, signatures_path: Path) -> Facts:
    """What decides about duplicates, of all candidates; the signatures stay in a file."""
    columns = ["question_digest", "bare_digest", "numbers_digest", "answer_digest", "rank"]
    narrow = [table for _, table in candidate_shards(directories, columns)]

    def gather(name: str, dtype: Any) -> npt.NDArray[Any]:
        return np.concatenate([table.column(name).to_numpy().astype(dtype) for table in narrow])

    rank = gather("rank", np.int32)
    signatures = None
    if permutations:
        signatures = np.lib.format.open_memmap(
            signatures_path, mode="w+", dtype=np.uint32, shape=(permutations, len(rank))
        )
        start = 0
        for _, table in candidate_shards(directories, ["signature"]):
            data = b"".join(table.column("signature").to_pylist())
            signatures[:, start : start + table.num_rows] = np.frombuffer(data, "<u4").reshape(-1, permutations).T
            start += table.num_rows
    return Facts(
        gather("question_digest", np.uint64),
        gather("bare_digest", np.uint64),
        gather("numbers_digest", np.uint64),
        gather("answer_digest", np.uint64),
        rank,
        signatures,
    )


def _candidates(directories: list[Path], columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Every candidate with its index over all sources and the number of its source."""
    index = 0
    for source, table in candidate_shards(directories, columns):
        for row in table.to_pylist():
            yield index, source, row
            index += 1


def _write_problems(
    config: PrepareConfig,
    directories: list[Path],
    duplicates: Duplicates,
    golds: Golds,
    labels: Annotations,
    annotate: Annotator,
    counts: Counter[str],
    made_from: MadeFrom,
) -> None:
    """The kept candidates as problems, annotated shard by shard; `labels` and `counts` take what comes of it."""
    directory = config.run.output / PROBLEMS
    columns = ["id", "question", "answer", "solution", "domain", "difficulty", "metadata"]
    reasons = duplicates.reason.tolist()
    part: list[dict[str, Any]] = []
    indices: list[int] = []
    shard = 0
    candidates = _candidates(directories, columns)
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


def _rollouts(
    directories: list[Path],
    names: list[str],
    duplicates: Duplicates,
    golds: Golds,
    labels: Annotations,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    """The trajectories of all candidates as rollouts; those of a duplicate belong to the problem that was kept.

    Each has the answer of its own source (see :mod:`.golds`).
    """
    kept = duplicates.kept.tolist()
    stand_ins = {kept[index] for index in np.flatnonzero(duplicates.reason != KEPT).tolist()} | golds.answers.keys()
    problems = {
        index: content_id("problem", row["question"], golds.answers.get(index, row["answer"]))
        for index, _, row in _candidates(directories, ["question", "answer"])
        if index in stand_ins
    }
    # By a digest, not by (problem, teacher): a third of the memory, and there are millions.
    samples: Counter[int] = Counter()
    seen: set[int] = set()
    columns = ["id", "question", "answer", "trajectories"]
    for index, source, row in _candidates(directories, columns):
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


def _write_shards(
    directory: Path, kind: Kind, size: int, rows: Iterable[dict[str, Any]], made_from: MadeFrom
) -> None:
    """Rows into shards of at most `size` rows and `ROLLOUT_SHARD_CHARS` characters of responses."""
    part: list[dict[str, Any]] = []
    chars = shard = 0
    for row in track(rows, title=kind, unit="row"):
        if part and (len(part) == size or chars + len(row["response"]) > ROLLOUT_SHARD_CHARS):
            if not shard_is_complete(directory, shard, made_from):
                write_shard(directory, shard, rows_to_table(part, kind), kind=kind, made_from=made_from)
            part, chars, shard = [], 0, shard + 1
        part.append(row)
        chars += len(row["response"])
    if part and not shard_is_complete(directory, shard, made_from):
        write_shard(directory, shard, rows_to_table(part, kind), kind=kind, made_from=made_from)


def _write_drops(config: PrepareConfig, directories: list[Path], duplicates: Duplicates) -> None:
    """One JSON line for every row that was dropped."""
    stand_ins = set(duplicates.kept[duplicates.reason != KEPT].tolist())
    kept = {
        index: {
            "kept": row["id"],
            "kept_source": config.sources[source].name,
            "match": row["question"][:SHOWN_CHARS],
            "match_answer": row["answer"],
        }
        for index, source, row in _candidates(directories, ["id", "question", "answer"])
        if index in stand_ins
    }
    with (
        atomic_file(config.run.output / DROPS_FILE) as temporary,
        temporary.open("w", encoding="utf-8") as drops,
    ):
        for directory in directories:
            with (directory / DROPS_FILE).open(encoding="utf-8") as lines:
                shutil.copyfileobj(lines, drops)
        for index, source, row in _candidates(directories, ["place", "question", "answer"]):
            reason = int(duplicates.reason[index])
            if reason == KEPT:
                continue
            drop = {
                "source": config.sources[source].name,
                "place": row["place"],
                "reason": DROP_REASONS[reason],
                "question": row["question"][:SHOWN_CHARS],
                "answer": row["answer"],
                "overlap": round(float(duplicates.similarity[index]), 3),
                **kept[int(duplicates.kept[index])],
            }
            drops.write(json.dumps(drop, ensure_ascii=False) + "\n")
