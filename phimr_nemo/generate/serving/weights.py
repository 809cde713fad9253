"""New weights on their way to a rollout server: buckets of named tensors, and what both sides check.

The trainer streams a checkpoint tensor by tensor; some of them together make a bucket, which travels as one
safetensors file. Neither side ever holds more than a bucket besides its own model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.store.content import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, device

ROUTES: Final = "/v1/phimr"
"""Below /v1, which the server's key guards."""
IDENTITY: Final = f"{ROUTES}/identity"
BEGIN: Final = f"{ROUTES}/weights/begin"
BUCKET: Final = f"{ROUTES}/weights/bucket"
FINISH: Final = f"{ROUTES}/weights/finish"
GROUP: Final = f"{ROUTES}/weights/group"
"""Tells of which group of GPUs the server is a member (GET), and lets it join one (POST)."""
BROADCAST: Final = f"{ROUTES}/weights/broadcast"
"""Takes one bucket out of the group."""
ABORT: Final = f"{ROUTES}/abort"
"""Ends what is being sampled; each reply holds what there is of its response."""
SLEEP: Final = f"{ROUTES}/sleep"
"""Of servers that share a trainer's GPUs. There is no route to wake one: new weights do, as they come."""
GENERATE: Final = "/inference/v1/generate"
"""vLLM's own interface for token ids in and token ids out."""
ABANDON: Final = "phimr_abandon_update"
"""The method of vLLM's workers that ends an update which will not be completed."""
JOIN: Final = "phimr_join"
"""The one that joins a group with the trainer."""
RECEIVE: Final = "phimr_receive"
"""The one that takes a bucket out of the group, and keeps it until it is loaded."""
LOGPROBS: Final = "processed_logprobs"
"""Log-probabilities of the distribution that is sampled from, at its temperature."""
RAW_LOGPROBS: Final = "raw_logprobs"
"""Log-probabilities before the temperature: those of the distribution sampled from at temperature 1 only."""
INCOMPLETE: Final = "incomplete"
"""The version of a server in the middle of an update."""
UNSYNCED: Final = "unsynced"
"""The version of a server that nobody has sent weights to."""
ASLEEP: Final = "asleep"
"""The version of a server that has given its GPUs' memory back, and its weights with it."""
KEEP: Final = "phimr-keep"
"""The header of a bucket that the server is to keep for its neighbours, until the next request for weights."""
KEPT: Final = "kept"
"""In the answer, and in what the neighbours are told: the name of the file that it kept."""
GONE: Final = 410
"""The status of a server that a bucket did not reach: it does not share memory with the neighbour that kept it, or
the group is broken. It takes the bucket in another way."""
KEPT_NAME: Final = "phimr-kept"
BUCKET_NAME: Final = "phimr-weights"
"""In the names of files that hold a bucket: for the neighbours, or for whom it was made."""
TOKENIZER_FILE: Final = "tokenizer.json"
SHARED_MEMORY: Final = Path("/dev/shm")
MB: Final = 10**6
HEADER_LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 64 << 20


class WrongWeights(ValueError):
    """What arrived is not the model's weights; the message says what is wrong."""


class NotArrived(Exception):
    """A bucket, or a server, that did not come through the group; the message says why. Nothing has changed by it."""


@dataclass(frozen=True)
class Identity:
    """What a server serves.

    Attributes:
        weights: hash of the weights that it was started with.
        tokenizer: SHA-256 of the tokenizer's file.
        version: of the weights in use: a number, "unsynced", "incomplete" or "asleep".
        max_length: prompt and response together (tokens).
        longrope: how it chooses LongRoPE's factors.
        logprobs: which log-probabilities it returns; "processed" ones are those at the sampling temperature.
    """

    weights: str
    tokenizer: str
    version: str
    max_length: int
    longrope: str
    logprobs: str

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Identity:
        """From a server's answer.

        Raises:
            ValueError: a field is missing, left over or of another type.
        """
        kinds = {name: int if name == "max_length" else str for name in cls.__dataclass_fields__}
        if value.keys() != kinds.keys() or not all(isinstance(value[name], kind) for name, kind in kinds.items()):
            raise ValueError(f"an identity has the fields {sorted(kinds)}")
        return cls(**value)


def tokenizer_hash(directory: Path) -> str:
    """SHA-256 of a model directory's tokenizer."""
    return file_sha256(directory / TOKENIZER_FILE)


def shared_memory() -> Path:
    """Where a file is memory that processes of this machine share; the place for temporary files elsewhere."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def buckets(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int, device: str | device = "cpu"
) -> Iterator[dict[str, Tensor]]:
    """Tensors in succession, as many together as fit.

    Args:
        tensors: (name, tensor).
        max_bytes: of a bucket; a larger tensor travels alone.
        device: where they are wanted.

    Yields:
        name -> contiguous tensor, in the order of arrival.
    """
    held: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > max_bytes:
            yield held
            held, size = {}, 0
        held[name] = tensor.detach().to(device).contiguous()
        size += tensor.nbytes
    if held:
        yield held


def tensors_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        WrongWeights: the file is no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
            if not 0 < length <= MAX_HEADER_BYTES:
                raise WrongWeights(f"a bucket whose header has {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return {name: tuple(int(size) for size in entry["shape"]) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, WrongWeights):
            raise
        raise WrongWeights(f"a bucket that cannot be read: {error}") from error


class Arrivals:
    """Which tensors of a checkpoint have come in an update.

    Args:
        expected: name -> shape of the whole checkpoint.
    """

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._expected = dict(expected)
        self._arrived: set[str] = set()

    def restart(self) -> None:
        """A new update begins."""
        self._arrived.clear()

    def check(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a bucket that does not belong here.

        Raises:
            WrongWeights: a tensor is unknown, of another shape, or comes a second time.
        """
        for name, shape in tensors.items():
            if name not in self._expected:
                raise WrongWeights(f"no tensor {name!r} is expected")
            if shape != self._expected[name]:
                raise WrongWeights(f"tensor {name!r} has shape {shape}, expected {self._expected[name]}")
            if name in self._arrived:
                raise WrongWeights(f"tensor {name!r} came twice")

    def add(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Take note of a bucket before it is loaded.

        Raises:
            WrongWeights: see :meth:`check`.
        """
        self.check(tensors)
        self._arrived |= tensors.keys()

    def check_complete(self) -> None:
        """Refuse to end an update that would mix old and new weights.

        Raises:
            WrongWeights: a tensor has not come.
        """
        missing = sorted(self._expected.keys() - self._arrived)
        if missing:
            raise WrongWeights(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
