"""Rates from counted work, by their definitions."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from architectures import small

from phimr_nemo.data.rows.batches import Row, collate_packed, collate_padded
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.model.flops import model_flops
from phimr_nemo.training.throughput import WORK, Work, counted, rates


def row(*lengths: int) -> Row:
    tokens = sum(lengths)
    return Row(
        np.arange(tokens, dtype=np.int32),
        np.ones(tokens, dtype=np.uint8),
        np.asarray(lengths, dtype=np.int32),
    )


ARCHITECTURE = small(
    vocab_size=100,
    intermediate_size=64,
    partial_rotary_factor=1.0,
    max_position_embeddings=64,
    original_max_position_embeddings=64,
)


def test_a_batch_says_its_document_tokens_and_causal_pairs() -> None:
    packed = counted(partial(collate_packed, pad_id=0, capacity=16))([row(3, 5), row(7)])
    pairs = sum(1 for n in (3, 5, 7) for query in range(n) for key in range(query + 1) if key <= query)
    assert packed[WORK].tolist() == [15, pairs]
    assert packed["tokens"].numel() == 32
    padded = counted(partial(collate_padded, pad_id=0, multiple=8))([row(9), row(2)])
    assert padded[WORK].tolist() == [11, 45 + 3]


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = ARCHITECTURE
    work = Work(slots=1000.0, tokens=900.0, valid=600.0, pairs=5000.0)
    found = rates(work, seconds=2.0, processes=5, arch=arch, fp8=False)
    assert found["slots_per_second_per_gpu"] == 100.0
    assert found["tokens_per_second_per_gpu"] == 90.0
    assert found["valid_tokens_per_second_per_gpu"] == 60.0
    flops = model_flops(arch, 900.0, 5000.0) / 10.0
    assert found["model_tflops_per_gpu"] == pytest.approx(flops / 1e12)
    assert "mfu" not in found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert rates(work, 2.0, 5, arch, fp8=False)["mfu"] == pytest.approx(flops / 989e12)
    assert rates(work, 2.0, 5, arch, fp8=True)["mfu"] == pytest.approx(flops / (2 * 989e12))


def test_the_work_of_padded_and_packed_rows_is_that_of_their_documents() -> None:
    """Two responses of 5 and 3 places behind prompts; what follows the last label is no work, and neither is a
    document of padding."""
    from phimr_nemo.align.microbatch import MicroBatch, work_of

    none, expected_pairs = IGNORED_LABEL, 5 * 6 // 2 + 3 * 4 // 2
    padded = torch.tensor([[none, none, 4, 5, 6, none], [none, 7, 8, none, none, none]])
    work = work_of(MicroBatch(torch.zeros_like(padded), padded))
    assert work == Work(slots=12, tokens=8, valid=5, pairs=expected_pairs)
    packed = torch.cat([padded[0, :5], padded[1, :3], torch.full((2,), none)])[None]
    work = work_of(MicroBatch(torch.zeros_like(packed), packed, documents=(5, 3, 2)))
    assert work == Work(slots=10, tokens=8, valid=5, pairs=expected_pairs)
