"""Items in the terminal: the question, and the responses of its panes side by side where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from phimr_nemo.report.tables import Table as Cells
from phimr_nemo.show.items import Item, Numbers, Response, View
from phimr_nemo.text.printable import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

NARROWEST_PANE: Final = 38
"""Columns of a response beside another; in fewer, lines of mathematics are broken to pieces."""
SHOWN_CHARS: Final = 4_000
"""Of a response in the terminal, its beginning and its end: a reasoning model writes tens of thousands."""
COLORS: Final = {"correct": "green", "wrong": "red", "": "dim"}
OTHER_COLOR: Final = "yellow"
NOTHING: Final = "nothing in {view} is like that: {of:,} items"


def overview(views: Sequence[View]) -> Table:
    """What there is: a line a view."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("--view", "items", "responses", "correct (%)", "panes"):
        table.add_column(title, justify="left" if title in ("--view", "panes") else "right", overflow="fold")
    for view in views:
        right, total = int(view.index.right.sum(dtype=int)), view.responses
        graded = bool(view.index.verdicts.any())
        cells = (
            view.name,
            f"{len(view.index):,}",
            f"{total:,}",
            f"{100 * right / max(total, 1):.1f}" if graded else "-",
            ", ".join(view.panes) if len(view.panes) > 1 or view.kind == "questions" else view.kind,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def show_table(console: Console, table: Cells) -> None:
    """Print a table of the reports."""
    from rich.table import Table
    from rich.text import Text

    console.print(f"{table.title}", style="bold")
    if table.rows:
        shown = Table(box=None, header_style="bold", pad_edge=False)
        for title in table.header:
            shown.add_column(Text(printable(title)), overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        console.print(shown)
    if table.note:
        console.print(printable(table.note), style="dim")
    console.print()


def show_items(console: Console, view: View, numbers: Numbers, *, found: int, whole: bool) -> None:
    """Print items.

    Args:
        console: where to.
        view: theirs.
        numbers: which of them.
        found: how many there are of that kind, for the last line.
        whole: print thinking, and long responses in full.
    """
    if not len(numbers):
        console.print(NOTHING.format(view=printable(view.name), of=len(view.index)))
        return
    for number, item in zip(numbers.tolist(), view.fetch(numbers.tolist()), strict=True):
        _show(console, view, number, item, whole=whole)
    of = "" if found == len(view.index) else f", of {len(view.index):,} in all"
    console.print(f"{printable(view.name)}: {len(numbers):,} of {found:,}{of}", style="dim")
    if view.note:
        console.print(printable(view.note), style="dim")


def _show(console: Console, view: View, number: int, item: Item, *, whole: bool) -> None:
    facts = ", ".join(item.facts)
    console.rule(f"{number + 1:,}: {printable(item.id)}{f' ({printable(facts)})' if facts else ''}", align="left")
    console.print(f"question: {printable(item.question)}", soft_wrap=True)
    if item.answer:
        console.print(f"answer:   {printable(item.answer)}", soft_wrap=True)
    many = len(item.panes) > 1
    named = many or view.kind == "questions"
    responses = [
        (f"{view.panes[place]}{f' {sample + 1}' if len(pane) > 1 else ''}" if named else f"{sample + 1}", response)
        for place, pane in enumerate(item.panes)
        for sample, response in enumerate(pane)
    ]
    if many and not whole:
        # One response of each, and how the others did: a stage's samples would drown the stages.
        responses = [
            (
                name
                if view.kind == "drops"
                else f"{name} ({sum(one.verdict == 'correct' for one in pane)} of {len(pane)})",
                pane[0],
            )
            for name, pane in zip(view.panes, item.panes, strict=True)
            if pane
        ]
    beside = max(1, min(len(responses), console.width // NARROWEST_PANE))
    for start in range(0, len(responses), beside):
        console.print(_row(responses[start : start + beside], beside, graded=view.kind != "drops", whole=whole))


def _row(responses: Sequence[tuple[str, Response]], beside: int, *, graded: bool, whole: bool) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, expand=True)
    for _ in range(beside):
        table.add_column(ratio=1, overflow="fold")
    empty = [""] * (beside - len(responses))
    heads: list[RenderableType] = [_head(name, response, graded=graded) for name, response in responses]
    bodies: list[RenderableType] = [_body(response, whole=whole) for _, response in responses]
    table.add_row(*heads, *empty)
    table.add_row(*bodies, *empty)
    return table


def _head(name: str, response: Response, *, graded: bool) -> Text:
    from rich.text import Text

    text = Text(printable(name), style="bold")
    if graded:
        text.append(f": {response.verdict or 'not graded'}", style=COLORS.get(response.verdict, OTHER_COLOR))
    numbers = [] if response.reward is None else [f"reward {response.reward:g}"]
    numbers += [] if response.tokens is None else [f"{response.tokens:,} tokens"]
    text.append(printable("".join(f", {part}" for part in (*numbers, *response.notes))), style="not bold")
    if response.verdict not in ("", "correct"):
        read = f" (read: {response.extracted})" if response.extracted else ""
        text.append(printable(f"\n{response.reason}{read}"), style="not bold dim")
    return text


def _body(response: Response, *, whole: bool) -> Text:
    from rich.text import Text

    text = Text()
    thinking, answer = printable(response.thinking.strip()), printable(response.answer.strip())
    if thinking and whole:
        text.append(f"{thinking}\n", style="dim")
    elif thinking:
        lines = thinking.count("\n") + 1
        folded = f"[thinking, {lines:,} {'line' if lines == 1 else 'lines'}; --whole prints it]"
        text.append(f"{folded}\n" if answer else _shortened(thinking), style="dim")
    text.append(answer if whole else _shortened(answer))
    return text


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARS:
        return text
    half = SHOWN_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters, --whole prints them ...]\n{text[-half:]}"
