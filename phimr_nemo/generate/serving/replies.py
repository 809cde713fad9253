"""What rollout servers are asked and say, checked: whether they serve the right model, and their responses."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx

from phimr_nemo.config import ServerEngine
from phimr_nemo.endpoint.settings import read_key
from phimr_nemo.endpoint.wire import Transient, parse_object
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Partial, Request, SamplingParams
from phimr_nemo.generate.serving.weights import GENERATE, SLEEP, Identity
from phimr_nemo.generate.serving.weightsync import STEP_SECONDS, label_number
from phimr_nemo.store.content import content_seed

CONNECT_SECONDS: Final = 20.0
REPLY_ALLOWANCE: Final = 1 << 16
REPLY_BYTES_PER_TOKEN: Final = 512
REFUSED: Final = (400, 404, 413, 422)
NO_ENTRY: Final = (401, 403)
ABORTED: Final = "abort"
"""How vLLM says that a response was ended from outside."""
SHOWN: Final = 300
"""Characters of a server's answer."""
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


async def ask(
    client: httpx.AsyncClient,
    url: str,
    request: Request,
    params: SamplingParams,
    wanted: Wanted,
    *,
    stop: Sequence[int],
    run: str,
) -> Completion | Partial:
    """Have a server sample a response, or the rest of one that was begun.

    Args:
        client: with the key and the time limit of a request.
        url: the server.
        request: what is asked.
        params: how tokens are drawn.
        wanted: the model.
        stop: token ids that end a response.
        run: whose weights are told apart.

    Returns:
        What the server sampled of it.

    Raises:
        UserError: the server refuses the key or the request.
        Transient: there is no reply that can be used.
    """
    begun = len(request.begun.token_ids)
    room = wanted.longest - len(request.prompt_ids)
    body = {
        "token_ids": list(request.context_ids),
        "sampling_params": {
            "temperature": params.temperature,
            "max_tokens": min(params.max_new_tokens, room) - begun,
            # A server's random numbers begin anew; the first ones again would hang together with the tokens so far.
            "seed": content_seed("continued", str(request.seed), str(begun)) if begun else request.seed,
            "stop_token_ids": list(stop),
            # Only these end a response; vLLM would add the tokenizer's own.
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        },
    }
    limit = REPLY_ALLOWANCE + params.max_new_tokens * REPLY_BYTES_PER_TOKEN
    async with client.stream("POST", url + GENERATE, json=body) as response:
        content = bytearray()
        async for piece in response.aiter_raw():
            content += piece
            if len(content) > limit:
                raise Transient("the reply is too long")
    if response.status_code in NO_ENTRY:
        raise no_entry(url)
    if response.status_code in REFUSED:
        raise UserError(
            f"{url} refuses request {request.id} (HTTP {response.status_code}): "
            f"{content[:REPLY_BYTES_PER_TOKEN].decode('utf-8', 'replace')}",
            rule="a prompt leaves room for a response, and the server speaks vLLM's interface for token ids",
            remedy="start the servers with `phimr serve` and the run's sequence_length",
        )
    if response.status_code != httpx.codes.OK:
        raise Transient(f"HTTP {response.status_code}")
    return read_reply(request.id, parse_object(bytes(content)), run=run, vocab_size=wanted.vocab_size)


