"""Adapters as a directory that PEFT reads: Hugging Face's names, the rows of query, key and value in its order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from phimr_nemo.config import LoRAConfig
from phimr_nemo.model.megatron.convert import adapter_tensors
from phimr_nemo.store.atomic import atomic_directory
from phimr_nemo.training.distributed import wait_for_all

if TYPE_CHECKING:
    from phimr_nemo.model.architecture import Architecture

ADAPTER_DIRECTORY: Final = "adapter"
"""In the run directory."""
PEFT_WEIGHTS: Final = "adapter_model.safetensors"
PEFT_CONFIG: Final = "adapter_config.json"


def write_adapter(models: list[nn.Module], arch: Architecture, config: LoRAConfig, base: Path, target: Path) -> None:
    """Write the adapters as a PEFT directory, in Hugging Face's names and order. Collective; process 0 writes.

    `peft.PeftModel.from_pretrained(model, target)` adds them to the base.

    Args:
        models: this process's model chunks.
        arch: the model.
        config: of the run.
        base: the directory that they were trained on.
        target: the new directory.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    from safetensors.torch import save_file

    tensors = dict(_peft_tensors(models, arch))
    if dist.get_rank() == 0:
        # One left there by a run that died right after its export is replaced.
        shutil.rmtree(target, ignore_errors=True)
        with atomic_directory(target) as directory:
            save_file(tensors, directory / PEFT_WEIGHTS, metadata={"format": "pt"})
            (directory / PEFT_CONFIG).write_text(
                json.dumps(_peft_config(config, base, arch), indent=2) + "\n", "utf-8"
            )
    wait_for_all(f"{target} is written")


def _peft_tensors(models: list[nn.Module], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    for name, inner, outer in adapter_tensors(models, arch):
        # Copies: what several matrices have in common is stored with each of them.
        module = f"base_model.model.{name.removesuffix('.weight')}"
        yield f"{module}.lora_A.weight", inner.to(torch.float32, copy=True).contiguous()
        yield f"{module}.lora_B.weight", outer.to(torch.float32, copy=True).contiguous()


def _peft_config(config: LoRAConfig, base: Path, arch: Architecture) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(arch.traits.matrices),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
