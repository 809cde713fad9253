"""The one grader: data, reward and evaluation all ask it whether a response's final answer is correct."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from phimr_nemo.errors import UserError
from phimr_nemo.process.memory import GIBIBYTE
from phimr_nemo.store.records import VerdictName
from phimr_nemo.verify.compare import judge
from phimr_nemo.verify.extract import Extraction, final_answer, gold_answer
from phimr_nemo.verify.gold import alternatives
from phimr_nemo.verify.plug import MAX_RESPONSE_CHARS, plugged_name
from phimr_nemo.verify.read.expression import Relation, Symbolic
from phimr_nemo.verify.read.quantity import Number
from phimr_nemo.verify.verdict import GRADER_VERSION, MAX_ANSWER_CHARS, NeedsWorker, Verdict
from phimr_nemo.verify.workers.pool import Job, Pool

SOFT_SECONDS: Final = 2.0
DEADLINE_SECONDS: Final = 5.0
MEMORY_BYTES: Final = GIBIBYTE


_ORDER: Final[tuple[VerdictName, ...]] = ("correct", "timeout", "error", "wrong", "unparsable", "gold_unreadable")
"""Of several answers: right by one is right; without that, what one of them left open is open."""


class _Refuse:
    """A :class:`Symbolic` for the parent, where math-verify never runs."""

    def equal(self, _gold: str, _predicted: str, _rounding: Number | None, **_: bool) -> bool:
        raise NeedsWorker

    def same_relation(self, _gold: Relation, _predicted: Relation) -> bool:
        raise NeedsWorker


_REFUSE: Final[Symbolic] = _Refuse()


class Grader:
    """Grades responses against gold answers, in worker processes that can be killed.

    Text, numbers, letters and lists of them are decided in the calling process; everything else by
    math-verify in a worker, under a limit of processor time, a wall-clock deadline and a memory limit. No
    input makes it hang or grow. Callable from any thread; calls from several threads take turns.
    A worker that dies is replaced. Not usable in a forked child: make a new one there.

    Args:
        workers: worker processes; they start when the first answer needs one.
        soft_seconds: processor time for one answer.
        deadline_seconds: wall time for one answer, after which its worker is killed.
        memory_bytes: address space of one worker.
        function: a grader of the user's own as MODULE:FUNCTION, which then decides every answer in the workers
            (see :mod:`phimr_nemo.verify.plug`); None for mathematics.

    Attributes:
        name: of what grades, with its version; verdicts record it.

    Raises:
        UserError: a limit that is not positive, or a function that cannot be found.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        soft_seconds: float = SOFT_SECONDS,
        deadline_seconds: float = DEADLINE_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        function: str | None = None,
    ) -> None:
        self.name = GRADER_VERSION if function is None else plugged_name(function)
        self._decide = _decide if function is None else _as_job
        for name, value in (
            ("workers", workers),
            ("soft_seconds", soft_seconds),
            ("deadline_seconds", deadline_seconds),
            ("memory_bytes", memory_bytes),
        ):
            if value <= 0:
                raise UserError(
                    f"{name} is {value}", rule=f"{name} must be positive", remedy=f"leave {name} out for its default"
                )
        self._pool = Pool(
            workers,
            soft_seconds=min(soft_seconds, deadline_seconds),
            deadline_seconds=deadline_seconds,
            memory_bytes=memory_bytes,
            function=function or "",
        )

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """Start a worker, so that a grader that cannot be imported is an error now and not after the work.

        Raises:
            UserError: math-verify or the user's function cannot be imported.
        """
        self._pool.start()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def grade(self, response: str, answer: str, *, is_cut_off: bool = False) -> Verdict:
        """Grade one response; see :meth:`grade_many`."""
        return self.grade_many([(response, answer)], [is_cut_off])[0]

    def grade_many(self, pairs: Sequence[tuple[str, str]], cut_off: Sequence[bool] | None = None) -> list[Verdict]:
        """Grade many responses.

        Args:
            pairs: (response, gold answer) each. The gold answer may be bare, boxed, or a worked
                solution that ends in ``\\boxed{...}``, ``#### ...`` or ``A: ...``; of the texts of a JSON array
                any one is right (:mod:`phimr_nemo.verify.gold`).
            cut_off: for each pair whether the response is known to have been cut off at the token limit: only what is
                complete in it is then an answer. None: nothing is known. A user's own grader sees the text alone.

        Returns:
            One verdict a pair, in order.

        Raises:
            UserError: math-verify is missing or not the pinned version.
            RuntimeError: workers keep dying, or the grader was made in another process.
        """
        given = [False] * len(pairs) if cut_off is None else cut_off
        if self._decide is not _decide:
            return self._grade_each([(*pair, cut) for pair, cut in zip(pairs, given, strict=True)])
        verdicts = iter(
            self._grade_each(
                [
                    (response, one, cut)
                    for (response, answer), cut in zip(pairs, given, strict=True)
                    for one in alternatives(answer)
                ]
            )
        )
        return [_best([next(verdicts) for _ in alternatives(answer)]) for _, answer in pairs]

    def _grade_each(self, asked: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """Grade responses against one answer each."""
        verdicts: list[Verdict | None] = []
        undecided: dict[Job, list[int]] = {}
        for index, (response, answer, is_cut_off) in enumerate(asked):
            decided = self._decide(response, answer, is_cut_off)
            if isinstance(decided, Job):
                undecided.setdefault(decided, []).append(index)
                verdicts.append(None)
            else:
                verdicts.append(decided)
        for verdict, places in zip(self._pool.run(list(undecided)), undecided.values(), strict=True):
            for index in places:
                verdicts[index] = verdict
        return [verdict for verdict in verdicts if verdict is not None]


def _best(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on a response that any of several answers makes right."""
    return min(verdicts, key=lambda verdict: _ORDER.index(verdict.verdict))


def _decide(response: str, answer: str, is_cut_off: bool = False) -> Verdict | Job:
    """The verdict, where it takes no mathematics; else the job for a worker."""
    gold = gold_answer(answer)
    extraction = final_answer(response, is_cut_off=is_cut_off)
    if not gold:
        return Verdict("error", extraction.text[:MAX_ANSWER_CHARS], "the gold answer is empty")
    if len(gold) > MAX_ANSWER_CHARS:
        return Verdict(
            "error",
            extraction.text[:MAX_ANSWER_CHARS],
            f"the gold answer is longer than {MAX_ANSWER_CHARS} characters",
        )
    if not extraction.text:
        return Verdict("unparsable", "", extraction.how)
    return _decide_extracted(gold, extraction)


def _as_job(response: str, answer: str, _is_cut_off: bool) -> Verdict | Job:
    """For the user's grader: the response as it is, by its end if it is too long, and the answer as it is."""
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict("error", "", f"the gold answer is longer than {MAX_ANSWER_CHARS} characters")
    return Job(answer, response[-MAX_RESPONSE_CHARS:], (), ())


def _decide_extracted(gold: str, extraction: Extraction) -> Verdict | Job:
    try:
        return judge(gold, extraction, _REFUSE)
    except NeedsWorker:
        return Job(gold, extraction.text, extraction.parts, extraction.boxes)


_default: Grader | None = None
_default_owner = -1
_default_lock = threading.Lock()


def grade(response: str, answer: str, *, is_cut_off: bool = False) -> Verdict:
    r"""Grade one response with a grader of this process that has one worker.

    That grader is the only global state of this package: made by the first call, remade in a
    forked child, and closed when the process exits. Use :class:`Grader` for many responses.

    Args:
        response: the whole response, thinking included.
        answer: the gold answer.
        is_cut_off: the response is known to have ended at the token limit.

    Raises:
        UserError: math-verify is missing or not the pinned version.

    >>> grade(r"so the probability is \boxed{\frac{2}{4}}", "1/2").verdict
    'correct'
    >>> grade("I do not know.", "1/2").verdict
    'unparsable'
    """
    global _default, _default_owner
    with _default_lock:
        if _default is None or _default_owner != os.getpid():
            _default, _default_owner = Grader(workers=1), os.getpid()
            atexit.register(_default.close)
        grader = _default
    return grader.grade(response, answer, is_cut_off=is_cut_off)
