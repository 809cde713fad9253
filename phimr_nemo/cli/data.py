"""`phimr data`: reports on record directories, and their checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phimr_nemo.errors import EXIT_USER
from phimr_nemo.text.printable import say

data_app = typer.Typer(help="Reports on record directories, and their checks.", no_args_is_help=True)


@data_app.command("report")
def data_report(
    directories: Annotated[list[Path], typer.Argument(help="Outputs of data steps, or directories above them.")],
    out: Annotated[Path, typer.Option(help="Where to write the page and the pictures.")] = Path("runs/data-report"),
) -> None:
    """Funnels with the reason of every drop, lengths, difficulty and pass rates: report.html and PNGs."""
    from phimr_nemo.report.data import write_data_report

    say(write_data_report(directories, out))


@data_app.command("check")
def data_check(
    directories: Annotated[list[Path], typer.Argument(help="Record or run directories.")],
    redo: Annotated[
        bool, typer.Option("--redo", help="Let the steps that made damaged shards make them, and only them, again.")
    ] = False,
) -> None:
    """Compare every shard with its checksum; name what is truncated, changed or half-written. Exit code 2 if any."""
    from phimr_nemo.store.check import check_directory, forget_damaged

    found = [damage for root in directories for damage in check_directory(root)]
    for damage in found:
        state = f"damaged: {', '.join(damage.shards)}" if damage.shards else "sound"
        say(f"{damage.directory}: {damage.count} shards, {state}")
        if redo:
            forget_damaged(damage)
    if not redo and any(damage.shards for damage in found):
        raise typer.Exit(EXIT_USER)
