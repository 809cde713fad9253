"""The chat format: what a question and an answer look like to the model, token by token.

The system text belongs to the tokenizer directory's own chat template, so every stage, the sampler and
transformers users see the same prompt.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.data.template import check_template
from phimr_nemo.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, open_tokenizer
from phimr_nemo.errors import UserError
from phimr_nemo.store.inputs import model_remedy
from phimr_nemo.store.unpacking import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

END_OF_TEXT: Final = "<|endoftext|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
END: Final = "<|end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, SYSTEM, USER, ASSISTANT, END)

TEMPLATE_FILE: Final = "chat_template.jinja"
"""Where newer releases of transformers keep the template; it takes precedence."""
REASONING_SYSTEM_PROMPT: Final = "Your name is Phi, an AI math expert developed by Microsoft."


def reasoning_template(system_prompt: str) -> str:
    """The Phi reasoning chat template (Jinja) with a given system text.

    It always opens with the system text, to which the user's own system message is appended after a
    space; then come `<|role|>content<|end|>` and, where a generation is asked for, `<|assistant|>`.

    Raises:
        UserError: the system text holds a quote, a backslash, a line break or a brace, which Jinja would read.
    """
    if any(character in system_prompt for character in "'\\\n{}"):
        raise UserError(
            f"system prompt {system_prompt!r}",
            rule="a system prompt holds no single quote, backslash, line break or brace",
            remedy="rephrase it",
        )
    return (
        "{{ '" + SYSTEM + system_prompt + "' }}"
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ ' ' + message['content'] }}"
        "{% endif %}{% endfor %}"
        "{{ '" + END + "' }}"
        "{% for message in messages %}{% if message['role'] != 'system' %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% else %}{{ eos_token }}{% endif %}"
    )


REASONING_TEMPLATE: Final = reasoning_template(REASONING_SYSTEM_PROMPT)
_OWN_TEMPLATE: Final = re.compile(re.escape(reasoning_template("PROMPT")).replace("PROMPT", r"[^'\\\n{}]*"))


def warn_of_other_template(directory: Path) -> None:
    """Log a warning when a directory's chat template has no system prompt of its own, as Phi-4-mini-instruct's.

    What is trained through it differs from the reasoning model's prompt, in this and in every later stage.
    """
    template = (directory / TEMPLATE_FILE, directory / TOKENIZER_CONFIG)
    try:
        text = template[0].read_text("utf-8") if template[0].is_file() else _template_in(template[1])
    except (OSError, ValueError):
        return  # load_tokenizer says what is wrong with it
    if text and SYSTEM not in text:
        _LOGGER.warning(
            "%s has a chat template without the reasoning model's system prompt; every stage hands it on to the "
            "release. `phimr adopt %s TARGET` makes a copy with the reasoning template.",
            *(directory, directory),
        )


def _template_in(file: Path) -> str:
    settings = read_json(file)
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    return template if isinstance(template, str) else ""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, from local files and without remote code.

    Raises:
        UserError: no tokenizer.json there, one that cannot be read, or the Phi chat tokens or a chat template are
            missing, or the template does not render a question in seconds.
    """
    tokenizer = load_tokens(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {directory} lacks a chat template",
            rule="a model is asked through the chat template of its tokenizer",
            remedy=f"`phimr adopt {directory} TARGET` makes a copy with the reasoning template",
        )
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, Mapping) else [templates]:
        if _OWN_TEMPLATE.fullmatch(template) is None:
            check_template(template, directory, tokenizer.special_tokens_map)
    return tokenizer


def load_tokens(directory: Path) -> PreTrainedTokenizerBase:
    """As :func:`load_tokenizer`, of a directory that need not have a chat template yet.

    Raises:
        UserError: no tokenizer.json there, one that cannot be read, or the Phi chat tokens are missing.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        raise UserError(
            f"{directory} holds no {TOKENIZER_FILE}",
            rule="a tokenizer directory is a Hugging Face directory with a fast tokenizer",
            remedy=model_remedy(directory),
        )
    tokenizer = open_tokenizer(directory)
    missing = sorted(set(SPECIAL_TOKENS) - set(tokenizer.get_added_vocab()))
    if missing:
        raise UserError(
            f"the tokenizer in {directory} lacks {missing}",
            rule=f"a Phi tokenizer has the added tokens {list(SPECIAL_TOKENS)}",
            remedy="give a Phi-family model's directory, or build a tokenizer with this project",
        )
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response: `<|end|>` and `<|endoftext|>`, in this order."""
    return tuple(tokenizer.convert_tokens_to_ids([END, END_OF_TEXT]))


def holds_special_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the text spells an added token: tokenised, it would forge a turn of the conversation."""
    return any(token in text for token in tokenizer.get_added_vocab())


def render_prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    """The prompt ids of many questions, up to and including `<|assistant|>`.

    Raises:
        UserError: a question spells an added token.
    """
    for question in questions:
        _refuse_special_tokens(tokenizer, question)
    texts = [prompt_text(tokenizer, question) for question in questions]
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else []


def render_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The prompt ids of one question, up to and including `<|assistant|>`.

    Raises:
        UserError: the question spells an added token.
    """
    return render_prompts(tokenizer, [question])[0]


def render_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt ids of a conversation so far, up to and including `<|assistant|>`.

    Args:
        tokenizer: a Phi tokenizer (see :func:`load_tokenizer`).
        turns: messages with `role` ("system", "user" or "assistant") and `content`.

    Raises:
        UserError: a turn spells an added token.
    """
    for turn in turns:
        _refuse_special_tokens(tokenizer, turn["content"])
    return list(tokenizer(_conversation_text(tokenizer, turns), add_special_tokens=False)["input_ids"])


def render_conversations(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], responses: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Ids and loss masks of many conversations; tokenised in one batch, hence on all cores.

    Args:
        tokenizer: a Phi tokenizer (see :func:`load_tokenizer`).
        questions: one question a conversation.
        responses: the response to each.

    Returns:
        For each conversation `(ids, loss_mask)` of one length; the mask is 1 on the response and its
        final `<|end|>`, 0 on the prompt.

    Raises:
        UserError: a question or response spells an added token.
    """
    for text in (*questions, *responses):
        _refuse_special_tokens(tokenizer, text)
    texts = [
        prompt_text(tokenizer, question) + response + END
        for question, response in zip(questions, responses, strict=True)
    ]
    if not texts:
        return []
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    conversations = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        prompt_length = ids.index(assistant) + 1
        conversations.append((ids, [0] * prompt_length + [1] * (len(ids) - prompt_length)))
    return conversations


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, question: str, response: str
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of one conversation (see :func:`render_conversations`).

    Raises:
        UserError: the question or response spells an added token.
    """
    return render_conversations(tokenizer, [question], [response])[0]


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of sampled ids, without special tokens and otherwise unchanged."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The prompt of a question as text, up to and including `<|assistant|>`."""
    return _conversation_text(tokenizer, [{"role": "user", "content": question}])


def _conversation_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))


def _refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    if holds_special_token(tokenizer, text):
        raise UserError(
            f"text {text[:80]!r} spells a special token",
            rule=f"questions and responses hold none of {sorted(tokenizer.get_added_vocab())}",
            remedy="drop or escape this record",
        )
    if not _is_encodable(text):
        raise UserError(
            f"text {text[:80]!a} holds half of a surrogate pair",
            rule="questions and responses are Unicode text",
            remedy="drop or repair this record",
        )


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
