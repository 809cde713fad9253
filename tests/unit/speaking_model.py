"""A real model of the family that says one text to everything: a chain of tokens from each to the next."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from phimr_nemo.data.chat import ASSISTANT, END, load_tokenizer

CERTAIN = 20.0
"""Logit of the next token of the chain, before the final norm's scale; others have codes of chance."""


def speaking_model(base: Path, target: Path, text: str) -> Path:
    """A copy of a tiny base whose greedy reply is `text`, each of whose tokens occurs once.

    Layers add nothing, so the last token alone decides: the output row of the chain's next token is its embedding.
    """
    shutil.copytree(base, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tokenizer = load_tokenizer(target)
    spoken = tokenizer(text, add_special_tokens=False)["input_ids"]
    chain = [tokenizer.convert_tokens_to_ids(ASSISTANT), *spoken, tokenizer.convert_tokens_to_ids(END)]
    assert len(set(chain)) == len(chain), f"{text!r} has a token twice"
    [file] = target.glob("*.safetensors")
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    embedding = tensors["model.embed_tokens.weight"]
    codes = torch.nn.functional.normalize(
        torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)), dim=1
    )
    head = torch.zeros_like(codes)
    for token, following in itertools.pairwise(chain):
        head[following] = CERTAIN * codes[token]
    tensors |= {"model.embed_tokens.weight": codes, "lm_head.weight": head}
    save_file(tensors, file, metadata={"format": "pt"})
    return target
