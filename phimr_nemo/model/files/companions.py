"""What a model directory holds besides its weights: configuration, end tokens, tokenizer, chat templates, licence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.data.chat import TEMPLATE_FILE
from phimr_nemo.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, portable, read_settings
from phimr_nemo.data.turns import FORMATS
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import CONFIG_FILE, Architecture
from phimr_nemo.model.fields import is_number
from phimr_nemo.model.origin import Origin, read_origin
from phimr_nemo.store.inputs import download_remedy, is_pointer
from phimr_nemo.store.links import refuse_links_out
from phimr_nemo.store.unpacking import MAX_TOKENIZER_BYTES, read_json

if TYPE_CHECKING:
    import torch

GENERATION_FILE: Final = "generation_config.json"
MAX_SHOWN: Final = 200
TOKENIZER_FILES: Final = (
    TOKENIZER_FILE,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
    "chat_template.json",
)
TEMPLATES: Final = "additional_chat_templates"
"""A directory of named chat templates, in releases of transformers from 4.52 on."""
SAMPLING: Final[Mapping[str, tuple[str, Callable[[float], bool]]]] = {
    "temperature": ("a number above 0", lambda value: value > 0),
    "top_p": ("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": ("a whole number, 0 for all tokens", lambda value: value >= 0 and value == int(value)),
    "min_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("a number above 0", lambda value: value > 0),
}
TEXTS: Final = (".jinja", ".json", ".txt")
LICENCES: Final = re.compile(r"(licen[cs]e|notice|copying)([._-].*)?", re.IGNORECASE)
INPUT_NAMES: Final = ["input_ids", "attention_mask"]
"""What a model takes; a tokenizer without a class of its own would give token types too."""


def write_model_files(
    directory: Path,
    arch: Architecture,
    tokenizer_from: Path,
    dtype: torch.dtype | None,
    origin: Origin | None = None,
) -> None:
    """Write what a model directory holds besides its weights: config, generation config, tokenizer, chat templates.

    Args:
        directory: where to; it exists.
        arch: the model.
        tokenizer_from: a directory with the tokenizer's files; its generation config and licence are handed on too.
        dtype: of the weights, for config.json; None leaves it unsaid.
        origin: how the model was made; None: what the tokenizer's directory says of that is handed on.

    Raises:
        UserError: the tokenizer is missing or does not fit the model, or a file of it cannot be read.
    """
    stated = {} if dtype is None else {"torch_dtype": str(dtype).removeprefix("torch.")}
    made = read_origin(tokenizer_from) if origin is None else origin
    _write_json(directory / CONFIG_FILE, {**arch.to_hf_config(), **stated, **made.to_config()})
    _write_json(directory / GENERATION_FILE, check_companions(arch, tokenizer_from))
    settings = read_settings(tokenizer_from)
    if settings:
        _write_json(directory / TOKENIZER_CONFIG, tokenizer_settings(settings, arch))
    for file in _copied(tokenizer_from):
        target = directory / file.relative_to(tokenizer_from)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def check_companions(arch: Architecture, directory: Path) -> dict[str, Any]:
    """The generation config of :func:`generation_config`, after looking at all that a model hands on.

    Raises:
        UserError: as there; or a file is a pointer of Git LFS, or a template no UTF-8.
    """
    refuse_links_out(directory)
    for file in _copied(directory):
        if is_pointer(file):
            raise UserError(
                f"{file} is a pointer of Git LFS, not the file itself",
                rule="a model hands its tokenizer, templates and licence on as they are",
                remedy=download_remedy(file),
            )
        if file.suffix in TEXTS:
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} is no UTF-8: {error}", rule="templates are UTF-8 text", remedy=download_remedy(file)
                ) from error
    return generation_config(arch, directory)


def tokenizer_settings(settings: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """tokenizer_config.json of a model, so that `model.generate(**tokenizer(text))` works in transformers 4.51 and 5.

    Args:
        settings: those of the tokenizer that the model was made with.
        arch: the model.
    """
    length = settings.get("model_max_length")
    context = arch.max_position_embeddings
    is_within = isinstance(length, int) and not isinstance(length, bool) and 1 <= length <= context
    return {
        **portable(dict(settings)),
        "model_input_names": INPUT_NAMES,
        "model_max_length": length if is_within else context,
    }


def generation_config(arch: Architecture, tokenizer_from: Path) -> dict[str, Any]:
    """What generation_config.json of a model says: its predecessor's settings, completed.

    Without a predecessor the end tokens are [end of turn, end of text], as in Phi-4-mini's own.

    Args:
        arch: the model.
        tokenizer_from: a directory with the tokenizer and, where there is one, the generation config.

    Raises:
        UserError: the tokenizer does not fit the model, or the generation config is none.
    """
    added = read_added_tokens(tokenizer_from, arch)
    end_of_turn = next((added[turns.end] for turns in FORMATS if turns.end in added), None)
    stated = _stated_generation(tokenizer_from / GENERATION_FILE, arch)
    ends = [*stated.get("eos_token_id", ()), *([] if end_of_turn is None else [end_of_turn])]
    ends += [token for token in _ends_in_config(tokenizer_from, arch) if token not in ends]
    known = {name: stated.get(name) for name in ("bos_token_id", "pad_token_id")}
    return {
        **(stated or {"_from_model_config": True}),
        "bos_token_id": arch.bos_token_id if known["bos_token_id"] is None else known["bos_token_id"],
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": arch.pad_token_id if known["pad_token_id"] is None else known["pad_token_id"],
    }


def _stated_generation(file: Path, arch: Architecture) -> dict[str, Any]:
    """A generation config with its end tokens as a list; {} where there is none."""
    try:
        stated = read_json(file)
        if not isinstance(stated, dict):
            raise ValueError(f"a {type(stated).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not a JSON object: {error}",
            rule="generation_config.json says where responses end and how they are sampled",
            remedy=f"{download_remedy(file)}, or delete it",
        ) from error
    stated = _sampling(file, stated)
    for name in ("bos_token_id", "pad_token_id"):
        _check_ids(file, name, [] if stated.get(name) is None else [stated[name]], arch)
    ends = stated.get("eos_token_id")
    if ends is None:
        return {name: value for name, value in stated.items() if name != "eos_token_id"}
    ids = ends if isinstance(ends, list) else [ends]
    _check_ids(file, "eos_token_id", ids, arch)
    return {**stated, "eos_token_id": ids}


def _check_ids(file: Path, name: str, ids: list[Any], arch: Architecture) -> None:
    wrong = [token for token in ids if isinstance(token, bool) or not isinstance(token, int)]
    if wrong or any(not 0 <= token < arch.vocab_size for token in ids):
        raise UserError(
            f"{file}: {name} = {ids!r}",
            rule=f"tokens are ids below the model's vocab_size, {arch.vocab_size}",
            remedy="use the file that belongs to the model, or delete it",
        )


def _sampling(file: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """A generation config whose sampling settings transformers takes; what other engines write for "off" is its own.

    Raises:
        UserError: a setting that means nothing.
    """
    if stated.get("top_k") == -1:
        stated = {**stated, "top_k": 0}
    if stated.get("temperature") == 0 and not isinstance(stated["temperature"], bool):
        stated = {name: value for name, value in stated.items() if name not in SAMPLING} | {"do_sample": False}
    for name, (rule, is_right) in SAMPLING.items():
        value = stated.get(name)
        if value is not None and not (is_number(value) and is_right(value)):
            raise UserError(
                f"{file}: {name} = {value!r}",
                rule=f"{name} is {rule}",
                remedy="use the file that belongs to the model, or delete it",
            )
    return stated


def _ends_in_config(directory: Path, arch: Architecture) -> list[int]:
    """The end tokens of config.json, which may list several; at least the architecture's."""
    try:
        stated = read_json(directory / CONFIG_FILE).get("eos_token_id")
    except (OSError, ValueError, RecursionError, AttributeError):
        stated = None
    listed = stated if isinstance(stated, list) else []
    return [arch.eos_token_id, *(token for token in listed if isinstance(token, int) and token != arch.eos_token_id)]


def _copied(directory: Path) -> Iterator[Path]:
    """The files that are handed on as they are."""
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            yield directory / name
    yield from sorted(file for file in directory.iterdir() if LICENCES.fullmatch(file.name) and file.is_file())
    yield from sorted((directory / TEMPLATES).glob("*.jinja"))


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
            remedy=download_remedy(file),
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
