"""What curation needs to know of a rollout, in a few dozen bytes: the columns of every global decision.

Ten million rollouts hold a hundred gigabytes of text and 0.9 GB of these columns. They are taken shard by shard, by
any number of processes, and are all that the reduce (:mod:`.reduce`) reads.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.curate.lengths import TokenCounter
from phimr_nemo.data.repetition import repetition
from phimr_nemo.store.records import DIFFICULTIES, GOLD, VerdictName, gold_kind
from phimr_nemo.text.tokens import START, spells_special_token
from phimr_nemo.verify.extract import final_answer

if TYPE_CHECKING:
    import pyarrow as pa

Narrow = npt.NDArray[np.void]
Hashes = npt.NDArray[np.uint64]

VERDICTS: Final[tuple[VerdictName, ...]] = get_args(VerdictName)
CORRECT: Final = VERDICTS.index("correct")
WRONG: Final = VERDICTS.index("wrong")
UNKNOWN_DIFFICULTY: Final = len(DIFFICULTIES)

NARROW: Final = np.dtype(
    [
        ("row", np.int64),
        ("problem", np.uint64),
        ("rollout", np.uint64),
        ("response", np.uint64),
        ("source", np.uint64),
        ("domain", np.uint64),
        ("sample", np.int32),
        ("tokens", np.int32),
        ("length", np.int32),
        ("prompt", np.int32),
        ("characters", np.int32),
        ("bytes", np.int32),
        ("repetition", np.float32),
        ("verdict", np.uint8),
        ("difficulty", np.uint8),
        ("boxes", np.uint8),
        ("stopped", np.bool_),
        ("blank", np.bool_),
        ("forged_question", np.bool_),
        ("forged_response", np.bool_),
        ("voted", np.bool_),
    ]
)
"""One rollout.

row: its number over all shards. problem, rollout, response, source, domain: 64-bit hashes of ids, text and labels; 0
without a label. tokens: of the response as recorded, -1 unknown. length, prompt: tokens of the conversation, and of
its prompt, in training (see :mod:`phimr_nemo.data.curate.lengths`). characters: of the response. bytes: of question
and response in UTF-8. repetition: of the response, see :func:`phimr_nemo.data.repetition.repetition`; 0 where it
spells a special token. boxes: of right, finished responses only, else 0: how many different boxed answers follow the
thinking. forged: the text spells a special token. voted: its gold answer is a vote among solutions.
"""

# What the added tokens of Phi-family tokenizers look like.
HASH_BYTES: Final = 8
BATCH_ROWS: Final = 1024
MOST_BOXES: Final = 255
COLUMNS: Final = (
    *("id", "problem_id", "question", "response", "sample_index", "finish_reason", "tokens", "difficulty"),
    *("domain", "source", "verdict", "metadata"),
)


def narrow_of_file(path: Path, counter: TokenCounter) -> Narrow:
    """The narrow columns of a parquet file of verdicts; rows count from 0. Memory is that of one batch of text.

    Args:
        path: a shard of kind "verdicts".
        counter: of the tokens in training.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        parts = [narrow_columns(batch, counter) for batch in file.iter_batches(BATCH_ROWS, columns=COLUMNS)]
    narrow = np.concatenate([np.empty(0, NARROW), *parts])
    narrow["row"] = np.arange(len(narrow))
    return narrow


