"""Requests to a model's server that cannot be meant: each is refused with its value; what can be is let through."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from phimr_nemo.generate.asked import FRUITLESS, Fault, read_request
from phimr_nemo.generate.serving.receiving import ASKING, guard_requests

HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
GIVEN_UP = {"error": {"message": "Internal server error", "type": "InternalServerError", "param": None, "code": 500}}
GRAMMAR = {"structured_outputs": {"grammar": "root ::= root"}}


def schema(content: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": content}}}


LIST = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]}
SELF = {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}
PAIR = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "properties": {"x": {"$ref": "#/$defs/a"}}}
SLASH = {"$defs": {"a/b": {"$ref": "#/$defs/c~0d"}, "c~d": {"type": "string"}}, "$ref": "#/$defs/a~1b"}
ARRAY = {"anyOf": [{"type": "string"}, {"$ref": "#/anyOf/0"}]}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a bias that is no number": ({"logit_bias": {"5": float("nan")}}, "logit_bias.5", "NaN"),
    "an endless bias": ({"logit_bias": {"5": float("-inf")}}, "logit_bias.5", "-Infinity"),
    "an endless number where nobody looks": ({"extra": [{"a": float("inf")}]}, "extra[0].a", "Infinity"),
    "a bias as a text": ({"logit_bias": {"5": "3"}}, "logit_bias", '"3"'),
    "a bias as a switch": ({"logit_bias": {"5": True}}, "logit_bias", "true"),
    "a bias that would be clamped": ({"logit_bias": {"5": 101}}, "logit_bias", "101"),
    "a temperature as a text": ({"temperature": "0.5"}, "temperature", '"0.5"'),
    "a temperature as a switch": ({"temperature": True}, "temperature", "true"),
    "a count as a text": ({"n": "2"}, "n", '"2"'),
    "a count with a fraction": ({"max_tokens": 1.5}, "max_tokens", "1.5"),
    "a seed as a text": ({"seed": "1"}, "seed", '"1"'),
    "a switch as a text": ({"stream": "yes"}, "stream", '"yes"'),
    "a token as a text": ({"stop_token_ids": ["3"]}, "stop_token_ids", '"3"'),
    "a chat's log-probabilities as a count": ({"logprobs": 1}, "logprobs", "1"),
    "a role that is none": ({"messages": [*HI, {"role": "robot", "content": "hi"}]}, "messages[1].role", '"robot"'),
    "no role": ({"messages": [{"content": "hi"}]}, "messages[0].role", "without a role"),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role", '["user"]'),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "without content"),
    "null content": ({"messages": [{"role": "system", "content": None}]}, "messages[0].content", "system"),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "without content"),
    "content of another kind": ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content", "{}"),
    "an answer of nothing": ({"messages": [*HI, {"role": "assistant", "tool_calls": []}]}, "messages[1].content", ""),
    "a schema that is itself": (schema(SELF), "response_format.json_schema.schema", "leads back"),
    "two that are each other": (schema(PAIR), "response_format.json_schema.schema", "leads back"),
    "a whole that is itself": (
        {"structured_outputs": {"json": {"$ref": "#"}}},
        "structured_outputs.json",
        "leads back",
    ),
    "the same as a text": (
        {"structured_outputs": {"json": json.dumps(SELF)}},
        "structured_outputs.json",
        "leads back",
    ),
    "a response's": (
        {"text": {"format": {"type": "json_schema", "schema": SELF}}},
        "text.format.schema",
        "leads back",
    ),
    "a schema elsewhere": (schema({"$ref": "http://x/y"}), "response_format.json_schema.schema", "http://x/y"),
}
TAKEN: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "numbers": {"temperature": 1, "top_p": 0.5, "n": 2, "seed": -1, "max_tokens": 3.0, "logit_bias": {"5": -100}},
    "switches": {"stream": True, "logprobs": True, "top_logprobs": 5},
    "what was left out": dict.fromkeys(("temperature", "n", "stop", "logit_bias", "response_format", "stream")),
    "stop texts": {"stop": ["a"], "stop_token_ids": [5]},
    "every role": {
        "messages": [{"role": role, "content": "x"} for role in ("system", "developer", "tool", "function")]
    },
    "a call": {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    "an empty text": {"messages": [{"role": "user", "content": ""}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
    "a list without end": schema(LIST),
    "a name with a slash": schema(SLASH),
    "a place in a list": schema(ARRAY),
    "a reference to nothing": schema({"$ref": "#/$defs/x"}),
    "a schema that is a text": {"structured_outputs": {"json": "{"}},
}
"""What vLLM takes, or refuses itself with a reason."""


def fault_of(changes: dict[str, Any]) -> Fault | None:
    return read_request(json.dumps({"model": "m", "messages": HI, **changes}).encode()).fault


@pytest.mark.parametrize(("changes", "param", "found"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_refused_with_value_rule_and_remedy(
    changes: dict[str, Any], param: str, found: str
) -> None:
    fault = fault_of(changes)
    assert fault is not None
    assert fault.param == param
    assert found in fault.found
    assert fault.rule
    assert fault.remedy
    assert fault.message == f"{fault.found}: {fault.rule}; {fault.remedy}"


@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_what_can_be_meant_is_let_through(changes: dict[str, Any]) -> None:
    assert fault_of(changes) is None


def test_a_completion_says_how_many_log_probabilities() -> None:
    for count, is_refused in ((1, False), (0, False), (True, True), ("3", True)):
        body = json.dumps({"model": "m", "prompt": "2+2=", "logprobs": count}).encode()
        assert (read_request(body).fault is not None) == is_refused, count


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"5", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000]
)
def test_what_is_no_object_is_left_to_the_server(body: bytes) -> None:
    assert read_request(body).fault is None


def test_a_number_beyond_all_is_refused() -> None:
    fault = read_request(b'{"temperature": 1e999}').fault
    assert fault is not None
    assert fault.param == "temperature"


def test_a_long_chain_of_references_is_followed_once() -> None:
    """Followed from each of its places it would be half a billion steps."""
    length = 30_000
    chain: dict[str, Any] = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(length)}
    assert fault_of(schema({"$defs": {**chain, str(length): {"type": "string"}}, "$ref": "#/$defs/0"})) is None
    assert fault_of(schema({"$defs": {**chain, str(length): {"$ref": "#/$defs/7"}}, "$ref": "#/$defs/0"})) is not None


def test_a_long_value_is_shown_in_part() -> None:
    fault = fault_of({"temperature": "x" * 10_000})
    assert fault is not None
    assert len(fault.message) < 200


async def gives_up(request: Request) -> Any:
    """As vLLM does: with a status, or in the middle of a stream; and another fault of its own."""
    asked = await request.json()
    if asked.get("stream"):
        lines = (
            b'data: {"choices": []}\n\n',
            b"data: " + json.dumps(GIVEN_UP).encode() + b"\n\n",
            b"data: [DONE]\n\n",
        )
        return StreamingResponse(iter(lines), media_type="text/event-stream")
    if asked.get("user") == "answered":
        return JSONResponse(asked)
    return JSONResponse({"error": "no memory"} if asked.get("user") == "no memory" else GIVEN_UP, 500)


def post(body: dict[str, Any], path: str = ASKING[0]) -> httpx.Response:
    app = Starlette(routes=[Route("/{path:path}", gives_up, methods=["POST"])])
    guard_requests(app)

    async def one() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
            return await client.post(path, content=json.dumps({"messages": HI, **body}))

    return asyncio.run(one())


@pytest.mark.parametrize("path", ASKING)
def test_the_guard_answers_in_openais_form_and_passes_the_rest_on_unchanged(path: str) -> None:
    refused = post({"temperature": "1"}, path)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "temperature"
    assert refused.json()["error"]["code"] == 400
    asked = {"user": "answered", "temperature": 1, **GRAMMAR}
    assert post(asked, path).json() == {"messages": HI, **asked}


def test_other_paths_are_not_looked_at() -> None:
    assert post({"user": "answered", "temperature": "1"}, "/inference/v1/generate").status_code == 200


def test_a_structured_output_that_the_engine_gave_up_is_a_refusal_with_the_reason() -> None:
    refused = post(GRAMMAR)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == FRUITLESS
    streamed = post({**GRAMMAR, "stream": True}).text.split("\n\n")
    assert streamed[0] == 'data: {"choices": []}'
    assert json.loads(streamed[1].removeprefix("data: "))["error"]["message"] == FRUITLESS
    assert streamed[2] == "data: [DONE]"


def test_other_failures_stay_what_they_are() -> None:
    """The planted twins: no form was asked for, or the server failed otherwise."""
    assert post({}).json() == GIVEN_UP
    assert post({}).status_code == 500
    assert "Internal server error" in post({"stream": True}).text
    failed = post({**GRAMMAR, "user": "no memory"})
    assert (failed.status_code, failed.json()) == (500, {"error": "no memory"})
