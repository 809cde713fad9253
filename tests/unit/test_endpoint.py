"""The endpoint client against a real server that delays, drops, refuses and lies; the journal; the asker's budget."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from openai_server import RETRY_AFTER, Fault, OpenAIServer, Reply, user_text

from phimr_nemo.config import AskConfig, EndpointConfig, EndpointEngine, parse_config
from phimr_nemo.endpoint import (
    AskedEndpoint,
    Asker,
    ChatReply,
    ChatRequest,
    Journal,
    Prompt,
    RequestFailed,
    read_journal,
    read_key,
    watch,
)
from phimr_nemo.endpoint.client import EndpointClient
from phimr_nemo.endpoint.watch import Watch
from phimr_nemo.errors import UserError

KEY = "sk-test-0123456789"


def settings(*urls: str, **changes: Any) -> EndpointConfig:
    values = {
        "base_urls": urls,
        "model": "teacher",
        "concurrency": 8,
        "idle_seconds": 5.0,
        "total_seconds": 20.0,
        "attempts": 4,
        "backoff_seconds": 0.01,
    }
    return parse_config(EndpointConfig, {**values, **changes})


def request(text: str, seed: int = 1) -> ChatRequest:
    return ChatRequest(user=text, max_tokens=64, temperature=0.6, top_p=0.95, seed=seed)


def echo(body: dict[str, Any]) -> str:
    return f"You said {user_text(body)} with seed {body['seed']}, é∎\u2028."


def ask(
    config: EndpointConfig, requests: list[ChatRequest]
) -> tuple[list[ChatReply | RequestFailed], dict[str, int]]:
    async def run() -> tuple[list[ChatReply | RequestFailed], dict[str, int]]:
        async with EndpointClient(config) as client:

            async def one(item: ChatRequest) -> ChatReply | RequestFailed:
                try:
                    return await client.complete(item)
                except RequestFailed as error:
                    return error

            return list(await asyncio.gather(*map(one, requests))), dict(client.counts)

    return asyncio.run(run())


def one_reply(config: EndpointConfig, item: ChatRequest) -> ChatReply:
    (reply,), _ = ask(config, [item])
    assert isinstance(reply, ChatReply), reply
    return reply


def test_a_request_travels_as_the_interface_wants_it_and_its_reply_is_put_together() -> None:
    with OpenAIServer(echo) as server:
        config = settings(server.url + "/", extra_body={"top_k": 20})
        item = ChatRequest(
            user="2+2?", system="Be brief.", max_tokens=64, temperature=0.6, top_p=0.95, seed=2**62 + 1
        )
        reply = one_reply(config, item)
        (body,), (headers,) = server.bodies, server.headers
    assert body == {
        "model": "teacher",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
        "max_tokens": 64,
        "temperature": 0.6,
        "top_p": 0.95,
        "seed": 2**62 + 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_k": 20,
    }
    assert headers[":path"] == "/v1/chat/completions"
    assert "authorization" not in headers
    text = echo(body)
    assert reply == ChatReply(text, "", "stop", 11, len(text.split()), attempts=1)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("streams", [True, False])
def test_reasoning_is_put_back_in_think_tags(field: str, streams: bool) -> None:
    replies = {
        "both": Reply("So \\boxed{4}.", "Two and two\nmake four.\n"),
        "cut": Reply("", "Two and two", "length"),
        "none": Reply("\\boxed{4}"),
    }
    with OpenAIServer(lambda body: replies[user_text(body)], streams=streams, reasoning_field=field) as server:
        found, _ = ask(settings(server.url), [request(name) for name in replies])
    assert all(isinstance(reply, ChatReply) for reply in found)
    assert [reply.response for reply in found if isinstance(reply, ChatReply)] == [
        "<think>\nTwo and two\nmake four.\n</think>\nSo \\boxed{4}.",
        "<think>\nTwo and two",
        "\\boxed{4}",
    ]
    assert [reply.finish_reason for reply in found if isinstance(reply, ChatReply)] == ["stop", "length", "stop"]


def test_a_tag_that_the_prompt_opened_is_opened_in_the_response() -> None:
    def response(text: str) -> str:
        return ChatReply(text, "", "stop", 0, 0).response

    assert response("\nhm\n</think>\n4") == "<think>\nhm\n</think>\n4"
    assert response("<think>\nhm\n</think>\n4") == "<think>\nhm\n</think>\n4"


CURED: list[Fault] = [
    "drop at once",
    "drop mid-stream",
    "429",
    "429 until",
    "429 date",
    "500",
    "503",
    "garbage",
    "html",
    "truncated json",
    "truncated",
    "empty choices",
    "no choices",
    "odd finish",
    "error in stream",
    "latin-1",
    "gzip",
    "huge line",
    "endless",
]


@pytest.mark.parametrize("fault", CURED)
def test_a_passing_fault_is_cured_by_another_attempt(fault: Fault) -> None:
    def twice(body: dict[str, Any], attempt: int) -> Fault | None:
        return fault if attempt < 2 else None

    with OpenAIServer(echo, fault=twice) as server:
        reply = one_reply(settings(server.url), request("x"))
        assert len(server.bodies) == reply.attempts == 3
    assert reply.text == echo(server.bodies[0])


@pytest.mark.parametrize("fault", CURED)
def test_a_lasting_fault_fails_after_the_given_attempts(fault: Fault) -> None:
    with OpenAIServer(echo, fault=lambda *_: fault) as server:
        (failed,), counts = ask(settings(server.url, attempts=2), [request("x")])
        assert len(server.bodies) == 2
    assert isinstance(failed, RequestFailed)
    assert failed.attempts == 2
    assert not failed.refused
    assert failed.reason
    assert counts["retries"] == 1


@pytest.mark.parametrize(
    ("fault", "limit", "reason"),
    [
        ("hang", {"idle_seconds": 0.2}, "idle_seconds"),
        ("hang mid-stream", {"idle_seconds": 0.2}, "idle_seconds"),
        ("hang mid-stream", {"total_seconds": 0.3}, "total_seconds"),
    ],
)
def test_a_silent_server_is_given_up(fault: Fault, limit: dict[str, float], reason: str) -> None:
    with OpenAIServer(echo, fault=lambda _, attempt: fault if attempt == 0 else None) as server:
        reply = one_reply(settings(server.url, **limit), request("x"))
        assert reply.attempts == 2
        (failed,), _ = ask(settings(server.url, **limit, attempts=1), [request("y")])
    assert isinstance(failed, RequestFailed)
    assert reason in failed.reason


@pytest.mark.parametrize("fault", ["drop after done", "stay open"])
def test_a_whole_reply_counts_whatever_becomes_of_the_connection(fault: Fault) -> None:
    with OpenAIServer(echo, fault=lambda *_: fault) as server:
        assert one_reply(settings(server.url), request("x")).attempts == 1


def test_retry_after_is_respected() -> None:
    times: list[float] = []

    def once(body: dict[str, Any], attempt: int) -> Fault | None:
        times.append(time.monotonic())
        return "429" if attempt == 0 else None

    with OpenAIServer(echo, fault=once) as server:
        one_reply(settings(server.url, backoff_seconds=0.001), request("x"))
    assert times[1] - times[0] >= float(RETRY_AFTER)


def test_the_wait_grows_and_is_drawn_anew() -> None:
    import tenacity

    async def waits() -> list[list[float]]:
        async with EndpointClient(settings("http://127.0.0.1:9/v1", backoff_seconds=0.5)) as client:
            state = tenacity.RetryCallState(tenacity.AsyncRetrying(), None, (), {})
            drawn = []
            for attempt in range(1, 12):
                state.attempt_number = attempt
                drawn.append([client._wait(state) for _ in range(200)])
            return drawn

    for attempt, drawn in enumerate(asyncio.run(waits()), start=1):
        bound = min(0.5 * 2 ** (attempt - 1), 60.0)
        assert 0.0 <= min(drawn) < 0.1 * bound
        assert 0.9 * bound < max(drawn) <= bound


def test_concurrency_is_bounded_and_connections_are_used_again() -> None:
    items = [request(str(number)) for number in range(60)]
    with OpenAIServer(echo, delay=lambda _: 0.005) as server:
        replies, _ = ask(settings(server.url, concurrency=5), items)
        assert server.largest == 5
        assert server.connections <= 10
    assert [reply.text for reply in replies if isinstance(reply, ChatReply)] == [
        f"You said {number} with seed 1, é∎\u2028." for number in range(60)
    ]


def test_addresses_take_turns_and_one_that_fails_is_rested_and_tried_again() -> None:
    broken = {"now": True}

    def fault(body: dict[str, Any], attempt: int) -> Fault | None:
        return "503" if broken["now"] else None

    with OpenAIServer(echo) as good, OpenAIServer(echo, fault=fault) as bad:

        async def run() -> None:
            async with EndpointClient(settings(good.url, bad.url, backoff_seconds=0.05)) as client:
                for number in range(20):
                    assert (await client.complete(request(str(number)))).text
                first = len(bad.bodies)
                # It is asked rarely while it fails, and takes its turns once it works.
                assert 1 <= first < 10
                broken["now"] = False
                await asyncio.sleep(1.0)
                for number in range(20, 40):
                    await client.complete(request(str(number)))
                assert len(bad.bodies) - first == 10

        asyncio.run(run())
        assert len(good.bodies) == 30


def test_an_address_where_nobody_listens_is_passed_over() -> None:
    with OpenAIServer(echo) as gone:
        url = gone.url
    with OpenAIServer(echo) as good:
        replies, _ = ask(settings(url, good.url), [request(str(number)) for number in range(10)])
    assert all(isinstance(reply, ChatReply) for reply in replies)


@pytest.mark.parametrize("status", ["401", "404", "302"])
def test_an_endpoint_that_lets_nobody_in_is_one_clear_error(
    status: Fault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with OpenAIServer(echo, fault=lambda *_: status) as server:
        with pytest.raises(UserError) as caught:
            ask(settings(server.url, api_key_env="TEACHER_KEY"), [request("x")])
        assert len(server.bodies) == 1
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.url in str(caught.value)
    assert status in str(caught.value)
    assert KEY not in str(caught.value) + repr(caught.value) + caplog.text


def test_one_refused_request_is_its_own_failure_but_a_refusal_of_all_is_the_settings() -> None:
    def long_ones(body: dict[str, Any], attempt: int) -> Fault | None:
        return "400" if len(user_text(body)) > 5 else None

    with OpenAIServer(echo, fault=long_ones) as server:
        (short, long), _ = ask(settings(server.url), [request("short"), request("too long")])
        assert isinstance(short, ChatReply)
        assert isinstance(long, RequestFailed)
        assert long.refused
        assert long.attempts == 1
        with pytest.raises(UserError, match="400"):
            ask(settings(server.url), [request(f"too long {number}") for number in range(20)])


def test_a_withheld_response_is_not_asked_for_again() -> None:
    with OpenAIServer(echo, fault=lambda *_: "content filter") as server:
        (failed,), _ = ask(settings(server.url), [request("x")])
        assert len(server.bodies) == 1
    assert isinstance(failed, RequestFailed)
    assert failed.refused


def test_a_long_run_of_random_faults_loses_and_mixes_nothing() -> None:
    draw = random.Random(7)
    faults = [*CURED[:-2], None, None, None, None, None, None, None, None]

    def fault(body: dict[str, Any], attempt: int) -> Fault | None:
        return None if attempt == 3 else draw.choice(faults)

    items = [request(f"question {number}", seed=number) for number in range(150)]
    with OpenAIServer(echo, fault=fault) as server:
        replies, _ = ask(settings(server.url, concurrency=32), items)
    assert [reply.text for reply in replies if isinstance(reply, ChatReply)] == [
        f"You said question {number} with seed {number}, é∎\u2028." for number in range(150)
    ]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8000/v1", "localhost"),
        ("ftp://host/v1", "ftp"),
        ("http://host:99999/v1", "address"),
        ("http://user:secret@host/v1", "credentials"),
        ("http://host/v1?key=secret", "credentials"),
    ],
)
def test_an_address_that_cannot_work_is_refused_and_secrets_are_not_repeated(url: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        settings(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  \n", "two\nlines", "é"])
def test_a_key_that_cannot_work_is_refused(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    with pytest.raises(UserError, match="TEACHER_KEY"):
        read_key(settings("http://host/v1", api_key_env="TEACHER_KEY"))


# The journal -----------------------------------------------------------------------------------------


def test_a_journal_cut_or_damaged_anywhere_yields_only_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "a" / "journal.jsonl"
    records = [{"id": str(number), "text": "a\n\u2028é\ud800" * number} for number in range(4)]
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    assert list(read_journal(path)) == records
    whole = path.read_bytes()
    ends = [0, *(place + 1 for place, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends) - 1
        assert list(read_journal(path)) == records[:kept]
        # What is appended after a torn line is whole; so is a line that lacked only its end.
        with Journal(path) as journal:
            journal.append({"id": "new"})
        kept += cut + 1 in ends
        assert list(read_journal(path)) == [*records[:kept], {"id": "new"}]
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert all(record in records for record in read_journal(path))
        assert len(list(read_journal(path))) >= len(records) - 2
    assert list(read_journal(tmp_path / "absent")) == []


# The asker -------------------------------------------------------------------------------------------


def asking(url: str, **changes: Any) -> AskConfig:
    """How a model behind an endpoint is asked; of `changes`, those of the endpoint's settings go there."""
    endpoint = {name: value for name, value in settings(url).__dict__.items() if name != "prices"}
    endpoint["prices"] = {"input_per_million": 1000.0, "output_per_million": 5000.0}
    endpoint |= {name: changes.pop(name) for name in list(changes) if name in endpoint}
    engine = {"kind": "endpoint", "endpoint": endpoint}
    return parse_config(AskConfig, {"engine": engine, "temperature": 0.0, "max_new_tokens": 8, **changes})


