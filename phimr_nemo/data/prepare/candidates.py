"""The first pass of `prepare`: a source's usable, uncontaminated problems in shards with what decides about them.

One directory a source. `counts.json` is written last and completes it, so a killed run repeats at most one source.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import SourceConfig
from phimr_nemo.data.prepare.decontaminate import EvaluationIndex
from phimr_nemo.data.prepare.dedup import Signer
from phimr_nemo.data.sources.damage import is_damaged
from phimr_nemo.data.sources.item import Item, UnusableRow
from phimr_nemo.data.sources.normalise import clean, comparison_key, comparison_tokens, numbers, storable
from phimr_nemo.data.sources.problems import DAMAGED, MAX_METADATA_CHARS
from phimr_nemo.data.sources.source import read_items
from phimr_nemo.data.sources.wrapping import Wrappers, bare_question, learn_wrappers
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_file, write_json
from phimr_nemo.store.content import content_id

if TYPE_CHECKING:
    import pyarrow as pa

COUNTS_FILE: Final = "counts.json"
DROPS_FILE: Final = "drops.jsonl"
SHARD_ROWS: Final = 10_000
SHARD_CHARS: Final = 64 << 20
MAX_QUESTION_CHARS: Final = 20_000
MAX_ANSWER_CHARS: Final = 2_000
SHOWN_CHARS: Final = 500
DIGEST_BYTES: Final = 8
SIGNATURE_ITEM_BYTES: Final = 4
# The preference among duplicates (see dedup).
GOLD_ANSWER_RANK: Final = 8
SOLUTION_RANK: Final = 4

WRAPPERS_FILE: Final = "wrappers.json"
WRAPPER_ROWS: Final = 2_000
"""Rows of a source from which its wrappers are learned."""

TOO_LONG: Final = "question or answer too long"
INCOMPLETE: Final = "no question or no answer"


@dataclass
class _Shard:
    """Rows that wait to be written, and how many characters they hold."""

    rows: list[dict[str, Any]]
    chars: int = 0


@cache
def candidate_schema(permutations: int) -> pa.Schema:
    """The columns of a candidate shard; without near duplicates (`permutations` 0) no signature."""
    import pyarrow as pa

    trajectory = pa.struct(
        [(name, pa.string()) for name in ("response", "teacher", "finish_reason", "labels")],
    )
    text = [(name, pa.string()) for name in ("id", "place", "question", "answer", "solution", "domain", "difficulty")]
    names = ("question_digest", "bare_digest", "numbers_digest", "answer_digest")
    digests = [(name, pa.uint64()) for name in names]
    signature = [("signature", pa.binary(permutations * SIGNATURE_ITEM_BYTES))] if permutations else []
    return pa.schema(
        [
            *text,
            ("metadata", pa.string()),
            ("voted", pa.bool_()),
            ("trajectories", pa.list_(trajectory)),
            *digests,
            ("rank", pa.int32()),
            *signature,
        ]
    )


def collect(
    source: SourceConfig, directory: Path, *, permutations: int, evaluation: EvaluationIndex | None
) -> dict[str, int]:
    """Read a source into candidate shards, unless that is done.

    Returns:
        "read", "candidates", "trajectories", "dropped: REASON" for each reason, and what was repaired or lost.

    Raises:
        UserError: the source cannot be read, or none of its rows is usable.
    """
    finished = directory / COUNTS_FILE
    if finished.is_file():
        return counts_of(directory)
    for left_over in directory.glob("part-*.parquet"):
        left_over.unlink()
    directory.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter({"read": 0, "candidates": 0, "trajectories": 0})
    signer = Signer(permutations) if permutations else None
    shard, index = _Shard([]), 0
    wrappers, items = _with_wrappers(read_items(source))
    write_json(directory / WRAPPERS_FILE, wrappers.as_text())
    with atomic_file(directory / DROPS_FILE) as temporary, temporary.open("w", encoding="utf-8") as drops:
        for place, item in items:
            counts["read"] += 1
            counts.update(item.lost if isinstance(item, Item) else ())
            row = _candidate(source, place, item, evaluation, signer, wrappers)
            if "reason" in row:
                counts[f"dropped: {row['reason']}"] += 1
                drops.write(json.dumps(row, ensure_ascii=False) + "\n")
                continue
            counts["candidates"] += 1
            counts["trajectories"] += len(row["trajectories"])
            shard.rows.append(row)
            shard.chars += sum(len(one["response"]) for one in row["trajectories"]) + len(row["question"])
            if len(shard.rows) >= SHARD_ROWS or shard.chars >= SHARD_CHARS:
                _write(directory, index, shard, permutations)
                shard, index = _Shard([]), index + 1
    if shard.rows:
        _write(directory, index, shard, permutations)
    if not counts["candidates"]:
        raise UserError(
            f"source {source.name}: none of its {counts['read']} rows is kept: {dict(counts)}",
            rule="a source brings at least one problem with a question and an answer",
            remedy=f"look at the reasons in {directory / DROPS_FILE}, at preset and columns; or leave the source out",
        )
    write_json(finished, dict(counts))
    return dict(counts)


def counts_of(directory: Path) -> dict[str, int]:
    """The counts of a source that is collected."""
    return dict(json.loads((directory / COUNTS_FILE).read_text("utf-8")))


def candidate_shards(directories: list[Path], columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """The candidate shards of all sources in order, each with the number of its source."""
    import pyarrow.parquet as pq

    for number, directory in enumerate(directories):
        for path in sorted(directory.glob("part-*.parquet")):
            yield number, pq.read_table(path, columns=columns)


def rows_at(table: pa.Table, places: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows of a table; only these become Python objects."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = table.take(pa.array(places, pa.int64())).to_pylist()
    return rows


def _candidate(
    source: SourceConfig,
    place: str,
    item: Item | UnusableRow,
    evaluation: EvaluationIndex | None,
    signer: Signer | None,
    wrappers: Wrappers,
) -> dict[str, Any]:
    """A candidate row, or a row of the drops file: that has a "reason"."""
    drop = {"source": source.name, "place": place}
    if isinstance(item, UnusableRow):
        return drop | {"reason": item.reason}
    if is_damaged(item.question, item.answer):
        return drop | {"reason": DAMAGED, "question": storable(item.question)[:SHOWN_CHARS]}
    question, answer = clean(item.question), clean(item.answer)
    drop["question"] = question[:SHOWN_CHARS]
    if not question or not (answer or item.trajectories):
        return drop | {"reason": INCOMPLETE}
    if len(question) > MAX_QUESTION_CHARS or len(answer) > MAX_ANSWER_CHARS:
        return drop | {"reason": TOO_LONG}
    tokens = comparison_tokens(bare_question(question))
    if not tokens:
        return drop | {"reason": INCOMPLETE}
    match = evaluation.match(question, tokens) if evaluation is not None else None
    if match is not None:
        return drop | {
            "reason": f"contaminated: {match.rule}, {match.set}",
            "match": match.question[:SHOWN_CHARS],
            "overlap": round(match.overlap, 3),
        }
    labels = (item.domain is not None) + (item.difficulty is not None)
    gold = GOLD_ANSWER_RANK if answer and not item.voted else 0
    key = " ".join(tokens)
    row: dict[str, Any] = {
        "id": content_id("problem", question, answer),
        "place": place,
        "question": question,
        "answer": answer,
        "solution": clean(item.solution) if item.solution else None,
        "domain": item.domain,
        "difficulty": item.difficulty,
        "metadata": _as_json(item.labels),
        "voted": item.voted,
        "trajectories": [
            {
                "response": storable(one.response),
                "teacher": source.teacher or one.teacher,
                "finish_reason": one.finish_reason,
                "labels": _as_json(one.labels),
            }
            for one in item.trajectories
        ],
        "question_digest": digest(key),
        "bare_digest": digest(comparison_key(bare_question(question, wrappers))),
        "numbers_digest": digest(" ".join(numbers(tokens))),
        # Two questions without an answer are never almost the same: nothing tells them apart.
        "answer_digest": digest(comparison_key(answer) if answer else f"no answer to {key}"),
        "rank": gold + (SOLUTION_RANK if item.solution else 0) + labels,
    }
    if signer is not None:
        row["signature"] = signer.sign(tokens).astype("<u4").tobytes()
    return row


def _with_wrappers(
    items: Iterator[tuple[str, Item | UnusableRow]],
) -> tuple[Wrappers, Iterator[tuple[str, Item | UnusableRow]]]:
    """What many of a source's first questions begin and end with, and all of its items from the first on."""
    head: list[tuple[str, Item | UnusableRow]] = []
    chars = 0
    for place, item in items:
        head.append((place, item))
        if isinstance(item, Item):
            chars += len(item.question) + sum(len(one.response) for one in item.trajectories)
        if len(head) >= WRAPPER_ROWS or chars >= SHARD_CHARS:
            break
    questions = dict.fromkeys(clean(item.question) for _, item in head if isinstance(item, Item))
    return learn_wrappers(list(questions)), itertools.chain(head, items)


def digest(text: str) -> int:
    """A 64-bit digest."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest(), "little")


def _as_json(labels: Mapping[str, Any]) -> str:
    """The labels without those that are long: a source's texts belong in columns."""
    short = {name: value for name, value in labels.items() if len(str(value)) <= MAX_METADATA_CHARS}
    return storable(json.dumps(_finite(short), ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def _write(directory: Path, index: int, shard: _Shard, permutations: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(shard.rows, schema=candidate_schema(permutations))
    with atomic_file(directory / f"part-{index:05d}.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")
