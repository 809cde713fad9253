"""Packing documents into rows of 16,384 tokens: time and wasted row space, ours against NeMo's and TRL's packers.

    python bench/pack.py [--quick] [--documents 1000000] [--capacity 16384] [--repeats 3]
                         [--rollouts FILE --tokenizer DIR]

Lengths are those of a recorded file's responses in tokens, drawn with replacement (`--rollouts`, `--tokenizer`),
or else lognormal with median 3,640 and sigma 0.8, cut off at the capacity: real right long-CoT responses have
about 3.7 K tokens in the median and a tail that reaches the limit.

Peers, each where it is importable:
- NeMo 2.4 `first_fit_decreasing` looks at every row for every document, so it is measured at fewer documents
  (`--nemo-documents`), and ours again at as many.
- TRL 0.24 `bfd` (`pip install --no-deps --target DIR trl==0.24.0`, then PYTHONPATH=DIR). Only its assignment of
  documents to rows runs: truncation and the copying of tokens, which `pack` does not do either, are taken out.
  `pack_dataset` packs 1,000 documents at a time unless told otherwise; the table shows both that and all at once.

Times are CPU seconds of this process: every packer runs in one thread, and the machine may be shared. Every packer
gets the same lengths; each result is checked (every document once, no row overfull).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
from common import machine, print_result, versions

from phimr_nemo.data.packing import pack

Lengths = npt.NDArray[np.int64]
RowFills = npt.NDArray[np.int64]
Packer = Callable[[Lengths, int], RowFills]

SEED = 0
LOGNORMAL_MEDIAN = 3640.0
LOGNORMAL_SIGMA = 0.8
SHORTEST = 16
TRL_DEFAULT_BATCH = 1000
TARGET_WASTE = 0.01
QUICK = {"documents": 50_000, "nemo_documents": 2_000, "repeats": 1}


def drawn_lengths(count: int, capacity: int) -> Lengths:
    drawn = np.random.default_rng(SEED).lognormal(np.log(LOGNORMAL_MEDIAN), LOGNORMAL_SIGMA, count)
    return np.clip(drawn, SHORTEST, capacity).astype(np.int64)


def recorded_lengths(rollouts: Path, tokenizer_directory: Path, count: int, capacity: int) -> Lengths:
    from phimr_nemo.data.chat import load_tokenizer
    from phimr_nemo.data.sources.recorded import recorded_rollouts

    tokenizer = load_tokenizer(tokenizer_directory)
    texts = [text for text in recorded_rollouts(rollouts)["response"].to_pylist() if text]
    sizes = np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])
    fitting = sizes[sizes <= capacity]
    print(f"{rollouts.name}: {len(sizes)} responses, {len(fitting)} of at most {capacity:,} tokens")
    return np.random.default_rng(SEED).choice(fitting, count).astype(np.int64)


def ours(lengths: Lengths, capacity: int) -> RowFills:
    rows = pack(lengths, capacity)
    if not np.array_equal(np.sort(np.concatenate(rows)), np.arange(len(lengths))):
        raise RuntimeError("our packer lost or doubled a document")
    return np.array([lengths[row].sum() for row in rows])


def nemo(lengths: Lengths, capacity: int) -> RowFills:
    from nemo.utils.sequence_packing_utils import first_fit_decreasing

    rows = first_fit_decreasing(lengths.tolist(), capacity)
    return np.array([sum(row) for row in rows])


def trl(lengths: Lengths, capacity: int) -> RowFills:
    """TRL's assignment of documents to rows, without its truncation and without its copying of tokens."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from trl import data_utils

    def take_lengths_only(documents: pa.Table, order: list[int]) -> pa.Table:
        sizes = pc.take(documents["seq_lengths"], order).combine_chunks()
        empty = pa.LargeListArray.from_arrays(pa.array(np.zeros(len(order) + 1, np.int64)), values)
        return pa.table({"input_ids": empty, "seq_lengths": sizes})

    spared = types.SimpleNamespace(
        list_slice=lambda column, _start, _stop: column,
        list_value_length=pc.list_value_length,
        make_struct=pc.make_struct,
        take=take_lengths_only,
    )
    values = pa.nulls(int(lengths.sum()))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    documents = pa.LargeListArray.from_arrays(offsets, values)
    with mock.patch.object(data_utils, "pc", spared):
        packed = data_utils._pack_bfd(pa.table({"input_ids": documents}), capacity)
    return np.diff(packed["input_ids"].combine_chunks().offsets.to_numpy())


