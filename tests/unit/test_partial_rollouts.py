"""Responses that are interrupted and continued: by the same weights they are the uninterrupted ones, and by others
every token keeps the log-probability and the version of the weights that sampled it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_local_sampler import ORIGINAL_LENGTH, make_hf_model, make_requests, make_sampler, named_tensors
from torch import Tensor

from phimr_nemo.align.grpo.objective import importance_weights
from phimr_nemo.config.sampled.rounds import MaskedCorrection, SamplerCorrection, TruncatedCorrection
from phimr_nemo.generate.local.decoder import Decoder
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, InterruptibleSampler, Request, SamplingParams

TEMPERATURE = 0.8
PARAMS = SamplingParams(TEMPERATURE, 1.0, 14)
STOP = (5, 6, 7)
TOLERANCE = 1e-4
MANY = 1_000


class AfterLooks(threading.Event):
    """Is set when it has been looked at so often: once before each token."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = looks

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.fixture(scope="module")
def model() -> Any:
    return make_hf_model()


def asked(requests: Sequence[Request], params: SamplingParams = PARAMS) -> list[tuple[Request, SamplingParams]]:
    return [(request, params) for request in requests]


def in_pieces(
    sampler: LocalSampler,
    requests: Sequence[Request],
    looks: Sequence[int],
    between: Callable[[list[Request]], list[Request]] = lambda left: left,
) -> list[Completion]:
    """Interrupted after each number of tokens; `between` gives what is asked then."""
    found: dict[str, Completion] = {}
    left = list(requests)
    for count in (*looks, MANY):
        left = sampler.sample_until(AfterLooks(count), asked(left), lambda c: found.update({c.request_id: c}), MANY)
        left = between(left)
    assert not left
    return [found[request.id] for request in requests]


