"""Rounds of requests that are sampled in a thread while something else goes on, oldest first, and their file.

New weights come between responses (:class:`WaitedFor`) or in the middle of them (:class:`Continued`). Requests that
were lost with an engine outside this process are missing in what comes back.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from phimr_nemo.config import Stale
from phimr_nemo.generate.sampler import (
    Completion,
    InterruptibleSampler,
    Partial,
    Request,
    Sampler,
    SamplingParams,
    Unfinished,
)

THREAD: Final = "rollouts"
SCHEMA: Final = pa.schema(
    [
        ("step", pa.int64()),
        ("request_id", pa.string()),
        ("prompt", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("versions", pa.list_(pa.int64())),
        ("finish_reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Lead:
    """How far sampling may be ahead of training.

    Attributes:
        steps: a response is trained on so many steps after its oldest token's weights at most; 0 = nothing is ahead.
        at_most: responses under way at once in this process, where new weights interrupt them; None = new weights
            wait for whole rounds.
        stale: "keep" trains on older responses all the same.
    """

    steps: int = 0
    at_most: int | None = None
    stale: Stale = "resample"


NOTHING_AHEAD: Final = Lead()


@dataclass
class Round:
    """A round that was begun.

    Attributes:
        prompt_of: slot -> prompt number; a request is named "slot/sample".
        requests: with what there is of their responses where these are not whole.
        params: how tokens are drawn.
        completed: the responses that are whole, by their requests' names.
    """

    prompt_of: Mapping[int, int]
    requests: Sequence[Request]
    params: SamplingParams
    completed: dict[str, Completion] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether every request has its response."""
        return len(self.completed) == len(self.requests)

    def missing(self) -> list[Request]:
        """The requests without one."""
        return [request for request in self.requests if request.id not in self.completed]

    def responses(self) -> list[Completion]:
        """Those that there are, in the order of the requests."""
        return [self.completed[request.id] for request in self.requests if request.id in self.completed]

    def fill(self, found: Iterable[Completion]) -> None:
        """Add responses."""
        self.completed |= {completion.request_id: completion for completion in found}


class Ahead(Protocol):
    """Rounds under way.

    Attributes:
        rounds: step -> round, in the order in which they are sampled.
    """

    rounds: dict[int, Round]

    def resume(self) -> None:
        """Sample what is missing, with the weights that the sampler has."""
        ...

    def settle(self) -> None:
        """Until `resume` the sampler is nobody else's: it samples nothing, and may be given new weights."""
        ...

    def restore(self, step: int, found: Round) -> None:
        """Take over a round that was begun before."""
        ...

    def take(self, step: int) -> Round:
        """Wait for a round, which is the caller's then; one with lost requests is not whole."""
        ...

    def close(self) -> None:
        """Stop as soon as possible."""
        ...


