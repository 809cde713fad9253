"""A base model made ready for the recipe: its weights and tokenizer, with the reasoning chat template."""

from __future__ import annotations

import json
from pathlib import Path

from phimr_nemo.data.chat import TEMPLATE_FILE, TOKENIZER_CONFIG, load_tokenizer, reasoning_template
from phimr_nemo.errors import UserError
from phimr_nemo.model.files.hf import HFDirectory, copy_hf_directory
from phimr_nemo.store.foreignjson import read_json


def adopt(source: Path, target: Path, *, system_prompt: str) -> None:
    """Copy a Phi-family model directory and give the copy the reasoning template.

    Every stage renders conversations with the template of the directory that it starts from and hands it on, so this
    is done once, before the data is packed; the release then has the template that the model was trained with.

    Args:
        source: a Hugging Face directory with its tokenizer, e.g. microsoft/Phi-4-mini-instruct.
        target: where to; must not exist or be empty.
        system_prompt: what the template puts before every conversation.

    Raises:
        UserError: an unreadable model or tokenizer, a system prompt that Jinja would read, or a target that exists.
    """
    template = reasoning_template(system_prompt)
    model = HFDirectory(source)
    file = source / TOKENIZER_CONFIG
    try:
        settings = read_json(file)
        settings["chat_template"] = template
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file}: {error}",
            rule="a tokenizer says how it is used in tokenizer_config.json",
            remedy="copy or download the model again",
        ) from error
    load_tokenizer(source)
    changed = {TOKENIZER_CONFIG: json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}
    if (source / TEMPLATE_FILE).is_file():
        changed[TEMPLATE_FILE] = template
    copy_hf_directory(target, model, tokenizer_from=source, extra_files=changed)
