"""What a request to a model's server may say, where vLLM would take anything for what was meant, or fail on it.

vLLM turns texts into numbers, clamps biases and renders any role, where OpenAI's own servers answer 400. What vLLM
refuses by itself, most ranges above all, is left to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
"""OpenAI's."""
IN_PLACE_OF_CONTENT: Final = ("tool_calls", "function_call", "refusal", "reasoning", "reasoning_content")
"""What an assistant's turn may have."""
LARGEST_BIAS: Final = 100
"""OpenAI's; vLLM makes larger ones this one."""
SHOWN_CHARS: Final = 80
REALS: Final = (
    *("temperature", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty"),
)
WHOLES: Final = (
    *("n", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "truncate_prompt_tokens"),
    *("top_k", "top_logprobs", "prompt_logprobs", "seed"),
)
SWITCHES: Final = ("stream", "echo", "ignore_eos", "add_generation_prompt", "include_stop_str_in_output")
TOKENS: Final = ("stop_token_ids", "allowed_token_ids")
FRUITLESS: Final = (
    "the structured output admits no text that the model could write: every rule of a grammar leads to an end, and "
    "no $ref of a schema back to itself; correct it, and try it on a small example"
)
"""To a request whose grammar could not be compiled, or left no token at all."""


class Fault(NamedTuple):
    """What is wrong with a request.

    Attributes:
        param: the field.
        found: the offending value, named.
        rule: what would have been right.
        remedy: what to do about it.
    """

    param: str
    found: str
    rule: str
    remedy: str

    @property
    def message(self) -> str:
        """All in one line."""
        return f"{self.found}: {self.rule}; {self.remedy}"


class Asked(NamedTuple):
    """A request as far as it matters here.

    Attributes:
        fault: what is wrong with it; None where nothing is, or where it is no JSON object, which vLLM refuses.
        is_structured: whether its output is to keep to a form.
    """

    fault: Fault | None
    is_structured: bool


def read_request(body: bytes) -> Asked:
    """Look through a request's body."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return Asked(None, is_structured=False)
    if not isinstance(values, dict):
        return Asked(None, is_structured=False)
    fault = next((fault for check in _CHECKS for fault in check(values)), None)
    return Asked(fault, any(values.get(name) for name in ("response_format", "structured_outputs", "text", "tools")))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _numbers(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Python reads NaN and Infinity, which JSON does not have, and makes one of a number that is too large."""
    waiting: list[tuple[str, Any]] = list(values.items())
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((f"{place}.{name}", inner) for name, inner in value.items())
        elif isinstance(value, list):
            waiting.extend((f"{place}[{number}]", inner) for number, inner in enumerate(value))
        elif isinstance(value, float) and not math.isfinite(value):
            rule, remedy = "numbers of JSON are finite (RFC 8259)", "write such a number, or leave it out"
            yield Fault(place, f"{place} = {_shown(value)}", rule, remedy)


class _Kind(NamedTuple):
    """What the values of some fields are, as they are named, with an example."""

    is_right: Callable[[Any], bool]
    name: str
    example: str


_WHOLE: Final = _Kind(_is_whole, "a whole number", "1")
_SWITCH: Final = _Kind(_is_switch, "true or false", "true")
_KINDS: Final[Mapping[str, _Kind]] = {
    **dict.fromkeys(REALS, _Kind(_is_number, "a number", "0.6")),
    **dict.fromkeys(WHOLES, _WHOLE),
    **dict.fromkeys(SWITCHES, _SWITCH),
    **dict.fromkeys(TOKENS, _Kind(_are_tokens, "a list of token ids", "[5]")),
}


def _kinds(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Numbers and switches as texts, and the like; null is a field that was left out."""
    # A chat asks for log-probabilities or not, a completion for how many.
    kinds = {**_KINDS, "logprobs": _SWITCH if "messages" in values else _WHOLE}
    for name, value in values.items():
        kind = kinds.get(name)
        if kind is not None and value is not None and not kind.is_right(value):
            yield Fault(name, f"{name} = {_shown(value)}", f"it is {kind.name}", f"for example {kind.example}")


def _biases(values: Mapping[str, Any]) -> Iterator[Fault]:
    biases = values.get("logit_bias")
    if not isinstance(biases, dict):
        return
    for token, bias in biases.items():
        if not _is_number(bias) or abs(bias) > LARGEST_BIAS:
            yield Fault(
                "logit_bias",
                f"logit_bias with {_shown({token: bias})}",
                f"a token id has a number from -{LARGEST_BIAS} to {LARGEST_BIAS}",
                f'for example {{"{token}": -{LARGEST_BIAS}}}',
            )


def _messages(values: Mapping[str, Any]) -> Iterator[Fault]:
    messages = values.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            yield from _message(f"messages[{number}]", message)


def _message(place: str, message: Mapping[str, Any]) -> Iterator[Fault]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        found = f"{place}.role = {_shown(role)}" if "role" in message else f"{place} without a role"
        yield Fault(f"{place}.role", found, f"a role is one of {', '.join(ROLES)}", "write whose turn it is")
    elif content is not None and not isinstance(content, str | list):
        rule = "a content is a text or a list of parts"
        yield Fault(f"{place}.content", f"{place}.content = {_shown(content)}", rule, 'for example "2+2?"')
    elif content in (None, []) and not (role == "assistant" and any(map(message.get, IN_PLACE_OF_CONTENT))):
        yield Fault(
            f"{place}.content",
            f"{place} of the {role} without content",
            "a message has a text or parts; an assistant's may call tools instead",
            "write one, or leave the message out",
        )


def _references(values: Mapping[str, Any]) -> Iterator[Fault]:
    for place, schema in _schemas(values):
        ending: set[str] = set()
        for node in _nodes(schema):
            reference = node.get("$ref")
            if isinstance(reference, str) and not reference.startswith("#"):
                rule, remedy = "only what is in the schema itself is read", 'bring it into "$defs"'
                yield Fault(place, f'"$ref": {_shown(reference)}', rule, remedy)
            elif isinstance(reference, str) and _leads_back(schema, reference, ending):
                rule, remedy = "a $ref leads to a schema in the end", "describe a value at the place that it names"
                yield Fault(place, f'"$ref": {_shown(reference)} leads back to itself', rule, remedy)


def _schemas(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON schemas of a request, each with its place."""
    places = (
        ("response_format", "json_schema", "schema"),
        ("text", "format", "schema"),
        ("structured_outputs", "json"),
    )
    for path in places:
        found: Any = values
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError):
                continue
        if isinstance(found, dict):
            yield ".".join(path), found


def _nodes(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object in a schema; however deep, since vLLM has not looked yet."""
    waiting: list[Any] = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _leads_back(schema: dict[str, Any], reference: str, ending: set[str]) -> bool:
    """Whether a reference comes to itself over references alone; `ending` gets those that do not."""
    seen: set[str] = set()
    node: Any = {"$ref": reference}
    while isinstance(node, dict) and isinstance(node.get("$ref"), str) and node["$ref"] not in ending:
        if node["$ref"] in seen:
            return True
        seen.add(node["$ref"])
        node = _pointed(schema, node["$ref"])
    ending |= seen
    return False


def _pointed(schema: Any, reference: str) -> Any:
    """What a JSON pointer (RFC 6901) points to; None where there is nothing."""
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list):
            schema = schema[int(name)] if name.isdecimal() and int(name) < len(schema) else None
        else:
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


_CHECKS: Final[tuple[Callable[[Mapping[str, Any]], Iterator[Fault]], ...]] = (
    _numbers,
    _kinds,
    _biases,
    _messages,
    _references,
)
