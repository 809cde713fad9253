"""Training questions that repeat an evaluation question, word for word or with other numbers.

Two rules, on the tokens of :mod:`phimr_nemo.data.sources.normalise`. *exact*: the same tokens. *n-gram*: with every
number masked, the two questions share at least `overlap` of the distinct n-grams of the shorter one, so that a copy
with changed numbers or an added sentence matches. Drawings are cut out first, and grams of which fewer than
`MIN_WORDS` tokens are words do not count, nor do those of more than `MAX_HOLDERS` evaluation questions: the head of a
drawing, `# + # + #` and "where m and n are relatively prime positive integers, find m + n" are in many questions.
Questions with fewer than `MIN_GRAMS` grams left are held to the exact rule alone: with its numbers masked "What is #
+ #?" is every addition."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from phimr_nemo.config import DecontaminationConfig, EvaluationSetConfig
from phimr_nemo.data.sources.normalise import comparison_tokens, mask_numbers
from phimr_nemo.data.sources.problems import (
    EVALUATION_NAMING,
    QUESTION_COLUMNS,
    first_present,
    lookup,
    missing_column,
    question_text,
)
from phimr_nemo.data.sources.rawfiles import read_rows
from phimr_nemo.store.shards import MANIFEST, iter_shards

EVALUATION_COLUMNS: Final = (*QUESTION_COLUMNS, "Question", "Problem")
MIN_GRAMS: Final = 8
MIN_WORDS: Final = 3
MAX_HOLDERS: Final = 4
_DRAWING: Final = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL | re.IGNORECASE)

Rule = Literal["exact", "ngram"]


@dataclass(frozen=True)
class Match:
    """Which evaluation question a training question repeats.

    Attributes:
        rule: "exact" or "ngram".
        set: the name of the evaluation set.
        question: the evaluation question.
        overlap: share of the shorter question's grams that both have; 1 for an exact match.
    """

    rule: Rule
    set: str
    question: str
    overlap: float


class EvaluationIndex:
    """Evaluation questions, to look training questions up in.

    Memory grows with the evaluation questions only, one look-up costs their shared grams.

    Args:
        questions: (name of the set, question).
        ngram: tokens a gram.
        overlap: the share of grams from which two questions match.
    """

    def __init__(self, questions: Iterable[tuple[str, str]], *, ngram: int, overlap: float) -> None:
        self._ngram = ngram
        self._overlap = overlap
        self._questions: list[tuple[str, str]] = []
        self._exact: dict[str, int] = {}
        self._holders: dict[str, list[int]] = {}
        self._sizes: list[int] = []
        grams: list[set[str]] = []
        for name, question in questions:
            key = " ".join(comparison_tokens(question))
            if key not in self._exact:
                self._exact[key] = len(grams)
                self._questions.append((name, question))
                grams.append(word_grams(question, ngram))
        holders = Counter(gram for own in grams for gram in own)
        self._common = frozenset(gram for gram, count in holders.items() if count > MAX_HOLDERS)
        for number, own in enumerate(grams):
            telling = own - self._common
            self._sizes.append(len(telling))
            for gram in telling:
                self._holders.setdefault(gram, []).append(number)

    def match(self, question: str, tokens: list[str]) -> Match | None:
        """The evaluation question that a training question repeats most, or None.

        Args:
            question: the training question.
            tokens: its :func:`comparison_tokens`.
        """
        exact = self._exact.get(" ".join(tokens))
        if exact is not None:
            return Match("exact", *self._questions[exact], 1.0)
        grams = word_grams(question, self._ngram) - self._common
        shared: Counter[int] = Counter()
        for gram in grams:
            shared.update(self._holders.get(gram, ()))
        best: tuple[float, int] | None = None
        for number, count in sorted(shared.items()):
            shorter = min(len(grams), self._sizes[number])
            share = count / shorter
            if shorter >= MIN_GRAMS and share >= self._overlap and (best is None or share > best[0]):
                best = share, number
        return None if best is None else Match("ngram", *self._questions[best[1]], best[0])


def word_grams(question: str, size: int) -> set[str]:
    """The distinct grams of a question without its drawings, numbers masked, that hold enough words."""
    masked = mask_numbers(comparison_tokens(_DRAWING.sub(" ", question)))
    words = [len(token) > 1 and token.isalpha() for token in masked]
    grams = set()
    inside = sum(words[:size])
    for start in range(len(masked) - size + 1):
        if inside >= MIN_WORDS:
            grams.add(" ".join(masked[start : start + size]))
        if start + size < len(masked):
            inside += words[start + size] - words[start]
    return grams


def read_index(config: DecontaminationConfig) -> EvaluationIndex:
    """The index of the configured evaluation sets.

    Raises:
        UserError: a set is missing, empty or damaged, or has no question column.
    """
    questions = [(one.name, question) for one in config.sets for question in evaluation_questions(one)]
    return EvaluationIndex(questions, ngram=config.ngram, overlap=config.overlap)


def evaluation_questions(one: EvaluationSetConfig) -> Iterator[str]:
    """The questions of a set: of a problems record directory, or of a file of rows.

    Raises:
        UserError: the set is missing, empty or damaged, or its first row has no question column.
    """
    if (one.path / MANIFEST).is_file():
        for shard in iter_shards(one.path, "problems", ["question"]):
            yield from shard.column("question").to_pylist()
        return
    column = one.question
    for _, row in read_rows(Path(one.path)):
        column = column or first_present(row, EVALUATION_COLUMNS)
        if column is None or lookup(row, column) is None:
            raise missing_column(
                one.path,
                one.question or f"a question column (one of {list(EVALUATION_COLUMNS)})",
                row,
                EVALUATION_NAMING,
            )
        yield question_text(lookup(row, column))