def asker_of(config: AskConfig, journal: Path) -> Asker:
    assert isinstance(config.engine, EndpointEngine)
    return Asker(config, AskedEndpoint(config, config.engine), journal)


def prompts(*names: str) -> list[Prompt]:
    return [Prompt(system="Judge.", user=name) for name in names]


def word(body: dict[str, Any]) -> str:
    return "YES " + user_text(body)


def test_a_question_is_asked_once_ever(tmp_path: Path) -> None:
    journal = tmp_path / "replies-0.jsonl"
    with OpenAIServer(word) as server:
        with asker_of(asking(server.url), journal) as asker:
            assert asker.ask(prompts("a", "b", "a")) == ["YES a", "YES b", "YES a"]
            assert asker.ask(prompts("b", "c")) == ["YES b", "YES c"]
            # 3 requests of 11 tokens and replies of 2 words each.
            spent = {"prompt_tokens": 33, "completion_tokens": 6, "cost_cents": 7}  # (33*1000 + 6*5000)/1e6 = 0.063
            first = {"asked": 3, "cached": 1, "failed": 0, "refused": 0, "over_budget": 0, "retries": 0}
            assert asker.counts == {**first, **spent}
        # Another run, another process of the same directory, and another question or setting.
        with asker_of(asking(server.url), journal) as asker:
            assert asker.ask(prompts("a", "c")) == ["YES a", "YES c"]
            assert asker.counts == {**dict.fromkeys(first, 0), "cached": 2, **spent}
        with asker_of(asking(server.url), tmp_path / "replies-1.jsonl") as asker:
            assert asker.ask(prompts("a")) == ["YES a"]
        assert len(server.bodies) == 3
        with asker_of(asking(server.url, temperature=0.5), journal) as asker:
            asker.ask(prompts("a"))
        assert len(server.bodies) == 4
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Judge."}


