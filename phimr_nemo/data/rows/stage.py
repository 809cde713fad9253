"""The stage `pack`: conversations -> rows of tokens."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import PackConfig
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.data.packing import lengths_of, pack, pack_mixed, row_table
from phimr_nemo.data.parallel import in_processes
from phimr_nemo.data.rows.tokenize import Frame, fast_tokenizer, prompt_frame, tokenize
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.check import open_for
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.shards import (
    check_shard,
    finish,
    is_complete,
    read_manifest,
    shard_is_complete,
    write_shard,
)

TOKENIZER_FILE: Final = "tokenizer.json"


def run_pack(config: PackConfig) -> dict[str, Any] | None:
    """Tokenise conversations and pack them, one shard of rows from each shard of conversations.

    A shard of rows that is there already is kept when it was made of the same conversations by the same tokenizer.

    Returns:
        Rows, documents, tokens, the share of row space left empty, and what was dropped; None when other
        processes still have shards to write.

    Raises:
        UserError: the conversations are not finished, the tokenizer is unfit, or no conversation fits a row.
    """
    output = config.run.output
    conversations = read_manifest(config.conversations, "conversations")
    tokenizer = load_tokenizer(config.tokenizer)
    frame, backend = prompt_frame(tokenizer), tokenizer.backend_tokenizer.to_str()
    deciding = {"sequence_length": config.sequence_length, "placement": config.placement, "seed": config.run.seed}
    tokenizer_content = content_id("tokenizer", backend, frame.before, frame.after, *frame.special)
    whole = MadeFrom({"conversations": conversations.content, "tokenizer": tokenizer_content}, deciding)
    if not is_complete(output, "rows") or read_manifest(output, "rows").made_from != whole:
        named = sorted(conversations.shards.items(), key=lambda item: (len(item[0]), item[0]))
        open_for(output, whole, len(named))
        atomic_write_text(output / TOKENIZER_FILE, backend)
        work = [
            (index, config.conversations / name, MadeFrom({**whole.inputs, "conversations": sha256}, deciding))
            for index, (name, sha256) in enumerate(named)
        ]
        mine = work[config.shard.index :: config.shard.count]
        in_processes(partial(_pack_shard, config, frame), mine, config.workers, title="pack")
        if not all(_is_packed(output, index, made_from) for index, _, made_from in work):
            return None
        totals: Counter[str] = Counter()
        for index, _, _ in work:
            totals.update(_read_counts(output, index))
        if not totals["documents"]:
            raise UserError(
                f"no conversation of {config.conversations} can be packed: {dict(totals)}",
                rule=f"a conversation has at most sequence_length={config.sequence_length} tokens",
                remedy="raise sequence_length, or curate shorter conversations",
            )
        finish(output, kind="rows", **whole.to_json(), counts=totals)
    manifest = read_manifest(output, "rows")
    space = manifest.rows * config.sequence_length
    return {"rows": manifest.rows, **manifest.counts, "empty share": 1 - manifest.counts["tokens"] / space}


def _pack_shard(config: PackConfig, frame: Frame, work: tuple[int, Path, MadeFrom]) -> None:
    import pyarrow.parquet as pq

    index, path, made_from = work
    output, sha256 = config.run.output, made_from.inputs["conversations"]
    if _is_packed(output, index, made_from):
        return
    if config.workers > 1:
        # A process a core: the tokenizer's own threads would only contend.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    check_shard(path, sha256)
    with pq.ParquetFile(path) as conversations:
        tokenizer = fast_tokenizer(output / TOKENIZER_FILE, made_from.inputs["tokenizer"])
        documents, questions, counts = tokenize(tokenizer, frame, conversations, config.sequence_length)
    # Counts first: a complete shard always has them, also when the run is resumed.
    write_json(_counts_path(output, index), counts)
    lengths = lengths_of(documents)
    if config.placement == "length":
        rows = pack(lengths, config.sequence_length)
    else:
        seed = content_seed("pack", str(config.run.seed), sha256)
        rows = pack_mixed(lengths, config.sequence_length, seed)
    write_shard(output, index, row_table(documents, rows, questions), kind="rows", made_from=made_from)


def _is_packed(directory: Path, index: int, made_from: MadeFrom) -> bool:
    """Whether a shard of rows is there that was made of this, with its counts."""
    return shard_is_complete(directory, index, made_from) and bool(_read_counts(directory, index))


def _read_counts(directory: Path, index: int) -> dict[str, int]:
    """The counts of a shard of rows; nothing when they are absent or damaged, so that it is made again."""
    try:
        counts = json.loads(_counts_path(directory, index).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return counts if isinstance(counts, dict) else {}


def _counts_path(directory: Path, index: int) -> Path:
    return directory / f"counts-{index:05d}.json"
