"""What every rollout engine offers: requests in, completions out, and new weights between calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from phimr_nemo.errors import UserError
from phimr_nemo.store.records import FinishReason

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 means greedy.
        top_p: nucleus mass in (0, 1]; 1 keeps the whole distribution.
        max_new_tokens: the response's limit in tokens, its stop token included.

    Raises:
        UserError: a value is outside its range.
    """

    temperature: float
    top_p: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature is {self.temperature}",
                rule="a sampling temperature is finite and not negative",
                remedy="use 0 for greedy decoding, or a value such as 0.6",
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(
                f"top_p is {self.top_p}",
                rule="top_p lies in (0, 1]",
                remedy="use 1 to keep the whole distribution, or a value such as 0.95",
            )
        if self.max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens is {self.max_new_tokens}",
                rule="a response has room for at least one token",
                remedy="give a positive number of tokens",
            )


@dataclass(frozen=True)
class Partial:
    """What there is of a response whose sampling was interrupted; all three are of one length.

    Attributes:
        token_ids: its tokens so far; none of them ends it.
        logprobs: of each, as in a :class:`Completion`.
        versions: of the weights that sampled each.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()


NOTHING: Final = Partial()


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        request_id: the id of its request.
        token_ids: the response's tokens; the last is the stop token when `finish_reason` is "stop".
        logprobs: natural log-probability of each token under softmax(logits / temperature) over the *whole*
            vocabulary, also when top_p < 1 (this is what the trainer computes, so the two can be compared);
            at temperature 0 it is that of softmax(logits). Of the weights that sampled it, whatever came after them.
            Empty from an engine that only writes text.
        finish_reason: "stop" at a stop token, "length" at the limit.
        versions: of the weights that sampled each token; empty from an engine that does not say, whose responses come
            from the weights it has.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[int, ...] = ()

    @property
    def version(self) -> int | None:
        """Of its oldest token; None where it is not known."""
        return min(self.versions, default=None)


@dataclass(frozen=True)
class Request:
    """One response to sample.

    Attributes:
        id: the caller's name for it, unique within a call.
        prompt_ids: the prompt's token ids, at least one.
        seed: non-negative, below 2^63; with the weights it determines the response.
        begun: what was sampled of the response before; it is continued, and its tokens count for the limit.
    """

    id: str
    prompt_ids: tuple[int, ...]
    seed: int
    begun: Partial = NOTHING

    @property
    def context_ids(self) -> tuple[int, ...]:
        """What stands before the next token."""
        return self.prompt_ids + self.begun.token_ids

    def whole(self, rest: Completion) -> Completion:
        """The response whose end is `rest`."""
        begun = self.begun
        return replace(
            rest,
            token_ids=begun.token_ids + rest.token_ids,
            logprobs=begun.logprobs + rest.logprobs,
            versions=begun.versions + rest.versions,
        )

    def further(self, more: Partial) -> Request:
        """The request for what is left of the response when `more` of it was sampled."""
        begun = self.begun
        return replace(
            self,
            begun=Partial(
                begun.token_ids + more.token_ids, begun.logprobs + more.logprobs, begun.versions + more.versions
            ),
        )


class Unfinished(Exception):
    """Some requests have no response, because no engine with the right weights is left.

    Args:
        completed: the responses that there are.
    """

    def __init__(self, completed: list[Completion]) -> None:
        super().__init__(f"only {len(completed)} responses were sampled")
        self.completed = completed


class Engine(Protocol):
    """Samples responses."""

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Sample one completion for each request, in the requests' order.

        Raises:
            UserError: a prompt is empty, holds an unknown token id, or leaves no room for a response.
            Unfinished: engines outside this process were lost.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot be used afterwards."""
        ...


class Sampler(Engine, Protocol):
    """An engine whose weights can be replaced between calls."""

    @property
    def version(self) -> int:
        """The version of the weights in use."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """What it met with since the start, by name, the same names in every process; {} if it counts nothing."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights by these tensors (Hugging Face names); the old stay if the set is wrong.

        Raises:
            UserError: a tensor is missing, unknown, repeated or of another shape.
        """
        ...


@runtime_checkable
class InterruptibleSampler(Sampler, Protocol):
    """A sampler that can be interrupted, and continues responses with the weights that it has then."""

    def sample_until(
        self,
        interrupted: threading.Event,
        asked: Sequence[tuple[Request, SamplingParams]],
        done: Callable[[Completion], None],
        at_most: int,
    ) -> list[Request]:
        """Sample, the first requests first, until all is done or an event comes.

        Args:
            interrupted: when it is set, what is under way ends with the tokens that it has.
            asked: requests, and how the tokens of each are drawn; ids are unique in the call.
            done: takes each response as soon as it is whole.
            at_most: requests under way at once.

        Returns:
            The requests without a response, with what there is of theirs: those that were interrupted, had not begun,
            or were lost with an engine outside this process.

        Raises:
            UserError: as `sample`.
        """
        ...
