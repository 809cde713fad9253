"""Small Phi-3 models of every shape that the bridge must carry; runs in the bridge's environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

ORIGINAL = 64
LONGEST = 2048
VOCABULARY = 256
PADDING = 0
SHORT = [1.0, 1.0, 1.1, 1.2, 1.3, 1.5]
LONG = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
# Head dimension 16, of which 12 are rotated; as many numbers as the tests can tell apart.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LONGEST,
    "original_max_position_embeddings": ORIGINAL,
    "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of the step that both sides take.
ADAM: dict[str, Any] = {
    "optimizer": "adam",
    "lr": 1e-2,
    "min_lr": 1e-2,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "clip_grad": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    # Phi-3-mini-4k: no LongRoPE, all dimensions rotated, as many key as query heads, a window of attention.
    "plain": {
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "num_key_value_heads": 4,
        "sliding_window": 47,
        "tie_word_embeddings": False,
    },
    # Nothing but the fused weights is unusual.
    "full": {"rope_scaling": None, "partial_rotary_factor": 1.0},
}


def save(directory: Path, variant: str, layout: str) -> None:
    """Write a model with random weights in float32.

    Args:
        directory: to be made.
        variant: a key of ``VARIANTS``.
        layout: whose config.json: ``transformers4`` (rope_scaling beside rope_theta) or ``transformers5``
            (rope_parameters, as the installed version writes it).
    """
    settings = {**SHAPE, **VARIANTS[variant]}
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    words = WordLevel({str(word): word for word in range(VOCABULARY)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(directory)
    if layout == "transformers4":
        written = json.loads((directory / "config.json").read_text())
        del written["rope_parameters"]
        (directory / "config.json").write_text(json.dumps({**written, **settings}, indent=2))
