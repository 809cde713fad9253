"""Training questions that repeat an evaluation question, word for word or with other numbers.

Three rules, on the tokens of :mod:`phimr_nemo.data.sources.normalise`. *exact*: the same tokens, once what only
stands around the questions is taken off (:mod:`phimr_nemo.data.sources.wrapping`). *contained*: the evaluation
question, of at least `MIN_CONTAINED` tokens, stands word for word in the other one, from the beginning of a sentence
or line to the end of one unless it is long. *n-gram*: with every
number masked, the two questions share at least `overlap` of the distinct n-grams of the shorter one, so that a copy
with changed numbers or an added sentence matches. Drawings are cut out first, and grams of which fewer than
`MIN_WORDS` tokens are words do not count, nor do those of more than `MAX_HOLDERS` evaluation questions: the head of a
drawing, `# + # + #` and "where m and n are relatively prime positive integers, find m + n" are in many questions.
Questions with fewer than `MIN_GRAMS` grams left are held to the first two rules: with its numbers masked "What is #
+ #?" is every addition."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from phimr_nemo.config import DecontaminationConfig, EvaluationSetConfig
from phimr_nemo.data.sources.cells import first_present, lookup, question_text
from phimr_nemo.data.sources.normalise import comparison_tokens, mask_numbers, tokens_and_lines
from phimr_nemo.data.sources.problems import (
    EVALUATION_NAMING,
    QUESTION_COLUMNS,
    missing_column,
)
from phimr_nemo.data.sources.rawfiles import read_csv, read_rows
from phimr_nemo.data.sources.wrapping import bare_question
from phimr_nemo.store.shards import MANIFEST, iter_shards

EVALUATION_COLUMNS: Final = (*QUESTION_COLUMNS, "Question", "Problem")
MIN_GRAMS: Final = 8
MIN_WORDS: Final = 3
MAX_HOLDERS: Final = 4
ANCHOR: Final = 3
"""Tokens that a question is looked for by."""
MIN_CONTAINED: Final = 3
LONG: Final = 14
"""A question of so many tokens is the same wherever it stands."""
_EDGES: Final = frozenset(".:?!;。：？！)]*#>\"'”_")
_DRAWING: Final = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL | re.IGNORECASE)

Rule = Literal["exact", "contained", "ngram"]


@dataclass(frozen=True)
class Match:
    """Which evaluation question a training question repeats.

    Attributes:
        rule: "exact", "contained" or "ngram".
        set: the name of the evaluation set.
        question: the evaluation question.
        overlap: share of the shorter question's grams that both have; 1 for one that is there whole.
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
        self._anchored: dict[str, list[tuple[list[str], int]]] = {}
        grams: list[set[str]] = []
        for name, question in questions:
            tokens = comparison_tokens(bare_question(question))
            key = " ".join(tokens)
            if key and key not in self._exact:
                self._exact[key] = len(grams)
                if len(tokens) >= MIN_CONTAINED:
                    self._anchored.setdefault(" ".join(tokens[:ANCHOR]), []).append((tokens, len(grams)))
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
            tokens: the :func:`comparison_tokens` of the bare question.
        """
        exact = self._exact.get(" ".join(tokens))
        if exact is not None:
            return Match("exact", *self._questions[exact], 1.0)
        contained = self._contained_in(question)
        if contained is not None:
            return Match("contained", *self._questions[contained], 1.0)
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

    def _contained_in(self, question: str) -> int | None:
        """The longest evaluation question that stands in a training question word for word."""
        tokens, lines = tokens_and_lines(question)
        best: tuple[int, int] | None = None
        for start in range(len(tokens) - MIN_CONTAINED + 1):
            for wanted, number in self._anchored.get(" ".join(tokens[start : start + ANCHOR]), ()):
                end = start + len(wanted)
                if tokens[start:end] == wanted and (
                    len(wanted) >= LONG or (_is_edge(tokens, lines, start) and _is_edge(tokens, lines, end))
                ):
                    best = max(best or (0, 0), (len(wanted), number))
        return None if best is None else best[1]


def _is_edge(tokens: list[str], lines: frozenset[int], place: int) -> bool:
    """Whether a sentence or line may begin at a place, or end before it."""
    if place in (0, len(tokens)) or place in lines:
        return True
    return tokens[place - 1] in _EDGES or tokens[place] in _EDGES


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
    path = Path(one.path)
    for _, row in read_csv(path) if path.suffix.lower() == ".csv" else read_rows(path):
        column = column or first_present(row, EVALUATION_COLUMNS)
        if column is None or lookup(row, column) is None:
            raise missing_column(
                one.path,
                one.question or f"a question column (one of {list(EVALUATION_COLUMNS)})",
                row,
                EVALUATION_NAMING,
            )
        yield question_text(lookup(row, column))
