"""Problems and a teacher behind an OpenAI-compatible endpoint -> a `rollouts` record directory.

Every response is appended to its shard's journal as soon as it is whole, so a kill at any moment costs the requests
that were under way and nothing else; once all responses of a shard are there it is written, and its journal goes.
The requests of the next shard start while the last ones of a shard are still being answered. A request that fails
for good leaves its shard open: the run goes on with everything else, ends with an error that counts the failures,
and the same command asks again for what is missing, and for that only.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import EndpointEngine
from phimr_nemo.data.parallel import ALONE, Team
from phimr_nemo.endpoint import ChatReply, ChatRequest, Journal, RequestFailed, read_journal
from phimr_nemo.endpoint.ask import cents
from phimr_nemo.endpoint.client import EndpointClient
from phimr_nemo.endpoint.wire import EMPTY_REPLY
from phimr_nemo.errors import UserError
from phimr_nemo.generate.plan import Plan, Planned, rollout_counts
from phimr_nemo.generate.sampler import SamplingParams
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.lease import FreeUnits
from phimr_nemo.store.progress import Progress
from phimr_nemo.store.provenance import MadeFrom, begin
from phimr_nemo.store.shards import finish, is_complete, rows_to_table, shard_is_complete, write_shard

MIN_FAILURES_IN_A_ROW: Final = 16
"""So many requests that fail for good one after another, or all that are under way: the endpoint is gone."""
SHOWN_REASONS: Final = 5
USAGE: Final = ("requests", "attempts", "missing", "prompt_tokens", "completion_tokens")
EMPTY_REPLIES: Final = "empty replies, asked again"
ONLY_REASONING: Final = "finished replies with nothing but reasoning"
"""Their answer, if there is one, is in the reasoning field: the server's reasoning parser does not fit the model."""


def request_rollouts(
    plan: Plan,
    engine: EndpointEngine,
    params: SamplingParams,
    out_dir: Path,
    *,
    shard_indices: Sequence[int],
    inputs: Mapping[str, str],
    team: Team = ALONE,
) -> bool:
    """Ask an endpoint for the rollouts of some shards.

    Args:
        plan: what is asked.
        engine: the endpoint.
        params: how tokens are drawn.
        out_dir: the record directory; finished shards and journaled responses in it are kept.
        shard_indices: make only these shards.
        inputs: what the problems were read from, by content.
        team: the processes that share the shards.

    Returns:
        Whether all shards are there; the manifest, with the account of tokens and costs, is then written.

    Raises:
        UserError: bad settings, the directory was begun with others, the endpoint refuses the key, the model or
            everything, or requests failed for good (they are counted by reason).
    """
    made_from = plan.made_from(
        inputs, params=asdict(params), system=engine.system, extra_body=dict(engine.endpoint.extra_body)
    )
    begin(out_dir, made_from)
    if is_complete(out_dir, "rollouts"):
        return True
    unfinished = []
    for index in shard_indices:
        if shard_is_complete(out_dir, index, made_from):
            _journal_path(out_dir, index).unlink(missing_ok=True)  # killed between the two
        else:
            unfinished.append(index)
    if unfinished:
        done = sum(plan.count(index) for index in shard_indices) - sum(plan.count(index) for index in unfinished)
        free = team.free_shards(out_dir, unfinished, lambda _: made_from)
        asyncio.run(_Generation(plan, engine, params, out_dir, made_from, free).run(unfinished, done))
    if not all(shard_is_complete(out_dir, index, made_from) for index in plan.shards):
        return False
    finish(out_dir, kind="rollouts", **made_from.to_json(), counts=_counts(out_dir, plan, engine))
    return True


def _journal_path(out_dir: Path, index: int) -> Path:
    return out_dir / f"replies-{index:05d}.jsonl"


def _usage_path(out_dir: Path, index: int) -> Path:
    return out_dir / f"usage-{index:05d}.json"


def _failures_path(out_dir: Path, index: int) -> Path:
    return out_dir / f"failed-{index:05d}.json"


