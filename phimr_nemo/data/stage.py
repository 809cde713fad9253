"""The stages `curate` (verdicts -> training sets) and `pack` (conversations -> rows)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tqdm import tqdm

from phimr_nemo.atomic import write_json
from phimr_nemo.config import CurateConfig, PackConfig, to_dict
from phimr_nemo.data.chat import holds_special_token, load_tokenizer, render_conversations
from phimr_nemo.data.curate import Drops, midtrain_conversations, preference_pairs, rl_prompts, sft_conversations
from phimr_nemo.data.packing import Document, pack_rows
from phimr_nemo.errors import UserError
from phimr_nemo.records import Kind
from phimr_nemo.store import (
    finish,
    is_complete,
    iter_shards,
    read_manifest,
    read_table,
    shard_is_complete,
    write_shard,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

CURATED_SHARD_ROWS: Final = 50_000
TOKENIZE_BATCH: Final = 1000

Curate = Callable[["pa.Table"], tuple["pa.Table", Drops]]


def run_curate(config: CurateConfig) -> dict[str, Any]:
    """Write each training set that the configuration names to its own directory of the output.

    A set that is there already is left as it is.

    Returns:
        Rows of each set.

    Raises:
        UserError: the verdicts are not finished, no set is named, or a set would be empty (its drops are shown).
    """
    sets = _sets(config)
    if not sets:
        raise UserError(
            "neither midtrain, sft, pairs nor prompts is configured",
            rule="curate makes at least one training set",
            remedy="set, e.g., midtrain.max_per_problem=8",
        )
    missing = [name for name, (kind, _) in sets.items() if not is_complete(config.run.output / name, kind)]
    verdicts = read_table(config.verdicts, "verdicts") if missing else None
    for name in tqdm(missing, desc="curate", unit="set"):
        kind, curate = sets[name]
        _write_set(config, name, kind, curate(verdicts))
    return {name: read_manifest(config.run.output / name, kind).rows for name, (kind, _) in sets.items()}


def _sets(config: CurateConfig) -> dict[str, tuple[Kind, Curate]]:
    """Name -> record kind and function of each set that is configured."""
    sets: dict[str, tuple[Kind, Curate]] = {}
    if config.midtrain is not None:
        curate = partial(midtrain_conversations, max_per_problem=config.midtrain.max_per_problem)
        sets["midtrain"] = ("conversations", curate)
    if config.sft is not None:
        sets["sft"] = (
            "conversations",
            partial(
                sft_conversations,
                difficulties=config.sft.difficulties,
                max_per_problem=config.sft.max_per_problem,
            ),
        )
    if config.pairs is not None:
        sets["pairs"] = (
            "pairs",
            partial(
                preference_pairs,
                max_per_problem=config.pairs.max_per_problem,
                mode=config.pairs.mode,
                seed=config.run.seed,
            ),
        )
    if config.prompts is not None:
        sets["prompts"] = (
            "prompts",
            partial(
                rl_prompts,
                min_pass=config.prompts.min_pass,
                max_pass=config.prompts.max_pass,
                hard_below=config.prompts.hard_below,
            ),
        )
    return sets


def _write_set(config: CurateConfig, name: str, kind: Kind, curated: tuple[pa.Table, Drops]) -> None:
    table, drops = curated
    if not table.num_rows:
        raise UserError(
            f"the {name} set of {config.verdicts} would be empty; dropped: {drops or 'nothing, there was no row'}",
            rule="a training set has at least one row",
            remedy=f"loosen {name}.*, or bring more or better rollouts",
        )
    directory = config.run.output / name
    for index, start in enumerate(range(0, table.num_rows, CURATED_SHARD_ROWS)):
        write_shard(directory, index, table.slice(start, CURATED_SHARD_ROWS), kind=kind)
    counts = {f"dropped: {reason}": count for reason, count in drops.items()}
    finish(directory, kind=kind, config=to_dict(config), inputs=[config.verdicts], counts=counts)


def run_pack(config: PackConfig) -> dict[str, Any]:
    """Tokenise conversations and pack them, one shard of rows from each shard of conversations.

    Returns:
        Rows, documents, tokens, the share of row space left empty, and what was dropped.

    Raises:
        UserError: the conversations are not finished, the tokenizer is unfit, or no conversation fits a row.
    """

    output = config.run.output
    if not is_complete(output, "rows"):
        tokenizer = load_tokenizer(config.tokenizer)
        shards = len(read_manifest(config.conversations, "conversations").shards)
        columns = ["question", "response"]
        tables = iter_shards(config.conversations, "conversations", columns)
        for index, table in enumerate(tqdm(tables, desc="pack", unit="shard", total=shards)):
            if shard_is_complete(output, index):
                continue
            documents, counts = tokenize(tokenizer, table, config.sequence_length)
            # Counts first: a complete shard always has them, also when the run is resumed.
            write_json(_counts_path(output, index), counts)
            write_shard(output, index, pack_rows(documents, config.sequence_length), kind="rows")
        totals: Counter[str] = Counter()
        for index in range(shards):
            totals.update(json.loads(_counts_path(output, index).read_text("utf-8")))
        if not totals["documents"]:
            raise UserError(
                f"no conversation of {config.conversations} can be packed: {dict(totals)}",
                rule=f"a conversation has at most sequence_length={config.sequence_length} tokens",
                remedy="raise sequence_length, or curate shorter conversations",
            )
        inputs = [config.conversations, config.tokenizer / "tokenizer.json"]
        finish(output, kind="rows", config=to_dict(config), inputs=inputs, counts=totals)
    manifest = read_manifest(output, "rows")
    space = manifest.rows * config.sequence_length
    return {"rows": manifest.rows, **manifest.counts, "empty share": 1 - manifest.counts["tokens"] / space}


def tokenize(
    tokenizer: PreTrainedTokenizerBase, conversations: pa.Table, capacity: int
) -> tuple[list[Document], dict[str, int]]:
    """Token ids and loss masks of conversations.

    Args:
        tokenizer: a Phi tokenizer.
        conversations: a table with the columns question and response.
        capacity: longer conversations are dropped.

    Returns:
        `(input_ids int32, loss_mask uint8)` of each conversation that is kept, and the counts "documents",
        "tokens" and drops by reason.
    """
    counts: Counter[str] = Counter()
    documents: list[Document] = []
    for batch in conversations.to_batches(max_chunksize=TOKENIZE_BATCH):
        clean = []
        for row in batch.to_pylist():
            if holds_special_token(tokenizer, row["question"]) or holds_special_token(tokenizer, row["response"]):
                counts["dropped: special token in text"] += 1
            else:
                clean.append(row)
        questions, responses = [row["question"] for row in clean], [row["response"] for row in clean]
        for ids, mask in render_conversations(tokenizer, questions, responses):
            if len(ids) > capacity:
                counts["dropped: longer than a row"] += 1
                continue
            documents.append((np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=np.uint8)))
            counts["documents"] += 1
            counts["tokens"] += len(ids)
    return documents, dict(counts)


def _counts_path(directory: Path, index: int) -> Path:
    return directory / f"counts-{index:05d}.json"
