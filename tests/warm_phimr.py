"""`phimr` in copies of one process that has imported its stages: what its commands do, without seconds of imports.

    warm_phimr.py serve NAME [MODULE or stage ...]
                                  imports, says "ready", then runs what it is asked for, one command after the other
    warm_phimr.py run NAME ...    in a shell's place of `phimr ...`: its directory, environment, streams and exit code

A command has the search path of the server, whatever its environment says. That the program starts, and how, is for
tests that start it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from phimr_nemo.jobs.steps.step import Step

ROOM = 1 << 17
"""Bytes of a request."""
POLL_SECONDS = 0.01
SECONDS = 1200.0
"""The longest command."""
LAST_CHARACTERS = 4000
"""Of what a failed step has printed."""
MODULE = "phimr_nemo.cli"
_numbers = itertools.count()


def address(name: str) -> str:
    """Linux's own kind, which is no file and has no long path."""
    return f"\0phimr-{name}"


def ask(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], place: str, streams: Sequence[int]
) -> int:
    """Have a command run in a directory, with these descriptors for 0, 1 and 2; its exit code."""
    request = {"arguments": arguments, "environment": dict(environment), "directory": place}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.settimeout(SECONDS)
        server.connect(address(name))
        socket.send_fds(server, [json.dumps(request).encode()], streams)
        answer = server.recv(ROOM)
    if not answer:
        raise RuntimeError(f"the process that runs the commands has ended: phimr {' '.join(arguments)}")
    return int(answer)


def serve(name: str, load: Sequence[str]) -> None:
    """Run commands until this process is ended; what runs then ends with it."""
    from phimr_nemo.config import STAGES
    from phimr_nemo.jobs.launch import import_stages
    from phimr_nemo.process.warm import WarmProcess, can_fork

    before = dict(os.environ)
    words = load or tuple(STAGES)
    for module in (f"{MODULE}.main", *(word for word in words if word not in STAGES)):
        importlib.import_module(module)
    import_stages([word for word in words if word in STAGES])
    assert can_fork()
    # Some libraries collect at exit: each copy would look through all that was imported, and copy what it lies on.
    gc.collect()
    gc.freeze()
    # As in an interpreter of the command's own, where the libraries set it.
    by_libraries = {key: value for key, value in os.environ.items() if before.get(key) != value}
    nowhere = os.open(os.devnull, os.O_RDWR)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address(name))
        listener.listen()
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            with client:
                message, streams, _, _ = socket.recv_fds(client, ROOM, 3)
                request: dict[str, Any] = json.loads(message)
                os.chdir(request["directory"])
                program = WarmProcess(lambda: None, {**by_libraries, **request["environment"]})
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                    os.close(stream)
                child = program.start(MODULE, request["arguments"])
                for number in range(len(streams)):
                    os.dup2(nowhere, number)
                while (code := child.poll()) is None:
                    time.sleep(POLL_SECONDS)
                client.send(str(code).encode())


class Server:
    """A server that is loaded and waits; it ends with this process, or when it is told to.

    Args:
        load: modules and stages that it imports; none = every stage.
        python: its interpreter.
        options: of the process: directory and environment.
    """

    def __init__(self, *load: str, python: str | Path = sys.executable, **options: Any) -> None:
        from processes import start

        self.name = f"{os.getpid()}-{next(_numbers)}"
        command = [python, __file__, "serve", self.name, *load]
        self._process = start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, **options)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the server did not start, see above"
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Phimr:
    """`phimr` in an environment; its server starts with the first command, and again if it was ended.

    Args:
        load: of :class:`Server`.
        python: the interpreter.
        variables: of every command's environment, besides this process's.
    """

    def __init__(self, *load: str, python: str | Path = sys.executable, **variables: str) -> None:
        self._load, self._python, self._variables = load, python, variables
        self._server: Server | None = None

    @property
    def pid(self) -> int | None:
        """The server's, if there is one."""
        return None if self._server is None else self._server.pid

    def stop(self) -> None:
        """End the server, if there is one."""
        if self._server is not None:
            self._server.stop()

    def __call__(
        self, *arguments: str, said: str = "", place: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`phimr` with these arguments, to its end.

        Args:
            said: its standard input.
            place: its working directory; None = this process's.
            variables: of this command's environment.
        """
        import tempfile

        environment, directory = {**os.environ, **self._variables, **(variables or {})}, str(place or os.getcwd())
        if sys.platform != "linux":
            command, options = [str(self._python), "-m", MODULE, *arguments], {"env": environment, "cwd": directory}
            return subprocess.run(command, input=said, capture_output=True, text=True, check=False, **options)
        if self._server is None or not self._server.is_alive:
            # As `make test` says: libraries set themselves up for it.
            begun = {**os.environ, **self._variables, "OMP_NUM_THREADS": "1"}
            self._server = Server(*self._load, python=self._python, env=begun)
        with contextlib.ExitStack() as files:
            given, out, err = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
            given.write(said)
            given.seek(0)
            streams = [given.fileno(), out.fileno(), err.fileno()]
            try:
                code = ask(self._server.name, arguments, environment, directory, streams)
            except TimeoutError:
                # With what it runs, which would be in the next one's way.
                self._server.stop()
                raise
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess(["phimr", *arguments], code, *texts)


phimr = Phimr()


def run_steps(steps: Sequence[Step]) -> None:
    """Run the steps of a recipe one after the other.

    Raises:
        AssertionError: a step failed.
    """
    from phimr_nemo.jobs.closing import PART_OF

    for step in steps:
        done = phimr(*step.arguments, variables={"OMP_NUM_THREADS": "1", PART_OF: "quickstart"})
        assert done.returncode == 0, f"{step}:\n{(done.stdout + done.stderr)[-LAST_CHARACTERS:]}"


if __name__ == "__main__":
    what, place, *words = sys.argv[1:]
    if what == "serve":
        serve(place, words)
    ended = ask(place, words, os.environ, os.getcwd(), [0, 1, 2])
    # As a shell says it.
    sys.exit(ended if ended >= 0 else 128 - ended)
