"""The stage `evaluate`: a model and problems -> responses, verdicts, results.json."""

from __future__ import annotations

from typing import Any

from phimr_nemo.config import EvaluateConfig
from phimr_nemo.evaluate.evaluate import evaluate_model
from phimr_nemo.generate.sampler import SamplingParams
from phimr_nemo.generate.stage import read_configured_problems


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Sample, grade and score; everything that was found is in `results.json`.

    Returns:
        Questions, samples and pass@1.

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
    return {"questions": result.questions, "samples": result.samples, "pass1": result.pass1}
