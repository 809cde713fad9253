"""A headless Chromium, spoken to over a pipe: no driver, no port, no network."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import start

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120.0
"""Seconds, on a machine that does much else."""
ASK_AGAIN = 0.05
FREE = 10
"""A descriptor above those that have a meaning."""


class NotThere(Exception):
    """The browser does not answer."""


def chromium() -> str:
    """The browser's path; without one the test is skipped."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return found


class Page:
    """A tab.

    Args:
        send, receive: file descriptors of the browser's pipe.
    """

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._read = send, receive, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.said: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser for something and wait for its answer; what it says of errors meanwhile is kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            answer = self._next(ends)
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(answer["params"]))
        raise NotThere(f"the browser has not answered {method} for {PATIENCE:.0f} s")

    def _next(self, ends: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, ends - time.monotonic()))
            read = os.read(self._receive, 1 << 20) if ready else b""
            if not read:
                raise NotThere("the browser has ended" if ready else f"the browser says nothing for {PATIENCE:.0f} s")
            self._read += read
        first, self._read = self._read.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(first)
        return answer

    def open(self, address: str) -> None:
        """Go to an address and wait until the page is ready."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait("document.body && document.body.dataset.state === 'ready'")

    def value(self, expression: str) -> Any:
        """What an expression comes to in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        ends = time.monotonic() + PATIENCE
        while not self.value(f"Boolean({condition})"):
            assert time.monotonic() < ends, f"never true: {condition}; {self.value('document.body.innerText')}"
            time.sleep(ASK_AGAIN)

    def press(self, key: str) -> None:
        """Press a key, and wait until the page has done what it means."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.wait("document.body.dataset.state === 'ready'")

    def resize(self, width: int, height: int) -> None:
        """Give the window another size, in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with a page, ended with all its processes.

    Args:
        profile: where it keeps its things.
    """
    theirs, ours = os.pipe(), os.pipe()
    program = chromium()

    def pipes() -> None:
        # Chromium reads from descriptor 3 and writes to 4; the pipes' own may be these two in the other order.
        reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD, FREE) for end in (theirs[0], ours[1]))
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    options = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--disable-component-update", "--window-size=1400,900"),
    )
    process = start(
        [program, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs[0])
    os.close(ours[1])
    try:
        try:
            page = Page(theirs[1], ours[0])
        except (NotThere, BrokenPipeError) as error:
            pytest.skip(f"{program} does not start here: {error}")
        yield page
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(theirs[1])
        os.close(ours[0])
