"""A base model made ready for the recipe: its weights and tokenizer, with the reasoning chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phimr_nemo.data.chat import TEMPLATE_FILE, load_tokens, turn_format
from phimr_nemo.data.tokenizer import TOKENIZER_CONFIG, read_settings
from phimr_nemo.data.turns import with_tools
from phimr_nemo.errors import UserError
from phimr_nemo.model.files.companions import tokenizer_settings
from phimr_nemo.model.files.hf import HFDirectory, copy_hf_directory

DEFAULT: Final = "default"
"""The one of several named templates that is used unless another one is asked for."""
FOR_TOOLS: Final = "tool_use"
"""The one that transformers uses where tools are given."""


def adopt(source: Path, target: Path, *, system_prompt: str | None) -> None:
    """Copy a model directory and give the copy the reasoning template in the turn format of its tokenizer.

    Every stage renders conversations with the template of the directory that it starts from and hands it on, so this
    is done once, before the data is packed; the release then has the template that the model was trained with. A
    conversation with tools is rendered by the template that the directory had, which knows them, or else refused.

    Args:
        source: a Hugging Face directory with its tokenizer, e.g. microsoft/Phi-4-mini-instruct.
        target: where to; must not exist or be empty.
        system_prompt: what the template puts before every conversation; None: what its turn format has.

    Raises:
        UserError: an unreadable model or tokenizer, a system prompt that Jinja would read, or a target that exists.
    """
    model = HFDirectory(source)
    settings = read_settings(source)
    if not settings:
        raise UserError(
            f"{source} has no {TOKENIZER_CONFIG}",
            rule=f"a tokenizer says how it is used in {TOKENIZER_CONFIG}",
            remedy="copy or download the model again",
        )
    turns = turn_format(load_tokens(source))
    reasoning = turns.template(turns.system_prompt if system_prompt is None else system_prompt)
    template = with_tools(reasoning, _own_template(source, settings))
    settings = tokenizer_settings(settings, model.architecture) | {
        "chat_template": _with_default(settings.get("chat_template"), template)
    }
    changed = {TOKENIZER_CONFIG: json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}
    if (source / TEMPLATE_FILE).is_file():
        changed[TEMPLATE_FILE] = template
    copy_hf_directory(target, model, tokenizer_from=source, extra_files=changed)


def _own_template(source: Path, settings: Mapping[str, Any]) -> str:
    """The template that a directory has used so far for conversations with tools; "" where it has none."""
    if (source / TEMPLATE_FILE).is_file():
        return (source / TEMPLATE_FILE).read_text("utf-8")
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        named = {one["name"]: one.get("template") for one in stated if isinstance(one, dict) and "name" in one}
        stated = named.get(FOR_TOOLS, named.get(DEFAULT))
    return stated if isinstance(stated, str) else ""


def _with_default(stated: Any, template: str) -> Any:
    """The template in place of the one that was used so far; others have names, and stay."""
    if not isinstance(stated, list):
        return template
    others = [one for one in stated if not (isinstance(one, dict) and one.get("name") == DEFAULT)]
    return [{"name": DEFAULT, "template": template}, *others]
