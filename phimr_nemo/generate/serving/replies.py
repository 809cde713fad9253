"""What rollout servers say, checked: whether they serve the right model, and their responses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from phimr_nemo.endpoint.wire import Transient
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion
from phimr_nemo.generate.serving.weights import Identity
from phimr_nemo.generate.serving.weightsync import label_number

ROUNDING: Final = 1e-3
"""A log-probability above 0 by more than this is none."""


@dataclass(frozen=True)
class Wanted:
    """What a server must serve.

    Attributes:
        weights: hash of the run's base.
        tokenizer: hash of its tokenizer.
        longest: prompt and response together (tokens).
        original: LongRoPE's original length; None for a model without.
        longrope: the run's policy.
        vocab_size: of the model.
        logprobs: which log-probabilities it returns.
    """

    weights: str
    tokenizer: str
    longest: int
    original: int | None
    longrope: str
    vocab_size: int
    logprobs: str


def read_completion(request_id: str, reply: Mapping[str, Any], *, run: str, vocab_size: int) -> Completion:
    """A response from vLLM's reply; its version is that of its oldest token, None if of another run.

    Raises:
        Transient: the reply has another form, was aborted, or holds impossible values.
    """
    try:
        (choice,) = reply["choices"]
        token_ids = tuple(choice["token_ids"])
        logprobs = tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"])
        reason = choice["finish_reason"]
        labels = {str(span["version"]) for span in choice["weight_versions"]}
    except (KeyError, TypeError, ValueError) as error:
        raise Transient("the reply has not the form of token ids with log-probabilities") from error
    if reason not in ("stop", "length"):
        raise Transient(f"the response ended with {reason!r}")
    if not all(type(token) is int and 0 <= token < vocab_size for token in token_ids):
        raise Transient("the reply holds token ids that the model does not have")
    if len(token_ids) != len(logprobs) or not token_ids:
        raise Transient("the reply has not one log-probability for each of at least one token")
    if not all(math.isfinite(value) and value <= ROUNDING for value in logprobs):
        raise Transient("the reply holds values that are no log-probabilities")
    numbers = [label_number(run, label) for label in labels]
    known = [number for number in numbers if number is not None]
    version = min(known) if known and len(known) == len(numbers) else None
    return Completion(request_id, token_ids, logprobs, reason, version)


def check_identity(url: str, identity: Identity, wanted: Wanted) -> None:
    """Refuse a server that serves something else.

    Raises:
        UserError: another model, tokenizer, length, LongRoPE policy, or other log-probabilities.
    """
    problem = None
    if identity.weights != wanted.weights:
        problem = f"was started with the weights {identity.weights}, the run's base has {wanted.weights}"
    elif identity.tokenizer != wanted.tokenizer:
        problem = f"has the tokenizer {identity.tokenizer}, the run's base has {wanted.tokenizer}"
    elif identity.max_length < wanted.longest:
        problem = f"takes sequences of {identity.max_length} tokens, the run has {wanted.longest}"
    elif wanted.original is not None and identity.longrope != wanted.longrope:
        problem = f"has longrope={identity.longrope}, the run has {wanted.longrope}"
    elif wanted.original is not None and (identity.max_length > wanted.original) != (
        wanted.longest > wanted.original
    ):
        problem = (
            f"takes sequences of {identity.max_length} tokens and the run of {wanted.longest}: on different sides of "
            f"LongRoPE's original length {wanted.original}, so they use different factors"
        )
    elif identity.logprobs != wanted.logprobs:
        problem = f"returns {identity.logprobs}, not {wanted.logprobs}: it is not of the run's engine.kind"
    if problem is not None:
        raise UserError(
            f"the rollout server {url} {problem}",
            rule="rollouts come from the model that is trained",
            remedy="start it with `phimr serve BASE --max-length SEQUENCE_LENGTH`, with the run's own values "
            "(and --engine trtllm for engine.kind=trtllm_server)",
        )


def no_entry(url: str) -> UserError:
    """What to say when a server refuses the key."""
    return UserError(
        f"the rollout server {url} refuses the key",
        rule="engine.api_key_env names the variable that holds the key the server was started with",
        remedy="export the same value on both sides",
    )
