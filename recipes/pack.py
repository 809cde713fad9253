"""Stage 0: the mid-training set -> packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/pack/paper.yaml"


def pack(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """Pack conversations into rows of one length, document boundaries kept."""
    return stage_recipe("pack", config, overrides)


if __name__ == "__main__":
    main(pack, PAPER)
