"""Stage 4: GRPO with a verifiable reward and the paper's three stabilisers."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/grpo/paper.yaml"


def grpo(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """NeMo-Aligner's ReinforceTrainer over the Megatron-Core policy."""
    return stage_recipe("grpo", config, overrides)


if __name__ == "__main__":
    main(grpo, PAPER)