@pytest.mark.parametrize("looks", [(1,), (5,), (3, 0, 4), (1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("max_batch", [2, 16])
def test_continued_by_the_same_weights_it_is_the_uninterrupted_response(
    looks: tuple[int, ...], max_batch: int, model: Any
) -> None:
    requests = make_requests([4, 9, 1, 6, ORIGINAL_LENGTH - 5], samples=3)
    sampler = make_sampler(model, max_batch=max_batch, stop_token_ids=STOP)
    whole = sampler.sample(requests, PARAMS)
    pieces = in_pieces(sampler, requests, looks)
    assert [(c.token_ids, c.finish_reason) for c in pieces] == [(c.token_ids, c.finish_reason) for c in whole]
    assert {c.finish_reason for c in whole} == {"stop", "length"}
    for ours, theirs in zip(pieces, whole, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)
        assert ours.versions == theirs.versions == (0,) * len(theirs.token_ids)


def test_random_numbers_that_begin_anew_are_seen(model: Any) -> None:
    """The planted twin: what was sampled before counts as prompt, and its random numbers are used again."""
    requests = make_requests([4, 9, 1, 6], samples=3)
    sampler = make_sampler(model)
    whole = sampler.sample(requests, PARAMS)
    left = sampler.sample_until(AfterLooks(4), asked(requests), lambda _: None, MANY)
    anew = sampler.sample([Request(r.id, r.context_ids, r.seed) for r in left], replace(PARAMS, max_new_tokens=10))
    assert [c.token_ids for c in anew] != [c.token_ids[4:] for c in whole]


def test_what_draws_its_tokens_otherwise_is_sampled_by_its_own_temperature(model: Any) -> None:
    """Rounds of one call may differ in it."""
    requests = make_requests([4, 9, 1, 6])
    warm = SamplingParams(1.3, 1.0, 9)
    sampler = make_sampler(model)
    found: dict[str, Completion] = {}
    mixed = [*asked(requests[:2]), *asked(requests[2:], warm)]
    assert sampler.sample_until(threading.Event(), mixed, lambda c: found.update({c.request_id: c}), MANY) == []
    expected = [*sampler.sample(requests[:2], PARAMS), *sampler.sample(requests[2:], warm)]
    assert [found[request.id] for request in requests] == expected


@pytest.mark.parametrize("at_most", [1, 3, 8])
def test_no_more_are_under_way_than_may_be(at_most: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[int] = []
    step = Decoder.step

    def counting(self: Decoder, cache: Any, tokens: Tensor, *others: Any) -> Tensor:
        under_way.append(len(tokens))
        return step(self, cache, tokens, *others)

    monkeypatch.setattr(Decoder, "step", counting)
    found: list[Completion] = []
    make_sampler(model).sample_until(
        threading.Event(), asked(make_requests([4, 9, 1], samples=5)), found.append, at_most
    )
    assert len(found) == 15
    assert max(under_way) == at_most


def test_only_engines_that_can_be_interrupted_are_of_that_kind(model: Any) -> None:
    class Plain:
        version = counts = None
        sample = update_weights = close = None

    assert isinstance(make_sampler(model), InterruptibleSampler)
    assert not isinstance(Plain(), InterruptibleSampler)


# ---- two versions of the weights in one response -------------------------------------------------------------

BEFORE = 6
"""Tokens by the first weights."""


@torch.inference_mode()
def logprobs_by(model: Any, request: Request, tokens: tuple[int, ...]) -> Tensor:
    """float64 [tokens] by transformers."""
    ids = torch.tensor([request.prompt_ids + tokens])
    scores = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double() / TEMPERATURE
    return scores.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.fixture(scope="module")
def later(model: Any) -> Any:
    """The model some optimizer steps later."""
    changed = make_hf_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return changed


@pytest.fixture(scope="module")
def mixed(model: Any, later: Any) -> tuple[list[Request], list[Completion]]:
    """Responses whose first tokens are of version 3, and the others of version 4."""
    requests = make_requests([4, 9, 1, 6], samples=2)
    sampler = make_sampler(model)
    sampler.update_weights(named_tensors(model), 3)

    def renew(left: list[Request]) -> list[Request]:
        if sampler.version == 3:
            sampler.update_weights(named_tensors(later), 4)
        return left

    return requests, in_pieces(sampler, requests, [BEFORE], renew)


def test_every_token_has_the_logprob_and_the_version_of_the_weights_that_sampled_it(
    mixed: tuple[list[Request], list[Completion]], model: Any, later: Any
) -> None:
    for request, completion in zip(*mixed, strict=True):
        tokens = completion.token_ids
        assert completion.versions == (3,) * BEFORE + (4,) * (len(tokens) - BEFORE)
        assert completion.version == 3
        old, new = logprobs_by(model, request, tokens), logprobs_by(later, request, tokens)
        expected = torch.cat((old[:BEFORE], new[BEFORE:]))
        assert torch.allclose(torch.tensor(completion.logprobs).double(), expected, atol=TOLERANCE)
        # The newest weights would say something else of the first tokens.
        assert float((new - expected)[:BEFORE].abs().max()) > 100 * TOLERANCE


CAP, LOW, HIGH = 1.05, 0.97, 1.06
CORRECTIONS: list[SamplerCorrection] = [
    TruncatedCorrection(kind="truncated", cap=CAP),
    MaskedCorrection(kind="masked", low=LOW, high=HIGH),
    MaskedCorrection(kind="sequence_masked", low=0.9, high=1.3),
]


def by_hand(correction: SamplerCorrection, trained: Sequence[float], behaviour: Sequence[float]) -> list[float]:
    """Weights of one response's tokens by the corrections' formulas."""
    ratios = [math.exp(ours - theirs) for ours, theirs in zip(trained, behaviour, strict=True)]
    if isinstance(correction, TruncatedCorrection):
        return [min(ratio, correction.cap) for ratio in ratios]
    assert isinstance(correction, MaskedCorrection)
    if correction.kind == "masked":
        return [ratio if correction.low <= ratio <= correction.high else 0.0 for ratio in ratios]
    whole = math.prod(ratios)
    return [whole if correction.low <= whole <= correction.high else 0.0] * len(ratios)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda correction: correction.kind)
def test_a_correction_weighs_each_token_by_the_weights_that_sampled_it(
    correction: SamplerCorrection, mixed: tuple[list[Request], list[Completion]], model: Any, later: Any
) -> None:
    """And the planted twin: log-probabilities of the newest weights for all tokens give other weights."""
    newest_differ = 0
    for request, completion in zip(*mixed, strict=True):
        tokens = completion.token_ids
        old, new = logprobs_by(model, request, tokens), logprobs_by(later, request, tokens)
        # The weights that are trained on are a little further still.
        trained = new + 0.3 * (new - old)
        behaviour = torch.cat((old[:BEFORE], new[BEFORE:]))
        rows = trained.float()[None], torch.tensor(completion.logprobs)[None], torch.ones(1, len(tokens)) > 0
        weights = importance_weights(correction, *rows)
        assert weights is not None
        expected = torch.tensor(by_hand(correction, trained.tolist(), behaviour.tolist()))
        assert torch.allclose(weights[0], expected, atol=1e-3)
        rescored = importance_weights(correction, rows[0], new.float()[None], rows[2])
        assert rescored is not None
        newest_differ += not torch.allclose(rescored[0], expected, atol=1e-3)
    assert newest_differ > 0
