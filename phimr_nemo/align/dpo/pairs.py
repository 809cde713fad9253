"""Preference pairs as rows: read, checked, tokenised, collated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from phimr_nemo.align.microbatch import balanced_shares
from phimr_nemo.config.dpo import Overlong
from phimr_nemo.data.chat import render_conversations
from phimr_nemo.data.rows.batches import Row, collate_padded
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGEST_BYTES: Final = 16
SIDES: Final = ("chosen", "rejected")
COLUMNS: Final = ("id", "question", *SIDES, *(f"{side}_finish_reason" for side in SIDES))


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs, [n] each.

    Attributes:
        chosen, rejected: question and response of both sides.
        too_long: pairs that were left out for the run's sequence length.
        truncated: pairs of which a side was cut off at it.
        ids: of the pairs.
        questions: of the pairs.
    """

    chosen: Sequence[Row]
    rejected: Sequence[Row]
    too_long: int = 0
    truncated: int = 0
    ids: Sequence[str] = ()
    questions: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    def digest(self) -> str:
        """Hash of all tokens and loss masks."""
        state = blake2b(digest_size=DIGEST_BYTES)
        for row in (*self.chosen, *self.rejected):
            state.update(len(row.input_ids).to_bytes(8, "little"))
            state.update(row.input_ids.tobytes())
            state.update(row.loss_mask.tobytes())
        return state.hexdigest()


def load_pairs(
    directory: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int, overlong: Overlong
) -> Pairs:
    """Read, check and tokenise a `pairs` record directory.

    Args:
        directory: the records.
        tokenizer: a Phi tokenizer.
        sequence_length: the most tokens of a question with one of its responses.
        overlong: "drop" leaves a pair with a longer side out: cut off, a response loses its answer, which is what
            the pair is about. "truncate" cuts the side off, and leaves the pair out when that takes a whole
            response, or all in which the two differ. "error" refuses it.

    Raises:
        UserError: the directory is not finished; a text spells a special token; a pair without a difference, or
            twice, or against another one; a pair that is too long under "error"; no pair is left.
    """
    items = read_table(directory, "pairs", COLUMNS).to_pylist()
    _check_texts(directory, items)
    questions = [item["question"] for item in items]
    sides = [
        [
            _row(*rendered)
            for rendered in render_conversations(
                tokenizer,
                questions,
                [item[side] for item in items],
                [item[f"{side}_finish_reason"] == "length" for item in items],
            )
        ]
        for side in SIDES
    ]
    kept: list[tuple[Row, Row, str, str]] = []
    truncated = 0
    for item, chosen, rejected in zip(items, *sides, strict=True):
        if _same(chosen, rejected):
            raise _without_difference(directory, item, "tokens")
        if not (chosen.loss_mask.any() and rejected.loss_mask.any()):
            raise _without_text(directory, item)
        longest = max(len(chosen.input_ids), len(rejected.input_ids))
        if longest <= sequence_length:
            kept.append((chosen, rejected, item["id"], item["question"]))
        elif overlong == "error":
            raise UserError(
                f"pair {item['id']} in {directory} has a side of {longest} tokens",
                rule=f"overlong=error: question and response together have at most {sequence_length} tokens",
                remedy="raise sequence_length, or set overlong=drop or overlong=truncate",
            )
        elif overlong == "truncate":
            pair = _cut_off(chosen, sequence_length), _cut_off(rejected, sequence_length)
            if pair[0].loss_mask.any() and pair[1].loss_mask.any() and not _same(*pair):
                kept.append((*pair, item["id"], item["question"]))
                truncated += 1
    if not kept:
        raise UserError(
            f"none of the {len(items)} pairs in {directory} fits into sequence_length={sequence_length}",
            rule="question and response together have at most sequence_length tokens",
            remedy="raise sequence_length, or curate pairs with shorter responses",
        )
    chosen_rows, rejected_rows, ids, asked = zip(*kept, strict=True)
    return Pairs(chosen_rows, rejected_rows, len(items) - len(kept), truncated, ids, asked)


