"""Stage 0: rollouts -> verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/verify/paper.yaml"


def verify(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """Grade every rollout with math-verify in killable workers."""
    return stage_recipe("verify", config, overrides)


if __name__ == "__main__":
    main(verify, PAPER)