def read_reply(request_id: str, reply: Mapping[str, Any], *, run: str, vocab_size: int) -> Completion | Partial:
    """A response from vLLM's reply, or what there is of one that was aborted; no versions if another run's weights
    had a part in it.

    Raises:
        Transient: the reply has another form, or holds impossible values.
    """
    try:
        (choice,) = reply["choices"]
        token_ids = tuple(choice["token_ids"])
        logprobs = tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"])
        reason = choice["finish_reason"]
        spans = [(str(span["version"]), int(span["start"]), int(span["end"])) for span in choice["weight_versions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise Transient("the reply has not the form of token ids with log-probabilities") from error
    if reason not in ("stop", "length", ABORTED):
        raise Transient(f"the response ended with {reason!r}")
    if not all(type(token) is int and 0 <= token < vocab_size for token in token_ids):
        raise Transient("the reply holds token ids that the model does not have")
    if len(token_ids) != len(logprobs) or not (token_ids or reason == ABORTED):
        raise Transient("the reply has not one log-probability for each of at least one token")
    if not all(math.isfinite(value) and value <= ROUNDING for value in logprobs):
        raise Transient("the reply holds values that are no log-probabilities")
    versions = _versions(spans, len(token_ids), run)
    if reason == ABORTED:
        return Partial(token_ids, logprobs, versions) if versions else Partial()
    return Completion(request_id, token_ids, logprobs, reason, versions)


def _versions(spans: Sequence[tuple[str, int, int]], tokens: int, run: str) -> tuple[int, ...]:
    """Of each token, from spans (label, start, end); empty if one is of another run.

    Raises:
        Transient: the spans are not those of so many tokens, one after another.
    """
    numbers = [(label_number(run, label), end - start) for label, start, end in spans]
    ends = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != ends[:-1] or ends[-1] != tokens or sorted(ends) != ends:
        raise Transient("the reply does not say of each token which weights made it")
    if any(number is None for number, _ in numbers):
        return ()
    return tuple(number for number, count in numbers if number is not None for _ in range(count))


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


@contextlib.asynccontextmanager
async def open_client(config: ServerEngine) -> AsyncIterator[httpx.AsyncClient]:
    """A client of rollout servers, with their key and the time that a request may take."""
    headers, key = {"Accept-Encoding": "identity"}, read_key(config)
    if key:
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(config.request_seconds, connect=CONNECT_SECONDS, pool=None)
    # A proxy of the environment is for other hosts than a cluster's own.
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=timeout, trust_env=False) as client:
        yield client


def put_to_sleep(config: ServerEngine, *, patience: float = 0.0) -> None:
    """Let colocated servers free their GPUs; one that is not there holds nothing.

    Args:
        config: the servers.
        patience: seconds in which those are waited for that do not answer yet.

    Raises:
        UserError: one is there and does not sleep: it is not colocated, refuses the key, or takes too long.
    """
    asyncio.run(_put_to_sleep(config, time.monotonic() + patience))


async def _put_to_sleep(config: ServerEngine, deadline: float) -> None:
    async with open_client(config) as client:
        left = [url.rstrip("/") for url in config.base_urls]
        while True:
            found = await asyncio.gather(*(_falls_asleep(client, url) for url in left))
            left = [url for url, is_there in zip(left, found, strict=True) if not is_there]
            if not left or time.monotonic() >= deadline:
                return
            await asyncio.sleep(config.probe_seconds)


async def _falls_asleep(client: httpx.AsyncClient, url: str) -> bool:
    """Whether it is there; then it sleeps."""
    problem = f"did not go to sleep within {STEP_SECONDS:g} s"
    try:
        response = await client.post(url + SLEEP, timeout=httpx.Timeout(STEP_SECONDS, connect=CONNECT_SECONDS))
    except (httpx.ReadTimeout, httpx.WriteTimeout):
        pass
    except httpx.TransportError:
        return False
    else:
        if response.status_code == httpx.codes.OK:
            return True
        if response.status_code in NO_ENTRY:
            raise no_entry(url)
        problem = f"does not go to sleep (HTTP {response.status_code} {response.text[:SHOWN]})"
        if response.status_code == httpx.codes.NOT_FOUND:
            problem = "was not started as one that goes to sleep"
    raise UserError(
        f"the rollout server {url} {problem}",
        rule="with engine.colocated=true servers and trainer take turns on the same GPUs",
        remedy="start it again with `phimr serve --colocated`, and run the same command to continue; or set "
        "engine.colocated=false where the servers have GPUs of their own",
    )
