"""Settings of the tiny base model and of the quickstart that runs on it."""

from __future__ import annotations

from phimr_nemo.config.common import Positive, RunConfig, config


@config
class BaseConfig:
    """A randomly initialised model of the Phi-4-mini architecture with a tokenizer of its own.

    Attributes:
        vocab_size: of the tokenizer that is trained on the synthetic problems.
        system_prompt: what the chat template puts before every conversation.
    """

    run: RunConfig
    vocab_size: Positive
    system_prompt: str
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    partial_rotary_factor: float
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: Positive
    original_max_position_embeddings: Positive
    long_factor_growth: float
    initializer_range: float


@config
class QuickstartConfig:
    """The whole recipe on a tiny model: one preset a step, and the sizes that are the quickstart's own."""

    run: RunConfig
    train_problems: Positive
    heldout_problems: Positive
    rl_problems: Positive
    evaluation_samples: Positive
