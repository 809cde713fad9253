"""Stage 3: rollout DPO, wrong rollouts of the same question dis-preferred."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/dpo/paper.yaml"


def dpo(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """NeMo-Aligner's DPOTrainer over the Megatron-Core policy."""
    return stage_recipe("dpo", config, overrides)


if __name__ == "__main__":
    main(dpo, PAPER)