def trl_batches(lengths: Lengths, capacity: int) -> RowFills:
    starts = range(0, len(lengths), TRL_DEFAULT_BATCH)
    return np.concatenate([trl(lengths[i : i + TRL_DEFAULT_BATCH], capacity) for i in starts])


def seconds_of(packer: Packer, lengths: Lengths, capacity: int, repeats: int) -> tuple[float, RowFills]:
    """Median CPU seconds and the fill of every row; computing and checking our fills is not timed."""
    times = []
    fills = ours(lengths, capacity) if packer is ours else np.empty(0, np.int64)
    for _ in range(repeats):
        started = time.process_time()
        if packer is ours:
            pack(lengths, capacity)
        else:
            fills = packer(lengths, capacity)
        times.append(time.process_time() - started)
    if fills.sum() != lengths.sum() or fills.max() > capacity:
        raise RuntimeError(f"{packer.__name__} lost tokens or overfilled a row")
    return statistics.median(times), fills


def measure(name: str, packer: Packer, lengths: Lengths, capacity: int, repeats: int) -> dict[str, float]:
    seconds, fills = seconds_of(packer, lengths, capacity, repeats)
    waste = 1 - float(lengths.sum()) / (len(fills) * capacity)
    print(f"| {name:25} | {len(lengths):10,} | {seconds:9.3f} | {len(fills):8,} | {waste:8.4%} |", flush=True)
    return {"documents": len(lengths), "seconds": round(seconds, 4), "rows": len(fills), "waste": round(waste, 6)}


def compare(options: argparse.Namespace) -> dict[str, object]:
    capacity = options.capacity
    if options.rollouts:
        lengths = recorded_lengths(options.rollouts, options.tokenizer, options.documents, capacity)
    else:
        lengths = drawn_lengths(options.documents, capacity)
    few = lengths[: options.nemo_documents]
    print(f"capacity {capacity:,}; lengths: median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}")
    print("| packer                    |  documents | CPU secs. |     rows |   wasted |\n|---|---|---|---|---|")
    result: dict[str, object] = {"bench": "pack", "capacity": capacity, "target_waste": TARGET_WASTE}
    mine = measure("ours", ours, lengths, capacity, options.repeats)
    result["ours"] = mine
    if importlib.util.find_spec("trl"):
        peer = measure("TRL bfd, all at once", trl, lengths, capacity, 1)
        result["trl"] = peer
        result["trl_batches_of_1000"] = measure("TRL bfd, as called", trl_batches, lengths, capacity, 1)
        result["ratio"] = round(peer["seconds"] / mine["seconds"], 2)
    else:
        print("TRL is not installed: not compared")
    if importlib.util.find_spec("nemo"):
        same = measure("ours", ours, few, capacity, options.repeats)
        peer = measure("NeMo first_fit_decreasing", nemo, few, capacity, 1)
        result["nemo_at_fewer"] = {"ours": same, "nemo": peer}
        result["nemo_ratio"] = round(peer["seconds"] / same["seconds"], 2)
    else:
        print("NeMo is not installed: not compared")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--nemo-documents", type=int, default=10_000)
    parser.add_argument("--capacity", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rollouts", type=Path, help="recorded responses whose lengths are drawn")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer that measures them")
    options = parser.parse_args()
    if (options.rollouts is None) != (options.tokenizer is None):
        parser.error("--rollouts and --tokenizer belong together")
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    result = compare(options)
    print_result({**result, "versions": versions("numpy", "pyarrow", "trl", "nemo-toolkit"), "machine": machine()})


if __name__ == "__main__":
    main()
