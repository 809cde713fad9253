"""The answer of a question whose sources disagree, or tell none.

Sources are asked in one order, which the configuration states (`golds`):

1. Each source's own answer is the one that it publishes; where it publishes none, the one that its finished solutions
   of the question vote for, if at least `quorum` of them agree and they are more than the share `majority`.
2. Answers are the same where the grader says so ("1/2" and "0.5"). If all are the same, that is the answer.
3. If not, it is a *conflict*. A published answer wins against votes. Among published ones that of the source that
   stands first in `trusted` wins. Without one, the solutions of all sources vote between the published answers,
   under the same quorum and majority. Without such a vote nobody wins.

A question that gets no answer stays among the problems with an empty one, and nothing is generated for it.

A rollout keeps its own source's answer, is graded against that, and carries a mark (`gold` in its metadata) where
this answer has lost or nothing is settled ("disputed"), or where it is a vote ("vote"). Curation trains nothing on
disputed ones, and makes pairs and prompts of voted ones only where it is told to.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from phimr_nemo.config import GoldConfig
from phimr_nemo.data.prepare.candidates import Work, candidate_tables, rows_at
from phimr_nemo.data.prepare.dedup import EXACT, EXACT_OTHER_ANSWER, KEPT, Duplicates
from phimr_nemo.data.prepare.narrow import Facts
from phimr_nemo.store.records import GoldKind
from phimr_nemo.verify.answer import Grader
from phimr_nemo.verify.extract import final_answer
from phimr_nemo.verify.gold import alternatives
from phimr_nemo.verify.verdict import Verdict

MAX_SPELLINGS: Final = 16
"""Different answers to one question that are compared with each other, the published ones and the most frequent."""
GROUPS_AT_ONCE: Final = 512


@dataclass
class Candidate:
    """A row of a question that needs a decision.

    Attributes:
        index: among all candidates.
        source: its source's name.
        answer: its own, or empty.
        voted: whether its source publishes a vote.
        solutions: final answers of its finished solutions.
    """

    index: int
    source: str
    answer: str
    voted: bool
    solutions: tuple[str, ...]


@dataclass(frozen=True)
class Settled:
    """What was decided about one question.

    Attributes:
        answer: None where nobody wins.
        voted: whether no source publishes it.
        conflict: whether sources disagree.
        own: the answer that each candidate's solutions are graded against, by index; empty for none.
        lost: the candidates whose own answer did not win.
    """

    answer: str | None
    voted: bool
    conflict: bool
    own: Mapping[int, str]
    lost: frozenset[int]


@dataclass
class Golds:
    """Decisions by candidate; what is not in them has its own answer, and nobody disputes it.

    Attributes:
        answers: of the kept question of a group, by its index.
        own: the answer that a candidate's solutions are graded against.
        kinds: the mark of a candidate's solutions.
        questions: the mark of a kept question, by its index.
        conflicts: what is known of each question in conflict, by its index, for people.
        counts: named counts for the manifest.
    """

    answers: dict[int, str] = field(default_factory=dict)
    own: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, GoldKind] = field(default_factory=dict)
    questions: dict[int, GoldKind] = field(default_factory=dict)
    conflicts: dict[int, dict[str, Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def settle_golds(works: Sequence[Work], facts: Facts, found: Duplicates, config: GoldConfig) -> Golds:
    """Settle the answers of all questions that have none or several; `found` takes what comes of it.

    Args:
        works: the candidates.
        facts: of all of them.
        found: the duplicates; of a conflict the best row with the answer that won is then kept.
        config: the rule.
    """
    golds = Golds()
    wanted = _open_candidates(facts, found)
    if not wanted:
        return golds
    groups: dict[int, list[Candidate]] = defaultdict(list)
    for one in _read(works, wanted):
        groups[int(found.kept[one.index])].append(one)
    ordered = sorted(groups)
    with Grader() as grader:
        for start in range(0, len(ordered), GROUPS_AT_ONCE):
            part = [groups[kept] for kept in ordered[start : start + GROUPS_AT_ONCE]]
            for kept, members, settled in zip(
                ordered[start : start + GROUPS_AT_ONCE], part, settle(part, config, grader), strict=True
            ):
                _apply(kept, members, settled, facts, found, golds)
    return golds


def settle(groups: Sequence[Sequence[Candidate]], config: GoldConfig, grader: Grader) -> Iterator[Settled]:
    """Decide about some questions, each given by its candidates."""
    spellings = [_spellings(members) for members in groups]
    classes = iter(_same_answers(spellings, grader))
    for members in groups:
        yield _settle_one(members, next(classes), config)


def _open_candidates(facts: Facts, found: Duplicates) -> frozenset[int]:
    """The candidates of questions of which one has no answer, has a voted one, or another answer than the rest."""
    unsure = facts.unsure | (found.reason == EXACT_OTHER_ANSWER)
    return frozenset(np.flatnonzero(np.isin(found.kept, found.kept[unsure])).tolist())


def _read(works: Sequence[Work], wanted: frozenset[int]) -> Iterator[Candidate]:
    start = 0
    names = {work.source: work.config.name for work in works}
    for source, table in candidate_tables(works, ["answer", "voted", "trajectories"]):
        places = [place for place in range(table.num_rows) if start + place in wanted]
        for place, row in zip(places, rows_at(table, places), strict=True):
            finished = dict.fromkeys(one["response"] for one in row["trajectories"] if one["finish_reason"] == "stop")
            said = tuple(text for text in (final_answer(one).text for one in finished) if text)
            yield Candidate(start + place, names[source], row["answer"], row["voted"], said)
        start += table.num_rows


def _spellings(members: Sequence[Candidate]) -> list[str]:
    """The different answers to a question, the published ones first, then those of solutions by frequency."""
    published = dict.fromkeys(one.answer for one in members if one.answer)
    said = Counter(answer for one in members for answer in one.solutions if answer not in published)
    frequent = sorted(said, key=lambda answer: (-said[answer], answer))
    return [*published, *frequent][:MAX_SPELLINGS]


def _same_answers(groups: Sequence[Sequence[str]], grader: Grader) -> list[dict[str, str]]:
    """For each group the first spelling that says the same as each spelling."""
    pairs = [pair for spellings in groups for pair in _pairs(spellings)]
    asked = [(f"\\boxed{{{form}}}", gold) for gold, other in pairs for form in alternatives(other)]
    verdicts = iter(grader.grade_many(asked))
    same = iter([_any_correct(list(itertools.islice(verdicts, len(alternatives(other))))) for _, other in pairs])
    found = []
    for spellings in groups:
        equal = {pair: next(same) for pair in _pairs(spellings)}
        first: dict[str, str] = {}
        for other in spellings:
            heads = [one for one, head in first.items() if one == head]
            first[other] = next((head for head in heads if equal[head, other]), other)
        found.append(first)
    return found


def _any_correct(verdicts: Sequence[Verdict]) -> bool:
    return any(verdict.verdict == "correct" for verdict in verdicts)


def _pairs(spellings: Sequence[str]) -> list[tuple[str, str]]:
    return [(one, other) for place, other in enumerate(spellings) for one in spellings[:place]]


def _settle_one(members: Sequence[Candidate], same: Mapping[str, str], config: GoldConfig) -> Settled:
    def head(answer: str) -> str:
        return same.get(answer, answer)

    by_source: dict[str, list[Candidate]] = defaultdict(list)
    for one in members:
        by_source[one.source].append(one)
    own: dict[int, str] = {}
    for group in by_source.values():
        voted = None
        if not any(one.answer for one in group):
            said = [head(answer) for one in group for answer in one.solutions]
            voted = _vote(said, said, config)
        own |= {one.index: one.answer or voted or "" for one in group}
    published = {head(one.answer) for one in members if one.answer and not one.voted}
    classes = {head(answer) for answer in own.values() if answer}
    # A vote never stands against an answer that somebody publishes.
    standing = published or classes
    winner = next(iter(standing)) if len(standing) == 1 else None
    if len(standing) > 1:
        winner = _trusted(by_source, {index: head(answer) for index, answer in own.items() if answer}, config)
        if winner not in standing:
            said = [head(answer) for one in members for answer in one.solutions]
            winner = _vote([answer for answer in said if answer in standing], said, config)
    conflict = len(classes) > 1
    lost = frozenset(index for index, answer in own.items() if answer and conflict and head(answer) != winner)
    return Settled(winner, winner is not None and winner not in published, conflict, own, lost)


def _vote(votes: Sequence[str], solutions: Sequence[str], config: GoldConfig) -> str | None:
    """The answer that enough votes agree on, which are more than the majority of all solutions."""
    counted = Counter(votes)
    if config.quorum is None or not counted:
        return None
    best = min(counted, key=lambda answer: (-counted[answer], answer))
    agreed = counted[best] >= config.quorum and counted[best] > config.majority * len(solutions)
    return best if agreed else None


def _trusted(by_source: Mapping[str, Sequence[Candidate]], own: Mapping[int, str], config: GoldConfig) -> str | None:
    """The answer of the most trusted source that has one, and only one."""
    for name in config.trusted:
        answers = {own[one.index] for one in by_source.get(name, ()) if one.index in own}
        if len(answers) == 1:
            return answers.pop()
    return None


def _apply(
    kept: int, members: Sequence[Candidate], settled: Settled, facts: Facts, found: Duplicates, golds: Golds
) -> None:
    """Write one decision down."""
    if settled.conflict:
        _note_conflict(kept, members, settled, golds)
    elif settled.answer is not None and settled.voted:
        golds.counts["golds by vote"] += 1
    for one in members:
        # Without an answer of its own source a solution is graded against the question's.
        answer = settled.own[one.index] or settled.answer or ""
        golds.own[one.index] = answer
        if one.index in settled.lost or (settled.conflict and settled.answer is None):
            golds.kinds[one.index] = "disputed"
        elif not answer:
            golds.kinds[one.index] = "none"
        elif settled.voted:
            golds.kinds[one.index] = "vote"
        if found.reason[one.index] == EXACT_OTHER_ANSWER and one.index not in settled.lost:
            found.reason[one.index] = EXACT
    if settled.answer is None:
        golds.answers[kept] = ""
        golds.questions[kept] = "disputed" if settled.conflict else "none"
        golds.counts["no answer: sources tell none and too few solutions agree"] += not settled.conflict
        return
    best = kept
    if kept in settled.lost:
        standing = [one.index for one in members if one.index not in settled.lost and settled.own[one.index]]
        best = min(standing, key=lambda index: (-int(facts.rank[index]), index))
        for one in members:
            found.kept[one.index] = best
        found.reason[kept], found.reason[best] = EXACT_OTHER_ANSWER, KEPT
    golds.answers[best] = next((one.answer for one in members if one.index == best), "") or settled.answer
    if settled.voted:
        golds.questions[best] = "vote"


def _note_conflict(kept: int, members: Sequence[Candidate], settled: Settled, golds: Golds) -> None:
    """Count a conflict, for each pair of sources too, and keep what people need to see of it."""
    golds.counts["conflicts: questions with several answers"] += 1
    golds.counts[f"conflicts: {'no answer settled' if settled.answer is None else 'settled'}"] += 1
    answers: dict[str, list[str]] = defaultdict(list)
    for one in members:
        own = settled.own[one.index]
        if own and one.source not in answers[own]:
            answers[own].append(one.source)
    sides = {(one.source, settled.own[one.index]) for one in members if settled.own[one.index]}
    pairs = {
        tuple(sorted((source, other)))
        for source, answer in sides
        for other, another in sides
        if (source, answer) < (other, another) and answer != another
    }
    golds.counts.update(f"conflicts: {one} against {other}" for one, other in sorted(pairs))
    golds.conflicts[kept] = {
        "answers": dict(answers),
        "solutions": dict(Counter(answer for one in members for answer in one.solutions)),
        "settled": settled.answer,
    }
