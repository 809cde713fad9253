"""Rollout servers that are interrupted: what there is of a response comes back, and goes on with new weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pytest
import torch
from rollout_server import RolloutServer
from test_rollout_servers import (
    MAX_LENGTH,
    NEW_TOKENS,
    PARAMS,
    POLICY,
    ROUNDING,
    base,
    changed,
    identity,
    model,
    requests,
    sampler_of,
    serving,
    settings,
    wanted,
)
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.generate.local.decoder import Decoder
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.generate.serving.replies import Wanted
from phimr_nemo.generate.serving.weights import ABORT, Identity
from phimr_nemo.model.files.hf import HFDirectory

__all__ = ["base", "identity", "model", "wanted"]

PATIENCE: Final = 60.0
AT_MOST: Final = 3
DRAWN: Final = 5
"""Tokens before something happens."""
STEP: Final = Decoder.step
NEVER: Final = threading.Event()


@pytest.fixture
def after_some_tokens() -> Iterator[Callable[[Callable[[], None], Callable[[], bool]], None]]:
    """Makes something happen when the servers have drawn some tokens; they draw no more until it had effect."""
    drawn, happening, has_effect = [0], [lambda: None], [lambda: True]

    def step(*arguments: Any) -> Tensor:
        drawn[0] += 1
        if drawn[0] == DRAWN:
            happening[0]()
            deadline = time.monotonic() + PATIENCE
            while not has_effect[0]() and time.monotonic() < deadline:
                time.sleep(0.01)
        return STEP(*arguments)

    def happens(what: Callable[[], None], effect: Callable[[], bool]) -> None:
        drawn[0], happening[0], has_effect[0] = 0, what, effect

    with mock.patch.object(Decoder, "step", step):
        yield happens


def asked(count: int) -> list[tuple[Request, SamplingParams]]:
    return [(request, PARAMS) for request in requests(count)]


def scored(model: Path, weights: dict[str, Tensor], request: Request, completion: Completion) -> list[float]:
    """Log-probabilities of its tokens by some weights."""
    sampler = LocalSampler(
        HFDirectory(model).architecture,
        weights.items(),
        stop_token_ids=(),
        max_batch=1,
        longrope_policy=POLICY,
        max_length=MAX_LENGTH,
    )
    assert sampler._decoder is not None
    found = []
    for place, token in enumerate(completion.token_ids):
        _, logits = sampler._decoder.prefill([request.prompt_ids + completion.token_ids[:place]])
        found.append(float((logits[0] / PARAMS.temperature).log_softmax(-1)[token]))
    return found


def test_interrupted_responses_go_on_with_new_weights(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted, after_some_tokens: Any
) -> None:
    old, new, found = changed(base, 3), changed(base, 4), dict[str, Completion]()

    def done(completion: Completion) -> None:
        found[completion.request_id] = completion

    with serving(model, identity, 1) as (server,):
        sampler, interrupted, busiest = sampler_of(settings([server]), wanted), threading.Event(), [0, 0]
        generate, counted = server._generate, threading.Lock()

        def counting(body: dict[str, Any]) -> dict[str, Any]:
            with counted:
                busiest[0] += 1
                busiest[1] = max(busiest)
            try:
                return generate(body)
            finally:
                with counted:
                    busiest[0] -= 1

        server._generate = counting
        sampler.update_weights(old.items(), 3)
        before = server.aborts
        after_some_tokens(interrupted.set, lambda: server.aborts > before)
        left = sampler.sample_until(interrupted, asked(8), done, AT_MOST)
        assert busiest[1] <= AT_MOST
        begun = {request.id: len(request.begun.token_ids) for request in left}
        assert 0 < max(begun.values()) < NEW_TOKENS
        assert len(left) + len(found) == 8
        sampler.update_weights(new.items(), 4)
        assert sampler.sample_until(NEVER, [(request, PARAMS) for request in left], done, AT_MOST) == []
    assert sampler.counts["retries"] == sampler.counts["removed"] == 0
    for request in requests(8):
        completion, count = found[request.id], begun.get(request.id, NEW_TOKENS)
        assert completion.versions == ((3,) * count + (4,) * NEW_TOKENS)[: len(completion.token_ids)]
        by_old, by_new = (scored(model, weights, request, completion) for weights in (old, new))
        assert completion.logprobs == pytest.approx([*by_old[:count], *by_new[count:]], abs=ROUNDING)
        assert by_old != pytest.approx(by_new, abs=100 * ROUNDING)


@pytest.mark.parametrize("is_interruptible", [True, False])
def test_a_response_that_others_aborted_is_continued_or_made_again(
    is_interruptible: bool,
    model: Path,
    base: dict[str, Tensor],
    identity: Identity,
    wanted: Wanted,
    after_some_tokens: Any,
) -> None:
    with serving(model, identity, 1) as (server,):
        sampler = sampler_of(settings([server]), wanted)
        sampler.update_weights(base.items(), 3)
        after_some_tokens(lambda: server.take(ABORT, b"")[1].clear(), lambda: True)
        found: list[Completion] = []
        if is_interruptible:
            assert sampler.sample_until(NEVER, asked(1), found.append, AT_MOST) == []
        else:
            found = sampler.sample(requests(1), PARAMS)
    assert [len(completion.token_ids) for completion in found] == [NEW_TOKENS]
    assert found[0].versions == (3,) * NEW_TOKENS
    assert found[0].logprobs == pytest.approx(scored(model, base, requests(1)[0], found[0]), abs=ROUNDING)
    assert sampler.counts["retries"] == (0 if is_interruptible else 1)


def test_a_server_that_cannot_be_interrupted_is_named(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted, after_some_tokens: Any
) -> None:
    class Older(RolloutServer):
        asked = 0

        def take(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
            self.asked += path == ABORT
            return (404, {}) if path == ABORT else super().take(path, body)

    with Older(model, identity) as server:
        sampler, interrupted = sampler_of(settings([server]), wanted), threading.Event()
        sampler.update_weights(base.items(), 3)
        after_some_tokens(interrupted.set, lambda: server.asked > 0)
        with pytest.raises(UserError, match="cannot be interrupted"):
            sampler.sample_until(interrupted, asked(8), lambda _: None, AT_MOST)


def test_what_is_asked_of_a_continued_response(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    """Prompt and tokens so far, the rest of the limit, and random numbers of its own."""
    bodies: list[dict[str, Any]] = []
    with serving(model, identity, 1) as (server,):
        sampler, generate = sampler_of(settings([server]), wanted), server._generate

        def noting(body: dict[str, Any]) -> dict[str, Any]:
            bodies.append(body)
            return generate(body)

        server._generate = noting
        sampler.update_weights(base.items(), 0)
        (whole,) = sampler.sample([Request("r", (5, 6, 7), 11)], PARAMS)
        partial = torch.tensor(whole.token_ids)[:4].tolist()
        begun = type(Request("r", (5,), 1).begun)(tuple(partial), whole.logprobs[:4], (0,) * 4)
        (continued,) = sampler.sample([Request("r", (5, 6, 7), 11, begun)], PARAMS)
    first, second = (body["sampling_params"] for body in bodies)
    assert [body["token_ids"] for body in bodies] == [[5, 6, 7], [5, 6, 7, *partial]]
    assert (first["max_tokens"], second["max_tokens"]) == (NEW_TOKENS, NEW_TOKENS - 4)
    assert first["seed"] == 11 != second["seed"]
    assert continued.token_ids[:4] == whole.token_ids[:4]
    assert len(continued.token_ids) == len(continued.logprobs) == len(continued.versions) <= NEW_TOKENS
