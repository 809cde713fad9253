"""A trained directory -> a release directory with its model card."""

from __future__ import annotations

from collections.abc import Sequence

import nemo_run as run

from recipes import main, stage_recipe

PAPER = "conf/export/paper.yaml"


def export(config: str = PAPER, overrides: Sequence[str] = ()) -> run.Partial:
    """The directory that transformers and vLLM load."""
    return stage_recipe("export", config, overrides)


if __name__ == "__main__":
    main(export, PAPER)