def narrow_columns(batch: pa.RecordBatch, counter: TokenCounter) -> Narrow:
    """The narrow columns of some verdicts; rows count from 0."""
    import pyarrow.compute as pc

    question, response = batch.column("question"), batch.column("response")
    narrow = np.zeros(batch.num_rows, NARROW)
    narrow["row"] = np.arange(batch.num_rows)
    narrow["problem"], narrow["rollout"] = hashes(batch.column("problem_id")), hashes(batch.column("id"))
    narrow["response"] = hashes(response)
    for name in ("source", "domain"):
        # Verdicts of an earlier release have no column `source`.
        if name in batch.schema.names:
            narrow[name] = label_hashes(batch.column(name))
    narrow["sample"], narrow["tokens"] = batch.column("sample_index").to_numpy(), batch.column("tokens").to_numpy()
    narrow["characters"] = pc.utf8_length(response).to_numpy()
    narrow["bytes"] = pc.add(pc.binary_length(question), pc.binary_length(response)).to_numpy()
    narrow["verdict"] = codes(batch.column("verdict"), VERDICTS)
    narrow["difficulty"] = codes(batch.column("difficulty"), DIFFICULTIES)
    narrow["stopped"] = pc.equal(batch.column("finish_reason"), "stop").to_numpy(zero_copy_only=False)
    narrow["blank"] = pc.equal(pc.utf8_trim_whitespace(response), "").to_numpy(zero_copy_only=False)
    narrow["forged_question"], narrow["forged_response"] = _forged(question), _forged(response)
    narrow["voted"] = _voted(batch.column("metadata"))
    _measure(narrow, response)
    narrow["length"], narrow["prompt"] = counter.count(question, response, narrow["tokens"])
    return narrow


def hashes(texts: pa.StringArray) -> Hashes:
    """64 bits of blake2b of every text, [rows]; read from Arrow's own buffers, so no text becomes a Python object."""
    _, offsets_buffer, data = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1].tolist()
    view = memoryview(data) if data is not None else memoryview(b"")
    digests = (
        hashlib.blake2b(view[start:end], digest_size=HASH_BYTES).digest()
        for start, end in itertools.pairwise(offsets)
    )
    return np.frombuffer(b"".join(digests), "<u8")


def label_hash(label: str | None) -> int:
    """The hash of a domain or a source; 0 without."""
    if label is None:
        return 0
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=HASH_BYTES).digest(), "little")


def label_hashes(labels: pa.StringArray) -> Hashes:
    """:func:`label_hash` of every label, [rows]; each different one is hashed once."""
    encoded = labels.dictionary_encode()
    known = np.array([label_hash(label) for label in [*encoded.dictionary.to_pylist(), None]], np.uint64)
    places = encoded.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)
    return np.asarray(known[places], np.uint64)


def codes(column: pa.StringArray | pa.ChunkedArray, names: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """The place of every value in `names`; the number of names for null and for what is not among them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    places = pc.index_in(column, value_set=pa.array(names, pa.string()))
    return np.asarray(pc.fill_null(places, len(names)).to_numpy()).astype(np.uint8)


def _forged(column: pa.StringArray) -> npt.NDArray[np.bool_]:
    import pyarrow.compute as pc

    suspects = np.flatnonzero(pc.match_substring(column, START).to_numpy(zero_copy_only=False))
    forged = np.zeros(len(column), np.bool_)
    forged[suspects] = [spells_special_token(column[int(index)].as_py()) for index in suspects]
    return forged


def _voted(metadata: pa.StringArray) -> npt.NDArray[np.bool_]:
    import pyarrow.compute as pc

    suspects = np.flatnonzero(pc.match_substring(metadata, f'"{GOLD}"').to_numpy(zero_copy_only=False))
    voted = np.zeros(len(metadata), np.bool_)
    voted[suspects] = [gold_kind(metadata[int(index)].as_py()) == "vote" for index in suspects]
    return voted


def _measure(narrow: Narrow, response: pa.StringArray) -> None:
    for index in np.flatnonzero(~narrow["forged_response"]):
        text = response[int(index)].as_py()
        narrow["repetition"][index] = repetition(text)
        if narrow["verdict"][index] == CORRECT and narrow["stopped"][index]:
            narrow["boxes"][index] = min(len(final_answer(text).boxes), MOST_BOXES)


def runs(sorted_values: npt.NDArray[np.generic]) -> Iterator[tuple[int, int]]:
    """`(start, end)` of every run of equal values of a sorted array."""
    edges = np.flatnonzero(sorted_values[1:] != sorted_values[:-1]) + 1
    bounds = [0, *edges.tolist(), len(sorted_values)] if len(sorted_values) else [0]
    yield from itertools.pairwise(bounds)
