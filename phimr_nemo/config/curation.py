"""Settings of the training sets and of packing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from phimr_nemo.config.common import Positive, RunConfig, Share, config
from phimr_nemo.records import Difficulty


@config
class MidtrainSet:
    """The full verified set."""

    max_per_problem: Positive


@config
class SFTSet:
    """The harder high-quality subset."""

    difficulties: tuple[Difficulty, ...]
    max_per_problem: Positive


@config
class PairSet:
    """Preference pairs from rollouts of one question."""

    mode: Literal["near_miss", "random"]
    max_per_problem: Positive


@config
class PromptSet:
    """Prompts for reinforcement learning."""

    min_pass: float
    max_pass: float
    hard_below: Share


@config
class CurateConfig:
    """Verdicts -> training sets, each in its own directory of the output; a set that is None is not made."""

    run: RunConfig
    verdicts: Path
    midtrain: MidtrainSet | None = None
    sft: SFTSet | None = None
    pairs: PairSet | None = None
    prompts: PromptSet | None = None


@config
class PackConfig:
    """Conversations -> packed rows.

    Attributes:
        tokenizer: directory with the tokenizer.
        sequence_length: tokens a row.
    """

    run: RunConfig
    conversations: Path
    tokenizer: Path
    sequence_length: Positive
