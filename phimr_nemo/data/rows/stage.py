"""The stage `pack`: conversations -> rows of tokens."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import PackConfig, to_dict
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.data.packing import lengths_of, pack, pack_mixed, row_table
from phimr_nemo.data.parallel import in_processes
from phimr_nemo.data.rows.tokenize import Frame, fast_tokenizer, prompt_frame, tokenize
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.content import content_seed
from phimr_nemo.store.shards import (
    check_shard,
    finish,
    input_hash,
    is_complete,
    read_manifest,
    shard_is_complete,
    write_shard,
)

TOKENIZER_FILE: Final = "tokenizer.json"


def run_pack(config: PackConfig) -> dict[str, Any] | None:
    """Tokenise conversations and pack them, one shard of rows from each shard of conversations.

    A shard of rows that is there already is kept when it was made of the same conversations.

    Returns:
        Rows, documents, tokens, the share of row space left empty, and what was dropped; None when other
        processes still have shards to write.

    Raises:
        UserError: the conversations are not finished, the tokenizer is unfit, or no conversation fits a row.
    """
    output = config.run.output
    named = read_manifest(config.conversations, "conversations").shards
    inputs = [config.conversations, config.tokenizer / "tokenizer.json"]
    hashes = {str(path): input_hash(path) for path in inputs}
    if not is_complete(output, "rows") or dict(read_manifest(output, "rows").inputs) != hashes:
        tokenizer = load_tokenizer(config.tokenizer)
        frame = prompt_frame(tokenizer)
        atomic_write_text(output / TOKENIZER_FILE, tokenizer.backend_tokenizer.to_str())
        ordered = sorted(named, key=lambda name: (len(name), name))
        work = [(index, config.conversations / name, named[name]) for index, name in enumerate(ordered)]
        mine = work[config.shard.index :: config.shard.count]
        in_processes(partial(_pack_shard, config, frame), mine, config.workers, title="pack")
        if not all(_is_packed(output, index, sha256) for index, _, sha256 in work):
            return None
        totals: Counter[str] = Counter()
        for index, _, _ in work:
            totals.update(_read_counts(output, index)["counts"])
        if not totals["documents"]:
            raise UserError(
                f"no conversation of {config.conversations} can be packed: {dict(totals)}",
                rule=f"a conversation has at most sequence_length={config.sequence_length} tokens",
                remedy="raise sequence_length, or curate shorter conversations",
            )
        finish(output, kind="rows", config=to_dict(config), inputs=inputs, counts=totals)
    manifest = read_manifest(output, "rows")
    space = manifest.rows * config.sequence_length
    return {"rows": manifest.rows, **manifest.counts, "empty share": 1 - manifest.counts["tokens"] / space}


def _pack_shard(config: PackConfig, frame: Frame, work: tuple[int, Path, str]) -> None:
    import pyarrow.parquet as pq

    index, path, sha256 = work
    output = config.run.output
    if _is_packed(output, index, sha256):
        return
    if config.workers > 1:
        # A process a core: the tokenizer's own threads would only contend.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    check_shard(path, sha256)
    with pq.ParquetFile(path) as conversations:
        tokenizer = fast_tokenizer(output / TOKENIZER_FILE)
        documents, questions, counts = tokenize(tokenizer, frame, conversations, config.sequence_length)
    # Counts first: a complete shard always has them, also when the run is resumed.
    write_json(_counts_path(output, index), {"counts": counts, "conversations": sha256})
    lengths = lengths_of(documents)
    if config.placement == "length":
        rows = pack(lengths, config.sequence_length)
    else:
        seed = content_seed("pack", str(config.run.seed), sha256)
        rows = pack_mixed(lengths, config.sequence_length, seed)
    write_shard(output, index, row_table(documents, rows, questions), kind="rows")


def _is_packed(directory: Path, index: int, sha256: str) -> bool:
    """Whether a shard of rows is there that was made of the conversations with this checksum."""
    return shard_is_complete(directory, index) and _read_counts(directory, index).get("conversations") == sha256


def _read_counts(directory: Path, index: int) -> dict[str, Any]:
    """The counts of a shard of rows; nothing when they are absent or damaged, so that it is made again."""
    try:
        counts = json.loads(_counts_path(directory, index).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return counts if isinstance(counts, dict) else {}


def _counts_path(directory: Path, index: int) -> Path:
    return directory / f"counts-{index:05d}.json"
