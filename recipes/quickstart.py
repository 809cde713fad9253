"""The whole recipe on a tiny model, on a laptop's CPU: data, four training stages, evaluation, export."""

from __future__ import annotations

from pathlib import Path

import nemo_run as run

from phimr_nemo.jobs.quickstart import run_quickstart

TINY = "conf/quickstart/tiny.yaml"


def quickstart_run(config: str, seeds: list[int], out: str) -> None:
    """Run the quickstart (paths as text, as NeMo-Run stores them)."""
    run_quickstart(Path(config), seeds, Path(out), [])


def quickstart(config: str = TINY, seeds: tuple[int, ...] = (0,), out: str = "runs/quickstart") -> run.Partial:
    """Every step of the recipe; finished steps are not run again."""
    return run.Partial(quickstart_run, config=config, seeds=list(seeds), out=out)


if __name__ == "__main__":
    run.run(quickstart(), direct=True)
