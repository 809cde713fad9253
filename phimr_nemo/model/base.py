"""A base model for the tiny preset: the architecture of a family, random weights, a tokenizer of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from phimr_nemo.config import BaseConfig
from phimr_nemo.config.tiny import FamilyName
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.data.turns import CHATML, CHATML_LLAMA3, LLAMA3, PHI, TurnFormat
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.families.phi3 import PHI3
from phimr_nemo.model.families.smollm3 import SMOLLM3, every_fourth
from phimr_nemo.model.files.hf import write_hf_directory
from phimr_nemo.model.origin import Origin
from phimr_nemo.model.table import tensor_shapes

TURNS: Final[Mapping[FamilyName, TurnFormat]] = {
    "phi3": PHI,
    "llama": LLAMA3,
    "mistral": CHATML,
    "qwen2": CHATML,
    "qwen3": CHATML,
    "smollm3": CHATML_LLAMA3,
}
"""How the tokenizer that is made for a family marks turns."""


def run_base(config: BaseConfig) -> dict[str, Any]:
    """Train the tokenizer, draw the weights and write `<output>/hf`.

    Raises:
        UserError: an impossible shape, or a vocabulary that the texts cannot fill.
    """
    turns = TURNS[config.family]
    tokenizer = build_tokenizer(
        synthetic_corpus(), vocab_size=config.vocab_size, system_prompt=config.system_prompt, turns=turns
    )
    architecture = tiny_architecture(config, end_of_text=tokenizer.convert_tokens_to_ids(turns.end_of_text))
    target = config.run.output / "hf"
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        write_hf_directory(
            target,
            architecture,
            random_tensors(architecture, config.run.seed),
            tokenizer_from=Path(scratch),
            origin=Origin(single_turn=True),
        )
    return {"parameters": architecture.num_parameters, "hf": "hf"}


def tiny_architecture(config: BaseConfig, *, end_of_text: int) -> Architecture:
    """The architecture that a base config describes.

    Args:
        config: the shape. `long_factor_growth` makes Phi's long LongRoPE factors rise linearly from 1 by it;
            the short ones are all 1, as in Phi-4-mini.
        end_of_text: id of the token that begins, ends and pads.
    """
    is_phi = config.family == PHI3.model_type
    pairs = int(config.hidden_size // config.num_attention_heads * config.partial_rotary_factor) // 2
    return Architecture(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        partial_rotary_factor=config.partial_rotary_factor,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=True,
        max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=config.original_max_position_embeddings
        if is_phi
        else config.max_position_embeddings,
        short_factor=(1.0,) * pairs if is_phi else None,
        long_factor=tuple(1.0 + config.long_factor_growth * i / max(pairs - 1, 1) for i in range(pairs))
        if is_phi
        else None,
        sliding_window=None,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        initializer_range=config.initializer_range,
        family=config.family,
        no_rope_layers=every_fourth(config.num_hidden_layers) if config.family == SMOLLM3.model_type else None,
    )


def random_tensors(architecture: Architecture, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Starting weights under their Hugging Face names, fp32: norms 1, biases 0, everything else normal.

    Projections that write into the residual stream are scaled by 1 / sqrt(2 layers) (GPT-2, section 2.3).
    """
    generator = torch.Generator().manual_seed(seed)
    residual = (2 * architecture.num_hidden_layers) ** -0.5
    for name, shape in tensor_shapes(architecture).items():
        if "norm" in name:
            yield name, torch.ones(shape)
            continue
        if name.endswith(".bias"):
            yield name, torch.zeros(shape)
            continue
        scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        yield name, torch.randn(shape, generator=generator) * (architecture.initializer_range * scale)
