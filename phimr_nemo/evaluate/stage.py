"""The stage `evaluate`: a model and problems -> responses, verdicts, results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import BenchmarkProblems, EndpointEngine, EvaluateConfig, FileProblems, SyntheticProblems
from phimr_nemo.evaluate.benchmarks import read_benchmark
from phimr_nemo.evaluate.evaluate import evaluate_model
from phimr_nemo.generate.stage import read_configured_problems
from phimr_nemo.store.runs import RUN_FILE

if TYPE_CHECKING:
    import pyarrow as pa

ROW_OF_STAGE: Final = {
    "base": "base",
    "midtrain": "mid-training",
    "sft": "SFT",
    "dpo": "DPO",
    "grpo": "GRPO",
    "distill": "distillation",
}
"""The stage that made a model -> its row in tables."""


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Sample, grade and score; everything that was found is in `results.json`.

    Returns:
        Questions, samples and pass@1.

    Raises:
        UserError: an unreadable model, or problems that are not there, not whole, or without answers.
    """
    problems, facts = read_evaluated(config)
    result = evaluate_model(config, problems, {**facts, "row": row_name(config)})
    return {"questions": result.questions, "samples": result.samples, "pass1": result.pass1}


def read_evaluated(config: EvaluateConfig) -> tuple[pa.Table, dict[str, Any]]:
    """The problems, and under which name their score stands in tables.

    Raises:
        UserError: see :func:`run_evaluate`.
    """
    if isinstance(config.problems, BenchmarkProblems):
        problems, edition = read_benchmark(config.problems)
        return problems, {"benchmark": config.problems.name, "edition": edition}
    problems, _ = read_configured_problems(config.problems, config.run.seed)
    if isinstance(config.problems, SyntheticProblems):
        return problems, {"benchmark": f"synthetic, {config.problems.split}"}
    path = config.problems.path
    return problems, {
        "benchmark": path.name.partition(".")[0] if isinstance(config.problems, FileProblems) else path.name
    }


def row_name(config: EvaluateConfig) -> str:
    """The model's name in tables: as given, else the stage of the run that made it, else its directory's name."""
    if config.row is not None:
        return config.row
    if isinstance(config.engine, EndpointEngine):
        return config.engine.endpoint.model
    assert config.model is not None, "the configuration has a model for an engine in this process"
    stage = stage_of_model(config.model)
    return ROW_OF_STAGE.get(stage or "", config.model.name if stage is None else stage)


def stage_of_model(model: Path) -> str | None:
    """The stage of the run in whose directory a model stands; None for models from elsewhere."""
    try:
        return str(json.loads((model.resolve().parent / RUN_FILE).read_text("utf-8"))["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
