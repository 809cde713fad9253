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
from phimr_nemo.data.tokenizer import (
    TOKENIZER_CONFIG,
    TOKENIZER_FILE,
    fast_remedy,
    open_tokenizer,
    panics_as_messages,
)
from phimr_nemo.data.turns import FORMATS, PHI, TurnFormat, format_of
from phimr_nemo.errors import UserError
from phimr_nemo.store.inputs import model_remedy
from phimr_nemo.store.unpacking import read_json
from phimr_nemo.text.tokens import spells_special_token
from phimr_nemo.text.turn import closes_thinking, continuation, is_thinking_tag, opened_thinking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGGER = logging.getLogger(__name__)

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = PHI.tokens
ENDS_OF_TEXT: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""Tokens that end a text in the tokenizers of all families: a model that has read it says no more."""
SHOWN: Final = 8
DEFAULT_TEMPLATE: Final = "default"
OPENING_TOKENS: Final = 16
"""More than any tokenizer needs for a thinking tag and a line break."""
TEMPLATE_FILE: Final = "chat_template.jinja"
"""Where newer releases of transformers keep the template; it takes precedence."""
REASONING_SYSTEM_PROMPT: Final = PHI.system_prompt
REASONING_TEMPLATE: Final = PHI.template(REASONING_SYSTEM_PROMPT)
_OWN_TEMPLATES: Final = [
    re.compile(re.escape(one.template("PROMPT")).replace("PROMPT", r"[^'\\\n{}]*")) for one in FORMATS
]
_SYSTEM_TURNS: Final = tuple(f"{one.role[0]}system" for one in FORMATS)
_PROBE_QUESTION, _PROBE_ANSWER = "question-of-the-probe", "answer-of-the-probe"


def warn_of_other_template(directory: Path) -> None:
    """Log a warning when a directory's chat template has no system prompt of its own, as Phi-4-mini-instruct's.

    What is trained through it differs from the reasoning model's prompt, in this and in every later stage.
    """
    template = (directory / TEMPLATE_FILE, directory / TOKENIZER_CONFIG)
    try:
        text = template[0].read_text("utf-8") if template[0].is_file() else _template_in(template[1])
    except (OSError, ValueError):
        return  # load_tokenizer says what is wrong with it
    if text and not any(opening in text for opening in _SYSTEM_TURNS):
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
        UserError: no tokenizer.json there, one that cannot be read, or a chat template is missing, does not render a
            question in seconds, or ends the assistant's turn with no special token.
    """
    tokenizer = load_tokens(directory)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer in {directory} lacks a chat template",
            rule="a model is asked through the chat template of its tokenizer",
            remedy=f"`phimr adopt {directory} TARGET` makes a copy with the reasoning template",
        )
    templates = tokenizer.chat_template
    if isinstance(templates, Mapping) and DEFAULT_TEMPLATE not in templates:
        raise UserError(
            f"the tokenizer in {directory} has the chat templates {sorted(templates)}, none of them named "
            f"{DEFAULT_TEMPLATE!r}",
            rule="of several chat templates the one of this name is used",
            remedy=f"name the one to use so in {TOKENIZER_CONFIG}, or `phimr adopt {directory} TARGET`",
        )
    named = templates if isinstance(templates, Mapping) else {DEFAULT_TEMPLATE: templates}
    for name, template in named.items():
        if not isinstance(template, str) or not any(own.fullmatch(template) for own in _OWN_TEMPLATES):
            check_template(template, directory, tokenizer.special_tokens_map, asks=name == DEFAULT_TEMPLATE)
    end_of_turn(tokenizer)
    if closes_thinking(prompt_text(tokenizer, _PROBE_QUESTION)):
        _LOGGER.warning(
            "the chat template of %s closes the thinking before the response begins: answers have none. "
            "`phimr adopt %s TARGET` makes a copy with the reasoning template.",
            *(directory, directory),
        )
    return tokenizer


def load_tokens(directory: Path) -> PreTrainedTokenizerBase:
    """As :func:`load_tokenizer`, of a directory that need not have a chat template yet.

    Raises:
        UserError: no tokenizer.json there, or one that cannot be read.
    """
    if not (directory / TOKENIZER_FILE).is_file():
        raise UserError(
            f"{directory} holds no {TOKENIZER_FILE}",
            rule="a tokenizer directory is a Hugging Face directory with a fast tokenizer",
            remedy=fast_remedy(directory) or model_remedy(directory),
        )
    return open_tokenizer(directory)


