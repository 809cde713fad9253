"""`phimr bridge trl`: a stage for TRL, run there by ``python -m phimr_nemo.bridges.trl.run``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from phimr_nemo.align.grpo.stabilisers import annealed_temperature
from phimr_nemo.bridges.counterparts import Counterpart
from phimr_nemo.bridges.export import Export
from phimr_nemo.bridges.files import SCHEDULE
from phimr_nemo.bridges.samples import dpo_samples, grpo_samples, sft_samples
from phimr_nemo.bridges.schedule import learning_rates
from phimr_nemo.bridges.trl.settings import DPO, GRPO, SFT, dpo_settings, grpo_settings, sft_settings
from phimr_nemo.config import DPOConfig, GRPOConfig, SFTConfig

VERSION: Final = "TRL 1.16"


def export_trl(config: SFTConfig | DPOConfig | GRPOConfig) -> Export:
    """A stage's settings, data and schedule for TRL.

    Raises:
        UserError: a setting without a counterpart, or data that is not usable.
    """
    schedule: dict[str, Any] = {}
    table: Sequence[Counterpart]
    if isinstance(config, SFTConfig):
        samples = sft_samples(config)
        trainer, table = sft_settings(config, samples.steps), SFT
        schedule["rates"] = learning_rates(config.optim, samples.steps)
    elif isinstance(config, DPOConfig):
        samples = dpo_samples(config)
        trainer, table = dpo_settings(config, samples.steps), DPO
        schedule["rates"] = learning_rates(config.optim, samples.steps)
    else:
        samples = grpo_samples(config)
        trainer, table = grpo_settings(config, samples.steps), GRPO
        schedule["rates"] = learning_rates(config.optim, config.steps * config.inner_batches)
        schedule["temperatures"] = [
            annealed_temperature(step, config.steps, config.temperature) for step in range(config.steps)
        ]
    settings = {
        "stage": {SFTConfig: "sft", DPOConfig: "dpo", GRPOConfig: "grpo"}[type(config)],
        "model": str(config.base),
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.model.dtype],
        "longrope": config.model.longrope,
        "sequence_length": config.sequence_length,
        "trainer": trainer,
    }
    if isinstance(config, GRPOConfig):
        settings["reward"] = {
            "correct": config.reward.correct,
            "wrong": config.reward.wrong,
            "workers": config.verify_workers,
            "grader": config.grader,
            "inner_batches": config.inner_batches,
        }
    return Export(VERSION, settings, table, samples, files={SCHEDULE: json.dumps(schedule)})