@pytest.mark.parametrize(
    ("limit", "answered"),
    # A question costs 11 + 2 tokens and (11*1000 + 2*5000)/1e6 = 0.021; the next is refused once that is spent.
    [({"max_requests": 3}, 3), ({"max_total_tokens": 27}, 3), ({"max_cost": 0.04}, 2), ({"max_requests": 0}, 0)],
)
def test_the_budget_holds_over_calls_and_runs(tmp_path: Path, limit: dict[str, Any], answered: int) -> None:
    names = [f"q{number}" for number in range(6)]
    with OpenAIServer(word) as server:
        config = asking(server.url, concurrency=1, **limit)
        with asker_of(config, tmp_path / "replies.jsonl") as asker:
            found = asker.ask(prompts(*names[:2])) + asker.ask(prompts(*names[2:]))
            assert asker.counts["over_budget"] == 6 - answered
        assert found == [f"YES {name}" for name in names[:answered]] + [None] * (6 - answered)
        with asker_of(config, tmp_path / "replies.jsonl") as asker:
            assert asker.ask(prompts(*names)) == found
        assert len(server.bodies) == answered


def test_a_cost_limit_needs_prices() -> None:
    with pytest.raises(UserError, match="max_cost"):
        AskConfig(
            engine=EndpointEngine(kind="endpoint", endpoint=settings("http://host/v1")),
            temperature=0.0,
            max_new_tokens=1,
            max_cost=1.0,
        )


