"""One function over many items: in this process, in several, or shared by the processes of an array."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from phimr_nemo.config import ShardConfig
from phimr_nemo.process.children import start_pool_worker, unheard_by_children
from phimr_nemo.store.check import is_declared
from phimr_nemo.store.lease import FreeUnits, Leases, rotated
from phimr_nemo.store.progress import track
from phimr_nemo.store.provenance import MadeFrom
from phimr_nemo.store.shards import shard_is_complete

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, *, title: str
) -> list[Result]:
    """`[function(item) for item in items]`, with a progress bar.

    Args:
        function: a function of a module (it goes to other processes by name).
        items: one call each.
        workers: processes; with 1 the calls happen here.
        title: of the progress bar.

    Returns:
        The results in the order of the items.

    Raises:
        Exception: the first that a call raised; calls that have not begun are then not made.
    """
    if workers == 1 or len(items) < 2:
        return [function(item) for item in track(items, title=title, unit="shard")]
    with _pool(min(workers, len(items))) as pool:
        with unheard_by_children([signal.SIGINT]):
            results = pool.map(function, items)
        return list(track(results, title=title, unit="shard", total=len(items)))


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that wait for work; after an error calls that have not begun are not made."""
    # Not forked: a forked child of a process with threads (Arrow's, the tokenizer's) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_pool_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _in_free_processes(
    function: Callable[[Item], None], items: Sequence[Item], free: FreeUnits, workers: int, title: str
) -> None:
    """Every process has one of the free items at a time, and takes the next when it has done it."""
    working: dict[Future[None], int] = {}

    def settle(most: int) -> None:
        while len(working) > most:
            done, _ = wait(working, return_when=FIRST_COMPLETED)
            for one in done:
                free.release(working.pop(one))
                one.result()

    with _pool(workers) as pool:
        for unit in track(free, title=title, unit="shard", total=len(items)):
            with unheard_by_children([signal.SIGINT]):
                working[pool.submit(function, items[unit])] = unit
            settle(workers - 1)
        settle(0)


@dataclass(frozen=True)
class Team:
    """The processes that share a step's work: all of an array, or this one alone.

    Attributes:
        leases: of this process; None when it is alone.
        index, count: its place among them.
    """

    leases: Leases | None = None
    index: int = 0
    count: int = 1

    def share(
        self,
        function: Callable[[Item], None],
        items: Sequence[Item],
        *,
        is_done: Callable[[Item], bool],
        workers: int,
        title: str,
    ) -> None:
        """Call the function for every item, wherever, and return when all of them are done.

        Args:
            function: does an item, and does nothing where it was done and is undamaged.
            items: the same in all processes.
            is_done: whether an item was done by somebody, damaged or not; cheap.
            workers: processes of this one.
            title: of the progress bar, and of the leases.
        """
        if self.leases is None:
            in_processes(function, items, workers, title=title)
            return
        # An item that was done before is looked at once, by the process whose share it would be.
        own = [item for item in items[self.index :: self.count] if is_done(item)]
        in_processes(function, own, workers, title=title)
        free = FreeUnits(
            rotated(range(len(items)), self.index, self.count),
            self.leases,
            name=title,
            is_done=lambda unit: is_done(items[unit]),
            wait=True,
        )
        if workers == 1:
            for unit in track(free.one_by_one(), title=title, unit="shard", total=len(items)):
                function(items[unit])
            return
        _in_free_processes(function, items, free, workers, title)

    def free_shards(self, directory: Path, shards: Sequence[int], made_from: Callable[[int], MadeFrom]) -> FreeUnits:
        """The shards of a record directory that are to be made by this process, as it asks for them.

        In an array whoever is free takes the next one; one that was made before is read, for damage, by the process
        whose share it would be.

        Args:
            directory: the record directory.
            shards: their numbers.
            made_from: a shard's number -> what it is made from; one that was made from something else is to be made.
        """

        def is_whole(shard: int) -> bool:
            return shard_is_complete(directory, shard, made_from(shard))

        if self.leases is None:
            return FreeUnits(shards, None, name="shard", is_done=is_whole)

        def is_made(shard: int) -> bool:
            if not is_declared(directory, shard, made_from(shard)):
                return False
            return shard % self.count != self.index or is_whole(shard)

        tried = rotated(shards, self.index, self.count)
        return FreeUnits(tried, self.leases, name="shard", is_done=is_made)


LEASES: Final = "leases"
ALONE: Final = Team()


@contextmanager
def team_of(shard: ShardConfig, output: Path) -> Iterator[Team]:
    """The team of a step's array; its leases lie under the step's output."""
    if shard.count == 1:
        yield ALONE
        return
    with Leases(output / LEASES, f"task-{shard.index}") as leases:
        yield Team(leases, shard.index, shard.count)
