"""Many short questions to a small model behind an endpoint, each answered once: replies are kept on disk.

The journal of replies is cache, account and safeguard against a kill in one: a question whose reply stands there
is not asked again, and what it cost counts against the budget.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from phimr_nemo.config import AskConfig, Prices
from phimr_nemo.endpoint.client import EndpointClient
from phimr_nemo.endpoint.journal import Journal, read_journal
from phimr_nemo.endpoint.settings import read_key
from phimr_nemo.endpoint.wire import ChatReply, ChatRequest, RequestFailed
from phimr_nemo.store.content import content_id
from phimr_nemo.store.progress import Progress

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


def cost(prices: Prices, prompt_tokens: int, completion_tokens: int) -> float:
    """What tokens cost, in the currency of the prices."""
    total = prompt_tokens * prices.input_per_million + completion_tokens * prices.output_per_million
    return total / MILLION


def cents(prices: Prices, prompt_tokens: int, completion_tokens: int) -> int:
    """The same in hundredths, rounded up."""
    return math.ceil(cost(prices, prompt_tokens, completion_tokens) * CENTS)


class Asker:
    """Asks an endpoint, remembers every reply, and stops at a budget. Use as a context manager.

    Args:
        config: the endpoint, how it is asked, the budget.
        journal: this process's own journal of replies, a `.jsonl` file; the others beside it are read as well,
            so that processes which share a directory share their replies.

    Raises:
        UserError: the key's variable is not set, or the journal cannot be written.
    """

    def __init__(self, config: AskConfig, journal: Path) -> None:
        read_key(config.endpoint)
        self._config = config
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
        prices = self._config.endpoint.prices
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
            A reply for each prompt, in order. It is untrusted text. None where the request failed for good, is
            refused, or the budget is spent; such a question is asked again by the next call.

        Raises:
            UserError: the endpoint refuses the key, the model, the path, or everything it is asked.
        """
        keys = [self._key(prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._replies}
        self._counts["cached"] += len(set(keys)) - len(new)
        if new:
            asyncio.run(self._ask_new(new, desc))
        return [self._replies.get(key) for key in keys]

    def _key(self, prompt: Prompt) -> str:
        config = self._config
        return content_id(
            config.endpoint.model,
            repr(sorted(config.endpoint.extra_body.items())),
            repr(config.temperature),
            str(config.max_tokens),
            prompt.system,
            prompt.user,
        )

    async def _ask_new(self, new: dict[str, Prompt], desc: str) -> None:
        waiting = iter(new.items())
        with Progress(len(new), title=desc, unit="question") as progress:
            async with EndpointClient(self._config.endpoint) as client:

                async def work() -> None:
                    # Workers, not one task a question: the budget is looked at just before each.
                    for key, prompt in waiting:
                        await self._ask_one(client, key, prompt)
                        progress.update()

                workers = [
                    asyncio.create_task(work()) for _ in range(min(self._config.endpoint.concurrency, len(new)))
                ]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
                    self._counts["retries"] += client.counts["retries"]

    async def _ask_one(self, client: EndpointClient, key: str, prompt: Prompt) -> None:
        if self._is_spent():
            self._counts["over_budget"] += 1
            return
        self._requests += 1
        self._counts["asked"] += 1
        request = ChatRequest(
            user=prompt.user,
            system=prompt.system,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            may_be_empty=True,
        )
        try:
            reply = await client.complete(request)
        except RequestFailed as error:
            self._counts["refused" if error.refused else "failed"] += 1
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
        config, prices = self._config, self._config.endpoint.prices
        tokens = self._prompt_tokens + self._completion_tokens
        spent = 0.0 if prices is None else cost(prices, self._prompt_tokens, self._completion_tokens)
        pairs = ((config.max_requests, self._requests), (config.max_total_tokens, tokens), (config.max_cost, spent))
        return any(limit is not None and value >= limit for limit, value in pairs)

    def close(self) -> None:
        """Bring the replies to the disk."""
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
