"""Distributed checkpoints of the newer Megatron-Core: layer by layer, gate and up apart; any of them read as one."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints import BASE, make_hf, to_hf, to_megatron
from torch.distributed.checkpoint import metadata as dcp

from phimr_nemo.errors import UserError
from phimr_nemo.model.files.distindex import FORMAT_FILE, INDEX_FILE, read_index

LAYERS = "decoder.layers."
GATE_UP = "mlp.linear_fc1.weight"


def relabelled(source: Path, target: Path, *, halves: bool) -> Path:
    """The same data files under the names of the newer Megatron-Core: the index alone tells a layout."""
    shutil.copytree(source, target)
    index = read_index(target / INDEX_FILE)
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, dcp.TensorStorageMetadata) or not key.startswith(LAYERS):
            entries[key] = entry
            storage |= {place: info for place, info in index.storage_data.items() if place.fqn == key}
            continue
        rows = entry.size[1]
        for chunk in entry.chunks:
            layer, *offsets = chunk.offsets
            name, size = key.replace(LAYERS, f"{LAYERS}{layer}."), list(entry.size[1:])
            if halves and name.endswith(GATE_UP):
                name += "_v" if offsets[0] >= rows // 2 else "_w"
                offsets[0] %= rows // 2
                size[0] = rows // 2
            there = entries.setdefault(name, dcp.TensorStorageMetadata(entry.properties, torch.Size(size), []))
            there.chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk.sizes[1:])))
            info = index.storage_data[dcp.MetadataIndex(key, chunk.offsets)]
            storage[dcp.MetadataIndex(name, torch.Size(offsets))] = info
    (target / INDEX_FILE).write_bytes(pickle.dumps(dcp.Metadata(entries, storage_data=storage)))
    return target


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("model"), BASE)


@pytest.mark.parametrize("halves", [False, True], ids=["gate and up together", "gate and up apart"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_layer_by_layer_is_read_byte_for_byte(
    tensor: int, pipeline: int, halves: bool, hf: Path, tmp_path: Path
) -> None:
    saved = to_megatron(hf, tmp_path / "old", tensor, pipeline)
    back = to_hf(relabelled(saved, tmp_path / "new", halves=halves), tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_gate_and_up_the_wrong_way_round_would_be_seen(hf: Path, tmp_path: Path) -> None:
    new = relabelled(to_megatron(hf, tmp_path / "old"), tmp_path / "new", halves=True)
    index = read_index(new / INDEX_FILE)
    swap = {"w": "v", "v": "w"}
    entries = {
        (key[:-1] + swap[key[-1]] if key[-2:] in ("_w", "_v") else key): e
        for key, e in index.state_dict_metadata.items()
    }
    storage = {
        dcp.MetadataIndex(p.fqn[:-1] + swap[p.fqn[-1]] if p.fqn[-2:] in ("_w", "_v") else p.fqn, p.offset): info
        for p, info in index.storage_data.items()
    }
    (new / INDEX_FILE).write_bytes(pickle.dumps(dcp.Metadata(entries, storage_data=storage)))
    back = to_hf(new, tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() != (hf / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("decoder.layers.", "decoder.blocks.", r"torch_dist 1\) holds no decoder\.layers\.\*"),
        (GATE_UP, "mlp.linear_fc1.weight_gate", r"torch_dist 1\) lacks the tensor decoder\.layers\.mlp"),
    ],
)
def test_unknown_names_are_refused_with_the_formats_version(
    old: str, new: str, said: str, hf: Path, tmp_path: Path
) -> None:
    saved = to_megatron(hf, tmp_path / "saved")
    index = read_index(saved / INDEX_FILE)
    entries = {key.replace(old, new): entry for key, entry in index.state_dict_metadata.items()}
    (saved / INDEX_FILE).write_bytes(pickle.dumps(dcp.Metadata(entries, storage_data=index.storage_data)))
    with pytest.raises(UserError, match=said):
        to_hf(saved, tmp_path / "back")


def test_another_version_of_the_format_is_refused(hf: Path, tmp_path: Path) -> None:
    saved = to_megatron(hf, tmp_path / "saved")
    said = json.loads((saved / FORMAT_FILE).read_text())
    (saved / FORMAT_FILE).write_text(json.dumps({**said, "sharded_backend_version": 2}))
    with pytest.raises(UserError, match="version 2 of the format torch_dist"):
        to_hf(saved, tmp_path / "back")
