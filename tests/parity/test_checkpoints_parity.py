"""The checkpoints that are read and written without a model are those of Megatron-Core's own loader and saver."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import checkpoint_worker as worker
import pytest
import torch
from distributed import run_distributed
from model_worker import ARCHITECTURE

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files import distcheckpoint
from phimr_nemo.model.files.hf import HFDirectory, write_hf_directory
from phimr_nemo.model.table import Pieces, Placement, pieces, tensor_shapes
from phimr_nemo.supervised.conversion import convert

UNTIED = dataclasses.replace(ARCHITECTURE, tie_word_embeddings=False)
PLAIN = {"partial_rotary_factor": 1.0, "short_factor": None, "long_factor": None}
QWEN2 = dataclasses.replace(UNTIED, family="qwen2", **PLAIN)
QWEN3 = dataclasses.replace(ARCHITECTURE, family="qwen3", head_size=12, **PLAIN)
TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2)


def make_hf(directory: Path, arch: Architecture) -> Path:
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1}}, "added_tokens": []}))
    generator = torch.Generator().manual_seed(0)
    tensors = ((name, torch.randn(shape, generator=generator)) for name, shape in tensor_shapes(arch).items())
    write_hf_directory(directory / "hf", arch, tensors, tokenizer_from=directory)
    return directory / "hf"


@pytest.mark.parametrize(
    ("arch", "written", "loaded"),
    [
        (ARCHITECTURE, TP2_PP2, TP2),
        (ARCHITECTURE, ParallelConfig(), PP2),
        (UNTIED, TP2, PP2),
        (QWEN2, TP2_PP2, TP2),
        (QWEN3, TP2, PP2),
    ],
    ids=["tp2pp2 in tp2", "one in pp2", "untied tp2 in pp2", "qwen2 tp2pp2 in tp2", "qwen3 tp2 in pp2"],
)
def test_megatron_loads_what_is_written(
    arch: Architecture, written: ParallelConfig, loaded: ParallelConfig, tmp_path: Path
) -> None:
    hf, checkpoint = make_hf(tmp_path, arch), tmp_path / "megatron"
    convert(hf, checkpoint, kind="megatron", layout=written, hf=None)
    different = run_distributed(worker.different_after_megatron_loads, loaded.world_size, hf, checkpoint, loaded)
    assert different == [[]] * loaded.world_size


def test_rows_in_hugging_faces_order_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault, which reading undoes as writing does it: queries, keys and values are not interleaved."""

    def stacked(placement: Placement, arch: Architecture, rank: int, size: int) -> Pieces:
        if placement.split == "qkv":
            placement = dataclasses.replace(placement, split="rows")
        return pieces(placement, arch, rank, size)

    monkeypatch.setattr(distcheckpoint, "pieces", stacked)
    hf, checkpoint = make_hf(tmp_path, ARCHITECTURE), tmp_path / "megatron"
    convert(hf, checkpoint, kind="megatron", layout=TP2, hf=None)
    convert(checkpoint, tmp_path / "back", kind="hf", layout=TP2, hf=None)
    assert HFDirectory(tmp_path / "back").weights_hash() == HFDirectory(hf).weights_hash()
    (different,) = run_distributed(worker.different_after_megatron_loads, 1, hf, checkpoint, ParallelConfig())
    assert different == [name for name in tensor_shapes(ARCHITECTURE) if "qkv_proj" in name]


@pytest.mark.parametrize(
    ("arch", "layout"),
    [(ARCHITECTURE, TP2_PP2), (UNTIED, PP2), (QWEN2, PP2), (QWEN3, TP2)],
    ids=["tp2pp2", "untied pp2", "qwen2 pp2", "qwen3 tp2"],
)
def test_what_megatron_saves_is_read(arch: Architecture, layout: ParallelConfig, tmp_path: Path) -> None:
    hf, checkpoint = make_hf(tmp_path, arch), tmp_path / "megatron"
    checkpoint.mkdir()
    run_distributed(worker.save_with_megatron, layout.world_size, hf, checkpoint, layout)
    convert(checkpoint, tmp_path / "back", kind="hf", layout=ParallelConfig(), hf=hf)
    assert HFDirectory(tmp_path / "back").weights_hash() == HFDirectory(hf).weights_hash()
