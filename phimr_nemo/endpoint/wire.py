"""What travels: a chat request's body, and a reply from a stream of server-sent events or from one JSON object.

Whatever the server sends is bounded and checked: garbage is an error that another attempt may cure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from phimr_nemo.config import EndpointConfig
from phimr_nemo.store.records import FinishReason
from phimr_nemo.text.thinking import CLOSE, OPEN

UNKNOWN: Final = -1
MAX_BODY_BYTES: Final = 16 << 20
"""A reply that is one JSON object."""
MAX_LINE_BYTES: Final = 4 << 20
"""A line of a stream, which is one token's, or for some servers a long piece of the reply."""
STREAM_BYTES_PER_TOKEN: Final = 4096
"""A streamed token travels in some hundred bytes of JSON; log-probabilities or long ids may come with it."""
STREAM_ALLOWANCE: Final = 1 << 20
MAX_MESSAGE_CHARS: Final = 300
EMPTY_REPLY: Final = "the reply is empty"
END_OF_STREAM: Final = "[DONE]"
BY_ID: Final = "token_id:"
"""Before a token's id in the place of its text."""
REASONING_FIELDS: Final = ("reasoning_content", "reasoning")
"""Where DeepSeek's interface, vLLM and SGLang put what a reasoning parser cut off; newer vLLM has the second."""


class Transient(Exception):
    """An attempt failed in a way that another one may cure.

    Args:
        reason: what happened, short and without the particulars of one request, so that it can be counted.
        retry_after: seconds that the server asks to wait.
        is_hosts_fault: whether other requests to the same address are likely to fail now as well.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, is_hosts_fault: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.retry_after, self.is_hosts_fault = reason, retry_after, is_hosts_fault


class RequestFailed(Exception):
    """A request has no reply, for good.

    Args:
        reason: what happened last.
        attempts: how often it was tried.
        refused: the server refuses this very request; waiting does not help.
    """

    def __init__(self, reason: str, *, attempts: int, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.attempts, self.refused = reason, attempts, refused


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion.

    Attributes:
        user: the user's turn.
        system: the system's turn, if any.
        max_tokens: of the reply, reasoning included.
        temperature, top_p: how tokens are drawn.
        seed: non-negative, below 2^63; None to leave it to the server.
        may_be_empty: take a reply without any text; else another attempt is made.
    """

    user: str
    max_tokens: int
    temperature: float
    top_p: float = 1.0
    system: str | None = None
    seed: int | None = None
    may_be_empty: bool = False
    path: ClassVar[str] = "/chat/completions"

    def body(self, config: EndpointConfig) -> dict[str, Any]:
        """The request as the interface wants it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        seed = {} if self.seed is None else {"seed": self.seed}
        return {
            "model": config.model,
            "messages": [*system, {"role": "user", "content": self.user}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **seed,
            # A long generation that sent nothing would be cut off by some proxy on the way.
            "stream": True,
            "stream_options": {"include_usage": True},
            **config.extra_body,
        }


@dataclass(frozen=True)
class ScoreRequest:
    """How probable a model finds a prompt: OpenAI's completions with `echo` and log-probabilities.

    Attributes:
        tokens: ids of the prompt, at least two.
    """

    tokens: tuple[int, ...]
    path: ClassVar[str] = "/completions"

    def body(self, config: EndpointConfig) -> dict[str, Any]:
        """The request as the interface wants it; one token is sampled and thrown away."""
        return {
            "model": config.model,
            "prompt": list(self.tokens),
            "max_tokens": 1,
            "echo": True,
            "logprobs": 1,
            # Of vLLM: which tokens it has scored, by their ids.
            "return_tokens_as_token_ids": True,
            **config.extra_body,
        }

    def scores(self, reply: Mapping[str, Any]) -> tuple[float, ...]:
        """Log-probabilities (nats, at temperature 1) of the tokens from the second on.

        Raises:
            Transient: the reply has no number for each of them.
            RequestFailed: it is about other tokens.
        """
        choices = reply.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        found = first.get("logprobs") if isinstance(first, dict) else None
        values = found.get("token_logprobs") if isinstance(found, dict) else None
        if not isinstance(values, list) or len(values) < len(self.tokens):
            raise Transient("the reply has no log-probabilities of the prompt")
        numbers = values[1 : len(self.tokens)]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
            raise Transient("a log-probability of the reply is no finite number")
        words = found.get("tokens") if isinstance(found, dict) else None
        named = [f"{BY_ID}{token}" for token in self.tokens]
        # Other servers than vLLM tell the tokens' text.
        is_by_id = isinstance(words, list) and all(isinstance(w, str) and w.startswith(BY_ID) for w in words[:1])
        if isinstance(words, list) and is_by_id and words[: len(named)] != named:
            raise RequestFailed("the server has scored other tokens than it was sent", attempts=1, refused=True)
        return tuple(float(number) for number in numbers)


@dataclass(frozen=True)
class ChatReply:
    """A whole reply.

    Attributes:
        text: the answer.
        reasoning: what the server's reasoning parser cut off; empty without one.
        finish_reason: "stop", or "length" at the token limit.
        prompt_tokens, completion_tokens: as the server counts them, reasoning included; `UNKNOWN` if it does not.
        attempts: how often the request was sent.
        empty_replies: how many of the attempts brought a reply without any text.
    """

    text: str
    reasoning: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    attempts: int = 1
    empty_replies: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is neither an answer nor reasoning."""
        return not self.text.strip() and not self.reasoning.strip()

    @property
    def is_only_reasoning(self) -> bool:
        """Whether the model ended by itself and all that it said is in the reasoning field, an answer among it.

        A server's reasoning parser does so with a model that does not open or close its thinking.
        """
        return self.finish_reason == "stop" and not self.text.strip() and bool(self.reasoning.strip())

    @property
    def response(self) -> str:
        """The answer with the reasoning before it in think tags, as the model wrote it.

        Reasoning without an answer never ended, so its tag stays open. Chat templates that open the tag in the
        prompt leave a reply with a closing tag alone, and the opening one is put back.
        """
        if self.reasoning.strip():
            opened = f"{OPEN}\n{self.reasoning.strip()}"
            return f"{opened}\n{CLOSE}\n{self.text}" if self.text.strip() else opened
        if CLOSE in self.text and OPEN not in self.text.partition(CLOSE)[0]:
            return f"{OPEN}\n{self.text.lstrip()}"
        return self.text


