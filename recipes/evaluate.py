"""pass@1 of a model on benchmark or held-out problems."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/evaluate/paper.yaml"


def evaluate(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """Sample, grade and score, with standard errors clustered by question."""
    return stage_recipe("evaluate", config, overrides)


if __name__ == "__main__":
    main(evaluate, PAPER)