def _counts(out_dir: Path, plan: Plan, engine: EndpointEngine) -> dict[str, int]:
    """The rollouts and what they cost, over all shards."""
    total: Counter[str] = Counter()
    for index in plan.shards:
        total.update(json.loads(_usage_path(out_dir, index).read_text("utf-8")))
    tokens = {"prompt_tokens": total["prompt_tokens"], "completion_tokens": total["completion_tokens"]}
    prices = engine.endpoint.prices
    cost = {} if prices is None else {"cost_cents": cents(prices, **tokens)}
    rare = {name: total[name] for name in (EMPTY_REPLIES, ONLY_REASONING) if total[name]}
    return {**rollout_counts(out_dir), **{name: total[name] for name in USAGE}, **rare, **cost}


class _Shard:
    """A shard under way: what is planned, its journal, and what is still missing."""

    def __init__(self, plan: Plan, out_dir: Path, index: int, made_from: MadeFrom) -> None:
        self.index, self.teacher, self.out_dir, self.made_from = index, plan.teacher, out_dir, made_from
        self.planned = plan.shard(index)
        path = _journal_path(out_dir, index)
        have = {record["id"] for record in read_journal(path)}
        self.missing = [item for item in self.planned if item.id not in have]
        self.left = len(self.missing)
        self.failures: list[dict[str, Any]] = []
        self.journal = Journal(path)

    def take(self, item: Planned, reply: ChatReply) -> None:
        """Keep a response."""
        self.journal.append(
            {
                "id": item.id,
                "response": reply.response,
                "finish_reason": reply.finish_reason,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
                "attempts": reply.attempts,
                "empty_replies": reply.empty_replies,
                "only_reasoning": reply.is_only_reasoning,
            }
        )

    def fail(self, item: Planned, error: RequestFailed) -> None:
        """Keep note of a request that has no response."""
        self.failures.append(
            {
                "id": item.id,
                "problem_id": item.problem["id"],
                "sample_index": item.sample_index,
                "reason": error.reason,
                "attempts": error.attempts,
                "refused": error.refused,
            }
        )

    def close(self, max_missing: float) -> bool:
        """Write the shard if it is whole, or lacks no more than may be missing; whether it was written."""
        self.journal.close()
        if self.failures:
            write_json(_failures_path(self.out_dir, self.index), self.failures)
        if len(self.failures) > max_missing * len(self.planned):
            return False
        records = {record["id"]: record for record in read_journal(_journal_path(self.out_dir, self.index))}
        table = rows_to_table(self._rows(records), "rollouts")
        write_json(_usage_path(self.out_dir, self.index), self._usage(list(records.values())))
        write_shard(self.out_dir, self.index, table, kind="rollouts", made_from=self.made_from)
        _journal_path(self.out_dir, self.index).unlink()
        if not self.failures:
            _failures_path(self.out_dir, self.index).unlink(missing_ok=True)
        return True

    def _rows(self, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            item.row(
                records[item.id]["response"],
                teacher=self.teacher,
                finish_reason=records[item.id]["finish_reason"],
                tokens=records[item.id]["completion_tokens"],
            )
            for item in self.planned
            if item.id in records
        ]

    def _usage(self, records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        return {
            "requests": len(self.planned),
            "missing": len(self.failures),
            "attempts": sum(record["attempts"] for record in (*records, *self.failures)),
            "prompt_tokens": sum(max(0, record["prompt_tokens"]) for record in records),
            "completion_tokens": sum(max(0, record["completion_tokens"]) for record in records),
            EMPTY_REPLIES: sum(record.get("empty_replies", 0) for record in records)
            + sum(failure["attempts"] for failure in self.failures if failure["reason"] == EMPTY_REPLY),
            ONLY_REASONING: sum(record.get("only_reasoning", False) for record in records),
        }


class _Generation:
    """The shards that one process takes, with `concurrency` requests under way."""

    def __init__(
        self,
        plan: Plan,
        engine: EndpointEngine,
        params: SamplingParams,
        out_dir: Path,
        made_from: MadeFrom,
        free: FreeUnits,
    ) -> None:
        self._plan, self._engine, self._params, self._out_dir = plan, engine, params, out_dir
        self._made_from, self._free = made_from, free
        self._open: dict[int, _Shard] = {}
        self._unwritten = set[int]()
        self._failed: Counter[str] = Counter()
        self._failed_in_a_row = 0
        self._limit_in_a_row = max(MIN_FAILURES_IN_A_ROW, engine.endpoint.concurrency)
        self._usage: Counter[str] = Counter()

    async def run(self, indices: Sequence[int], done: int) -> None:
        """Ask for everything that the shards miss.

        Raises:
            UserError: see :func:`request_rollouts`.
        """
        total = done + sum(self._plan.count(index) for index in indices)
        with Progress(total, done=done, unit="rollout", title="generate") as bar:
            items = self._items(bar)
            async with EndpointClient(self._engine.endpoint) as client:
                workers = [
                    asyncio.create_task(self._work(client, items, bar))
                    for _ in range(self._engine.endpoint.concurrency)
                ]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
                    for shard in self._open.values():
                        shard.journal.close()
        if self._unwritten:
            raise self._failure(total)

    def _items(self, bar: Progress) -> Iterator[tuple[_Shard, Planned]]:
        """What is missing, shard by shard; a shard is opened when its turn comes, and held until it is written."""
        for index in self._free:
            self._unwritten.add(index)
            shard = _Shard(self._plan, self._out_dir, index, self._made_from)
            bar.found_done(len(shard.planned) - shard.left)
            if not shard.left:
                self._close(shard)
                continue
            self._open[index] = shard
            for item in shard.missing:
                if self._failed_in_a_row >= self._limit_in_a_row:
                    return
                yield shard, item

    async def _work(self, client: EndpointClient, items: Iterator[tuple[_Shard, Planned]], bar: Progress) -> None:
        for shard, item in items:
            await self._ask(client, shard, item)
            shard.left -= 1
            self._show(client, bar)
            if not shard.left:
                del self._open[shard.index]
                # Replies to other shards arrive meanwhile.
                await asyncio.to_thread(self._close, shard)

    def _close(self, shard: _Shard) -> None:
        if shard.close(self._engine.max_missing):
            self._unwritten.discard(shard.index)
        self._free.release(shard.index)

    async def _ask(self, client: EndpointClient, shard: _Shard, item: Planned) -> None:
        request = ChatRequest(
            user=item.prompt,
            system=self._engine.system,
            max_tokens=self._params.max_new_tokens,
            temperature=self._params.temperature,
            top_p=self._params.top_p,
            seed=item.seed,
        )
        try:
            reply = await client.complete(request)
        except RequestFailed as error:
            shard.fail(item, error)
            self._failed[error.reason] += 1
            # One that is refused says nothing about the others.
            self._failed_in_a_row += not error.refused
            return
        shard.take(item, reply)
        self._failed_in_a_row = 0
        self._usage["prompt_tokens"] += max(0, reply.prompt_tokens)
        self._usage["completion_tokens"] += max(0, reply.completion_tokens)

    def _show(self, client: EndpointClient, bar: Progress) -> None:
        """Rate and time to go are the bar's own."""
        prices = self._engine.endpoint.prices
        facts = {"tokens": self._usage["completion_tokens"], "retries": client.counts["retries"]}
        if prices is not None:
            facts["cents"] = cents(prices, self._usage["prompt_tokens"], self._usage["completion_tokens"])
        if self._failed:
            facts["failed"] = self._failed.total()
        bar.show(facts)
        bar.update()

    def _failure(self, total: int) -> UserError:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self._failed.most_common(SHOWN_REASONS))
        rest = len(self._failed) - SHOWN_REASONS
        gone = self._failed_in_a_row >= self._limit_in_a_row
        return UserError(
            f"{self._failed.total()} of {total} requests have no response ({reasons}"
            + (f"; {rest} other reasons)" if rest > 0 else ")")
            + (f"; stopped because the last {self._failed_in_a_row} all failed" if gone else ""),
            rule="a shard is written when no more than the share engine.max_missing of its responses is missing",
            remedy="run the same command again: what is there is kept and only the missing is asked for; "
            f"{self._out_dir}/failed-*.json names them, and engine.max_missing lets a few be missing for good",
        )