def turn_format(tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    """The format that a tokenizer has the special tokens of.

    Raises:
        UserError: it has those of none.
    """
    found = format_of(tokenizer.get_added_vocab())
    if found is None:
        raise UserError(
            f"the tokenizer has none of the turn formats' tokens, but {sorted(tokenizer.get_added_vocab())[:SHOWN]}",
            rule="; ".join(f"{one.name}: {', '.join(one.tokens)}" for one in FORMATS),
            remedy="use a model whose tokenizer has them (an instruct version often does), or give the tokenizer a "
            "chat template that ends the assistant's turn with a special token",
        )
    return found


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends the assistant's turn: the first special one that the chat template writes behind it.

    Without a chat template it is that of the tokenizer's turn format.

    Raises:
        UserError: the template writes none, and the tokenizer has the tokens of no format.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return turn_format(tokenizer).end
    turns = [{"role": "user", "content": _PROBE_QUESTION}, {"role": "assistant", "content": _PROBE_ANSWER}]
    try:
        rest = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(_PROBE_ANSWER)[2]
    except TemplateError:  # a template may refuse a conversation that nobody continues
        rest = ""
    places = [(rest.find(token), -len(token), token) for token in forbidden_tokens(tokenizer) if token in rest]
    return min(places)[2] if places else turn_format(tokenizer).end


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response: of a turn's end and then of the text's, such as `<|end|>` and `<|endoftext|>`."""
    known = tokenizer.get_added_vocab()
    ends = [end_of_turn(tokenizer), *(token for token in ENDS_OF_TEXT if token in known)]
    return tuple(tokenizer.convert_tokens_to_ids(list(dict.fromkeys(ends))))


def forbidden_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens that no question or response may spell: tokenised, they would forge a turn of the conversation.

    They are the added tokens that are special or look like it. A thinking tag is none of them, even where a tokenizer
    has it as a token of its own, nor are words that were added to a vocabulary.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    added = [token for token in tokenizer.get_added_vocab() if token in special or spells_special_token(token)]
    return tuple(sorted(token for token in added if not is_thinking_tag(token)))


def render_prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    """The prompt ids of many questions, up to where the assistant's response begins.

    Raises:
        UserError: a question spells a special token.
    """
    _refuse_forged(tokenizer, questions)
    return _encoded(tokenizer, [prompt_text(tokenizer, question) for question in questions])


def render_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The prompt ids of one question (see :func:`render_prompts`).

    Raises:
        UserError: the question spells a special token.
    """
    return render_prompts(tokenizer, [question])[0]


def render_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt ids of a conversation so far, up to where the assistant's next turn begins.

    Args:
        tokenizer: see :func:`load_tokenizer`.
        turns: messages with `role` ("system", "user" or "assistant") and `content`.

    Raises:
        UserError: a turn spells a special token.
    """
    _refuse_forged(tokenizer, [turn["content"] for turn in turns])
    return _encoded(tokenizer, [_conversation_text(tokenizer, turns)])[0]


def render_conversations(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    responses: Sequence[str],
    cut_off: Sequence[bool] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Ids and loss masks of many conversations; tokenised in one batch, hence on all cores.

    The prompt has the ids of :func:`render_prompts`, whatever follows: a sampler will see the same.

    Args:
        tokenizer: see :func:`load_tokenizer`.
        questions: one question a conversation.
        responses: the response to each; a thinking tag that the template has opened already is not repeated.
        cut_off: whether each response ended at a length limit, and so has no end token; None = none did.

    Returns:
        For each conversation `(ids, loss_mask)` of one length; the mask is 1 on the response and its
        final end token, 0 on the prompt.

    Raises:
        UserError: a question or response spells a special token.
    """
    _refuse_forged(tokenizer, (*questions, *responses))
    prompts = [prompt_text(tokenizer, question) for question in questions]
    endless = [False] * len(prompts) if cut_off is None else cut_off
    end = end_of_turn(tokenizer)
    texts = [
        response_part(prompt, response, "" if is_cut else end)
        for prompt, response, is_cut in zip(prompts, responses, endless, strict=True)
    ]
    ids = _encoded(tokenizer, [*prompts, *texts])
    return [
        ([*prompt, *response], [0] * len(prompt) + [1] * len(response))
        for prompt, response in zip(ids[: len(prompts)], ids[len(prompts) :], strict=True)
    ]


def response_part(prompt: str, response: str, end: str) -> str:
    """The text of a response behind its prompt, with the end token that it has; "" for one that was cut off.

    It is tokenised by itself: so the prompt keeps the ids that a sampler sees, and the loss begins where it ends.
    """
    return continuation(prompt, response) + end


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, question: str, response: str
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of one conversation (see :func:`render_conversations`).

    Raises:
        UserError: the question or response spells a special token.
    """
    return render_conversations(tokenizer, [question], [response])[0]


def render_messages(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], *, cut_off: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a conversation of several turns; the loss is on every turn of the assistant's.

    Args:
        tokenizer: see :func:`load_tokenizer`.
        turns: messages with `role` ("system", "user" or "assistant") and `content`; the last is the assistant's.
        cut_off: whether the last one ended at a length limit, and so has no end token.

    Raises:
        UserError: a turn spells a special token, the last turn is not the assistant's, or the template refuses the
            conversation, leaves a turn out, or writes earlier turns differently once there are later ones, so that
            no text holds the prompts of all turns.
    """
    _refuse_forged(tokenizer, [turn["content"] for turn in turns])
    if not turns or turns[-1]["role"] != "assistant":
        raise UserError(
            f"a conversation that ends with a turn of {turns[-1]['role'] if turns else 'nobody'!r}",
            rule="a conversation to learn from ends with the assistant's answer",
            remedy="leave its last turns out",
        )
    parts: list[str] = []
    end = end_of_turn(tokenizer)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            prompt, written = _conversation_text(tokenizer, turns[:number]), "".join(parts)
            _refuse_lost(prompt, turns[:number])
            if not prompt.startswith(written):
                raise UserError(
                    f"the chat template rewrites the turns before turn {number + 1} once it is there",
                    rule="a conversation is trained on as one text: later turns leave earlier ones as they are",
                    remedy="use a template that keeps earlier turns whole, or make a conversation of each turn",
                )
            parts += [
                prompt.removeprefix(written),
                response_part(prompt, turn["content"], "" if cut_off and turn is turns[-1] else end),
            ]
    ids, mask = [], []
    for place, part in enumerate(_encoded(tokenizer, parts)):
        ids += part
        mask += [place % 2] * len(part)
    return ids, mask


def decode_response(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of sampled ids as they are, special tokens included; only the one that ended the response is left out.

    A turn that the model made up so stays visible to what grades the response or learns from it.
    """
    ids = list(token_ids)
    if ids and ids[-1] in stop_token_ids(tokenizer):
        ids.pop()
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def response_text(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of a sampled response (see :func:`decode_response`), with the thinking tag that its prompt opened."""
    return opening(tokenizer, prompt_ids) + decode_response(tokenizer, token_ids)


def opening(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The thinking tag that some chat templates open at the end of the prompt: it belongs to the response."""
    tail = tokenizer.decode(list(prompt_ids[-OPENING_TOKENS:]), clean_up_tokenization_spaces=False)
    return opened_thinking(tail)


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The prompt of a question as text, up to where the assistant's response begins."""
    return _conversation_text(tokenizer, [{"role": "user", "content": question}])


def _conversation_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses a conversation of {', '.join(turn['role'] for turn in turns)}: {error}",
            rule="every conversation is rendered by the model's own chat template",
            remedy="leave such turns out, put a system text before the first question, or `phimr adopt` the model",
        ) from error


def _refuse_lost(prompt: str, turns: Sequence[Mapping[str, str]]) -> None:
    """Refuse a prompt from which a turn before the assistant's is missing: a template passes over unknown roles."""
    for number, turn in enumerate(turns, 1):
        if turn["role"] != "assistant" and turn["content"].strip() not in prompt:
            raise UserError(
                f"the chat template leaves out turn {number}, of {turn['role']!r}",
                rule="what is learnt follows from what the prompt says: every turn is in it",
                remedy="use a template that knows this role, or leave such conversations out",
            )


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    with panics_as_messages():
        return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []


def _refuse_forged(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    forbidden = forbidden_tokens(tokenizer)
    for text in texts:
        if any(token in text for token in forbidden):
            raise UserError(
                f"text {text[:80]!r} spells a special token",
                rule=f"questions and responses hold none of {list(forbidden)}",
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
