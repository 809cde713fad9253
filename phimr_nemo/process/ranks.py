"""The ranks of a job on this machine as copies of this process, which has imported what they need."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.process.children import Relay
from phimr_nemo.process.warm import WarmProcess

POLL_SECONDS: Final = 0.1
GRACE_SECONDS: Final = 30.0
"""As torchrun: what the others have after one has failed, before they are killed."""
HERE: Final = "127.0.0.1"


@dataclass(frozen=True)
class RankFailure:
    """The first rank that failed.

    Attributes:
        rank: its number.
        code: its exit code, negative for a signal.
        told: what it left for its launcher, see :func:`phimr_nemo.errors.exit_with_message`.
    """

    rank: int
    code: int
    told: Mapping[str, Any]


def run_ranks(
    module: str, arguments: Sequence[str], processes: int, relay: Relay, look: Callable[[], None]
) -> RankFailure | None:
    """Run `python -m module arguments...` as so many ranks, with the environment that torchrun would give each.

    Call where :func:`phimr_nemo.process.warm.can_fork` is true.

    Args:
        module: its name.
        arguments: of its command line.
        processes: how many.
        relay: passes signals on to them.
        look: called while they run.

    Returns:
        The first that failed; None = all have finished.
    """
    from torch.distributed import TCPStore

    with socket.socket() as listening, _shared_directory() as errors:
        listening.bind((HERE, 0))
        listening.listen()
        port = listening.getsockname()[1]
        shared = {
            **os.environ,
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(processes)),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": HERE,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": str(uuid.uuid4()),
            "TORCHELASTIC_USE_AGENT_STORE": str(True),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }
        files = [errors / f"{rank}.json" for rank in range(processes)]
        ranks = []
        for rank, file in enumerate(files):
            own = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))
            copy = WarmProcess(lambda: None, {**shared, **own, "TORCHELASTIC_ERROR_FILE": str(file)})
            ranks.append(copy.start(module, arguments))
        # The ranks meet here. It has a thread of its own, so it comes after them.
        store = TCPStore(HERE, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
        first: RankFailure | None = None
        until = float("inf")
        running = dict(enumerate(ranks))
        while running:
            for rank, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[rank]
                if code and first is None:
                    told = json.loads(files[rank].read_text("utf-8")) if files[rank].is_file() else {}
                    first, until = RankFailure(rank, code, told), time.monotonic() + GRACE_SECONDS
                    relay.stop()
            if time.monotonic() > until:
                for process in running.values():
                    process.kill()
            relay.tell()
            look()
            time.sleep(POLL_SECONDS)
        del store
    return first


@contextlib.contextmanager
def _shared_directory() -> Iterator[Path]:
    """A directory that is removed at the end: by this process, not, as tempfile's own class does, by its copies."""
    path = Path(tempfile.mkdtemp(prefix="phimr-ranks-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
