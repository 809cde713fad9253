"""Drawing tokens from logits: temperature, nucleus, and random numbers that belong to a request.

A request's random numbers are the output stream of a Philox counter-based generator keyed by its seed:
token t uses word t. They depend on neither the batch nor the order of work, so a request gives the same
tokens alone, in any batch, and when it is repeated after a crash. (What remains is rounding: a matrix
product may differ in its last bits between batch sizes, which matters only if a random number falls into
that gap of about 1e-7.)
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MANTISSA_BITS: Final = 52
WORD_BITS: Final = 64

NUCLEUS: Final = 256
"""Most probable tokens among which a nucleus is looked for first."""
SMALL_VOCABULARY: Final = 4096
"""Running sums over so few tokens are no slower than what saves them."""
LARGEST_BLOCK: Final = 256
"""Tokens that are added up at once; a power of two, as it often divides a vocabulary."""


def request_uniforms(seed: int, count: int) -> np.ndarray:
    """The first `count` uniforms of a request.

    They are multiples of 2^-52 in [0, 1): with 52 bits, and not 53, u * total < total holds in float64 for
    every total, so the inverse distribution function never runs past its end.

    Args:
        seed: the request's seed, non-negative, below 2^63.
        count: how many.

    Returns:
        float64 array [count]; a longer call begins with the same numbers.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return (words >> np.uint64(WORD_BITS - MANTISSA_BITS)).astype(np.float64) * 2.0**-MANTISSA_BITS


def greedy_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token of each row, and its log-probability at temperature 1.

    Args:
        logits: [batch, vocab].

    Returns:
        Token ids [batch] int64 and log-probabilities [batch] float32.
    """
    logits = logits.float()
    best, tokens = logits.max(dim=-1)
    return tokens, best - logits.logsumexp(dim=-1)


def sampled_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the distribution function at the row's uniform.

    Args:
        logits: [batch, vocab].
        uniforms: [batch] float64 in [0, 1).
        temperature: positive.
        top_p: keep the smallest set of most probable tokens with at least this mass (Holtzman et al. 2020).

    Returns:
        Token ids [batch] int64, and log-probabilities [batch] float32 under softmax(logits / temperature)
        over the whole vocabulary.
    """
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)
    probabilities = logprobs.exp()
    if top_p < 1.0:
        tokens = _invert_nucleus(probabilities, uniforms, top_p)
    elif logits.shape[1] <= SMALL_VOCABULARY:
        tokens = _invert(probabilities.cumsum(dim=-1, dtype=torch.float64), uniforms)
    else:
        tokens = _invert_in_blocks(probabilities, uniforms)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds u * total: never one of probability zero.

    The bound only matters for a row of NaN; the caller finds that in the log-probability.
    """
    targets = (uniforms * cumulative[:, -1])[:, None]
    found = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return found.clamp(max=cumulative.shape[1] - 1)


def _invert_in_blocks(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """What `_invert` finds in the cumulative sum of a whole row, in two steps.

    Blocks of tokens are added up, the block is found, and only in that one the sums are made token by token: over a
    vocabulary of 49 thousand running sums in float64 take a tenth of the time of a step on a CPU.
    """
    rows, vocabulary = probabilities.shape
    size = math.gcd(vocabulary, LARGEST_BLOCK)
    blocks = probabilities.view(rows, vocabulary // size, size)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    chosen = _invert(ends, uniforms)[:, None]
    inside = blocks.gather(1, chosen[..., None].expand(rows, 1, size))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    before = F.pad(ends, (1, 0)).gather(1, chosen)
    # Added up in another order the block's own sum may be less than what is left by a rounding error.
    left = (uniforms[:, None] * ends[:, -1:] - before).minimum(inside[:, -1:].nextafter(inside.new_zeros(())))
    found = torch.searchsorted(inside, left, right=True)
    return (chosen * size + found)[:, 0].clamp(max=vocabulary - 1)


def _invert_nucleus(probabilities: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """Draw from the nucleus of each row: the same token as from the whole row in order, without ordering all of it.

    Ordering 49 thousand probabilities takes as long as the model that gives them, and a nucleus rarely has more than
    some dozens. Rows whose nucleus does not surely end within the `NUCLEUS` most probable tokens are ordered whole.
    """
    if probabilities.shape[1] <= NUCLEUS:
        return _drawn_in_order(*_in_order(probabilities), uniforms, top_p)[0]
    # By token first: `topk` leaves the order of equal probabilities open.
    tokens = probabilities.topk(NUCLEUS, dim=-1).indices.sort(dim=-1).values
    ordered, rank = _in_order(probabilities.gather(1, tokens))
    drawn, ends_within = _drawn_in_order(ordered, tokens.gather(1, rank), uniforms, top_p)
    others = (~ends_within).nonzero()[:, 0]
    if len(others):
        whole = _in_order(probabilities[others])
        drawn[others] = _drawn_in_order(*whole, uniforms[others], top_p)[0]
    return drawn


def _in_order(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Each row from the most probable entry on, equal ones in the order of their places, and these places."""
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    return ordered, places


def _drawn_in_order(ordered: Tensor, tokens: Tensor, uniforms: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw from the nucleus of ordered probabilities, of all tokens or of the most probable ones.

    Returns:
        Tokens [batch], and [batch] whether the nucleus ends before the last probability that is there: no token that
        is not there, not even one of equal probability, belongs to it then.
    """
    mass = ordered.double()
    outside = mass.cumsum(dim=-1) - mass >= top_p
    kept = mass.masked_fill(outside, 0.0)
    ranks = _invert(kept.cumsum(dim=-1), uniforms)
    ends_within = (outside | (ordered > ordered[:, -1:])).all(dim=-1)
    return tokens.gather(1, ranks[:, None])[:, 0], ends_within
