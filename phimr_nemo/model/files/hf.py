"""Hugging Face model directories: read lazily, checked before use, written whole or not at all.

Only safetensors: pickle files can run code and are refused. A checkpoint is compared with its config.json by name
and shape as soon as it is opened, and every tensor is checked to be finite when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import CONFIG_FILE, Architecture
from phimr_nemo.model.files.blocks import (
    RowSource,
    block_buffer,
    blocks,
    common_dtype,
    is_finite,
    raw_bytes,
    read_at,
    read_block,
    transfer,
)
from phimr_nemo.model.files.companions import read_added_tokens, write_model_files
from phimr_nemo.model.files.misfits import TO_BFLOAT16, misfit_remedy
from phimr_nemo.model.files.shards import DTYPES, INDEX_FILE, SINGLE_FILE, WeightFiles, tensor_places, write_weights
from phimr_nemo.model.origin import Origin
from phimr_nemo.model.table import EMBEDDING, HEAD, is_derived, tensor_shapes
from phimr_nemo.process.memory import GIBIBYTE
from phimr_nemo.store.atomic import atomic_directory
from phimr_nemo.store.inputs import download_remedy, model_remedy
from phimr_nemo.store.links import refuse_links_out
from phimr_nemo.store.unpacking import read_json

PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})

COMPARED_ROWS: Final = 4096
DEFAULT_SHARD_BYTES: Final = 4 * GIBIBYTE
HASH_DIGEST_BYTES: Final = 16
MAX_INDEX_BYTES: Final = 16 << 20
MAX_SHOWN: Final = 200


class HFDirectory:
    """A model directory whose tensors are read one at a time.

    Args:
        path: the directory: config.json, and model.safetensors or an index with its shards.

    Raises:
        UserError: no such directory, pickle weights, a shard missing or truncated, tensors missing, misshaped or
            left over in comparison with config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(
                f"model directory {self.path} does not exist",
                rule="a model is a local Hugging Face directory",
                remedy=model_remedy(self.path),
            )
        refuse_links_out(self.path)
        self.architecture = Architecture.from_directory(self.path)
        self._files = {name: file for name, file in _weight_files(self.path).items() if not is_derived(name)}
        self._stored: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, int] = {}
        self._check_tensors()

    def names(self) -> tuple[str, ...]:
        """The tensors, in the order of the layers."""
        return tuple(tensor_shapes(self.architecture))

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU in the file's dtype.

        Raises:
            UserError: it holds a NaN or an infinity, or the file became unreadable.
        """
        return self.read_pieces(name, 0, None)

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Rows (axis 0) or columns (axis 1) `start` to `stop` of a tensor.

        Raises:
            UserError: as ``read``.
        """
        return self.read_pieces(name, axis, ((start, stop),))

    def read_pieces(self, name: str, axis: int, ranges: Sequence[tuple[int, int]] | None) -> Tensor:
        """The concatenation of ranges of a tensor along one axis; ``None`` is all of it.

        Raises:
            UserError: as ``read``.
        """
        # Opened anew each time: a mapping that stays open keeps every page it ever read in memory.
        stored = self._stored.get(name, name)
        with _opened(self._files[name]) as file:
            if ranges is None:
                tensor: Tensor = file.get_tensor(stored)
            else:
                view = file.get_slice(stored)
                parts = [view[a:b] if axis == 0 else view[:, a:b] for a, b in ranges]
                tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
        if not is_finite(tensor):
            raise UserError(
                f"tensor {name} in {self._files[name]} holds NaN or infinite values",
                rule="weights are finite numbers",
                remedy="use a checkpoint from before the training diverged, or download the file again",
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, as it is stored."""
        return self._dtypes[name]

    def place(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def read_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Fill `rows` with the tensor's rows from `start` on, unchecked; see ``RowSource``.

        Raises:
            UserError: the file became unreadable.
        """
        row_bytes = rows.dtype.itemsize * torch.Size(rows.shape[1:]).numel()
        file = self._files[name]
        try:
            read_at(file, self._places[name] + start * row_bytes, rows)
        except (OSError, EOFError) as error:
            raise _unreadable(file, error) from error

    def weights_hash(self) -> str:
        """A digest (32 hexadecimal digits) of all tensors' names, dtypes, shapes and bytes, however sharded."""
        digest = hashlib.blake2b(digest_size=HASH_DIGEST_BYTES)
        shapes = tensor_shapes(self.architecture)
        largest = max(dtype.itemsize for dtype in self._dtypes.values())
        buffer = block_buffer(self.architecture, largest)
        for block in blocks(self.architecture, largest):
            name, start, _ = block
            if start == 0:
                digest.update(f"{name}|{DTYPES[self._dtypes[name]]}|{shapes[name]}|".encode())
            digest.update(raw_bytes(read_block(self, block, buffer)))
        return digest.hexdigest()

    def _check_tensors(self) -> None:
        expected = tensor_shapes(self.architecture)
        if self.architecture.tie_word_embeddings and HEAD in self._files:
            if EMBEDDING in self._files:
                _check_tied_head(self._files[EMBEDDING], self._files.pop(HEAD))
            else:
                # Of two names of one tensor safetensors may keep either.
                self._files[EMBEDDING], self._stored[EMBEDDING] = self._files.pop(HEAD), HEAD
        missing, extra = sorted(expected.keys() - self._files), sorted(self._files.keys() - expected)
        if missing or extra:
            raise UserError(
                f"{self.path}: {len(missing)} tensors missing {_some(missing)}, "
                f"{len(extra)} left over {_some(extra)}",
                rule=f"exactly the {len(expected)} tensors of the architecture in {CONFIG_FILE}",
                remedy=misfit_remedy(missing, extra),
            )
        by_file: dict[Path, list[str]] = {}
        for name, file in self._files.items():
            by_file.setdefault(file, []).append(name)
        for file, names in by_file.items():
            with _opened(file) as handle:
                present = set(handle.keys())
                for name in names:
                    stored = self._stored.get(name, name)
                    self._dtypes[name] = _check_tensor(handle, present, file, stored, expected[name])
            # Another shard may hold a tensor of the same name, which the index does not mean.
            places = tensor_places(file)
            self._places |= {name: places[self._stored.get(name, name)] for name in names}


def _check_tied_head(embedding_file: Path, head_file: Path) -> None:
    """A tied model may store its output layer too, as long as that is the embedding.

    Raises:
        UserError: it is another tensor.
    """
    with _opened(embedding_file) as one, _opened(head_file) as other:
        if HEAD not in other.keys():  # noqa: SIM118 - no mapping, it has keys() alone
            return
        embedding, head = one.get_slice(EMBEDDING), other.get_slice(HEAD)
        shape = embedding.get_shape()
        is_alike = (shape, embedding.get_dtype()) == (head.get_shape(), head.get_dtype())
        starts = range(0, shape[0], COMPARED_ROWS)
        if is_alike and all(
            torch.equal(embedding[at : at + COMPARED_ROWS], head[at : at + COMPARED_ROWS]) for at in starts
        ):
            return
    raise UserError(
        f"{HEAD} in {head_file} is not {EMBEDDING}, and {CONFIG_FILE} says that they are one tensor",
        rule="a model with tie_word_embeddings has its embedding as output layer",
        remedy=f'if it was trained with a head of its own, write "tie_word_embeddings": false into {CONFIG_FILE}; '
        f"otherwise remove {HEAD} from the weights",
    )


def _check_tensor(handle: Any, present: set[str], file: Path, name: str, shape: tuple[int, ...]) -> torch.dtype:
    """What the header says of a tensor is what the architecture asks for; returns its dtype."""
    if name not in present:
        raise UserError(
            f"{file} lacks the tensor {name} that the index promises",
            rule="every shard holds the tensors that the index lists for it",
            remedy="download the directory again",
        )
    header = handle.get_slice(name)
    found = tuple(header.get_shape())
    if found != shape:
        raise UserError(
            f"tensor {name} in {file} has shape {list(found)}",
            rule=f"{CONFIG_FILE} asks for {list(shape)}",
            remedy="use the config.json that belongs to these weights",
        )
    for dtype, stored in DTYPES.items():
        if header.get_dtype() == stored:
            return dtype
    raise UserError(
        f"tensor {name} in {file} has dtype {header.get_dtype()}",
        rule=f"weights are {', '.join(DTYPES.values())}",
        remedy=TO_BFLOAT16,
    )


def write_hf_directory(
    path: Path,
    arch: Architecture,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    tokenizer_from: Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Mapping[str, str] | None = None,
    origin: Origin | None = None,
) -> None:
    """Write a directory that transformers and vLLM load, atomically, holding one tensor at a time.

    Args:
        path: where to; must not exist or be empty.
        arch: the model.
        tensors: every tensor of the checkpoint in the order of ``tensor_shapes``, all of one dtype.
        tokenizer_from: a directory whose tokenizer, chat template and generation_config are copied.
        max_shard_bytes: tensors are put into one file up to this size.
        extra_files: further text files, name -> content (model card, licence).
        origin: how the model was made; None: as the tokenizer's directory says.

    Raises:
        UserError: the target is in the way, the disk is full, the tokenizer is missing or too large for the
            vocabulary, or the tensors are not the architecture's.
    """
    with _new_directory(path, arch, tokenizer_from, extra_files) as directory:
        dtype = write_weights(directory, arch, tensors, max_shard_bytes)
        write_model_files(directory, arch, tokenizer_from, dtype, origin)


def copy_hf_directory(
    path: Path,
    source: RowSource,
    *,
    tokenizer_from: Path,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Mapping[str, str] | None = None,
    origin: Origin | None = None,
) -> None:
    """Write what ``write_hf_directory`` writes from weights that lie on a disk, block by block in several threads.

    Args:
        path: where to; must not exist or be empty.
        source: the weights, in whatever form.
        tokenizer_from, max_shard_bytes, extra_files, origin: as for ``write_hf_directory``.

    Raises:
        UserError: as ``write_hf_directory``, or a tensor cannot be read.
    """
    arch = source.architecture
    with _new_directory(path, arch, tokenizer_from, extra_files) as directory:
        dtype = common_dtype(source)
        write_model_files(directory, arch, tokenizer_from, dtype, origin)
        transfer(source, WeightFiles(directory, arch, dtype, max_shard_bytes))


@contextmanager
def _new_directory(
    path: Path, arch: Architecture, tokenizer_from: Path, extra_files: Mapping[str, str] | None
) -> Iterator[Path]:
    """A directory to fill with a model, which gets its name when it is whole."""
    # Before the weights are touched.
    read_added_tokens(tokenizer_from, arch)
    with atomic_directory(Path(path)) as directory:
        yield directory
        for name, text in (extra_files or {}).items():
            (directory / name).write_text(text, encoding="utf-8")
        # What was written is read back by the library that everybody else reads it with.
        HFDirectory(directory)


def _weight_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file."""
    index = path / INDEX_FILE
    if index.is_file():
        return _indexed_files(path, index)
    single = path / SINGLE_FILE
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UserError(
            f"{path} holds pickle weights {_some(pickles)}",
            rule="weights are safetensors; unpickling a file can run any code that is in it",
            remedy="use a safetensors version of the model, or convert it where you trust its origin",
        )
    raise UserError(
        f"{path} holds no weights",
        rule=f"a model directory has {SINGLE_FILE}, or {INDEX_FILE} and its shards",
        remedy="download the weights too",
    )


def _indexed_files(path: Path, index: Path) -> dict[str, Path]:
    try:
        weight_map = read_json(index, limit=MAX_INDEX_BYTES)["weight_map"]
        files = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is no safetensors index: {str(error)[:MAX_SHOWN]!r}",
            rule="the index is a JSON object with a weight_map from tensor to file name",
            remedy=download_remedy(index),
        ) from error
    for shard in sorted(set(files.values())):
        # A name with a directory in it could point anywhere on this machine.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{index} names the shard {shard!r}",
                rule="a shard is a *.safetensors file beside the index",
                remedy="do not use this directory unless you know where it comes from",
            )
        if not (path / shard).is_file():
            beside = f", or delete the index if {SINGLE_FILE} is the model" if (path / SINGLE_FILE).is_file() else ""
            raise UserError(
                f"shard {shard} is missing in {path}",
                rule="every shard that the index names is there",
                remedy=f"finish the download{beside}",
            )
    return {name: path / shard for name, shard in files.items()}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """``safe_open`` whose errors say what to do."""
    try:
        with safe_open(str(file), framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(
        f"{file} cannot be read as safetensors: {error}",
        rule="a file that is not truncated or corrupted: its header's offsets match its size",
        remedy=f"{download_remedy(file)}, or export it again",
    )


def _some(names: Sequence[str]) -> str:
    """At most three names, for an error message."""
    shown = 3
    return str(list(names[:shown]))[:-1] + (", ...]" if len(names) > shown else "]")
