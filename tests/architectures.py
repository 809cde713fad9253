"""A small model of the Phi3 family; a test changes what matters to it."""

from __future__ import annotations

import dataclasses
from typing import Any

from phimr_nemo.model.architecture import Architecture

SMALL = Architecture(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    partial_rotary_factor=0.75,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=256,
    original_max_position_embeddings=256,
    short_factor=None,
    long_factor=None,
    sliding_window=None,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    initializer_range=0.02,
)


def small(**changes: Any) -> Architecture:
    """`SMALL` with other values."""
    return dataclasses.replace(SMALL, **changes)
