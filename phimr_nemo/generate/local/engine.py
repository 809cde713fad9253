"""The built-in rollout engine: continuous batching over a plain PyTorch decoder, on CPU or one GPU.

Rows 0..n-1 of the cache are always the n unfinished sequences: when a sequence finishes, the last row moves
into its place, so a long tail costs only its own rows; when a quarter of the rows is free, waiting requests
are admitted into them. Each distinct prompt is computed once and copied to its requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Final

import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.generate.local.decoder import Decoder, KVCache, cache_bytes_a_position, own_weights
from phimr_nemo.generate.local.prompts import Prompts, computed_prompts
from phimr_nemo.generate.local.sampling import greedy_tokens, request_uniforms, sampled_tokens
from phimr_nemo.generate.sampler import Completion, Partial, Request, SamplingParams
from phimr_nemo.losses.device import sent
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.longrope import LongRopePolicy, inverse_frequencies
from phimr_nemo.process.memory import GIBIBYTE
from phimr_nemo.store.records import FinishReason

ADMIT_WHEN_FREE: Final = 0.25
"""Share of rows that must be free before waiting requests are admitted: one prompt pass serves many."""


FIRST_CAPACITY: Final = 256
"""Positions a row has at first; the cache doubles when a sequence outgrows it."""


@dataclass
class _Rows:
    """The state of the cache's rows; entry r of each tensor belongs to row r of the cache.

    What is counted is on the CPU, which decides by it; what was drawn is where the model computes.

    Attributes:
        request: [rows] index of the row's request in the call.
        position: [rows] position of the token that is fed next.
        generated: [rows] tokens sampled so far.
        budget: [rows] tokens it may have in all.
        latest: [rows] the token that was drawn last.
        uniforms: [rows, max_new] the request's random numbers.
        tokens: [rows, max_new] what was sampled.
        logprobs: [rows, max_new] and its log-probabilities.
    """

    request: Tensor
    position: Tensor
    generated: Tensor
    budget: Tensor
    latest: Tensor
    uniforms: Tensor
    tokens: Tensor
    logprobs: Tensor

    @staticmethod
    def allocate(rows: int, max_new: int, device: torch.device) -> _Rows:
        return _Rows(
            request=torch.zeros(rows, dtype=torch.long),
            position=torch.zeros(rows, dtype=torch.long),
            generated=torch.zeros(rows, dtype=torch.long),
            budget=torch.zeros(rows, dtype=torch.long),
            latest=torch.zeros(rows, dtype=torch.long, device=device),
            uniforms=torch.zeros(rows, max_new, dtype=torch.float64, device=device),
            tokens=torch.zeros(rows, max_new, dtype=torch.long, device=device),
            logprobs=torch.zeros(rows, max_new, dtype=torch.float32, device=device),
        )

    def sampled(self, row: int) -> tuple[int, Tensor, Tensor]:
        """A row's request, tokens and log-probabilities."""
        count = int(self.generated[row])
        return int(self.request[row]), self.tokens[row, :count], self.logprobs[row, :count]

    def move(self, source: Tensor, target: Tensor) -> None:
        for state in vars(self).values():
            state[sent(target, state.device)] = state[sent(source, state.device)]


