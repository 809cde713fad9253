"""The maps of `prepare`: pieces of sources into usable, uncontaminated problems, and what decides about them.

A source is looked at once (:mod:`.look`), then every piece of it is read by itself::

    source-000.json        what was seen of a source
    part-00000.parquet     candidates of a piece, with their text
    narrow-00000.parquet   their narrow columns
    drops-00000.jsonl      the rows that were dropped
    part-00000.json        counts; written last, so a killed process repeats a piece
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from phimr_nemo.config import SourceConfig
from phimr_nemo.data.prepare.decontaminate import EvaluationIndex
from phimr_nemo.data.prepare.dedup import Candidates, Signer, band_keys, band_names, first_row
from phimr_nemo.data.prepare.look import read_look
from phimr_nemo.data.prepare.narrow import label_code, narrow_schema
from phimr_nemo.data.sources.damage import is_damaged
from phimr_nemo.data.sources.item import Item, UnusableRow
from phimr_nemo.data.sources.labels import DOMAINS
from phimr_nemo.data.sources.normalise import clean, comparison_key, comparison_tokens, numbers, storable
from phimr_nemo.data.sources.problems import DAMAGED, MAX_METADATA_CHARS
from phimr_nemo.data.sources.source import (
    Layout,
    Piece,
    items_of,
    piece_rows,
)
from phimr_nemo.data.sources.wrapping import NO_WRAPPERS, Wrappers, bare_question
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_file, write_json
from phimr_nemo.store.content import content_id
from phimr_nemo.store.records import DIFFICULTIES

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_ROWS: Final = 10_000
SHARD_CHARS: Final = 64 << 20
MAX_QUESTION_CHARS: Final = 20_000
MAX_ANSWER_CHARS: Final = 2_000
SHOWN_CHARS: Final = 500
DIGEST_BYTES: Final = 8
# The preference among duplicates (see dedup).
GOLD_ANSWER_RANK: Final = 8
SOLUTION_RANK: Final = 4

TOO_LONG: Final = "question or answer too long"
INCOMPLETE: Final = "no question or no answer"


@cache
def candidate_schema() -> pa.Schema:
    """The columns of candidates with their text."""
    import pyarrow as pa

    trajectory = pa.struct(
        [(name, pa.string()) for name in ("response", "teacher", "finish_reason", "labels")],
    )
    text = ("id", "place", "question", "answer", "solution", "domain", "difficulty", "metadata")
    columns = [(name, pa.string()) for name in text]
    return pa.schema([*columns, ("voted", pa.bool_()), ("trajectories", pa.list_(trajectory))])


@dataclass(frozen=True)
class Work:
    """A piece of a source, and where its candidates go.

    Attributes:
        source: its number.
        config: its settings.
        wrappers, layout: of the source.
        piece: the piece.
        number: of the piece over all sources.
        directory: of all candidates.
    """

    source: int
    config: SourceConfig
    wrappers: Wrappers
    layout: Layout | None
    piece: Piece
    number: int
    directory: Path

    @property
    def table(self) -> Path:
        """The candidates."""
        return self.directory / f"part-{self.number:05d}.parquet"

    @property
    def narrow(self) -> Path:
        """Their narrow columns."""
        return self.directory / f"narrow-{self.number:05d}.parquet"

    @property
    def drops(self) -> Path:
        """The rows that were dropped."""
        return self.directory / f"drops-{self.number:05d}.jsonl"

    @property
    def counts(self) -> Path:
        """What was counted; it completes the piece."""
        return self.table.with_suffix(".json")


def all_work(sources: Sequence[SourceConfig], looks: Sequence[Path]) -> list[Work]:
    """The pieces of all sources, in order."""
    found: list[Work] = []
    for number, (source, path) in enumerate(zip(sources, looks, strict=True)):
        look = read_look(path)
        for piece in look.pieces:
            found.append(Work(number, source, look.wrappers, look.layout, piece, len(found), path.parent))
    return found


def collect(work: Work, *, permutations: int, evaluation: EvaluationIndex | None) -> None:
    """Read a piece, unless that is done.

    What is counted: "read", "candidates", "trajectories", "dropped: REASON" for each reason, and what was repaired or
    lost.

    Raises:
        UserError: it cannot be read.
    """
    if work.counts.is_file():
        return
    counts: Counter[str] = Counter({"read": 0, "candidates": 0, "trajectories": 0})
    signer = Signer(permutations) if permutations else None
    items = items_of(work.config, work.layout, piece_rows(work.config, work.piece))
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_file(work.drops))
        drops = stack.enter_context(temporary.open("w", encoding="utf-8"))
        writer = stack.enter_context(_Writer(work, permutations))
        for place, item in items:
            counts["read"] += 1
            counts.update(item.lost if isinstance(item, Item) else ())
            found = _candidate(work.config, place, item, evaluation, signer, work.wrappers)
            if isinstance(found, _Candidate):
                counts["candidates"] += 1
                counts["trajectories"] += len(found.row["trajectories"])
                writer.add(found)
            else:
                counts[f"dropped: {found['reason']}"] += 1
                drops.write(json.dumps(found, ensure_ascii=False) + "\n")
    write_json(work.counts, dict(counts))


def counts_of(work: Work) -> dict[str, int]:
    """The counts of a piece that is collected."""
    return dict(json.loads(work.counts.read_text("utf-8")))


def source_counts(works: Sequence[Work]) -> list[Counter[str]]:
    """The counts of every source, added over its pieces.

    Raises:
        UserError: nothing is left of a source.
    """
    counts: list[Counter[str]] = []
    for work in works:
        if work.source == len(counts):
            counts.append(Counter())
        counts[work.source].update(counts_of(work))
    for number, found in enumerate(counts):
        if not found["candidates"]:
            (first, *_) = (work for work in works if work.source == number)
            raise UserError(
                f"source {first.config.name}: none of its {found['read']} rows is kept: {dict(found)}",
                rule="a source brings at least one problem with a question and an answer",
                remedy=f"look at the reasons in {first.drops}, at preset and columns; or leave the source out",
            )
    return counts


def candidates_of(works: Sequence[Work]) -> Candidates:
    """The narrow columns of all pieces that have any."""
    rows = [counts_of(work)["candidates"] for work in works]
    return Candidates([work.narrow for work in works], np.concatenate([[0], np.cumsum(rows)]).astype(np.int64))


def candidate_tables(works: Sequence[Work], columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """The candidates of all sources in order, a part of a piece at a time, each with the number of its source."""
    import pyarrow.parquet as pq

    for work in works:
        with pq.ParquetFile(work.table) as file:
            for group in range(file.num_row_groups):
                yield work.source, file.read_row_group(group, columns=columns)


def rows_at(table: pa.Table, places: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows of a table; only these become Python objects."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = table.take(pa.array(places, pa.int64())).to_pylist()
    return rows


@dataclass(frozen=True)
class _Candidate:
    """A row with its text, and its narrow columns."""

    row: dict[str, Any]
    narrow: dict[str, Any]


class _Writer:
    """Writes the candidates of a piece, and their narrow columns, in bounded memory. Use as a context manager."""

    def __init__(self, work: Work, permutations: int) -> None:
        self._row = first_row(work.number)
        self._files = ((work.table, candidate_schema()), (work.narrow, narrow_schema(permutations)))
        self._stack = ExitStack()
        self._rows: list[_Candidate] = []
        self._chars = 0

    def __enter__(self) -> _Writer:
        import pyarrow.parquet as pq

        with ExitStack() as stack:
            self._writers = [
                stack.enter_context(
                    pq.ParquetWriter(stack.enter_context(atomic_file(path)), schema, compression="zstd")
                )
                for path, schema in self._files
            ]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        self._stack.__exit__(*error)

    def add(self, found: _Candidate) -> None:
        """Take one more."""
        self._rows.append(found)
        self._chars += sum(len(one["response"]) for one in found.row["trajectories"]) + len(found.row["question"])
        if len(self._rows) >= SHARD_ROWS or self._chars >= SHARD_CHARS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        numbered = [{"row": self._row + place, **one.narrow} for place, one in enumerate(self._rows)]
        for writer, rows in zip(self._writers, ([one.row for one in self._rows], numbered), strict=True):
            writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
        self._row += len(self._rows)
        self._rows, self._chars = [], 0


def _candidate(
    source: SourceConfig,
    place: str,
    item: Item | UnusableRow,
    evaluation: EvaluationIndex | None,
    signer: Signer | None,
    wrappers: Wrappers,
) -> _Candidate | dict[str, Any]:
    """A candidate, or a row of the drops file: that has a "reason"."""
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
    }
    narrow: dict[str, Any] = {
        "question": digest(key),
        "bare": digest(key if wrappers == NO_WRAPPERS else comparison_key(bare_question(question, wrappers))),
        "numbers": digest(" ".join(numbers(tokens))),
        # Two questions without an answer are never almost the same: nothing tells them apart.
        "answer": digest(comparison_key(answer) if answer else f"no answer to {key}"),
        "rank": gold + (SOLUTION_RANK if item.solution else 0) + labels,
        "unsure": item.voted or not answer,
        "domain": label_code(item.domain, DOMAINS),
        "difficulty": label_code(item.difficulty, DIFFICULTIES),
    }
    if signer is not None:
        signature = signer.sign(tokens)
        narrow["signature"] = signature.astype("<u4").tobytes()
        keys = band_keys(narrow["numbers"], narrow["answer"], signature)
        narrow |= zip(band_names(len(keys)), keys.tolist(), strict=True)
    return _Candidate(row, narrow)


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
