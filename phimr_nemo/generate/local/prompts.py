"""The first pass of the built-in engine: prompts, with what was sampled of their responses before, into the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from phimr_nemo.generate.local.decoder import Decoder, KVCache
from phimr_nemo.generate.sampler import Request

PREFILL_TOKENS: Final = 16_384
"""Padded prompt tokens in one forward pass at most; bounds the memory of its activations."""


@dataclass(frozen=True)
class Prompts:
    """Distinct prompts computed together: cache rows, and the logits [prompts, vocab] after each."""

    cache: KVCache
    logits: Tensor


def computed_prompts(decoder: Decoder, requests: Sequence[Request], batch: int) -> Iterator[tuple[int, Prompts, int]]:
    """Yield (request index, block of computed prompts, row in it), requests of one prompt in succession.

    Each distinct prompt is computed once. A block holds as many prompts as feed `batch` requests, within
    `PREFILL_TOKENS`; only the current block is kept.
    """
    askers: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        askers.setdefault(request.context_ids, []).append(index)
    block: list[tuple[int, ...]] = []
    for prompt in askers:
        longest = max(len(p) for p in (*block, prompt))
        is_full = (len(block) + 1) * longest > PREFILL_TOKENS or sum(len(askers[p]) for p in block) >= batch
        if block and is_full:
            yield from _compute_block(decoder, block, askers)
            block = []
        block.append(prompt)
    if block:
        yield from _compute_block(decoder, block, askers)


def _compute_block(
    decoder: Decoder, block: Sequence[tuple[int, ...]], askers: Mapping[tuple[int, ...], Sequence[int]]
) -> Iterator[tuple[int, Prompts, int]]:
    computed = Prompts(*decoder.prefill(block))
    for row, prompt in enumerate(block):
        for index in askers[prompt]:
            yield index, computed, row
