"""Many short questions to a model, each answered once: replies are kept on disk.

The journal of replies is cache, account and safeguard against a kill in one: a question whose reply stands there
is not asked again, and what it cost counts against the budget.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from phimr_nemo.config import AskConfig, EndpointEngine, Prices
from phimr_nemo.config.engine import QUESTION
from phimr_nemo.endpoint.journal import Journal, read_journal
from phimr_nemo.endpoint.settings import read_key
from phimr_nemo.endpoint.wire import ChatReply, ChatRequest, RequestFailed
from phimr_nemo.store.content import content_id
from phimr_nemo.store.progress import Progress
from phimr_nemo.text.turn import visible_text

JOURNAL_SUFFIX: Final = ".jsonl"
MILLION: Final = 1_000_000
CENTS: Final = 100


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        system: who answers, and how.
        user: what is asked.
    """

    system: str
    user: str


Replied = Callable[[str, ChatReply | RequestFailed], None]
"""Told of a question, by its key, what came of it."""


class Answers(Protocol):
    """A model that answers: behind an endpoint, or one that `phimr_nemo.generate.asking` opens."""

    @property
    def name(self) -> str:
        """What it is called, a part of the key of a reply: another model's replies are not this one's."""
        ...

    @property
    def settings(self) -> str:
        """What else its replies depend on besides the model, the question and how tokens are drawn."""
        ...

    def answer(self, questions: Iterator[tuple[str, Prompt]], replied: Replied) -> int:
        """Answer keyed questions, which are taken one after another while the budget lasts.

        Returns:
            How many requests were made again.

        Raises:
            UserError: the model cannot be asked at all.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


OpensModel = Callable[[AskConfig], Answers]


class AskedEndpoint:
    """A served model.

    Args:
        config: how it is asked.
        engine: its endpoint.

    Raises:
        UserError: the key's variable is not set.
    """

    def __init__(self, config: AskConfig, engine: EndpointEngine) -> None:
        read_key(engine.endpoint)
        self._config, self._endpoint = config, engine.endpoint

    @property
    def name(self) -> str:
        """The served model's."""
        return self._endpoint.model

    @property
    def settings(self) -> str:
        """The further fields of the requests."""
        return repr(sorted(self._endpoint.extra_body.items()))

    def answer(self, questions: Iterator[tuple[str, Prompt]], replied: Replied) -> int:
        """Ask as many at once as the endpoint's settings say.

        Raises:
            UserError: the endpoint refuses the key, the model, the path, or everything it is asked.
        """
        return asyncio.run(self._answer(questions, replied))

    async def _answer(self, questions: Iterator[tuple[str, Prompt]], replied: Replied) -> int:
        # What speaks HTTP is loaded where there is something to ask.
        from phimr_nemo.endpoint.client import EndpointClient

        async with EndpointClient(self._endpoint) as client:

            async def work() -> None:
                # Workers, not one task a question: the budget is looked at just before each.
                for key, prompt in questions:
                    try:
                        replied(key, await client.complete(self._request(prompt)))
                    except RequestFailed as error:
                        replied(key, error)

            workers = [asyncio.create_task(work()) for _ in range(self._endpoint.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            return int(client.counts["retries"])

    def _request(self, prompt: Prompt) -> ChatRequest:
        config = self._config
        return ChatRequest(
            user=prompt.user,
            system=prompt.system,
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            may_be_empty=True,
        )

    def close(self) -> None:
        """Nothing: the endpoint is not this process's."""


def cost(prices: Prices, prompt_tokens: int, completion_tokens: int) -> float:
    """What tokens cost, in the currency of the prices."""
    total = prompt_tokens * prices.input_per_million + completion_tokens * prices.output_per_million
    return total / MILLION


def cents(prices: Prices, prompt_tokens: int, completion_tokens: int) -> int:
    """The same in hundredths, rounded up."""
    return math.ceil(cost(prices, prompt_tokens, completion_tokens) * CENTS)


class Asker:
    """Asks a model, remembers every reply, and stops at a budget. Use as a context manager.

    Args:
        config: how it is asked, the budget.
        model: what is asked; it is closed with this object.
        journal: this process's own journal of replies, a `.jsonl` file; the others beside it are read as well,
            so that processes which share a directory share their replies.

    Raises:
        UserError: the journal cannot be written.
    """

    def __init__(self, config: AskConfig, model: Answers, journal: Path) -> None:
        self._config, self._model = config, model
        self._counts: Counter[str] = Counter()
        self._replies: dict[str, str] = {}
        self._requests = self._prompt_tokens = self._completion_tokens = 0
        for path in sorted({*journal.parent.glob(f"*{JOURNAL_SUFFIX}"), journal}):
            for record in read_journal(path):
                self._remember(record, is_own=path == journal)
        self._journal = Journal(journal)

    @property
    def counts(self) -> dict[str, int]:
        """What this object did (asked, cached, failed, refused, over_budget, retries), and what its journal cost.

        Tokens as far as the server counts them; `cost_cents` only where prices are given.
        """
        prices = self._config.prices
        spent = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._completion_tokens}
        cost_cents = {} if prices is None else {"cost_cents": cents(prices, **spent)}
        names = ("asked", "cached", "failed", "refused", "over_budget", "retries")
        return {**{name: self._counts[name] for name in names}, **spent, **cost_cents}

    def ask(self, prompts: Sequence[Prompt], *, desc: str = "ask") -> list[str | None]:
        """Ask all that has no reply yet.

        Args:
            prompts: the questions; equal ones are asked once.
            desc: the progress bar's name.

        Returns:
            A reply for each prompt, in order, without the model's thinking. It is untrusted text. None where the
            request failed for good, is refused, or the budget is spent; such a question is asked again by the next
            call.

        Raises:
            UserError: the model cannot be asked at all.
        """
        prompts = [Prompt(p.system, self._config.prompt.replace(QUESTION, p.user)) for p in prompts]
        keys = [self._key(prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._replies}
        self._counts["cached"] += len(set(keys)) - len(new)
        if new:
            with Progress(len(new), title=desc, unit="question") as progress:

                def replied(key: str, reply: ChatReply | RequestFailed) -> None:
                    self._take(key, reply)
                    progress.update()

                self._counts["retries"] += self._model.answer(self._within_budget(new), replied)
        return [None if key not in self._replies else visible_text(self._replies[key]) or "" for key in keys]

    def _key(self, prompt: Prompt) -> str:
        config = self._config
        return content_id(
            self._model.name,
            # The whole distribution goes without saying: so it was before there was a choice.
            self._model.settings + ("" if config.top_p == 1.0 else f" top_p={config.top_p!r}"),
            repr(config.temperature),
            str(config.max_new_tokens),
            prompt.system,
            prompt.user,
        )

    def _within_budget(self, new: dict[str, Prompt]) -> Iterator[tuple[str, Prompt]]:
        """The questions while the budget lasts; each counts as soon as it is taken."""
        for key, prompt in new.items():
            if self._is_spent():
                self._counts["over_budget"] += 1
                continue
            self._requests += 1
            self._counts["asked"] += 1
            yield key, prompt

    def _take(self, key: str, reply: ChatReply | RequestFailed) -> None:
        if isinstance(reply, RequestFailed):
            self._counts["refused" if reply.refused else "failed"] += 1
            return
        record = _record(key, reply)
        self._journal.append(record)
        self._requests -= 1
        self._remember(record, is_own=True)

    def _remember(self, record: dict[str, Any], *, is_own: bool) -> None:
        self._replies[record["key"]] = record["text"]
        if is_own:
            self._requests += 1
            self._prompt_tokens += max(0, record["prompt_tokens"])
            self._completion_tokens += max(0, record["completion_tokens"])

    def _is_spent(self) -> bool:
        config, prices = self._config, self._config.prices
        tokens = self._prompt_tokens + self._completion_tokens
        spent = 0.0 if prices is None else cost(prices, self._prompt_tokens, self._completion_tokens)
        pairs = ((config.max_requests, self._requests), (config.max_total_tokens, tokens), (config.max_cost, spent))
        return any(limit is not None and value >= limit for limit, value in pairs)

    def close(self) -> None:
        """Bring the replies to the disk and close the model."""
        self._model.close()
        self._journal.close()

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _record(key: str, reply: ChatReply) -> dict[str, Any]:
    return {
        "key": key,
        "text": reply.text,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
