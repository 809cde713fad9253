"""Stage 0: sources -> problems, and rollouts from the sources that bring trajectories."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/prepare/paper.yaml"


def prepare(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """Read, normalise, deduplicate, decontaminate and label the questions of all sources."""
    return stage_recipe("prepare", config, overrides)


if __name__ == "__main__":
    main(prepare, PAPER)