class LocalSampler:
    """Samples from a Phi3-architecture model; see :class:`phimr_nemo.generate.sampler.Sampler`.

    Args:
        arch: the model's architecture.
        tensors: its weights under their Hugging Face names; copied.
        stop_token_ids: a response ends with the first of these.
        max_batch: sequences computed together at most.
        longrope_policy: the run's policy, the same as the trainer's; "per_sequence" needs the final length
            before it is known and is refused where lengths can cross the original one.
        max_length: prompt and response together never exceed it (the response then ends with "length");
            also what decides between short and long rotary factors.
        dtype: what to compute in.
        device: where to compute.
        cache_bytes: what the keys and values of all sequences under way may take; fewer are computed together where
            `max_batch` of the longest would take more. None for no bound.

    Raises:
        UserError: the weights are not the architecture's, the policy cannot be sampled with, or not even one sequence
            of `max_length` fits into `cache_bytes`.
    """

    def __init__(
        self,
        arch: Architecture,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        stop_token_ids: Sequence[int],
        max_batch: int,
        longrope_policy: LongRopePolicy,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_bytes: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise UserError(
                f"max_batch is {max_batch}",
                rule="the sampler computes at least one sequence at a time",
                remedy="give a positive number of sequences",
            )
        if longrope_policy == "per_sequence" and max_length > arch.original_max_position_embeddings:
            raise UserError(
                f"LongRoPE policy 'per_sequence' with max_length {max_length}",
                rule="a sampler does not know a sequence's final length, so above the original "
                f"{arch.original_max_position_embeddings} positions it cannot choose the factors by it",
                remedy="use 'long_when_max_length_exceeds_original', as vLLM does",
            )
        if arch.sliding_window is not None and arch.sliding_window < max_length:
            raise UserError(
                f"sliding window of {arch.sliding_window} tokens with max_length {max_length}",
                rule="attention is full: the window covers the maximum length",
                remedy="lower the maximum length or use a model without a sliding window",
            )
        self._arch, self._max_batch, self._max_length = arch, max_batch, max_length
        self._dtype, self._device, self._cache_bytes = dtype, torch.device(device), cache_bytes
        self._rows_of(max_length)
        self._stop = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.long, device=self._device)
        self._frequencies = inverse_frequencies(arch, max_length, longrope_policy)
        self._decoder: Decoder | None = None
        self._version = -1
        self.update_weights(tensors, version=0)

    @property
    def version(self) -> int:
        """The version of the weights in use."""
        return self._version

    @property
    def counts(self) -> Mapping[str, int]:
        """Nothing: an engine in the process loses no request."""
        return {}

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace all weights; the old ones stay in use if the new set is not exactly the model's.

        Raises:
            UserError: a tensor is missing, unknown, repeated or of another shape.
        """
        weights = own_weights(self._arch, tensors, dtype=self._dtype, device=self._device)
        self._decoder = Decoder(self._arch, weights, self._frequencies, self._max_length)
        self._version = version

    def close(self) -> None:
        """Free the weights."""
        self._decoder = None

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Sample one completion for each request, in the requests' order.

        Raises:
            UserError: a prompt is empty, holds an unknown token id, or leaves no room for a response; or the
                model's logits are not finite.
        """
        found: dict[str, Completion] = {}
        never, most = threading.Event(), self._max_batch
        self._sample(
            requests, params, never, lambda completion: found.update({completion.request_id: completion}), most
        )
        return [found[request.id] for request in requests]

    def sample_until(
        self,
        interrupted: threading.Event,
        asked: Sequence[tuple[Request, SamplingParams]],
        done: Callable[[Completion], None],
        at_most: int,
    ) -> list[Request]:
        """See :class:`phimr_nemo.generate.sampler.InterruptibleSampler`.

        Requests that are drawn alike are computed together. A continued response has the random numbers that it would
        have had: with the same weights it is the uninterrupted one, up to rounding.
        """
        left = []
        for params, together in groupby(asked, key=itemgetter(1)):
            left += self._sample([request for request, _ in together], params, interrupted, done, at_most)
        return left

    @torch.inference_mode()
    def _sample(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        interrupted: threading.Event,
        done: Callable[[Completion], None],
        at_most: int,
    ) -> list[Request]:
        """Hand over what gets whole before the interruption; the requests that are left."""
        decoder = self._decoder
        if decoder is None:
            raise RuntimeError("the sampler is closed")
        for request in requests:
            self._check(request)
        budgets = [self._budget(request, params) for request in requests]
        left = dict(enumerate(requests))
        for index, tokens, logprobs, reason in self._run(decoder, requests, budgets, params, interrupted, at_most):
            request = left.pop(index)
            piece = tuple(tokens.tolist()), tuple(logprobs.tolist())
            versions = (self._version,) * len(piece[0])
            if reason is None:
                left[index] = request.further(Partial(*piece, versions))
            else:
                done(request.whole(Completion(request.id, *piece, reason, versions)))
        return [left[index] for index in sorted(left)]

    def _budget(self, request: Request, params: SamplingParams) -> int:
        """Tokens that its response may still have."""
        return min(params.max_new_tokens, self._max_length - len(request.prompt_ids)) - len(request.begun.token_ids)

    @torch.inference_mode()
    def stream(self, request: Request, params: SamplingParams) -> Iterator[int]:
        """Yield the tokens of one request as they are drawn: those that `sample` gives it, one by one.

        Raises:
            UserError: as `sample`.
        """
        decoder = self._decoder
        if decoder is None:
            raise RuntimeError("the sampler is closed")
        self._check(request)
        budget = self._budget(request, params)
        limit = len(request.context_ids) + budget
        cache = KVCache(self._arch, rows=1, capacity=FIRST_CAPACITY, limit=limit, like=decoder.weights.embedding)
        state = _Rows.allocate(1, budget, self._device)
        logits = _admit(state, cache, list(computed_prompts(decoder, [request], 1)), 0, [request], [budget])
        while True:
            finished, _ = self._choose(state, logits, 1, params)
            yield int(state.latest[0])
            if bool(finished[0]):
                return
            logits = self._feed(decoder, cache, state, 1)

    def _rows_of(self, positions: int) -> int:
        """Sequences computed together at most if each may come to have so many positions."""
        if self._cache_bytes is None:
            return self._max_batch
        row = cache_bytes_a_position(self._arch, self._dtype) * positions
        if row > self._cache_bytes:
            raise UserError(
                f"keys and values of one sequence of {positions:,} tokens take {row / GIBIBYTE:.3g} GiB, of "
                f"{self._max_batch} together {self._max_batch * row / GIBIBYTE:,.0f} GiB; the cache may have "
                f"{self._cache_bytes / GIBIBYTE:.3g} GiB",
                rule="the built-in engine keeps the keys and values of at least one whole sequence",
                remedy="give the cache more memory, lower the maximum length, or sample with vLLM servers",
            )
        return min(self._max_batch, self._cache_bytes // row)

    def _check(self, request: Request) -> None:
        context, length = request.context_ids, len(request.prompt_ids)
        if not (length > 0 and len(context) < self._max_length):
            raise UserError(
                f"request {request.id!r} has a prompt of {length} tokens",
                rule=f"a prompt has at least one token and fewer than max_length {self._max_length}",
                remedy="drop the problem or raise the maximum length",
            )
        if not (min(context) >= 0 and max(context) < self._arch.vocab_size):
            raise UserError(
                f"request {request.id!r} has a token id outside 0..{self._arch.vocab_size - 1}",
                rule="prompt ids index the model's vocabulary",
                remedy="use the tokenizer that belongs to the model",
            )

    def _run(
        self,
        decoder: Decoder,
        requests: Sequence[Request],
        budgets: Sequence[int],
        params: SamplingParams,
        interrupted: threading.Event,
        at_most: int,
    ) -> Iterator[tuple[int, Tensor, Tensor, FinishReason | None]]:
        """Yield (request index, tokens, log-probabilities, reason) as sequences finish; None if interrupted."""
        if not requests:
            return
        limit = max(len(r.context_ids) + b for r, b in zip(requests, budgets, strict=True))
        rows = min(self._rows_of(limit), len(requests), at_most)
        like = decoder.weights.embedding
        cache = KVCache(self._arch, rows=rows, capacity=FIRST_CAPACITY, limit=limit, like=like)
        state = _Rows.allocate(rows, max(budgets), self._device)
        ready = computed_prompts(decoder, requests, rows)
        logits = like.new_zeros(0, self._arch.vocab_size)
        active, waiting = 0, len(requests)
        while (active or waiting) and not interrupted.is_set():
            free = min(rows - active, waiting)
            if free and (active == 0 or rows - active >= ADMIT_WHEN_FREE * rows):
                admitted = list(islice(ready, free))
                first_logits = _admit(state, cache, admitted, active, requests, budgets)
                logits = torch.cat((logits, first_logits))
                active, waiting = active + free, waiting - free
            finished, stopped = self._choose(state, logits, active, params)
            done = finished.nonzero()[:, 0]
            for row in done.tolist():
                yield *state.sampled(row), "stop" if bool(stopped[row]) else "length"
            active = _close_gaps(state, cache, finished, active)
            logits = logits[:0] if not active else self._feed(decoder, cache, state, active)
        for row in range(active):
            yield *state.sampled(row), None

    def _choose(self, state: _Rows, logits: Tensor, active: int, params: SamplingParams) -> tuple[Tensor, Tensor]:
        """Draw and record the next token of each active row; [active] whether it ended, and by a stop token.

        Both on the CPU, which waits for the device here, once more where a nucleus is drawn from, and nowhere else
        between two tokens.
        """
        rows = torch.arange(active, device=self._device)
        index = sent(state.generated[:active], self._device)
        if params.temperature == 0.0:
            tokens, logprobs = greedy_tokens(logits)
        else:
            uniforms = state.uniforms[rows, index]
            tokens, logprobs = sampled_tokens(logits, uniforms, temperature=params.temperature, top_p=params.top_p)
        stopped, is_finite = torch.stack((torch.isin(tokens, self._stop), torch.isfinite(logprobs))).cpu()
        if not bool(is_finite.all()):
            raise UserError(
                f"weights of version {self._version} give logits that are not finite",
                rule="a token is drawn from finite logits",
                remedy="look at the training run that made these weights: it has diverged",
            )
        state.tokens[rows, index] = tokens
        state.logprobs[rows, index] = logprobs
        state.latest[:active] = tokens
        state.generated[:active] += 1
        return stopped | (state.generated[:active] >= state.budget[:active]), stopped

    def _feed(self, decoder: Decoder, cache: KVCache, state: _Rows, active: int) -> Tensor:
        """Feed each active row its latest token; logits [active, vocab]."""
        positions = state.position[:active].clone()
        state.position[:active] += 1
        latest = state.latest[:active]
        return decoder.step(cache, latest, sent(positions, self._device), int(positions.max()) + 1)


def _admit(
    state: _Rows,
    cache: KVCache,
    admitted: Sequence[tuple[int, Prompts, int]],
    active: int,
    requests: Sequence[Request],
    budgets: Sequence[int],
) -> Tensor:
    """Put requests into the rows from `active` on; returns the logits [admitted, vocab] after their prompts."""
    device = state.latest.device
    logits = []
    for _, group in groupby(admitted, key=lambda item: id(item[1])):
        members = list(group)
        prompts = members[0][1]
        sources = sent(torch.tensor([row for _, _, row in members]), device)
        targets = torch.arange(active, active + len(members), device=device)
        cache.copy_rows(prompts.cache, sources, targets, prompts.cache.capacity)
        logits.append(prompts.logits[sources])
        for row, (index, _, _) in enumerate(members, start=active):
            state.request[row] = index
            state.position[row] = len(requests[index].context_ids)
            state.generated[row] = 0
            state.budget[row] = budgets[index]
            begun = len(requests[index].begun.token_ids)
            uniforms = torch.from_numpy(request_uniforms(requests[index].seed, begun + budgets[index])[begun:])
            state.uniforms[row, : budgets[index]] = sent(uniforms, device)
        active += len(members)
    return torch.cat(logits)


def _close_gaps(state: _Rows, cache: KVCache, finished: Tensor, active: int) -> int:
    """Move unfinished rows from the end into finished ones before it; returns how many rows stay active."""
    remaining = active - int(finished.sum())
    gaps = finished[:remaining].nonzero()[:, 0]
    movers = (~finished[remaining:]).nonzero()[:, 0] + remaining
    if len(gaps):
        device = state.latest.device
        cache.copy_rows(cache, sent(movers, device), sent(gaps, device), int(state.position[movers].max()))
        state.move(movers, gaps)
    return remaining
