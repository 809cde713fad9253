"""The process group of a trainer and its rollout servers' workers: rank 0 broadcasts buckets of tensors to the rest.

Both sides use it, and nothing in it depends on the backend but how a group is begun. Every wait ends: a member that
dies, or that nobody reaches, costs the others an error. torch's groups rather than vLLM's own communicator, because a
worker has to leave one whose other members are gone; vLLM's waits for them for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Backend = Literal["nccl", "gloo"]
"""What the tensors travel with: gloo between CPUs."""
ROOT: Final = 0
"""The trainer's rank."""
ALIGNMENT: Final = 16
"""Bytes: a tensor begins where one of any dtype may."""
LOOK_SECONDS: Final = 0.002
"""How often a broadcast under way is looked at."""
ASK_SECONDS: Final = 0.2
"""How often the store is asked whether the trainer has left: no backend tells it to all members at once."""
LEFT: Final = "left"
SHOWN: Final = 120
"""Characters of torch's own message."""
ERROR_HANDLING: Final = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Read when a group is made; torch's default ends the whole process when another member is lost."""
NO_HANDLING: Final = "0"
NCCL_LIBRARY: Final = "libnccl.so.2"
DTYPES: Final = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class GroupBroken(Exception):
    """A group that did not form, or lost a member; the message says what is known."""


@dataclass(frozen=True)
class Offer:
    """What a server's workers need to join.

    Attributes:
        name: of the group: every one has its own.
        backend: what the tensors travel with.
        address: of the trainer, as this server reaches it.
        port: of the store there, where members find one another.
        first: rank of the server's first worker.
        size: members, the trainer included.
        seconds: what forming the group and each broadcast may take.
    """

    name: str
    backend: Backend
    address: str
    port: int
    first: int
    size: int
    seconds: float


@dataclass(frozen=True)
class Membership:
    """What a server says of itself.

    Attributes:
        name: of the group it is in; empty = none.
        workers: its processes that join, one a GPU.
        backend: what they can travel with.
        library: version of the server's NCCL, which refuses members of another; empty with gloo.
    """

    name: str
    workers: int
    backend: str
    library: str


