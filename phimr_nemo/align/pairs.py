"""Preference pairs as rows, and their reference log-probabilities, computed once and kept with the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.data.batches import Row, collate_padded
from phimr_nemo.data.chat import render_conversations
from phimr_nemo.errors import UserError
from phimr_nemo.store import atomic_file, read_table
from phimr_nemo.train import platform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_FILE: Final = "reference.safetensors"
MICRO_BATCHES_A_CALL: Final = 8
"""Micro-batches between two updates of the progress bar."""


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs, [n] each; `dropped` were longer than the run's sequence length."""

    chosen: Sequence[Row]
    rejected: Sequence[Row]
    dropped: int

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True)
class Reference:
    """log ref(response | question) of each pair's sides: float32 [n], nats."""

    chosen: Tensor
    rejected: Tensor


def load_pairs(directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Pairs:
    """Read and tokenise a `pairs` record directory.

    A pair with a side longer than `sequence_length` is dropped: cut off, a response would lose its answer,
    which is what the pair is about.

    Raises:
        UserError: the directory is not finished, a text spells a special token, or no pair fits.
    """
    table = read_table(directory, "pairs", ["question", "chosen", "rejected"])
    questions = table.column("question").to_pylist()
    sides = [
        [_row(*rendered) for rendered in render_conversations(tokenizer, questions, table.column(side).to_pylist())]
        for side in ("chosen", "rejected")
    ]
    kept = [pair for pair in zip(*sides, strict=True) if max(len(row.input_ids) for row in pair) <= sequence_length]
    if not kept:
        raise UserError(
            f"none of the {len(questions)} pairs in {directory} fits into sequence_length={sequence_length}",
            rule="question and response together have at most sequence_length tokens",
            remedy="raise sequence_length, or curate pairs with shorter responses",
        )
    return Pairs([pair[0] for pair in kept], [pair[1] for pair in kept], len(questions) - len(kept))


def _row(ids: Sequence[int], mask: Sequence[int]) -> Row:
    return Row(
        np.asarray(ids, dtype=np.int32),
        np.asarray(mask, dtype=np.uint8),
        np.asarray([len(ids)], dtype=np.int32),
    )


class PairCollate:
    """Pair numbers -> padded tensors with their reference log-probabilities.

    Args:
        pairs: all pairs.
        reference: their reference log-probabilities.
        pad_id: token of the padding.
    """

    def __init__(self, pairs: Pairs, reference: Reference, pad_id: int) -> None:
        self._pairs, self._reference, self._pad_id = pairs, reference, pad_id

    def __call__(self, numbers: Sequence[int], pad_length_to_multiple_of: int = 1) -> dict[str, Tensor]:
        """`chosen`, `rejected`, `chosen_labels`, `rejected_labels` int64 [b, s]; `reference_*` float32 [b]."""
        rows = [self._pairs.chosen[i] for i in numbers] + [self._pairs.rejected[i] for i in numbers]
        batch = collate_padded(rows, pad_id=self._pad_id, multiple=pad_length_to_multiple_of)
        chosen, rejected = batch["tokens"].chunk(2)
        chosen_labels, rejected_labels = batch["labels"].chunk(2)
        return {
            "chosen": chosen,
            "rejected": rejected,
            "chosen_labels": chosen_labels,
            "rejected_labels": rejected_labels,
            "reference_chosen": self._reference.chosen[list(numbers)],
            "reference_rejected": self._reference.rejected[list(numbers)],
        }


def stored_reference(
    directory: Path, policy: MegatronPolicy, pairs: Pairs, pad_id: int, identity: Mapping[str, str]
) -> Reference:
    """The reference log-probabilities beside the run; computed with the policy as it is if they are not there yet.

    Args:
        directory: the run directory.
        policy: holds the reference weights still.
        pairs: all pairs.
        pad_id: token of the padding.
        identity: hashes of the reference model's weights and of the data, by name.

    Raises:
        UserError: stored values belong to another reference model or to other pairs.
    """
    path = directory / REFERENCE_FILE
    identity = {**identity, "pairs": str(len(pairs))}
    box = [path.is_file()]
    dist.broadcast_object_list(box, 0)
    if box[0]:
        return _read_reference(path, identity)
    reference = _compute_reference(policy, pairs, pad_id)
    if dist.get_rank() == 0:
        with atomic_file(path) as temporary:
            save_file({"chosen": reference.chosen, "rejected": reference.rejected}, temporary, metadata=identity)
    return reference


def _read_reference(path: Path, identity: Mapping[str, str]) -> Reference:
    with safe_open(str(path), framework="pt") as file:
        stored: dict[str, Any] = file.metadata() or {}
        changed = [name for name, value in identity.items() if stored.get(name) != value]
        if changed:
            differences = ", ".join(f"{name}: {stored.get(name)} -> {identity[name]}" for name in changed)
            raise UserError(
                f"{path} was computed for another reference ({differences})",
                rule="DPO's reference model and its pairs do not change during a run",
                remedy="restore base= and pairs=, or choose another run.output",
            )
        return Reference(file.get_tensor("chosen"), file.get_tensor("rejected"))


def _compute_reference(policy: MegatronPolicy, pairs: Pairs, pad_id: int) -> Reference:
    """Sums of log-probabilities of all responses; each data-parallel rank computes a share (collective)."""
    rows = [*pairs.chosen, *pairs.rejected]
    sums = torch.zeros(len(rows), dtype=torch.float64)
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    mine = by_length[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    size = policy.micro_batch * MICRO_BATCHES_A_CALL
    policy.prepare_for_inference()
    starts = range(0, len(mine), size)
    for start in tqdm(starts, desc="dpo reference", disable=dist.get_rank() != 0, mininterval=1.0):
        part = mine[start : start + size]
        batch = collate_padded([rows[i] for i in part], pad_id=pad_id, multiple=1)
        sums[part] = policy.log_probs(batch["tokens"], batch["labels"]).double().sum(dim=1)
    policy.finish_inference()
    shared = sums.to(platform.device())
    dist.all_reduce(shared, group=parallel_state.get_data_parallel_group())
    chosen, rejected = shared.float().cpu().chunk(2)
    return Reference(chosen.contiguous(), rejected.contiguous())
