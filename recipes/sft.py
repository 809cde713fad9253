"""Stage 2: supervised fine-tuning on unpacked conversations, so that the model learns when to stop."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/sft/paper.yaml"


def sft(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """NeMo 2.0 over Megatron-Core, from one Hugging Face directory to the next."""
    return stage_recipe("sft", config, overrides)


if __name__ == "__main__":
    main(sft, PAPER)
