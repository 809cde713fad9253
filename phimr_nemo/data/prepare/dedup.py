"""One question, once: exact and near duplicates over all sources, and which row of them is kept.

Exact duplicates have the same :func:`comparison_tokens` once what only stands around a question is taken off
(:mod:`phimr_nemo.data.sources.wrapping`; what is learned from a source counts only where the answers agree). Near
duplicates hold the same numbers, have the same answer after normalisation, and a Jaccard similarity of their token
3-grams of at least a threshold, estimated by MinHash (datasketch; Broder 1997). Numbers and answer must agree because
in mathematics one other number, or "center" for "radius", makes another question.

Of duplicates the best row is kept: one with an answer of its source, then one with a worked solution,
then one with more own labels, then the earliest. Every dropped row is similar to the row it is dropped for, not only
to another dropped one. Questions are sorted out of core (:mod:`phimr_nemo.data.outofcore`); what is decided takes 13
bytes a question in memory.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.config import NearDuplicatesConfig
from phimr_nemo.data.outofcore import Narrow, engine, first_of_runs, sorted_rows, whole_groups
from phimr_nemo.store.atomic import scratch_directory

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

Indices = npt.NDArray[np.int64]

SIGNATURE_ITEM_BYTES: Final = 4
PIECE_BITS: Final = 32
PLACE_MASK: Final = (1 << PIECE_BITS) - 1
SORT_DIRECTORY: Final = "sort"
SHINGLE_TOKENS: Final = 3
# 25 bands of 5 find a pair of similarity 0.8 with probability 1 - (1 - 0.8^5)^25 > 0.9999, one of 0.5 with 0.55.
ROWS_PER_BAND: Final = 5
MINHASH_SEED: Final = 1
# In a run of equal bands each question is held against so many better ones.
MAX_COMPARED: Final = 16
PAIRS_AT_ONCE: Final = 4096
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(29)

KEPT: Final = 0
EXACT: Final = 1
EXACT_OTHER_ANSWER: Final = 2
NEAR: Final = 3


class Signer:
    """MinHash signatures of questions.

    Args:
        permutations: the length of a signature.
    """

    def __init__(self, permutations: int) -> None:
        from datasketch import MinHash

        self._empty = MinHash(num_perm=permutations, seed=MINHASH_SEED, hashfunc=zlib.crc32)

    def sign(self, tokens: list[str]) -> npt.NDArray[np.uint32]:
        """The signature of a question's token 3-grams; of all its tokens together if there are fewer."""
        count = max(1, len(tokens) - SHINGLE_TOKENS + 1)
        shingles = {" ".join(tokens[start : start + SHINGLE_TOKENS]).encode() for start in range(count)}
        signature = self._empty.copy()
        signature.update_batch(sorted(shingles))
        return signature.hashvalues.astype(np.uint32)


def band_names(bands: int) -> list[str]:
    """The columns of the keys under which near duplicates meet."""
    return [f"band_{number:03d}" for number in range(bands)]


