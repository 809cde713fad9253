"""Where turns begin and end: what a prompt asks and has opened of a response, and the part of it that answers."""

from __future__ import annotations

import re
from typing import Final

THINK_NAMES: Final = (
    *("think", "thinking", "thought", "thoughts", "reasoning", "reason", "scratchpad", "analysis", "reflection"),
    *("seed:think", "longcat_think", "inner_monologue", "internal_monologue"),
)
_NAMES: Final = "|".join(map(re.escape, THINK_NAMES))
_OPENING = re.compile(
    rf"<(?:{_NAMES})>|\[THINK\]|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|think\|>|◁think▷|<unused94>",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    rf"</(?:{_NAMES})>|\[/THINK\]|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|/think\|>|◁/think▷|<unused95>",
    re.IGNORECASE,
)
_OPENED = re.compile(rf"(?:{_OPENING.pattern})\s*\Z", re.IGNORECASE)
_CLOSED = re.compile(rf"(?:{_OPENING.pattern})\s*(?:{_CLOSING.pattern})\s*\Z", re.IGNORECASE)
_SPOKEN_CHARS: Final = 40
"""The last words of a prompt, in which the assistant is spoken to."""
_THINKING_TAG = re.compile(rf"{_OPENING.pattern}|{_CLOSING.pattern}", re.IGNORECASE)
_START_OF_TURN: Final = (
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<\|start_of_role\|>|<\|header_start\|>|<｜(?:User|Assistant)｜>"
    r"|<\|(?:user|assistant|system|tool|observation|User|Assistant)\|>|\[INST\]"
)
_LEADING = re.compile(
    rf"\s*(?:(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|{_START_OF_TURN})"
    r"\s*(?:assistant|model)?\s*(?:<\|end_header_id\|>|<\|header_end\|>|<\|end_of_role\|>|<\|im_sep\|>)?\s*)+"
)
_END_OF_TURN = re.compile(
    r"<\|(?:endoftext|im_end|eot_id|eom_id|end_of_text|endofturn|end_of_turn|eot|EOT|return|END_OF_TURN_TOKEN|call|eod|end_of_document)\|>"
    r"|<\|end\|>(?!\s*<\|start\|>assistant)|</s>|<eos>|<end_of_turn>|<turn\|>|<｜end▁of▁sentence｜>|<\|role_end\|>|\[/INST\]|<\|eom\|>|<\|message_end\|>"
    rf"|{_START_OF_TURN}"
)
_USER_TURN = re.compile(
    r"<\|im_start\|>\s*user\s|<\|(?:start_header_id|header_start|start_of_role)\|>\s*user\s*"
    r"<\|(?:end_header_id|header_end|end_of_role)\|>|<start_of_turn>\s*user\s|<\|turn>\s*user\s|<｜User｜>"
    r"|<\|(?:user|User)\|>|<\|im_user\|>user<\|im_middle\|>|\[INST\]"
)
_MARKS_OF_USERS: Final = ("<|", "<｜", "<start_of_turn>", "[INST]", "User:", "Human:", "USER:", "HUMAN:")
_SPOKEN = re.compile(r"(?:\A|\s|>)(?:User|Human|USER|HUMAN):\s")
_SPOKEN_TO = re.compile(r"(?:Assistant|ASSISTANT|AI|Bot):\s*\Z")
_SYSTEM_IN_TURN = re.compile(r"\s*<<SYS>>.*?<</SYS>>", re.DOTALL)
_CHANNEL: Final = "<|channel|>"
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*<\|message\|>")


def is_thinking_tag(token: str) -> bool:
    """Whether a token is a tag around thinking: it belongs to a response, and forges no turn."""
    return _THINKING_TAG.fullmatch(token) is not None


def opened_thinking(prompt: str) -> str:
    """The tag that some chat templates open at the end of the prompt, with the space after it; empty without one.

    It belongs to the response: with it in front, the response's text is what a reader of it expects.
    """
    found = _OPENED.search(prompt)
    return found.group() if found else ""


def closes_thinking(prompt: str) -> bool:
    """Whether a prompt ends with thinking that is over, as Qwen3's without thinking does."""
    return _CLOSED.search(prompt) is not None


def last_user_turn(prompt: str) -> str:
    """What the user says last in a prompt that was rendered by a chat template; any other text as it is.

    Also of the template of DeepSeek-R1-Zero, whose marks are words ("User: ... Assistant:").
    """
    if not any(mark in prompt for mark in _MARKS_OF_USERS):
        return prompt  # nearly every text
    start = _last_end(_USER_TURN, prompt, 0)
    if start is not None:
        ended = _END_OF_TURN.search(prompt, start)
        turn = _SYSTEM_IN_TURN.sub("", prompt[start : ended.start() if ended else None], 1)
    else:
        unopened = prompt.rstrip().removesuffix(opened_thinking(prompt).strip())
        spoken_to = _SPOKEN_TO.search(unopened, max(0, len(unopened) - _SPOKEN_CHARS))
        start = _last_end(_SPOKEN, unopened, 0) if spoken_to else None
        turn = unopened[start : spoken_to.start()].rstrip("# \n") if spoken_to and start is not None else ""
    return turn.strip() or prompt


def continuation(prompt: str, response: str) -> str:
    """What a response adds to a prompt: all of it, but for a thinking tag that the prompt has opened already."""
    opened = opened_thinking(prompt)
    tag, begun = opened.rstrip(), response.lstrip()
    if not tag or not begun.startswith(tag):
        return response
    return begun.removeprefix(tag).removeprefix(opened.removeprefix(tag))


def visible_text(response: str) -> str | None:
    """The text of the assistant's turn after its thinking; None when the thinking never ended.

    Whatever follows the end of the turn, such as another turn that the model made up, is no part of it.
    """
    leading = _LEADING.match(response)
    start = leading.end() if leading else 0
    if _CHANNEL in response[start:]:
        start_of_final = _last_end(_FINAL, response, start)
        return None if start_of_final is None else _own_turn(response, start_of_final)
    turn = _own_turn(response, start)
    closed = _last_end(_CLOSING, turn, 0) or 0
    if _OPENING.search(turn, closed):
        return None
    return turn[closed:]


def _own_turn(response: str, start: int) -> str:
    ended = _END_OF_TURN.search(response, start)
    return response[start : ended.start()] if ended else response[start:]


def _last_end(pattern: re.Pattern[str], text: str, start: int) -> int | None:
    end = None
    for match in pattern.finditer(text, start):
        end = match.end()
    return end
