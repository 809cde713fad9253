"""Read a training stage's own checkpoint into a Megatron model, past everything that exports."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.megatron.configuration import transformer_config
from phimr_nemo.model.megatron.gpt import PhiGPTModel, build_model


def empty_model(architecture: Architecture, max_length: int) -> PhiGPTModel:
    """A model of one process with weights of its own; Megatron's groups are there already."""
    return build_model(
        architecture,
        transformer_config(architecture, ParallelConfig(), dtype=torch.float32),
        max_length=max_length,
        longrope_policy="long_when_max_length_exceeds_original",
        pre_process=True,
        post_process=True,
    )


def load_checkpoint(model: PhiGPTModel, directory: Path, prefix: str) -> None:
    """Fill the model from a Megatron distributed checkpoint whose names begin with `prefix`."""
    wanted = model.sharded_state_dict(prefix=prefix)
    names = list(wanted)
    state = dist_checkpointing.load(wanted, str(directory))
    model.load_state_dict({name.removeprefix(prefix): state[name] for name in names})


def logits(model: PhiGPTModel, ids: Tensor) -> Tensor:
    """[b, s, vocabulary]."""
    with torch.no_grad():
        return model(ids)
