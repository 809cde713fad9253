"""What a model directory holds besides its weights: configuration, end tokens, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from phimr_nemo.data.chat import END
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import CONFIG_FILE, Architecture
from phimr_nemo.model.origin import Origin, read_origin
from phimr_nemo.store.foreignjson import MAX_TOKENIZER_BYTES, read_json
from phimr_nemo.store.links import refuse_links_out

GENERATION_FILE: Final = "generation_config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
MAX_SHOWN: Final = 200
TOKENIZER_FILES: Final = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def write_model_files(
    directory: Path,
    arch: Architecture,
    tokenizer_from: Path,
    dtype: torch.dtype | None,
    origin: Origin | None = None,
) -> None:
    """Write what a model directory holds besides its weights: config, generation config, tokenizer, chat template.

    Args:
        directory: where to; it exists.
        arch: the model.
        tokenizer_from: a directory with the tokenizer's files.
        dtype: of the weights, for config.json; None leaves it unsaid.
        origin: how the model was made; None: what the tokenizer's directory says of that is handed on.

    Raises:
        UserError: the tokenizer is missing or does not fit the model.
    """
    stated = {} if dtype is None else {"torch_dtype": str(dtype).removeprefix("torch.")}
    made = read_origin(tokenizer_from) if origin is None else origin
    _write_json(directory / CONFIG_FILE, {**arch.to_hf_config(), **stated, **made.to_config()})
    refuse_links_out(tokenizer_from)
    added_tokens = read_added_tokens(tokenizer_from, arch)
    _write_json(directory / GENERATION_FILE, generation_config(arch, added_tokens))
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, directory / name)


def generation_config(arch: Architecture, added_tokens: Mapping[str, int]) -> dict[str, Any]:
    """End tokens for generation: [end of turn, end of text], as in Phi-4-mini's own generation_config.json."""
    ends = [arch.eos_token_id]
    end_of_turn = added_tokens.get(END)
    if end_of_turn is not None and end_of_turn not in ends:
        ends.insert(0, end_of_turn)
    return {
        "_from_model_config": True,
        "bos_token_id": arch.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": arch.pad_token_id,
    }


def read_added_tokens(directory: Path, arch: Architecture) -> dict[str, int]:
    """The tokenizer's added tokens (text -> id), after comparing the tokenizer with the model.

    Raises:
        UserError: no tokenizer.json, not one that is understood, or ids outside the model's vocabulary.
    """
    file = Path(directory) / TOKENIZER_FILE
    try:
        loaded = read_json(file, limit=MAX_TOKENIZER_BYTES)
        added = {str(token["content"]): int(token["id"]) for token in loaded["added_tokens"]}
        largest = max((*map(int, loaded["model"]["vocab"].values()), *added.values()))
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} has no {TOKENIZER_FILE}",
            rule="a model directory brings its tokenizer",
            remedy="give the directory of the base model as the tokenizer's source",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{file} is not a tokenizer that is understood here: {str(error)[:MAX_SHOWN] or type(error).__name__}",
            rule="a fast tokenizer is a JSON file with model.vocab and added_tokens",
            remedy="copy or download the tokenizer again",
        ) from error
    if largest >= arch.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has the id {largest}, the model a vocabulary of {arch.vocab_size}",
            rule="every token id is below vocab_size",
            remedy="use the tokenizer that belongs to the model",
        )
    return added


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
