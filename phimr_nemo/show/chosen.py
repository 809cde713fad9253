"""The view of preference pairs: the chosen and the rejected response side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from phimr_nemo.show.graded import codes, holds
from phimr_nemo.show.items import UNKNOWN_TOKENS, Cells, Item, Mask, Response, View, index_of, response_of
from phimr_nemo.show.records import Records
from phimr_nemo.store.records import PAIR_SIDES

# What a side is where an earlier release did not record its verdict.
USUAL_VERDICT: Final[Mapping[str, str]] = {"chosen": "correct", "rejected": "wrong"}
SEARCHED: Final = ("problem_id", "question", *PAIR_SIDES)


def pairs_view(name: str, records: Records) -> View:
    """A view of preference pairs, an item a pair.

    Args:
        name: of the view.
        records: of kind "pairs".

    Raises:
        UserError: a shard cannot be read.
    """
    verdicts: dict[str, list[str]] = {side: [] for side in PAIR_SIDES}
    modes: list[str | None] = []
    for table in records.tables([*(f"{side}_verdict" for side in PAIR_SIDES), "mode"]):
        for side in PAIR_SIDES:
            recorded = table[f"{side}_verdict"].to_pylist()
            verdicts[side] += [one or USUAL_VERDICT[side] for one in recorded]
        modes += table["mode"].to_pylist()
    count = len(records)
    cells = Cells(
        item=np.tile(np.arange(count), len(PAIR_SIDES)),
        pane=np.repeat(np.arange(len(PAIR_SIDES)), count),
        verdict=np.concatenate([codes(verdicts[side]) for side in PAIR_SIDES]),
        reasons=[modes * len(PAIR_SIDES)],
        tokens=np.full(len(PAIR_SIDES) * count, UNKNOWN_TOKENS),
    )

    def fetch(numbers: Sequence[int]) -> list[Item]:
        return [_item(row) for row in records.rows(numbers)]

    def search(text: str) -> Mask:
        return holds(records, SEARCHED, text)

    return View(name, "pairs", PAIR_SIDES, index_of(count, len(PAIR_SIDES), cells), fetch, search)


def _item(row: Mapping[str, Any]) -> Item:
    facts = (row["mode"], *(str(row[name]) for name in ("domain", "difficulty") if row.get(name)))
    return Item(row["problem_id"], row["question"], "", facts, tuple((_response(row, side),) for side in PAIR_SIDES))


def _response(row: Mapping[str, Any], side: str) -> Response:
    repetition = row.get(f"{side}_repetition")
    notes = () if repetition is None else (f"repeats {repetition:.0%} of itself",)
    return response_of(row[side], verdict=row.get(f"{side}_verdict") or USUAL_VERDICT[side], notes=notes)
