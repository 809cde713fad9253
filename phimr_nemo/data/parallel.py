"""One function over many items, in this process or in several."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from phimr_nemo.process.children import start_pool_worker, unheard_by_children
from phimr_nemo.store.progress import track

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
    # Not forked: a forked child of a process with threads (Arrow's, the tokenizer's) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=start_pool_worker) as pool:
        try:
            with unheard_by_children([signal.SIGINT]):
                results = pool.map(function, items)
            return list(track(results, title=title, unit="shard", total=len(items)))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
