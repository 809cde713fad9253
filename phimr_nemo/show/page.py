"""The page that shows views: one file with everything in it, or the same file beside a server that has the data.

In the file an index of some bytes an item is read at once, and text is unpacked piece by piece when it is shown or
searched. Foreign text reaches the page as packed JSON, and the document as text nodes; the page's policy lets no
other script run than its own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from phimr_nemo.report.page import render
from phimr_nemo.show.items import VERDICTS, Index, Item, Response, View
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.text.printable import printable

HERE: Final = Path(__file__).parent
CHUNK_BYTES: Final = 256 << 10
"""Of text that is packed together: a list of items reads as many pieces as it has items at most."""
READ_ITEMS: Final = 256
PAGE_BYTES: Final = 96 << 20
"""Of packed text in one file; a browser takes a few hundred MB, and what is more than this is served instead."""
MOST_STEPS: Final = 2_000
"""To choose from in the page."""
PACKING: Final = 6
TEMPLATE: Final = """{% extends "page" %}
{% block title %}{{ title }}{% endblock %}
{% block policy %}; script-src '{{ digest }}'{% if served %}; connect-src 'self'{% endif %}{% endblock %}
{% block style %}{{ style | safe }}{% endblock %}
{% block body %}
<h1>{{ title }}</h1>
<div class="bar" id="tabs" role="tablist"></div>
<div class="soft" id="note" hidden></div>
<div class="filters">
<div class="bar"><input type="search" id="search" aria-label="search"
placeholder="search questions and responses (/)"></div>
<div class="bar" id="choices"></div></div>
<div class="bar"><button class="back" id="back">&larr; list</button>
<span class="soft" id="status" role="status">opening</span>
<span class="pages"><button id="before" title="key p">&larr;</button>
<button id="after" title="key n">&rarr;</button></span></div>
<div class="both"><ul class="list" id="list" role="listbox" aria-label="items"></ul>
<div class="detail" id="detail"></div></div>
<details id="keys"><summary>keys</summary><div class="help">
<span><kbd>j</kbd> <kbd>k</kbd> next, previous item</span><span><kbd>n</kbd> <kbd>p</kbd> next, previous page</span>
<span><kbd>/</kbd> search, <kbd>Esc</kbd> leave, clear it</span><span><kbd>t</kbd> fold, unfold thinking</span>
<span><kbd>[</kbd> <kbd>]</kbd> previous, next sample</span><span><kbd>d</kbd> difference of two</span>
<span><kbd>m</kbd> mathematics, as written</span><span><kbd>1</kbd> ... <kbd>9</kbd> views</span></div></details>
<noscript>This page needs JavaScript; <code>phimr show RUN</code> prints the same in a terminal.</noscript>
{% endblock %}
{% block script %}
{% for id, text in blocks %}<script type="text/plain" id="{{ id }}">{{ text }}</script>
{% endfor %}
<script>{{ script | safe }}</script>
{% endblock %}
"""


def write_page(views: Sequence[View], path: Path, *, title: str, most: int = PAGE_BYTES) -> Path:
    """Write one page that needs no server and no network.

    Args:
        views: what it shows.
        path: the file.
        title: of the page.
        most: packed bytes of text; of a view that does not fit the first items are in the page, and it says so.

    Returns:
        The file.

    Raises:
        UserError: a shard cannot be read, or the file cannot be written.
    """
    blocks: list[tuple[str, str]] = []
    facts, left = [], most
    for number, view in enumerate(views):
        starts: list[int] = []
        items = 0
        # Every view has its share of what is left.
        allowed = left // (len(views) - number)
        for start, count, text in _chunks(view):
            packed = _packed(text)
            if len(packed) > allowed:
                break
            blocks.append((f"chunk-{number}-{len(starts)}", packed))
            starts.append(start)
            items = start + count
            allowed, left = allowed - len(packed), left - len(packed)
        blocks.append((f"index-{number}", _packed(json.dumps(index_json(view.index, items)))))
        facts.append({**view_json(view, items), "chunks": starts})
    text = page({"views": facts, "verdicts": VERDICTS, "served": False}, blocks, title=title)
    atomic_write_text(path, text)
    return path


def page(meta: Mapping[str, Any], blocks: Sequence[tuple[str, str]], *, title: str) -> str:
    """The page.

    Args:
        meta: the views and what is common to them.
        blocks: id -> packed data that is in the page.
        title: of the page.
    """
    script = "\n".join((HERE / name).read_text("utf-8") for name in ("logic.js", "viewer.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return render(
        TEMPLATE,
        title=printable(title),
        style=(HERE / "viewer.css").read_text("utf-8"),
        script=script,
        digest=f"sha256-{digest}",
        served=meta["served"],
        blocks=[("meta", _packed(json.dumps(meta))), *blocks],
    )


def _packed(text: str) -> str:
    """A text as base64 of gzip, without the clock in it."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), PACKING, mtime=0)).decode("ascii")


def _chunks(view: View) -> Iterator[tuple[int, int, str]]:
    """First item, number of items and JSON of pieces of about `CHUNK_BYTES`."""
    held: list[str] = []
    size = start = 0
    for first in range(0, len(view.index), READ_ITEMS):
        for item in view.fetch(range(first, min(first + READ_ITEMS, len(view.index)))):
            text = json.dumps(item_json(item), ensure_ascii=False)
            if held and size + len(text) > CHUNK_BYTES:
                yield start, len(held), f"[{','.join(held)}]"
                start, held, size = start + len(held), [], 0
            held.append(text)
            size += len(text)
    if held:
        yield start, len(held), f"[{','.join(held)}]"


def view_json(view: View, items: int) -> dict[str, Any]:
    """What the page knows of a view.

    Args:
        view: the view.
        items: how many of its items the page can show.
    """
    left_out = len(view.index) - items
    notes = [view.note] if view.note else []
    if left_out:
        notes.append(
            f"The first {items:,} of {len(view.index):,} items; the others do not fit into one page: "
            "`phimr show RUN --serve` shows them all."
        )
    steps = np.unique(view.index.steps)[::-1]
    return {
        "name": printable(view.name),
        "kind": view.kind,
        "panes": [printable(name) for name in view.panes],
        "items": items,
        "graded": bool(view.index.verdicts.any()),
        "reasons": [printable(name) for name in view.index.names],
        "steps": steps[steps > 0][:MOST_STEPS].tolist(),
        "note": printable(" ".join(notes)),
    }


def index_json(index: Index, items: int) -> dict[str, str]:
    """The arrays of the first items of an index, little-endian, as base64."""
    arrays = {name: getattr(index, name)[:items] for name in (one.name for one in fields(Index)) if name != "names"}
    return {
        name: base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")
        for name, array in arrays.items()
    }


def item_json(item: Item) -> dict[str, Any]:
    """An item under short names, its texts such as no reader obeys them.

    id; q: question; a: gold answer; f: facts; p: panes of responses with t: thinking, x: the rest, v: verdict,
    r: reason, e: the answer that was read, n: tokens, w: reward, s: notes.
    """
    return {
        "id": printable(item.id),
        "q": printable(item.question),
        "a": printable(item.answer),
        "f": [printable(fact) for fact in item.facts],
        "p": [[_response_json(one) for one in pane] for pane in item.panes],
    }


def _response_json(one: Response) -> dict[str, Any]:
    values = asdict(one)
    names = dict(zip("txvrenws", values, strict=True))
    texts = {short: printable(values[name]) for short, name in names.items() if isinstance(values[name], str)}
    return {**{short: values[name] for short, name in names.items()}, **texts, "s": list(map(printable, one.notes))}
