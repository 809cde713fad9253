"""The part of a response that answers: the assistant's own turn, after its thinking."""

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
_CHANNEL: Final = "<|channel|>"
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*<\|message\|>")


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