class LineSplitter:
    """Cuts a stream of bytes into lines of bounded length.

    Args:
        max_bytes: of the whole stream.
    """

    def __init__(self, max_bytes: int) -> None:
        self._rest = b""
        self._left = max_bytes

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that end in `data`, without their ends.

        Raises:
            Transient: the stream is too long, or is no UTF-8.
        """
        self._left -= len(data)
        if self._left < 0:
            raise Transient("the reply is longer than its tokens can be")
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise Transient("the reply has a line that is too long")
        for line in lines:
            try:
                yield line.rstrip(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise Transient("the reply is no UTF-8") from error


def max_stream_bytes(max_tokens: int) -> int:
    """A bound on the bytes of a streamed reply."""
    return STREAM_ALLOWANCE + max_tokens * STREAM_BYTES_PER_TOKEN


def parse_object(text: str | bytes) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        Transient: it is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Transient("the reply is no JSON") from error
    if not isinstance(value, dict):
        raise Transient("the reply is no JSON object")
    return value


class Assembly:
    """Puts a reply together from the chunks of a stream, or from one object that holds all of it."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._finish: str | None = None
        self._prompt_tokens = self._completion_tokens = UNKNOWN

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in one chunk.

        Raises:
            Transient: it tells of an error, or has not the interface's form.
        """
        if chunk.get("error"):
            raise Transient("the server reports an error within the reply", is_hosts_fault=True)
        self._add_usage(chunk.get("usage"))
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise Transient("the reply has no list of choices")
        # The last chunk of a stream has the usage and no choice.
        for choice in choices[:1]:
            message = choice.get("delta", choice.get("message")) if isinstance(choice, dict) else None
            if not isinstance(message, dict):
                raise Transient("a choice of the reply has no message")
            self._text.append(_text(message.get("content")))
            self._reasoning.append(next((_text(message[f]) for f in REASONING_FIELDS if message.get(f)), ""))
            reason = choice.get("finish_reason")
            if reason is not None:
                self._finish = str(reason)

    def _add_usage(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self._prompt_tokens = _count(usage.get("prompt_tokens"))
            self._completion_tokens = _count(usage.get("completion_tokens"))

    def reply(self) -> ChatReply:
        """The whole reply.

        Raises:
            Transient: it is cut off, or ends for no reason that a response may end for.
            RequestFailed: the server withholds the response.
        """
        if self._finish == "content_filter":
            raise RequestFailed("the server withholds the response (content_filter)", attempts=1, refused=True)
        if self._finish is None:
            raise Transient("the reply ends in the middle")
        if self._finish not in ("stop", "length"):
            raise Transient(f"the reply ends with finish_reason {self._finish[:MAX_MESSAGE_CHARS]!r}")
        return ChatReply(
            text="".join(self._text),
            reasoning="".join(self._reasoning),
            finish_reason="stop" if self._finish == "stop" else "length",
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )


def _text(value: Any) -> str:
    """A piece of text; lone surrogates, which no file can hold, become question marks."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Transient("the content of the reply is no text")
    return value.encode("utf-8", "replace").decode("utf-8")


def _count(value: Any) -> int:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    return value if is_count else UNKNOWN