def test_a_failed_question_has_no_reply_and_is_asked_again(tmp_path: Path) -> None:
    down = {"now": True}

    def fault(body: dict[str, Any], attempt: int) -> Fault | None:
        return "500" if down["now"] and user_text(body) == "b" else None

    journal = tmp_path / "replies.jsonl"
    with OpenAIServer(word, fault=fault) as server, asker_of(asking(server.url), journal) as asker:
        assert asker.ask(prompts("a", "b")) == ["YES a", None]
        assert asker.counts["failed"] == 1
        assert asker.counts["retries"] == 3
        down["now"] = False
        assert asker.ask(prompts("a", "b")) == ["YES a", "YES b"]


def test_a_refused_key_ends_the_asking(tmp_path: Path) -> None:
    with OpenAIServer(word, fault=lambda *_: "401", delay=lambda _: 0.01) as server:
        with asker_of(asking(server.url), tmp_path / "replies.jsonl") as asker, pytest.raises(UserError, match="401"):
            asker.ask(prompts(*map(str, range(50))))
        assert len(server.bodies) <= 8


def test_the_key_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with OpenAIServer(word) as server:
        config = asking(server.url, api_key_env="TEACHER_KEY")
        with asker_of(config, tmp_path / "replies.jsonl") as asker:
            asker.ask(prompts("a"))
    assert os.environ["TEACHER_KEY"] == KEY
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())
    assert json.loads(next((tmp_path / "replies.jsonl").open()).split(" ", 1)[1])["text"] == "YES a"


