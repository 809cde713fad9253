"""The benchmarks of the paper: how many questions each has, how it is asked, and how often.

The questions come from the user's own file (this project ships none); the count is checked, because a
score on part of a benchmark is not a score on the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.data.problems import read_problems
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import SamplingParams

if TYPE_CHECKING:
    import pyarrow as pa

BOXED_PROMPT: Final = "Please reason step by step, and put your final answer within \\boxed{}. {question}"
"""The user's turn in Microsoft's published evaluation scripts of Phi-4-mini-reasoning."""

PUBLISHED_PARAMS: Final = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=32_768)
"""Sampling of the same scripts."""


@dataclass(frozen=True)
class Benchmark:
    """A set of questions with a published protocol.

    Attributes:
        name: as in result tables.
        questions: how many there are.
        samples: responses a question. Published for AIME24 (64) and MATH-500 (8); for the others our choice by
            the same rule, more where questions are few.
        prompt_template: the user's turn.
        params: how tokens are drawn.
    """

    name: str
    questions: int
    samples: int
    prompt_template: str = BOXED_PROMPT
    params: SamplingParams = PUBLISHED_PARAMS


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("AIME24", questions=30, samples=64),
        Benchmark("AIME25", questions=30, samples=64),
        Benchmark("AMC", questions=83, samples=64),
        Benchmark("MATH-500", questions=500, samples=8),
        Benchmark("GSM8K", questions=1_319, samples=1),
    )
}


def read_benchmark(name: str, path: Path) -> pa.Table:
    """Read a benchmark's questions from the user's file.

    Args:
        name: one of `BENCHMARKS`.
        path: JSON, JSONL or parquet in a layout that :func:`phimr_nemo.data.problems.read_problems` knows.

    Returns:
        A table of kind "problems".

    Raises:
        UserError: an unknown benchmark, an unreadable file, or another number of questions.
    """
    if name not in BENCHMARKS:
        raise UserError(f"unknown benchmark {name!r}", rule=f"one of {list(BENCHMARKS)}", remedy="correct the name")
    problems: pa.Table = read_problems(path)
    wanted = BENCHMARKS[name].questions
    if problems.num_rows != wanted:
        raise UserError(
            f"{path} holds {problems.num_rows} questions",
            rule=f"{name} has {wanted}",
            remedy="give the whole benchmark; for a part of it, evaluate it as an ordinary problems file",
        )
    return problems
