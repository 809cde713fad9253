"""The names under which a Megatron distributed checkpoint keeps tensors: they depend on Megatron-Core's settings.

- All layers' tensors of a kind in one, along a first axis: Megatron-Core to 0.14, later unless told otherwise.
- Layer by layer (`decoder.layers.3...`): where layers may differ (`non_homogeneous_layers`).
- Layer by layer, and gate and up each in a tensor of its own (`weight_w`, `weight_v`): where every rank's part is one
  block (`singleton_local_shards`), which trainers on 0.15 and later ask for.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.distindex import FORMAT_FILE, Shape
from phimr_nemo.model.table import ADAPTER, SavedTensor, saved_tensors

LAYERS: Final = "decoder.layers."
HALVES: Final = ("_w", "_v")
"""Of gate and up."""
SHOWN: Final = 3


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: a range of the rows of a Hugging Face tensor, in the order of the checkpoint.

    Attributes:
        key: its name there, without prefix.
        layer: the place along its first axis; None without such an axis.
        start: its first row in the whole tensor.
        shape: of the rows: [rows, ...].
    """

    key: str
    layer: int | None
    start: int
    shape: Shape


def stored_tensors(path: Path, arch: Architecture, keys: Collection[str]) -> dict[str, tuple[StoredTensor, ...]]:
    """Hugging Face name -> the tensors of a checkpoint that make it up, in the order of their rows.

    Args:
        path: the checkpoint, for messages.
        arch: of the model in it.
        keys: names of the tensors in it, without prefix.

    Raises:
        UserError: names of a layout that is none of these, or adapters beside the matrices.
    """
    adapters = [key for key in keys if ADAPTER in key]
    if adapters:
        raise UserError(
            f"{path} holds adapters beside its matrices, such as {min(adapters)}",
            rule="whole matrices are converted; those here are the base's, and not what was trained",
            remedy="take the run's `hf`, which has the adapters merged in, or its `adapter`",
        )
    return {tensor.placement.name: _stored(path, tensor, keys) for tensor in saved_tensors(arch)}


def stored_shape(stored: StoredTensor, arch: Architecture) -> Shape:
    """The shape in the checkpoint."""
    return stored.shape if stored.layer is None else (arch.num_hidden_layers, *stored.shape)


def _stored(path: Path, tensor: SavedTensor, keys: Collection[str]) -> tuple[StoredTensor, ...]:
    shape = tensor.placement.shape
    names = [(tensor.key, tensor.layer)]
    if tensor.layer is not None:
        names.append((tensor.key.replace(LAYERS, f"{LAYERS}{tensor.layer}.", 1), None))
    for key, layer in names:
        if key in keys:
            return (StoredTensor(key, layer, 0, shape),)
        if tensor.placement.split == "gate_up" and all(key + half in keys for half in HALVES):
            half = (shape[0] // 2, *shape[1:])
            return tuple(StoredTensor(key + end, layer, half[0] * at, half) for at, end in enumerate(HALVES))
    if tensor.layer is not None and not any(key.startswith(LAYERS) for key in keys):
        raise UserError(
            f"{path} (format {_version(path)}) holds no {LAYERS}*, but {sorted(keys)[:SHOWN]}",
            rule="the tensors of all layers are saved together or layer by layer, gate and up together or as "
            "weight_w and weight_v",
            remedy="export it to Hugging Face with the Megatron-Core that wrote it",
        )
    raise UserError(
        f"{path} (format {_version(path)}) lacks the tensor {' or '.join(key for key, _ in names)}",
        rule="the checkpoint holds every tensor of the architecture in its config.json",
        remedy="give the config.json that belongs to these weights (--hf)",
    )


def _version(path: Path) -> str:
    """The format and its version, as the checkpoint says."""
    said = json.loads((path / FORMAT_FILE).read_text("utf-8"))
    return f"{said.get('sharded_backend')} {said.get('sharded_backend_version')}"