class WaitedFor:
    """An :class:`Ahead` whose rounds are sampled by the weights that they were begun with, one after the other.

    Args:
        sampler: not used by others before `settle`.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler, self._thread = sampler, ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        self._work: dict[int, Future[None]] = {}
        self.rounds: dict[int, Round] = {}

    def resume(self) -> None:
        """Begin those rounds that are new."""
        for step, begun in self.rounds.items():
            if step not in self._work:
                self._work[step] = self._thread.submit(self._sample, begun)

    def _sample(self, begun: Round) -> None:
        begun.fill(sampled(self._sampler, begun.requests, begun.params))

    def settle(self) -> None:
        """Wait for all rounds."""
        for work in self._work.values():
            work.result()

    def restore(self, step: int, found: Round) -> None:
        """Take a round as it is: its weights are not there any more, so what it lacks is lost."""
        self.rounds[step] = found
        self._work[step] = Future()
        self._work[step].set_result(None)

    def take(self, step: int) -> Round:
        """Wait for a round."""
        self._work[step].result()
        del self._work[step]
        return self.rounds.pop(step)

    def close(self) -> None:
        """Wait for the round that is being sampled; others are not begun."""
        self._thread.shutdown(cancel_futures=True)


class Continued:
    """An :class:`Ahead` whose responses are interrupted by new weights, and continued with them.

    Args:
        sampler: not used by others before `settle`.
        at_most: responses under way at once.
    """

    def __init__(self, sampler: InterruptibleSampler, at_most: int) -> None:
        self._sampler, self._at_most = sampler, at_most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
        self._work: Future[None] | None = None
        self._interrupted, self._changed, self._is_over = threading.Event(), threading.Condition(), True
        self.rounds: dict[int, Round] = {}

    def resume(self) -> None:
        """Sample what is missing of all rounds, unless that goes on already."""
        if self._work is None and not all(begun.is_whole for begun in self.rounds.values()):
            self._interrupted.clear()
            self._is_over = False
            self._work = self._thread.submit(self._sample)

    def _sample(self) -> None:
        rounds = list(self.rounds.values())
        owner = {request.id: begun for begun in rounds for request in begun.requests}

        def done(completion: Completion) -> None:
            with self._changed:
                owner[completion.request_id].fill([completion])
                self._changed.notify_all()

        try:
            asked = [(request, begun.params) for begun in rounds for request in begun.missing()]
            left = {
                request.id: request
                for request in self._sampler.sample_until(self._interrupted, asked, done, self._at_most)
            }
            for begun in rounds:
                begun.requests = [left.get(request.id, request) for request in begun.requests]
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def settle(self) -> None:
        """Interrupt what is under way."""
        if self._work is not None:
            self._interrupted.set()
            work, self._work = self._work, None
            work.result()

    def restore(self, step: int, found: Round) -> None:
        """Take over a round with what there is of its responses."""
        self.rounds[step] = found

    def take(self, step: int) -> Round:
        """Wait for a round, while others go on."""
        wanted = self.rounds[step]
        with self._changed:
            self._changed.wait_for(lambda: wanted.is_whole or self._is_over)
        if not wanted.is_whole and self._work is not None:
            self._work.result()
        return self.rounds.pop(step)

    def close(self) -> None:
        """Interrupt what is under way."""
        self._interrupted.set()
        self._thread.shutdown(cancel_futures=True)


def sampled(sampler: Sampler, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
    """Completions with their versions; fewer than requests if servers were lost."""
    if not requests:
        return []
    version = sampler.version
    try:
        completions = sampler.sample(requests, params)
    except Unfinished as unfinished:
        completions = unfinished.completed
    return [c if c.versions else replace(c, versions=(version,) * len(c.token_ids)) for c in completions]


# ---- their file --------------------------------------------------------------------------------------------


def rows_of(rounds: Mapping[int, Round]) -> list[dict[str, Any]]:
    """A row for every request, whole, partial or not begun."""
    rows = []
    for step, begun in rounds.items():
        for request in begun.requests:
            completion = begun.completed.get(request.id)
            found: Completion | Partial = request.begun if completion is None else completion
            rows.append(
                {
                    "step": step,
                    "request_id": request.id,
                    "prompt": begun.prompt_of[slot_of(request.id)],
                    **{name: getattr(found, name) for name in ("token_ids", "logprobs", "versions")},
                    "finish_reason": None if completion is None else completion.finish_reason,
                }
            )
    return rows


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A file's content."""
    stream = io.BytesIO()
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows in a file.

    Raises:
        pyarrow.ArrowException, OSError: it is damaged, or another version's.
    """
    table = pq.read_table(file, page_checksum_verification=True)
    if table.schema != SCHEMA:
        raise pa.ArrowInvalid("its columns are those of another version")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def filled(begun: Round, rows: Iterable[Mapping[str, Any]]) -> Round:
    """A round of fresh requests with what a file has of their responses."""
    partial: dict[str, Partial] = {}
    for row in rows:
        name, *found = row["request_id"], *(tuple(row[key]) for key in ("token_ids", "logprobs", "versions"))
        token_ids, logprobs, versions = found
        if row["finish_reason"] is None:
            partial[name] = Partial(token_ids, logprobs, versions)
        else:
            begun.fill([Completion(name, token_ids, logprobs, row["finish_reason"], versions)])
    begun.requests = [
        request.further(partial[request.id]) if request.id in partial else request for request in begun.requests
    ]
    return begun


def slot_of(request_id: str) -> int:
    """The slot in a request's name "slot/sample"."""
    return int(request_id.partition("/")[0])


def by_step(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    """Rows of each round, oldest first."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["step"], []).append(row)
    yield from sorted(found.items())
