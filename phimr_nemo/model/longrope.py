"""Rotary embeddings; LongRoPE's have one set of frequencies for short and one for long sequences.

Phi-4-mini divides its inverse frequencies by ``short_factor`` up to 4,096 tokens and by ``long_factor`` above,
and multiplies cos and sin by ``attention_factor`` in both regimes (LongRoPE, arXiv 2402.13753). Which set
applies is a *policy*, because the engines disagree:

- ``long_when_max_length_exceeds_original``: long for every sequence of a run whose maximum length exceeds the
  original one. As in vLLM (``max_model_len``) and TensorRT-LLM.
- ``per_sequence``: long for sequences longer than the original length, short for the others. As in
  transformers, with one sequence per batch.
- ``always_short``: short, plain RoPE.

Trainer and sampler must use one policy: between the regimes log-probabilities differ by several nats. (A
sampler that grows a sequence past the boundary under ``per_sequence`` has cached keys of the other regime,
which no trainer can reproduce; the default policy has no such boundary.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from phimr_nemo.config import LongRopePolicy
from phimr_nemo.losses.device import sent
from phimr_nemo.model.regime import uses_long_factors

if TYPE_CHECKING:
    from phimr_nemo.model.architecture import Architecture

__all__ = ["LongRopePolicy", "LongRotaryEmbedding", "inverse_frequencies", "uses_long_factors"]


def inverse_frequencies(
    arch: Architecture, max_length: int, policy: LongRopePolicy, sequence_length: int | None = None
) -> Tensor:
    """Angle per position of every rotated pair: 1 / (factor_i * theta^(2i / rotary_dim)).

    Args: as ``uses_long_factors``.

    Returns:
        float32 [rotary_dim / 2], radians per token.

    Raises:
        UserError: as ``uses_long_factors``.
    """
    is_long = uses_long_factors(arch, max_length, policy, sequence_length)
    factors = arch.long_factor if is_long else arch.short_factor
    # In float32 and in this order of operations, because transformers computes it so: equal to the last bit.
    exponents = torch.arange(0, arch.rotary_dim, 2, dtype=torch.int64).float() / arch.rotary_dim
    scale = torch.ones_like(exponents) if factors is None else torch.tensor(factors, dtype=torch.float32)
    plain = 1.0 / (scale * arch.rope_theta**exponents)
    return plain if arch.llama3 is None else _slowed(plain, *arch.llama3)


def _slowed(frequencies: Tensor, factor: float, low: float, high: float, original: int) -> Tensor:
    """Llama 3.1's scaling, in transformers' order of operations.

    What turns more than `high` times within the original length stays, what turns less than `low` times is divided by
    the factor, and in between the share of both is linear in the number of turns.
    """
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    share = (original / wavelengths - low) / (high - low)
    between = (1 - share) * slowed / factor + share * slowed
    is_between = ~(wavelengths < original / high) * ~(wavelengths > original / low)
    return torch.where(is_between, between, slowed)


class LongRotaryEmbedding(nn.Module):
    """Rotary angles for Megatron's attention, in place of its ``RotaryEmbedding``.

    Megatron applies cos and sin itself; the attention factor is applied to queries and keys by
    ``RotaryScale`` (rotation is linear, so scaling before or after it is the same).
    """

    def __init__(self, arch: Architecture, max_length: int, policy: LongRopePolicy) -> None:
        super().__init__()
        self.policy: LongRopePolicy = policy
        self.original_length = arch.original_max_position_embeddings
        # The two regimes of this run; equal unless the policy looks at each sequence. Not buffers:
        # model.bfloat16() would round the angles away.
        self.short_frequencies = inverse_frequencies(arch, max_length, policy, 1)
        self.long_frequencies = inverse_frequencies(arch, max_length, policy, self.original_length + 1)

    def for_length(self, length: int, device: torch.device, longest: int | None = None) -> Tensor:
        """Angles of one sequence (or of rows of one length): float32 [length, 1, 1, rotary_dim].

        Args:
            length: of the table (tokens).
            device: where to.
            longest: what decides the regime under ``per_sequence``, if not `length`.
        """
        return self.for_positions(torch.arange(length, device=device), length if longest is None else longest)

    def for_positions(self, positions: Tensor, length: int) -> Tensor:
        """Angles of some positions of a sequence.

        Args:
            positions: int [n].
            length: of the sequence (tokens); it decides the regime under ``per_sequence``.

        Returns:
            float32 [n, 1, 1, rotary_dim].
        """
        is_long = length > self.original_length
        short, long = self._frequencies(positions.device)
        return _angles(torch.outer(positions.float(), long if is_long else short))[:, None, None]

    def for_documents(self, lengths: Tensor, device: torch.device | None = None) -> Tensor:
        """Angles of a packed row whose documents each start at position 0.

        Args:
            lengths: int [documents], their lengths in order (tokens).
            device: where to; None = to the lengths.

        Returns:
            float32 [sum(lengths), 1, rotary_dim].
        """
        starts = torch.cumsum(lengths, 0) - lengths
        tokens = int(lengths.sum())
        positions = torch.arange(tokens, device=lengths.device) - torch.repeat_interleave(
            starts, lengths, output_size=tokens
        )
        of_tokens = positions, torch.repeat_interleave(lengths, lengths, output_size=tokens)
        return self.for_tokens(*(sent(numbers, device or lengths.device) for numbers in of_tokens))

    def for_tokens(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Angles of tokens of several documents.

        Args:
            positions: int [t], each token's position in its document.
            lengths: int [t], the length of its document (tokens).

        Returns:
            float32 [t, 1, rotary_dim].
        """
        is_long = (lengths > self.original_length)[:, None]
        short, long = self._frequencies(positions.device)
        frequencies = torch.where(is_long, long, short)
        return _angles(positions.float()[:, None] * frequencies)[:, None]

    def _frequencies(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Short and long ones on a device."""
        if self.short_frequencies.device != device:
            # Once: a copy in every forward pass would make the GPU wait for it.
            self.short_frequencies = self.short_frequencies.to(device)
            self.long_frequencies = self.long_frequencies.to(device)
        return self.short_frequencies, self.long_frequencies


def _angles(half: Tensor) -> Tensor:
    """[t, rotary_dim / 2] -> [t, rotary_dim]: both halves of the rotated dimensions turn alike."""
    return torch.cat((half, half), dim=-1)
