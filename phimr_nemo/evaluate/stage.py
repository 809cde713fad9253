"""The stage `evaluate`: a model and problems -> responses, verdicts, results.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from phimr_nemo.config import EvaluateConfig
from phimr_nemo.evaluate.evaluate import evaluate_model
from phimr_nemo.generate.sampler import SamplingParams
from phimr_nemo.generate.stage import read_configured_problems


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Sample, grade and score.

    Raises:
        UserError: an unreadable model or problems file.
    """
    problems, _ = read_configured_problems(config.problems, config.run.seed)
    result = evaluate_model(
        config.model,
        problems,
        samples=config.samples,
        params=SamplingParams(config.temperature, config.top_p, config.max_new_tokens),
        out_dir=config.run.output,
        workers=config.workers,
        seed=config.run.seed,
        max_batch=config.max_batch,
        prompt_template=config.prompt,
    )
    return asdict(result)
