"""A tokenizer's files: what they say of it, in a form that every release of transformers from 4.51 on reads.

transformers 5 gives the fast tokenizer's class another name and keeps its further special tokens under another key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.imports import lean_imports
from phimr_nemo.store.content import content_id
from phimr_nemo.store.inputs import download_remedy
from phimr_nemo.store.links import refuse_links_out
from phimr_nemo.store.unpacking import MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
FAST_CLASS: Final = "PreTrainedTokenizerFast"
NEW_FAST_CLASS: Final = "TokenizersBackend"
"""transformers 5's name of the same class."""
SPECIAL: Final = "additional_special_tokens"
NEW_SPECIAL: Final = "extra_special_tokens"
# How and where from transformers 5 has loaded it, which says nothing of the tokenizer.
OF_THE_LOADING: Final = ("backend", "is_local", "local_files_only")
OF_THE_CALL: Final = ("truncation", "padding")
"""What tokenizer.json keeps of how it was called last."""

READ_BY_TRANSFORMERS: Final = (
    *(TOKENIZER_FILE, TOKENIZER_CONFIG, "config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json"),
)
SLOW_FILES: Final = ("tokenizer.model", "spiece.model", "vocab.json")
MAX_SHOWN: Final = 200


def read_settings(directory: Path) -> dict[str, Any]:
    """A directory's tokenizer_config.json; {} where there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    file = directory / TOKENIZER_CONFIG
    try:
        settings = read_json(file)
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not a JSON object: {str(error)[:MAX_SHOWN]}",
            rule=f"a tokenizer says how it is used in {TOKENIZER_CONFIG}",
            remedy=download_remedy(file),
        ) from error
    return settings


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings as every release of transformers from 4.51 on understands them."""
    kept = {name: value for name, value in settings.items() if name not in OF_THE_LOADING}
    if kept.get("tokenizer_class") == NEW_FAST_CLASS:
        kept["tokenizer_class"] = FAST_CLASS
    if isinstance(kept.get(NEW_SPECIAL), list):
        kept.setdefault(SPECIAL, kept[NEW_SPECIAL])
        kept[NEW_SPECIAL] = {}
    return kept


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, from local files and without remote code.

    Raises:
        UserError: it cannot be read.
    """
    with lean_imports():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

    refuse_links_out(directory)
    _refuse_large(directory)
    stated = read_settings(directory)
    understood = portable(stated)
    changed = {name: value for name, value in understood.items() if stated.get(name) != value}
    is_renamed = changed.pop("tokenizer_class", None) is not None
    loader = PreTrainedTokenizerFast if is_renamed else AutoTokenizer
    try:
        opened: PreTrainedTokenizerBase = loader.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_fast=True, **changed
        )
    # The tokenizers library raises Exception itself, and a panic of its own that is none.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        found = str(error)[:MAX_SHOWN] or type(error).__name__
        file = _unreadable(directory)
        raise UserError(
            f"{directory} has a {file.name} that cannot be read: {found}",
            rule=f"a model directory has the files of a fast tokenizer, {TOKENIZER_FILE} and {TOKENIZER_CONFIG}",
            remedy=download_remedy(file),
        ) from error
    return opened


def fast_remedy(directory: Path) -> str:
    """How the files of a slow tokenizer become those of a fast one; "" where there are none."""
    slow = next((name for name in SLOW_FILES if (directory / name).is_file()), None)
    if slow is None:
        return ""
    return (
        f'its tokenizer is a slow one, {slow}; make a fast one: python -c "from transformers import AutoTokenizer; '
        f"AutoTokenizer.from_pretrained('{directory}', use_fast=True).save_pretrained('{directory}')\""
    )


@contextmanager
def panics_as_messages() -> Iterator[None]:
    """Say what a tokenizer fails at; the library ends a search of a pattern without end with a panic.

    Raises:
        UserError: a pattern of the tokenizer's finds no end in a text.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(
            f"the tokenizer fails at a text: {str(error)[:MAX_SHOWN]}",
            rule=f"the patterns in {TOKENIZER_FILE} divide any text in bounded time",
            remedy="use the tokenizer that the model was published with, or leave the text out",
        ) from error


def _unreadable(directory: Path) -> Path:
    """The first file that is seen to be no text or JSON, or else the tokenizer's own."""
    for name in READ_BY_TRANSFORMERS:
        try:
            text = (directory / name).read_text("utf-8")
            if name.endswith(".json"):
                json.loads(text)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError):
            return directory / name
    return directory / TOKENIZER_FILE


def words_hash(directory: Path) -> str:
    """A hash of how a directory's tokenizer turns text into ids and back, whatever its chat template and formatting.

    Raises:
        UserError: it has no tokenizer.json, or one that is no JSON object.
    """
    file = directory / TOKENIZER_FILE
    refuse_links_out(directory)
    try:
        content = read_json(file, limit=MAX_TOKENIZER_BYTES)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not a JSON object: {str(error)[:MAX_SHOWN]}",
            rule="a tokenizer is compared by the file of a fast one",
            remedy=download_remedy(file),
        ) from error
    kept = {name: value for name, value in content.items() if name not in OF_THE_CALL}
    return content_id("tokenizer", json.dumps(kept, sort_keys=True))


def _refuse_large(directory: Path) -> None:
    for file in sorted(directory.glob("*.j*")):
        limit = MAX_TOKENIZER_BYTES if file.name == TOKENIZER_FILE else MAX_CONFIG_BYTES
        if file.name in READ_BY_TRANSFORMERS and file.stat().st_size > limit:
            raise UserError(
                f"{file} has {file.stat().st_size:,} bytes",
                rule=f"this file of a tokenizer has at most {limit:,}",
                remedy=download_remedy(file),
            )
