"""A conversation with a model: its turns as tokens, its reply as text while it is drawn, thinking set apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from phimr_nemo.data.chat import render_turns
from phimr_nemo.generate.sampler import Request, SamplingParams
from phimr_nemo.store.content import content_seed
from phimr_nemo.text import thinking as thinking_tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from phimr_nemo.generate.local.engine import LocalSampler


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Piece:
    """Text in the order in which it was drawn; `thinking` inside a leading <think> ... </think>."""

    text: str
    thinking: bool


def reply(
    sampler: LocalSampler,
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Turn],
    params: SamplingParams,
    *,
    seed: int,
) -> Iterator[Piece]:
    """The model's next turn, piece by piece.

    Args:
        sampler: the model.
        tokenizer: its tokenizer.
        turns: the conversation so far; the last turn is the user's.
        params: how tokens are drawn.
        seed: with the conversation it determines the reply.

    Raises:
        UserError: a turn spells a special token, or the conversation leaves no room for a reply.
    """
    prompt = render_turns(tokenizer, [{"role": turn.role, "content": turn.content} for turn in turns])
    words = [f"{turn.role}\n{turn.content}" for turn in turns]
    request = Request("reply", tuple(prompt), content_seed(str(seed), *words))
    yield from mark_thinking(decode_stream(tokenizer, sampler.stream(request, params)))


def decode_stream(tokenizer: PreTrainedTokenizerFast, token_ids: Iterable[int]) -> Iterator[str]:
    """Text of tokens as they come, without special tokens; a character of several tokens comes whole."""
    stream = DecodeStream(skip_special_tokens=True)
    for token in token_ids:
        text = stream.step(tokenizer.backend_tokenizer, token)
        if text:
            yield text


def mark_thinking(texts: Iterable[str]) -> Iterator[Piece]:
    """Set a leading <think> ... </think> apart, its tags included; tags may be cut anywhere between texts."""
    source, held = iter(texts), ""
    while len(held) < len(thinking_tags.OPEN) and thinking_tags.OPEN.startswith(held):
        text = next(source, None)
        if text is None:
            break
        held += text
    thinking = held.startswith(thinking_tags.OPEN)
    for text in chain([""], source):
        held += text
        if thinking:
            before, close, after = held.partition(thinking_tags.CLOSE)
            kept = 0 if close else _open_end(before)
            yield from _piece(before[: len(before) - kept] + close, True)
            held = after if close else before[len(before) - kept :]
            thinking = not close
        if not thinking:
            yield from _piece(held, False)
            held = ""
    yield from _piece(held, thinking)


def _piece(text: str, thinking: bool) -> Iterator[Piece]:
    if text:
        yield Piece(text, thinking)


def _open_end(text: str) -> int:
    """Length of the longest end of `text` that may be the beginning of </think>."""
    longest = min(len(text), len(thinking_tags.CLOSE) - 1)
    return next((n for n in range(longest, 0, -1) if thinking_tags.CLOSE.startswith(text[-n:])), 0)
