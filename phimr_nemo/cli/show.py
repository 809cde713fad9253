"""Commands that show what runs have said: `show`, in a terminal or a browser, and `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from phimr_nemo.errors import UserError
from phimr_nemo.process.stopping import stoppable
from phimr_nemo.text.printable import say

if TYPE_CHECKING:
    from phimr_nemo.show.items import View

Verdict = Literal["correct", "wrong", "unparsable", "timeout", "error", "gold_unreadable"]
Change = Literal["gained", "lost"]


def show(
    run: Annotated[Path, typer.Argument(help="A run directory, or one above several, as runs/quickstart.")],
    view: Annotated[str, typer.Option(help="Which view, or a part of its name; default the first.")] = "",
    search: Annotated[str, typer.Option(help="Only items that hold this text.")] = "",
    verdict: Annotated[Verdict | None, typer.Option(help="Only items with a response that was graded so.")] = None,
    pane: Annotated[str, typer.Option(help="The pane (a stage, a side) that --verdict and --change mean.")] = "",
    reason: Annotated[str, typer.Option(help="Only items with such a reason, of the grader or of curation.")] = "",
    change: Annotated[
        Change | None, typer.Option(help="Only questions that a stage answers better or worse than the first.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="GRPO's samples: only of this step.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Items to print.")] = 3,
    skip: Annotated[int, typer.Option(min=0, help="Items to pass over first.")] = 0,
    whole: Annotated[bool, typer.Option(help="Print thinking, every sample, and long responses in full.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one page that needs no server and no network.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page to this machine's browser: any size.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve; 0 = any free one.")] = 0,
) -> None:
    """Questions with every stage's responses, GRPO's samples, preference pairs, and what was dropped and why."""
    from rich.console import Console

    from phimr_nemo.show.items import Wanted, select
    from phimr_nemo.show.terminal import overview, show_items
    from phimr_nemo.show.views import find_views

    with stoppable("show"):
        views = find_views(run)
        if html is not None:
            from phimr_nemo.show.page import write_page

            say(write_page(views, html, title=run.name or str(run)))
        if serve:
            from phimr_nemo.show.serve import serve_views

            serve_views(views, title=run.name or str(run), port=port)
        if html is not None or serve:
            return
        console = Console(highlight=False, markup=False, emoji=False)
        chosen = _view(views, view)
        if not view and len(views) > 1:
            console.print(overview(views))
        wanted = Wanted(search, verdict, _pane(chosen, pane), reason, change, step)
        numbers = select(chosen, wanted)
        show_items(console, chosen, numbers[skip : skip + count], found=len(numbers), whole=whole)


def compare(
    first: Annotated[Path, typer.Argument(help="A run directory, or one above several.")],
    second: Annotated[Path, typer.Argument(help="Another; runs below both are paired by their names.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write compare.html, the curves as PNG, and both runs' responses.")
    ] = None,
) -> None:
    """Two runs: settings that differ, learning curves, scores and their paired difference, questions that flipped."""
    from rich.console import Console

    from phimr_nemo.show.compare import compare as compare_runs
    from phimr_nemo.show.compare import write_comparison
    from phimr_nemo.show.curves import text_plot
    from phimr_nemo.show.terminal import show_table

    with stoppable("compare"):
        found = compare_runs(first, second)
        console = Console(highlight=False, markup=False, emoji=False)
        for table in (found.settings, found.scores, found.flipped):
            if table is not None:
                show_table(console, table)
        for title, curves in found.curves.items():
            say("\n".join(text_plot(curves, title)) + "\n")
        for line in found.alone:
            say(line)
        if out is not None:
            say(write_comparison(found, out))


def _view(views: Sequence[View], name: str) -> View:
    """The view that is meant.

    Raises:
        UserError: none is, or several are.
    """
    meant = [one for one in views if one.name == name] or [one for one in views if name in one.name]
    if not name or len(meant) == 1:
        return meant[0]
    raise UserError(
        f"--view {name!r} is {'a part of ' + str([one.name for one in meant]) if meant else 'no view'}",
        rule=f"the views are {[one.name for one in views]}",
        remedy="give one of these names, or a part that no other has",
    )


def _pane(view: View, name: str) -> int | None:
    """The pane that is meant.

    Raises:
        UserError: the view has none of that name.
    """
    if not name:
        return None
    if name not in view.panes:
        raise UserError(
            f"--pane {name!r} is no pane of {view.name}",
            rule=f"its panes are {list(view.panes)}",
            remedy=f"for example --pane {view.panes[-1]!r}",
        )
    return view.panes.index(name)
