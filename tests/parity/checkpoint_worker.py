"""What a rank does with a Megatron checkpoint: let Megatron itself load it, let Megatron itself save it."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.configuration import transformer_config
from phimr_nemo.model.megatron.convert import export_tensors, load_tensors
from phimr_nemo.model.megatron.gpt import PhiGPTModel, build_model
from phimr_nemo.training.distributed import start_process_group

LENGTH = 16
SEED = 1


def different_after_megatron_loads(hf: Path, checkpoint: Path, layout: ParallelConfig) -> list[str]:
    """Names of the tensors that Megatron's loader leaves other than the Hugging Face directory has them."""
    source = HFDirectory(hf)
    model = _model(source.architecture, layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = dist_checkpointing.load(model.sharded_state_dict(prefix=""), str(checkpoint))
    model.load_state_dict(state, strict=False)
    found = export_tensors([model], source.architecture)
    return [name for name, tensor in found if not torch.equal(tensor, source.read(name))]


def save_with_megatron(hf: Path, checkpoint: Path, layout: ParallelConfig) -> None:
    """Load a Hugging Face directory into the ranks' models and save them with Megatron."""
    source = HFDirectory(hf)
    model = _model(source.architecture, layout)
    load_tensors([model], source.architecture, source)
    dist_checkpointing.save(
        model.sharded_state_dict(prefix=""),
        str(checkpoint),
        sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
    )


def _model(arch: Architecture, layout: ParallelConfig) -> PhiGPTModel:
    from megatron.core import parallel_state

    start_process_group(layout, SEED)
    return build_model(
        arch,
        transformer_config(arch, layout, dtype=torch.float32),
        max_length=LENGTH,
        longrope_policy="always_short",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