@dataclass(frozen=True)
class Described:
    """A tensor that will come: its name, torch's name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        itemsize: int = DTYPES[self.dtype].itemsize
        return math.prod(self.shape) * itemsize

    @classmethod
    def parse(cls, value: Any) -> Described:
        """From a request.

        Raises:
            ValueError: it describes no tensor of weights.
        """
        is_right = isinstance(value, Mapping) and value.keys() == {"name", "dtype", "shape"}
        if not is_right or not isinstance(value["name"], str) or value["dtype"] not in DTYPES:
            raise ValueError(f"a tensor has name, dtype ({', '.join(DTYPES)}) and shape")
        shape = value["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("a shape is a list of whole numbers")
        return cls(value["name"], value["dtype"], tuple(shape))


def described(bucket: Mapping[str, Tensor]) -> list[Described]:
    """What is in a bucket, in its order."""
    return [
        Described(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in bucket.items()
    ]


def _places(tensors: Sequence[Described]) -> tuple[list[int], int]:
    """Where each tensor begins, and the end of all (bytes)."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def packed(bucket: Mapping[str, Tensor]) -> Tensor:
    """A bucket as it travels: uint8 [n], on the device of its tensors."""
    starts, end = _places(described(bucket))
    flat = torch.zeros(end, dtype=torch.uint8, device=next(iter(bucket.values())).device)
    for start, tensor in zip(starts, bucket.values(), strict=True):
        flat[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return flat


def empty_bucket(tensors: Sequence[Described], device: torch.device) -> Tensor:
    """Room for a bucket that will come: uint8 [n]."""
    return torch.empty(_places(tensors)[1], dtype=torch.uint8, device=device)


def unpacked(flat: Tensor, tensors: Sequence[Described]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket as it travelled, as views of it."""
    for start, tensor in zip(_places(tensors)[0], tensors, strict=True):
        yield tensor.name, flat[start : start + tensor.nbytes].view(DTYPES[tensor.dtype]).view(tensor.shape)


class Group:
    """One member's side.

    Args:
        name: of the group.
        process_group: torch's.
        store: where a member that leaves says so.
        device: where buckets lie.
        seconds: what a broadcast may take.
    """

    def __init__(
        self, name: str, process_group: Any, store: dist.Store, device: torch.device, seconds: float
    ) -> None:
        self.name, self._group, self._store, self._device, self._seconds = name, process_group, store, device, seconds
        self._left = threading.Event()

    def broadcast(self, flat: Tensor) -> None:
        """Send (rank 0) or receive (the others) a bucket; returns when it is there.

        Args:
            flat: uint8 [n] on the group's device, as long everywhere.

        Raises:
            GroupBroken: a member was lost or has left, or it took too long; the group is of no use then.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.asyncOp = ROOT, True
        try:
            with _on(self._device):
                work = self._group.broadcast([flat], options)
                self._wait(work)
                work.wait()
        except RuntimeError as error:
            raise GroupBroken(f"a member was lost ({_first_line(error)})") from error

    def _wait(self, work: Any) -> None:
        now = time.monotonic()
        deadline, ask = now + self._seconds, now + ASK_SECONDS
        while not work.is_completed():
            now = time.monotonic()
            if now > deadline:
                raise GroupBroken(f"a broadcast took longer than {self._seconds:g} s")
            if now > ask:
                ask = now + ASK_SECONDS
                if self._store.check([LEFT]):
                    raise GroupBroken("the group was left")
            if self._left.is_set():
                raise GroupBroken("the group was left")
            time.sleep(LOOK_SECONDS)

    def leave(self) -> None:
        """End the group for this member; the others are told, or notice when their time is over."""
        self._left.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(LEFT, "")
        with contextlib.suppress(RuntimeError):
            self._group.abort()


def nccl_version() -> str:
    """The version of the NCCL that torch has loaded, by its own word; torch knows the one it was built with."""
    code = ctypes.c_int()
    try:
        ctypes.CDLL(NCCL_LIBRARY).ncclGetVersion(ctypes.byref(code))
    except OSError:
        # A torch that has it inside.
        return ".".join(map(str, torch.cuda.nccl.version()))
    major, rest = divmod(code.value, 10_000)
    return ".".join(map(str, (major, *divmod(rest, 100))))


def open_store(seconds: float) -> dist.TCPStore:
    """The trainer's store, on a free port of all its addresses.

    Args:
        seconds: how long members wait for one another.
    """
    wait = datetime.timedelta(seconds=seconds)
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)


def join(offer: Offer, rank: int, device: torch.device, store: dist.Store | None = None) -> Group:
    """Become a member; returns when all have.

    Args:
        offer: the group.
        rank: of this member.
        device: where its buckets lie.
        store: the trainer's own; the others reach it by the offer's address.

    Raises:
        GroupBroken: the trainer cannot be reached, or not all came in time.
    """
    wait = datetime.timedelta(seconds=offer.seconds)

    def form() -> Group:
        own = store or dist.TCPStore(offer.address, offer.port, is_master=False, timeout=wait)
        place = dist.PrefixStore(offer.name, own)
        begin = _begin_nccl if offer.backend == "nccl" else _begin_gloo
        group = Group(offer.name, begin(place, rank, offer.size, wait, device), place, device, offer.seconds)
        # Only a first exchange makes NCCL connect.
        group.broadcast(torch.zeros(1, dtype=torch.uint8, device=device))
        return group

    return _within(offer.seconds, form)


def _begin_gloo(store: dist.Store, rank: int, size: int, wait: datetime.timedelta, _: torch.device) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, wait)


def _begin_nccl(store: dist.Store, rank: int, size: int, wait: datetime.timedelta, device: torch.device) -> Any:
    # NCCL itself would wait for an absent member without end.
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(size)], wait)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = wait
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = NO_HANDLING
    try:
        with _on(device):
            return dist.ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The current GPU belongs to a thread; on a CPU nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _within(seconds: float, work: Callable[[], Group]) -> Group:
    """What forms a group, in a thread that can be left behind."""
    found: Future[Group] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except (GroupBroken, RuntimeError, OSError) as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError as error:
        raise GroupBroken(f"the group did not form within {seconds:g} s") from error
    except (RuntimeError, OSError) as error:
        raise GroupBroken(f"the group did not form ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:SHOWN]