def held_out_pairs(pairs: Pairs, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the pairs to train on, and of those to validate with; no question is on both sides.

    Args:
        pairs: all pairs.
        count: at least so many are held out, with all pairs of their questions; which ones depends on their questions
            and the seed alone.
        seed: of the choice.

    Raises:
        UserError: no pair is left to train on.
    """
    of_question: dict[str, list[int]] = {}
    for number, question in enumerate(pairs.questions):
        of_question.setdefault(question, []).append(number)
    held_out: set[int] = set()
    for question in sorted(of_question, key=lambda text: content_id("validation", str(seed), text)):
        if len(held_out) >= count:
            break
        held_out.update(of_question[question])
    if len(held_out) == len(pairs):
        raise UserError(
            f"validation_pairs={count} of {len(pairs)} pairs, of {len(of_question)} questions",
            rule="validation shares no question with training, and leaves it some",
            remedy="lower validation_pairs, or bring pairs of more questions",
        )
    numbers = range(len(pairs))
    return [n for n in numbers if n not in held_out], [n for n in numbers if n in held_out]


def _check_texts(directory: Path, items: Sequence[dict[str, Any]]) -> None:
    """Refuse pairs that say nothing, say it twice, or contradict each other."""
    seen: dict[tuple[str, str, str], str] = {}
    for item in items:
        number, question, chosen, rejected = item["id"], item["question"], item["chosen"], item["rejected"]
        if chosen == rejected:
            raise _without_difference(directory, item, "text")
        if not (chosen.strip() and rejected.strip()):
            raise _without_text(directory, item)
        if (question, chosen, rejected) in seen:
            raise UserError(
                f"pair {number} in {directory} has the texts of pair {seen[question, chosen, rejected]}",
                rule="a pair of texts stands in the data once: epochs repeat it",
                remedy="remove one of them, or curate the pairs again",
            )
        if (question, rejected, chosen) in seen:
            raise UserError(
                f"pair {number} in {directory} is pair {seen[question, rejected, chosen]} the other way round",
                rule="of two responses to a question only one is the better one",
                remedy="remove one of the pairs, or verify and curate them again",
            )
        seen[question, chosen, rejected] = number


def _without_difference(directory: Path, item: dict[str, Any], what: str) -> UserError:
    return UserError(
        f"pair {item['id']} in {directory} has the same {what} as chosen and as rejected",
        rule="the two sides of a pair differ: equal ones have no gradient",
        remedy="remove the pair, or curate the pairs again",
    )


def _without_text(directory: Path, item: dict[str, Any]) -> UserError:
    return UserError(
        f"pair {item['id']} in {directory} has a side without any text",
        rule="both sides of a pair are responses: nothing is learnt of an empty one but to end",
        remedy="remove the pair, or curate the pairs again",
    )


def _row(ids: Sequence[int], mask: Sequence[int]) -> Row:
    return Row(
        np.asarray(ids, dtype=np.int32),
        np.asarray(mask, dtype=np.uint8),
        np.asarray([len(ids)], dtype=np.int32),
    )


def _cut_off(row: Row, length: int) -> Row:
    return _row(row.input_ids[:length].tolist(), row.loss_mask[:length].tolist())


def _same(one: Row, other: Row) -> bool:
    return np.array_equal(one.input_ids, other.input_ids)


class PairCollate:
    """Pair numbers of a global batch -> padded tensors of this data-parallel rank's share.

    Args:
        pairs: all pairs.
        reference: their reference log-probabilities [2, pairs], chosen and rejected; None when they are computed
            in every step.
        pad_id: token of the padding.
        rank, ranks: this process's place among the data-parallel ones.
    """

    def __init__(self, pairs: Pairs, reference: Tensor | None, pad_id: int, *, rank: int, ranks: int) -> None:
        self._pairs, self._reference, self._pad_id = pairs, reference, pad_id
        self._rank, self._ranks = rank, ranks

    def __call__(self, numbers: Sequence[int], pad_length_to_multiple_of: int = 1) -> dict[str, Tensor]:
        """`chosen`, `rejected`, `chosen_labels`, `rejected_labels` int64 [b, s]; `reference` float32 [2, b]."""
        pairs = self._pairs
        lengths = [len(pairs.chosen[i].input_ids) + len(pairs.rejected[i].input_ids) for i in numbers]
        share = [numbers[place] for place in balanced_shares(lengths, self._ranks)[self._rank]]
        rows = [pairs.chosen[i] for i in share] + [pairs.rejected[i] for i in share]
        batch = collate_padded(rows, pad_id=self._pad_id, multiple=pad_length_to_multiple_of)
        chosen, rejected = batch["tokens"].chunk(2)
        chosen_labels, rejected_labels = batch["labels"].chunk(2)
        collated = {
            "chosen": chosen,
            "rejected": rejected,
            "chosen_labels": chosen_labels,
            "rejected_labels": rejected_labels,
        }
        if self._reference is not None:
            collated["reference"] = self._reference[:, torch.tensor(share)]
        return collated
