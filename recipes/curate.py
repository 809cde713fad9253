"""Stage 0: verdicts -> training sets."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/curate/paper.yaml"


def curate(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """Mid-training set, SFT subset, preference pairs and RL prompts."""
    return stage_recipe("curate", config, overrides)


if __name__ == "__main__":
    main(curate, PAPER)
