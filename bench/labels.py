"""Truth of labels on real problem sets: benchmark questions behind wrappers, and questions with several answers.

    python bench/labels.py [--quick] [--data DIRECTORY]

DIRECTORY holds the problem files ($PHIMR_SHARED_DATA/problems by default, beside the repository).

First, every question of five benchmarks behind each of several wrappers, and how many are found; beside it the rule
that any shared 8-gram of words is a hit (open-r1's), and both on training sets, where a hit is a copy, a variant or
an error. Then all sets together through `prepare`: how many questions occur with several answers, between which sets.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from common import machine, print_result, versions

from phimr_nemo.config import EvaluationSetConfig, PrepareConfig, RunConfig, SourceConfig
from phimr_nemo.data.prepare.decontaminate import EvaluationIndex, evaluation_questions
from phimr_nemo.data.sources.normalise import clean, comparison_tokens
from phimr_nemo.data.sources.wrapping import bare_question
from phimr_nemo.jobs.composed import run_prepare
from phimr_nemo.store.shards import read_manifest

REPOSITORY: Final = Path(__file__).resolve().parents[1]
BENCHMARKS: Final = {
    "AIME24": "aime24.jsonl",
    "AIME25": "aime25.json",
    "AMC": "amc.json",
    "MATH-500": "math500.jsonl",
    "GSM8K": "gsm8k_test.jsonl",
}
TRAINING: Final = {
    "GSM8K, training": ("gsm8k_train.jsonl",),
    "MATH, training": ("math_train.json",),
    "DeepScaleR": tuple(f"deepscaler_level_{level}.json.gz" for level in range(1, 6)),
}
SETS: Final = {
    "gsm8k": "gsm8k_train.jsonl",
    "math": "math_train.json",
    "math-test": "math_test.jsonl",
    "aime": "aime_1983_2023.json",
    **{f"deepscaler-{level}": f"deepscaler_level_{level}.json.gz" for level in range(1, 6)},
}
NGRAM: Final = 8
OVERLAP: Final = 0.6
QUICK_ROWS: Final = 200
BOXED: Final = " Let's think step by step and output the final answer within \\boxed{}."
SYNTHETIC_1: Final = (
    "Solve the following math problem efficiently and clearly. The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before "
    "answering.\n\n"
)
WRAPPERS: Final[dict[str, Callable[[str], str]]] = {
    "bare": lambda q: q,
    "Skywork-OR1": lambda q: q + BOXED,
    "SYNTHETIC-1": lambda q: SYNTHETIC_1 + q,
    "DeepSeek-R1's prompt": lambda q: q + "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "Bespoke-Stratos": lambda q: "Return your final response within \\boxed{}. " + q,
    "number and points": lambda q: "12. (5 points) " + q,
    "headings": lambda q: f"**Problem:** {q}\n\n**Answer:**",
    "an unknown prefix": lambda q: "Here comes a little riddle for you, my friend: " + q,
    "unknown on both sides": lambda q: f"Consider this carefully\n{q}\nThanks a lot in advance for your help",
    "within a story": lambda q: f"Alice was given homework. {q} She solved it within an hour, how proud she was.",
}
_WORD: Final = re.compile(r"\w+")


def word_ngrams(question: str) -> set[tuple[str, ...]]:
    """The 8-grams of words of a question."""
    words = _WORD.findall(question.lower())
    return {tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}


def questions_of(path: Path, most: int | None) -> list[str]:
    """The questions of a file, the first ones for a quick look."""
    found = list(evaluation_questions(EvaluationSetConfig(name="set", path=path)))
    return found if most is None else found[:most]


class Rules:
    """Our rules and the 8-gram rule on the same benchmarks."""

    def __init__(self, benchmarks: dict[str, list[str]]) -> None:
        pairs = [(name, question) for name, questions in benchmarks.items() for question in questions]
        self._index = EvaluationIndex(pairs, ngram=NGRAM, overlap=OVERLAP)
        self._grams = {gram for _, question in pairs for gram in word_ngrams(question)}

    def ours(self, question: str) -> str | None:
        """The rule that finds a question, or None."""
        text = clean(question)
        match = self._index.match(text, comparison_tokens(bare_question(text)))
        return None if match is None else match.rule

    def any_ngram(self, question: str) -> bool:
        """Whether any 8-gram is shared."""
        return not self._grams.isdisjoint(word_ngrams(question))


def print_wrappers(rules: Rules, benchmarks: dict[str, list[str]]) -> tuple[int, int, int]:
    """The table of wrappers; questions found by our rules, by the 8-gram rule, and all."""
    print(
        "| wrapper | " + " | ".join(f"{name} ({len(qs)})" for name, qs in benchmarks.items()) + " | any 8-gram, all |"
    )
    print("|---|" + "---:|" * (len(benchmarks) + 1))
    found = peer = total = 0
    for name, wrap in WRAPPERS.items():
        hits = [sum(rules.ours(wrap(q)) is not None for q in qs) for qs in benchmarks.values()]
        others = sum(rules.any_ngram(wrap(q)) for qs in benchmarks.values() for q in qs)
        print(f"| {name} | " + " | ".join(map(str, hits)) + f" | {others} |")
        found, peer, total = found + sum(hits), peer + others, total + sum(map(len, benchmarks.values()))
    return found, peer, total


def print_training(rules: Rules, directory: Path, most: int | None) -> tuple[int, int, int]:
    """The table of training sets; rows, hits that only containment adds, and hits of the 8-gram rule."""
    print("\n| training set | rows | exact | contained | n-gram | any 8-gram |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = contained = peer = 0
    for name, files in TRAINING.items():
        questions = [one for file in files for one in questions_of(directory / file, most)]
        hits = Counter(rule for question in questions if (rule := rules.ours(question)) is not None)
        others = sum(map(rules.any_ngram, questions))
        print(f"| {name} | {len(questions)} | {hits['exact']} | {hits['contained']} | {hits['ngram']} | {others} |")
        rows, contained, peer = rows + len(questions), contained + hits["contained"], peer + others
    return rows, contained, peer


def print_conflicts(directory: Path, names: Iterable[str], most: int | None) -> dict[str, int]:
    """The table of questions with several answers."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "prepared"
        sources = tuple(SourceConfig(name=name, path=str(directory / SETS[name]), limit=most or 0) for name in names)
        run_prepare(PrepareConfig(run=RunConfig(output=output, seed=0), sources=sources, shard_size=10_000))
        counts = read_manifest(output / "problems", "problems").counts
    print("\n| what | questions |")
    print("|---|---:|")
    read = {"rows": counts["read"], "rows that repeat a question": counts.get("dropped: exact duplicate", 0)}
    conflicts = {
        name.removeprefix("conflicts: "): counts[name] for name in sorted(counts) if name.startswith("conflicts")
    }
    for name, count in {**read, **conflicts}.items():
        print(f"| {name} | {count} |")
    return conflicts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK_ROWS} questions of each set")
    shared = Path(os.environ.get("PHIMR_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=shared / "problems")
    options = parser.parse_args()
    most = QUICK_ROWS if options.quick else None
    benchmarks = {name: questions_of(options.data / file, most) for name, file in BENCHMARKS.items()}
    rules = Rules(benchmarks)
    found, peer, total = print_wrappers(rules, benchmarks)
    rows, contained, peer_hits = print_training(rules, options.data, most)
    conflicts = print_conflicts(options.data, SETS, most)
    print_result(
        {
            "metric": "benchmark questions found behind wrappers",
            "ours": found / total,
            "peer": peer / total,
            "peer_name": "any shared 8-gram of words",
            "ratio": found / max(peer, 1),
            "training_rows": rows,
            "contained_hits": contained,
            "peer_hits": peer_hits,
            "conflicts": conflicts,
            "versions": versions("pyarrow", "math-verify"),
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    main()
