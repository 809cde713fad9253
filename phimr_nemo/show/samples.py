"""The view of responses that a GRPO run has kept: a group an item, the newest step first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from phimr_nemo.show.graded import codes
from phimr_nemo.show.items import Cells, Item, Mask, Response, View, index_of, response_of
from phimr_nemo.store.responses import kept_steps, read_responses

OPEN_STEPS: Final = 16
"""Whose samples are kept in memory."""
SEARCHED: Final = ("prompt_id", "question", "answer", "response")
CUT_OFF, TRAINED = "cut off", "trained on"


def samples_view(name: str, run: Path) -> View:
    """A view of a GRPO or distillation run's samples.

    Args:
        name: of the view.
        run: its directory.

    Raises:
        UserError: a sample is damaged.
    """

    @lru_cache(OPEN_STEPS)
    def rows(step: int) -> list[dict[str, Any]]:
        return read_responses(run, step)

    groups: list[tuple[int, str]] = []
    item, verdicts, tokens, steps, notes = [], [], [], [], []
    for step in reversed(kept_steps(run)):
        places: dict[str, int] = {}
        for row in rows(step):
            if row["prompt_id"] not in places:
                places[row["prompt_id"]] = len(groups)
                groups.append((step, row["prompt_id"]))
                steps.append(step)
            item.append(places[row["prompt_id"]])
            verdicts.append(row["verdict"])
            tokens.append(row["tokens"])
            notes.append(_notes(row))
    cells = Cells(
        item=np.array(item, np.int64),
        pane=np.zeros(len(item), np.int64),
        verdict=codes(verdicts),
        reasons=[
            [CUT_OFF if CUT_OFF in words else None for words in notes],
            [TRAINED if TRAINED in words else None for words in notes],
        ],
        tokens=np.array(tokens, np.int64),
    )

    def group(number: int) -> list[dict[str, Any]]:
        step, prompt = groups[number]
        return [row for row in rows(step) if row["prompt_id"] == prompt]

    def fetch(numbers: Sequence[int]) -> list[Item]:
        return [_item(group(number)) for number in numbers]

    def search(text: str) -> Mask:
        folded = text.casefold()
        hits = [
            any(folded in row[column].casefold() for row in group(number) for column in SEARCHED)
            for number in range(len(groups))
        ]
        return np.array(hits, np.bool_)

    index = index_of(len(groups), 1, cells, np.array(steps, np.int64))
    return View(name, "samples", ("responses",), index, fetch, search)


def _notes(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(word for word, said in ((CUT_OFF, row["truncated"]), (TRAINED, row["trained"])) if said)


def _item(rows: Sequence[dict[str, Any]]) -> Item:
    first = rows[0]
    responses: list[Response] = [
        response_of(
            row["response"], verdict=row["verdict"], tokens=row["tokens"], reward=row["reward"], notes=_notes(row)
        )
        for row in rows
    ]
    return Item(
        first["prompt_id"], first["question"], first["answer"], (f"step {first['step']}",), (tuple(responses),)
    )