class Told:
    """A watch with a clock of its own, and what it told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.lines = 50.0, list[str]()
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)
        self.watch = Watch(["http://a/v1", "http://b/v1"], 600.0, self.lines.append)


def test_a_failing_address_is_named_at_once_then_now_and_then_and_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told(monkeypatch)
    for _ in range(100):
        told.watch.failed("http://a/v1", "no connection")
        told.now += 1.0
    told.watch.heard("http://b/v1")
    told.watch.heard("http://a/v1")
    told.watch.heard("http://a/v1")
    failed = [f"http://a/v1: no connection ({n} attempts failed); trying again" for n in (31, 61, 91)]
    first = "http://a/v1: no connection (1 attempt failed); trying again"
    assert told.lines == [first, *failed, "http://a/v1 answers again"]


def test_silence_is_told_until_somebody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(monkeypatch)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        told.now += seconds
        if len(slept) == 80:
            told.watch.heard("http://b/v1")

    monkeypatch.setattr(watch.asyncio, "sleep", sleep)
    asyncio.run(told.watch.run())
    assert sum(slept) == 40.0
    assert [line.partition("no word after ")[2].partition(" s;")[0] for line in told.lines] == ["3", "33"]
    assert all("http://a/v1, http://b/v1" in line and "idle_seconds=600" in line for line in told.lines)
    # What a user is promised.
    assert watch.SILENT_SECONDS + watch.TICK_SECONDS < 5.0


def test_a_dead_address_beside_one_that_answers_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with OpenAIServer(echo) as server:
            replies, _ = ask(settings(dead, server.url), [request(str(number)) for number in range(6)])
    assert all(isinstance(reply, ChatReply) for reply in replies)
    assert f"{dead}: no connection" in capfd.readouterr().err


def test_an_endpoint_that_says_nothing_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.0)
    with OpenAIServer(echo, fault=lambda _, attempt: "hang" if attempt == 0 else None) as server:
        one_reply(settings(server.url, idle_seconds=1.5), request("1"))
    assert f"{server.url}: no word after" in capfd.readouterr().err
