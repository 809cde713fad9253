"""Stage 1: distillation as mid-training, packed next-token prediction on the full verified set."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/midtrain/paper.yaml"


def midtrain(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """NeMo 2.0 over Megatron-Core, from one Hugging Face directory to the next."""
    return stage_recipe("midtrain", config, overrides)


if __name__ == "__main__":
    main(midtrain, PAPER)
