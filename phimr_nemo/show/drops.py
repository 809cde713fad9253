"""The view of rows that `prepare` dropped: each with the reason, beside the question that it is like, if any."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from phimr_nemo.errors import UserError
from phimr_nemo.show.items import NO_VERDICT, UNKNOWN_TOKENS, Cells, Item, Mask, Numbers, Response, View, index_of

PANES: Final = ("dropped", "because of")
SEARCHED: Final = ("source", "place", "question", "answer", "match", "match_answer")
UNREADABLE: Final = "(no question could be read)"


def drops_view(name: str, path: Path) -> View:
    """A view of dropped rows, an item a row; text is read when it is asked for.

    Args:
        name: of the view.
        path: a drops.jsonl.

    Raises:
        UserError: a line is damaged.
    """
    starts: list[int] = []
    reasons: list[str | None] = []
    likes: list[bool] = []
    for start, drop in _lines(path):
        starts.append(start)
        reasons.append(str(drop["reason"]))
        likes.append("match" in drop)
    count = len(starts)
    like: Numbers = np.flatnonzero(np.array(likes, np.bool_)).astype(np.int64)
    cells = Cells(
        item=np.concatenate([np.arange(count), like]),
        pane=np.repeat([0, 1], [count, len(like)]),
        verdict=np.full(count + len(like), NO_VERDICT),
        reasons=[[*reasons, *(None for _ in like)]],
        tokens=np.full(count + len(like), UNKNOWN_TOKENS),
    )

    def fetch(numbers: Sequence[int]) -> list[Item]:
        found = []
        with path.open("rb") as file:
            for number in numbers:
                file.seek(starts[number])
                found.append(_item(_read(path, file.readline())))
        return found

    def search(text: str) -> Mask:
        folded = text.casefold()
        hits = [any(folded in str(drop.get(key, "")).casefold() for key in SEARCHED) for _, drop in _lines(path)]
        return np.array(hits, np.bool_)

    return View(name, "drops", PANES, index_of(count, len(PANES), cells), fetch, search)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line, and the byte at which it begins."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            yield start, _read(path, line)
            start += len(line)


def _read(path: Path, line: bytes) -> dict[str, Any]:
    try:
        drop = json.loads(line)
        if not isinstance(drop, dict) or "reason" not in drop:
            raise ValueError("no reason")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} has a line that cannot be read: {error}",
            rule="prepare writes a JSON object with a reason for every row that it drops",
            remedy="remove the file, or prepare again into another run.output",
        ) from error
    return drop


def _item(drop: dict[str, Any]) -> Item:
    question, overlap = str(drop.get("question") or UNREADABLE), drop.get("overlap")
    dropped = Response("", _with_answer(question, drop.get("answer")), notes=(str(drop["reason"]),))
    like: tuple[Response, ...] = ()
    if "match" in drop:
        source = drop.get("kept_source")
        notes = (f"kept, of {source}" if source else "of an evaluation set",)
        like = (Response("", _with_answer(str(drop["match"]), drop.get("match_answer")), notes=notes),)
    facts = () if overlap is None else (f"overlap {overlap}",)
    return Item(f"{drop.get('source')}, {drop.get('place')}", question, "", facts, ((dropped,), like))


def _with_answer(question: str, answer: object) -> str:
    return f"{question}\n\nanswer: {answer}" if answer else question
