"""What a data set of rollouts costs: the teacher's GPU-hours, storage, and core-hours of verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from phimr_nemo.config import GenerationPlanConfig
from phimr_nemo.plan.hardware import find_gpu

SECONDS_AN_HOUR: Final = 3600
HOURS_A_DAY: Final = 24
MILLION: Final = 1_000_000


@dataclass(frozen=True)
class GenerationPlan:
    """The cost of `problems x rollouts`.

    Attributes:
        rollouts: how many.
        tokens: of all rollouts.
        gpu_hours, gpu_days: of the teacher; days on all its GPUs together.
        text_bytes, stored_bytes: as text, and in record directories of rollouts (verdicts take as much again).
        core_hours, core_days: of verification; days on all cores together.
        judge_requests, judge_tokens, judge_dollars: of the judge's second look at what the grader calls wrong.
    """

    rollouts: int
    tokens: float
    gpu_hours: float
    gpu_days: float
    text_bytes: float
    stored_bytes: float
    core_hours: float
    core_days: float
    judge_requests: int
    judge_tokens: float
    judge_dollars: float


def plan_generation(config: GenerationPlanConfig) -> GenerationPlan:
    """Multiply out the rates.

    Raises:
        UserError: a GPU that is not in the table.
    """
    find_gpu(config.gpu)
    rollouts = config.problems * config.rollouts
    tokens = float(rollouts * config.mean_tokens)
    gpu_hours = tokens / config.tokens_a_gpu_second / SECONDS_AN_HOUR
    core_hours = rollouts / config.answers_a_core_second / SECONDS_AN_HOUR
    text = tokens * config.bytes_a_token
    asked = round(rollouts * config.judged_share)
    prompts, replies = asked * config.judge_prompt_tokens, asked * config.judge_reply_tokens
    return GenerationPlan(
        rollouts=rollouts,
        tokens=tokens,
        gpu_hours=gpu_hours,
        gpu_days=gpu_hours / config.gpus / HOURS_A_DAY,
        text_bytes=text,
        stored_bytes=text / config.compression,
        core_hours=core_hours,
        core_days=core_hours / config.cores / HOURS_A_DAY,
        judge_requests=asked,
        judge_tokens=float(prompts + replies),
        judge_dollars=(prompts * config.judge_input_per_million + replies * config.judge_output_per_million)
        / MILLION,
    )
