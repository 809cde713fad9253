"""Says when an endpoint does not answer: within seconds, then every half minute, and when it answers again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from phimr_nemo.store.progress import say

SILENT_SECONDS: Final = 3.0
"""Without a first word from any address, after which that is said."""
REPEAT_SECONDS: Final = 30.0
TICK_SECONDS: Final = 0.5


class Watch:
    """What is heard of an endpoint's addresses.

    Args:
        urls: the addresses.
        idle_seconds: after which a silent attempt is given up.
        tell: takes a line for the user.
    """

    def __init__(self, urls: Sequence[str], idle_seconds: float, tell: Callable[[str], None] = say) -> None:
        self._urls, self._idle_seconds, self._tell = urls, idle_seconds, tell
        self._started = time.monotonic()
        self._heard = False
        self._told: dict[str, float] = {}
        self._failures: Counter[str] = Counter()

    def heard(self, url: str) -> None:
        """An address has answered as it should."""
        self._heard = True
        if self._told.pop(url, None) is not None:
            self._tell(f"{url} answers again")
        self._failures.pop(url, None)

    def failed(self, url: str, reason: str) -> None:
        """An attempt has failed in a way that is the address's fault."""
        self._heard = True
        self._failures[url] += 1
        now = time.monotonic()
        if url not in self._told or now - self._told[url] >= REPEAT_SECONDS:
            self._told[url] = now
            count = self._failures[url]
            attempts = "1 attempt" if count == 1 else f"{count} attempts"
            self._tell(f"{url}: {reason} ({attempts} failed); trying again")

    async def run(self) -> None:
        """Say that nobody has answered yet, as long as that is so."""
        due = SILENT_SECONDS
        while not self._heard:
            await asyncio.sleep(TICK_SECONDS)
            waited = time.monotonic() - self._started
            if not self._heard and waited >= due:
                where = ", ".join(self._urls)
                self._tell(
                    f"{where}: no word after {waited:.0f} s; waiting up to idle_seconds={self._idle_seconds:g}"
                )
                due += REPEAT_SECONDS