def band_keys(numbers: int, answer: int, signature: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """A question's key in each band, [bands]: of its numbers and its answer, and of a stretch of its signature."""
    count = len(signature) // ROWS_PER_BAND
    keys = np.full(count, _mix(np.array([numbers], np.uint64), np.array([answer], np.uint64))[0])
    for rows in signature.astype(np.uint64).reshape(count, ROWS_PER_BAND).T:
        keys = _mix(keys, rows)
    return keys


@dataclass(frozen=True)
class Candidates:
    """The narrow columns of all candidates (:mod:`.narrow`), piece by piece.

    A candidate's `row` is the number of its piece in the upper half and its place in the piece in the lower one:
    known before other pieces are read, and ascending in the order of sources and rows. Its index counts all.

    Attributes:
        files: of every piece.
        starts: [pieces + 1] the index of each piece's first candidate, and the number of all.
    """

    files: Sequence[Path]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def index(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The indices of rows."""
        return np.asarray(self.starts[rows >> PIECE_BITS] + (rows & PLACE_MASK), np.int64)


def first_row(piece: int) -> int:
    """The row of a piece's first candidate."""
    return piece << PIECE_BITS


@dataclass(frozen=True)
class Duplicates:
    """The decision, one entry a question, in the order of sources and rows.

    Attributes:
        kept: [n] the index of the row that stands for this one; its own where it is kept.
        reason: [n] KEPT, EXACT, EXACT_OTHER_ANSWER or NEAR.
        similarity: [n] estimated Jaccard similarity to the kept row; 1 for exact duplicates.
    """

    kept: npt.NDArray[np.int64]
    reason: npt.NDArray[np.uint8]
    similarity: npt.NDArray[np.float32]


def find_duplicates(candidates: Candidates, near: NearDuplicatesConfig | None, threads: int = 1) -> Duplicates:
    """Decide which questions are kept. Deterministic: the same columns give the same decision."""
    count = len(candidates)
    found = Duplicates(
        kept=np.arange(count, dtype=np.int64),
        reason=np.full(count, KEPT, dtype=np.uint8),
        similarity=np.ones(count, dtype=np.float32),
    )
    with (
        scratch_directory(candidates.files[0].parent / SORT_DIRECTORY) as directory,
        engine(directory, threads) as connection,
    ):
        _mark_equal(connection, candidates, found)
        _mark_wrapped(connection, candidates, found)
        if near is not None:
            files = _write_pairs(connection, candidates, found, near, directory)
            if files:
                _mark_near(connection, candidates, found, files, near)
    # A duplicate of a question that turned out a duplicate of another stands for what that one stands for.
    while (found.kept != found.kept[found.kept]).any():
        found.kept[:] = found.kept[found.kept]
    return found


def _in_preference(
    connection: duckdb.DuckDBPyConnection, candidates: Candidates, keys: Sequence[str], others: Sequence[str] = ()
) -> Iterator[Narrow]:
    """The rows by keys, those of equal keys in the order of preference: best rank first, then earliest."""
    dtype = np.dtype([("row", np.int64), *((name, np.uint64) for name in (*keys, *others))])
    order = f"{', '.join(keys)}, rank DESC, row"
    return whole_groups(sorted_rows(connection, candidates.files, dtype, order), keys[0])


def _mark_equal(connection: duckdb.DuckDBPyConnection, candidates: Candidates, found: Duplicates) -> None:
    for part in _in_preference(connection, candidates, ["question"], ["answer"]):
        index, best = candidates.index(part["row"]), first_of_runs(part["question"])
        others = np.flatnonzero(best != np.arange(len(part)))
        best = best[others]
        found.kept[index[others]] = index[best]
        same = part["answer"][others] == part["answer"][best]
        found.reason[index[others]] = np.where(same, EXACT, EXACT_OTHER_ANSWER)


def _mark_wrapped(connection: duckdb.DuckDBPyConnection, candidates: Candidates, found: Duplicates) -> None:
    """Kept questions that are equal without their sources' wrappers and have the same answer.

    A learned wrapper may be a part of the question ("Find the area of this square:"), so the answer must agree.
    """
    for part in _in_preference(connection, candidates, ["bare", "answer"]):
        index = candidates.index(part["row"])
        open_rows = found.reason[index] == KEPT
        index, left = index[open_rows], part[open_rows]
        best = first_of_runs(left["bare"], left["answer"])
        others = np.flatnonzero(best != np.arange(len(left)))
        found.kept[index[others]] = index[best[others]]
        found.reason[index[others]] = EXACT


def _write_pairs(
    connection: duckdb.DuckDBPyConnection,
    candidates: Candidates,
    found: Duplicates,
    near: NearDuplicatesConfig,
    directory: Path,
) -> list[Path]:
    """Files of pairs (worse, better) of kept questions that agree in a band, some of them in several."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for name in band_names(near.permutations // ROWS_PER_BAND):
        for number, part in enumerate(_in_preference(connection, candidates, [name])):
            left = part[found.reason[candidates.index(part["row"])] == KEPT]
            worse, better = _pairs_of(left[name], left["row"])
            if len(worse):
                files.append(directory / f"pairs-{name}-{number}.parquet")
                pq.write_table(pa.table({"worse": worse, "better": better}), files[-1])
    return files


def _pairs_of(keys: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]) -> tuple[Indices, Indices]:
    """Each question of a run of equal keys with the best of the run and with some before it; (worse, better)."""
    first = first_of_runs(keys)
    place = np.arange(len(keys))
    worse, better = [place[first != place]], [first[first != place]]
    for distance in range(1, min(MAX_COMPARED + 1, len(keys))):
        same = place[distance:][first[distance:] == first[:-distance]]
        worse.append(same)
        better.append(same - distance)
    return rows[np.concatenate(worse)], rows[np.concatenate(better)]


_COMPARED: Final = """
    SELECT worse, better, w.rank AS worse_rank, b.rank AS better_rank, w.signature AS one, b.signature AS other
    FROM (SELECT DISTINCT worse, better FROM read_parquet($pairs))
    JOIN read_parquet($files) w ON w.row = worse
    JOIN read_parquet($files) b ON b.row = better AND b.numbers = w.numbers AND b.answer = w.answer
"""


def _mark_near(
    connection: duckdb.DuckDBPyConnection,
    candidates: Candidates,
    found: Duplicates,
    pairs: Sequence[Path],
    near: NearDuplicatesConfig,
) -> None:
    files = {"pairs": [str(path) for path in pairs], "files": [str(path) for path in candidates.files]}
    # By preference: the best first.
    better: dict[tuple[int, int], list[tuple[float, int, int]]] = defaultdict(list)
    for batch in connection.execute(_COMPARED, files).to_arrow_reader(PAIRS_AT_ONCE):
        one, other = (_signatures(batch.column(name), near.permutations) for name in ("one", "other"))
        similarity = (one == other).mean(axis=1)
        alike = np.flatnonzero(similarity >= near.threshold)
        names = ("worse", "worse_rank", "better", "better_rank")
        columns = [batch.column(name).to_numpy()[alike].tolist() for name in names]
        for worse, worse_rank, best, rank, share in zip(*columns, similarity[alike].tolist(), strict=True):
            better[-worse_rank, worse].append((share, rank, -best))
    for key in sorted(better):
        worse = int(candidates.index(np.array([key[1]]))[0])
        of_better = candidates.index(-np.array([row for _, _, row in better[key]])).tolist()
        kept = [
            (one, index) for one, index in zip(better[key], of_better, strict=True) if found.reason[index] == KEPT
        ]
        if kept:
            (share, _, _), index = max(kept)
            found.kept[worse], found.reason[worse], found.similarity[worse] = index, NEAR, share


def _signatures(column: pa.BinaryArray, permutations: int) -> npt.NDArray[np.uint32]:
    """[rows, permutations]."""
    return np.frombuffer(b"".join(column.to_pylist()), "<u4").reshape(-1, permutations)


def _mix(key: npt.NDArray[np.uint64], value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Both in one 64-bit hash (multiplication and shift; what collides is compared in full afterwards)."""
    mixed = key * _MULTIPLIER
    mixed = ((mixed ^ (mixed >> _SHIFT)) ^ value) * _MULTIPLIER
    return mixed ^ (mixed >> _SHIFT)
