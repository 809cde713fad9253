"""Settings of evaluation and release."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from phimr_nemo.config.common import Positive, RunConfig, Share, config
from phimr_nemo.config.generation import Problems


@config
class EvaluateConfig:
    """pass@1 of a model on problems.

    Attributes:
        model: Hugging Face directory.
        samples: answers a question.
        prompt: the user's turn; `{question}` stands in it once.
    """

    run: RunConfig
    model: Path
    problems: Problems
    samples: Positive
    prompt: str
    temperature: float
    top_p: Share
    max_new_tokens: Positive
    max_batch: Positive = 256
    workers: Positive = 1


@config
class ExportConfig:
    """A trained directory -> a release directory.

    Attributes:
        model: Hugging Face directory of the last stage.
        base_model: what it was trained from, for the model card.
        licence: its identifier on the hub.
        stages: stage name -> run directory, for the model card.
        evaluations: row name -> directory of an evaluation, for the model card's table.
    """

    run: RunConfig
    model: Path
    base_model: str
    licence: str
    stages: dict[str, Path] = field(default_factory=dict)
    evaluations: dict[str, Path] = field(default_factory=dict)
