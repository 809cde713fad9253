"""What a rank of this project's own trainer does in the bridge's tests; runs in the trainers' environment."""

from __future__ import annotations

from pathlib import Path

import model_worker
import optimizer_worker
import torch
from safetensors.torch import save_file

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.files.hf import write_hf_directory
from phimr_nemo.model.megatron.convert import export_tensors


def step(source: str, target: str, batch: str) -> float | None:
    """One optimizer step on a batch, which is saved for the other side; the loss before it."""
    ids, labels = model_worker.batch()
    save_file({"ids": ids, "labels": labels}, batch)
    training = optimizer_worker.Training(source, ParallelConfig(), sharded=False, dtype=torch.float32)
    loss = training.step()
    arch = training.model.architecture
    write_hf_directory(Path(target), arch, export_tensors([training.model], arch), tokenizer_from=Path(source))
    return loss
