"""Stage 0: questions and a teacher -> rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/generate/paper.yaml"


def generate(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """Sample the teacher, one shard of questions a Slurm array task."""
    return stage_recipe("generate", config, overrides)


if __name__ == "__main__":
    main(generate, PAPER)
