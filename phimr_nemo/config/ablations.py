"""Settings of the ablations that compare domains, teachers and stages."""

from __future__ import annotations

from pathlib import Path

from phimr_nemo.config.common import config


@config
class ForgettingConfig:
    """What each stage forgets.

    Attributes:
        output: where the table and the picture go.
        quickstarts: outputs of finished quickstarts.
    """

    output: Path
    quickstarts: tuple[Path, ...]
