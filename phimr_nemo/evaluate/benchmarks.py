"""The benchmarks by name: where they are, how many questions they have, and whether a copy is the whole benchmark.

The questions come from the user's own copy or from the Hugging Face hub; this project ships none. A score on part of
a benchmark, or on another year's, is not a score on the benchmark, so questions are counted and, where all answers
are whole numbers, the answers compared with the published ones by a digest. How a benchmark is asked stands in
conf/evaluate/.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from phimr_nemo.config import BenchmarkProblems, SourceConfig
from phimr_nemo.config.evaluation import BenchmarkName
from phimr_nemo.data.sources.item import Item, UnusableRow
from phimr_nemo.data.sources.presets import PRESETS
from phimr_nemo.data.sources.source import read_items, source_rows
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.gpqa import read_gpqa
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import rows_to_table

if TYPE_CHECKING:
    import pyarrow as pa

Edition = Literal["tested", "other", "unknown"]
GPQA: Final = "GPQA-Diamond"
NO_ANSWER: Final = "no question or no answer"


@dataclass(frozen=True)
class Hub:
    """A dataset of the Hugging Face hub."""

    name: str
    split: str
    subset: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """A set of questions.

    Attributes:
        name: as in result tables.
        questions: how many there are; more than one number where editions differ.
        hub: its dataset; None where it is not read from there.
        preset: the layout of the published set; a copy in another layout is read by the usual column names.
        answers: digest of the answers, where all are whole numbers.
        edition: digest of the questions of the edition that the project's tests read.
    """

    name: BenchmarkName
    questions: tuple[int, ...]
    hub: Hub | None = None
    preset: Literal["olympiad_bench", "omni_math"] | None = None
    answers: str | None = None
    edition: str | None = None


BENCHMARKS: Final[Mapping[BenchmarkName, Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "AIME24",
            (30,),
            Hub("HuggingFaceH4/aime_2024", "train"),
            answers="30e5cde05a6727b7",
            edition="5eef75e07da5f78a",
        ),
        Benchmark(
            "AIME25",
            (30,),
            Hub("yentinglin/aime_2025", "train"),
            answers="8cf49895d9119a63",
            edition="5ed529ffa95b1176",
        ),
        Benchmark("AMC23", (40,), Hub("math-ai/amc23", "test")),
        Benchmark("AMC", (83,), answers="e0c743af749407a3", edition="97c57407a678f2f4"),
        Benchmark("MATH-500", (500,), Hub("HuggingFaceH4/MATH-500", "test"), edition="3b24682d8bcf6982"),
        Benchmark(
            "GSM8K",
            (1_319,),
            Hub("openai/gsm8k", "test", "main"),
            answers="93de47f2a1e309cf",
            edition="345c4b92c8353362",
        ),
        # English competition questions with text alone; the edition of Qwen2.5-Math's evaluation has one more.
        Benchmark(
            "OlympiadBench",
            (674, 675),
            Hub("Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP"),
            preset="olympiad_bench",
        ),
        Benchmark(GPQA, (198,)),
        Benchmark("Omni-MATH", (4_428,), Hub("KbsdJames/Omni-MATH", "test"), preset="omni_math"),
    )
}


def read_benchmark(problems: BenchmarkProblems) -> tuple[pa.Table, Edition]:
    """Read a benchmark, whole.

    Returns:
        A table of kind "problems", and whether its questions are, up to white space, those of the edition that the
        project's tests read ("unknown" where there is none).

    Raises:
        UserError: the copy cannot be read, has other columns, lacks answers, has
            another number of questions, or other answers than the benchmark.
    """
    benchmark = BENCHMARKS[problems.name]
    if benchmark.name == GPQA:
        table = read_gpqa(problems.path)  # type: ignore[arg-type]  # there is no hub
        read = table.num_rows
    else:
        rows = _read(benchmark, problems)
        read = len(rows)
        table = rows_to_table(list({row["id"]: row for row in rows}.values()), "problems")
    where = problems.path or f"{benchmark.hub.name} on the hub"  # type: ignore[union-attr]
    if read not in benchmark.questions:
        raise UserError(
            f"{where} holds {read} questions",
            rule=f"{benchmark.name} has {' or '.join(map(str, benchmark.questions))}",
            remedy="give the whole benchmark; for a part of it use problems.kind=file",
        )
    if benchmark.answers is not None and answers_digest(table["answer"].to_pylist()) != benchmark.answers:
        raise UserError(
            f"the answers in {where} are not those of {benchmark.name}",
            rule="the answers, as whole numbers and in any order, are the published ones",
            remedy="check that it is this benchmark (and its year); otherwise use problems.kind=file",
        )
    if benchmark.edition is None:
        return table, "unknown"
    return table, "tested" if questions_digest(table["question"].to_pylist()) == benchmark.edition else "other"


def answers_digest(answers: list[str]) -> str | None:
    """A digest of answers that are whole numbers, in whatever order and with or without leading zeros; else None."""
    try:
        numbers = sorted(str(int(answer)) for answer in answers)
    except ValueError:
        return None
    return content_id(*numbers)


def questions_digest(questions: list[str]) -> str:
    """A digest of questions in whatever order, white space aside."""
    return content_id(*sorted(" ".join(question.split()) for question in questions))


def _read(benchmark: Benchmark, problems: BenchmarkProblems) -> list[dict[str, Any]]:
    """The questions as rows of kind "problems"; those of another subject or with an image are not among them.

    Raises:
        UserError: the copy cannot be read, or a question has no answer.
    """
    source = _source(benchmark, problems)
    rows = []
    for place, item in read_items(source):
        if isinstance(item, UnusableRow):
            # Presets leave out what is not asked; a row without an answer is a damaged copy.
            if "answer" in item.reason:
                raise _no_answer(source, place)
            continue
        if not item.question or not item.answer:
            raise _no_answer(source, place)
        rows.append(_problem(item, benchmark.name))
    return rows


def _source(benchmark: Benchmark, problems: BenchmarkProblems) -> SourceConfig:
    if problems.path is None and benchmark.hub is not None:
        hub = benchmark.hub
        return SourceConfig(
            name=benchmark.name,
            path=hub.name,
            hub=True,
            subset=hub.subset,
            split=hub.split,
            preset=benchmark.preset,
        )
    own = SourceConfig(
        name=benchmark.name, path=str(problems.path), split=benchmark.hub.split if benchmark.hub else "test"
    )
    if benchmark.preset is None:
        return own
    first = next(itertools.islice(source_rows(own), 1), None)
    if first is None or not PRESETS[benchmark.preset].fits(first[1]):
        return own
    return SourceConfig(name=own.name, path=own.path, split=own.split, preset=benchmark.preset)


def _problem(item: Item, source: str) -> dict[str, Any]:
    return {
        "id": content_id("problem", item.question, item.answer),
        "source": source,
        "question": item.question,
        "answer": item.answer,
        "solution": item.solution,
        "domain": item.domain,
        "difficulty": item.difficulty,
        "metadata": json.dumps(dict(item.labels), ensure_ascii=False, default=str),
    }


def _no_answer(source: SourceConfig, place: str) -> UserError:
    return UserError(
        f"{source.path}, {place}: {NO_ANSWER}",
        rule=f"every question of {source.name} has an answer",
        remedy="use a complete copy; to score what has an answer use problems.kind=file",
    )
