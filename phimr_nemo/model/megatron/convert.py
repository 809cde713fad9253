"""Weights between a Hugging Face directory and the Megatron model, under any tensor and pipeline layout.

Nothing here holds more than one full tensor: loading reads each rank's pieces, exporting assembles one tensor at a
time and hands it on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.files.shards import write_pieces
from phimr_nemo.model.megatron.gpt import PhiGPTModel
from phimr_nemo.model.table import Pieces, Placement, checkpoint_tensors, pieces, placement_of, tensor_shapes

__all__ = ["export_tensors", "load_tensors", "tensor_shapes", "write_pieces"]


@torch.no_grad()
def load_tensors(models: Sequence[nn.Module], arch: Architecture, source: HFDirectory) -> None:
    """Copy a checkpoint's weights into this rank's model chunks.

    An optimizer that was built before keeps its own main copies: call its ``reload_model_params()`` after.

    Args:
        models: this rank's chunks (one without virtual pipelining), bare or wrapped.
        arch: the model.
        source: the checkpoint; tensors are cast to the parameters' dtype.

    Raises:
        UserError: the checkpoint is of another architecture, or a tensor is missing, misshaped or not finite.
    """
    _check_same_shape(arch, source.architecture)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for chunk in models:
        for name, parameter, placement in _parameters(chunk, arch):
            part = pieces(placement, arch, rank, size)
            _check_part(name, parameter, placement, part)
            parameter.copy_(source.read_pieces(placement.name, part.axis, part.ranges))


@torch.no_grad()
def export_tensors(models: Sequence[nn.Module], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Give the whole checkpoint, tensor by tensor, on every rank.

    Collective over the tensor- and pipeline-parallel groups: every rank of a model replica iterates to the end.

    Args:
        models: this rank's chunks, bare or wrapped.
        arch: the model.

    Yields:
        (Hugging Face name, full tensor on the CPU in the parameters' dtype), in the same order on all ranks. A
        tied head is not repeated.
    """
    held: dict[str, Tensor] = {}
    for chunk in models:
        for _name, parameter, placement in _parameters(chunk, arch):
            # A tied output layer comes after the embedding, or alone on the last stage.
            held.setdefault(placement.name, parameter.detach())
    owners = _owning_stages(held)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(group)
    for wanted in checkpoint_tensors(arch):
        owner, dtype = owners[wanted.name]
        full = None
        if stage == owner:
            full = _assemble(held[wanted.name], wanted, arch)
        if len(stages) > 1:
            if full is None:
                full = torch.empty(wanted.shape, dtype=dtype, device=_device(models))
            dist.broadcast(full, src=stages[owner], group=group)
        assert full is not None
        yield wanted.name, full.cpu()


def _assemble(part: Tensor, placement: Placement, arch: Architecture) -> Tensor:
    """The full tensor from the parts of the tensor-parallel group: each rank's pieces written back in place."""
    group = parallel_state.get_tensor_model_parallel_group()
    size = dist.get_world_size(group)
    if placement.split == "whole":
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    full = torch.empty(placement.shape, dtype=part.dtype, device=part.device)
    for rank, gathered in enumerate(parts):
        write_pieces(full, gathered, pieces(placement, arch, rank, size))
    return full


def _owning_stages(held: Mapping[str, Tensor]) -> dict[str, tuple[int, torch.dtype]]:
    """Per checkpoint tensor, the first pipeline stage that has it, and its dtype there."""
    group = parallel_state.get_pipeline_model_parallel_group()
    by_stage: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_stage, {name: tensor.dtype for name, tensor in held.items()}, group=group)
    owners: dict[str, tuple[int, torch.dtype]] = {}
    for stage, dtypes in enumerate(by_stage):
        for name, dtype in dtypes.items():
            owners.setdefault(name, (stage, dtype))
    return owners


def _parameters(chunk: nn.Module, arch: Architecture) -> Iterator[tuple[str, nn.Parameter, Placement]]:
    """This chunk's parameters with their places in the checkpoint.

    Raises:
        UserError: a parameter that no checkpoint of this family has.
    """
    model = _phi_model(chunk)
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for name, parameter in model.named_parameters():
        placement = placement_of(name, layers, arch)
        if placement is None:
            raise UserError(
                f"the Megatron model has a parameter {name}",
                rule="every parameter has a tensor in a Phi3-family checkpoint",
                remedy="build the model with phimr_nemo.model.build_model and without adapters",
            )
        yield name, parameter, placement


def _phi_model(chunk: nn.Module) -> PhiGPTModel:
    """The model inside whatever DDP, Float16Module or NeMo wrapped around it."""
    for module in chunk.modules():
        if isinstance(module, PhiGPTModel):
            return module
    raise TypeError(f"{type(chunk).__name__} holds no PhiGPTModel")


def _device(models: Sequence[nn.Module]) -> torch.device:
    return next(models[0].parameters()).device


def _check_part(name: str, parameter: Tensor, placement: Placement, part: Pieces) -> None:
    expected = list(placement.shape)
    expected[part.axis] = part.length
    if list(parameter.shape) != expected:
        raise UserError(
            f"Megatron parameter {name} has shape {list(parameter.shape)}",
            rule=f"this rank's part of {placement.name} is {expected}",
            remedy="build the model for the architecture of the checkpoint",
        )


def _check_same_shape(arch: Architecture, other: Architecture) -> None:
    """Refuse a checkpoint whose weights would mean something else in this model."""
    ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "sliding_window"}
    differing: dict[str, Any] = {
        name: (getattr(arch, name), getattr(other, name))
        for name in arch.__dataclass_fields__
        if name not in ignored and getattr(arch, name) != getattr(other, name)
    }
    if differing:
        raise UserError(
            f"the checkpoint's architecture differs from the model's: {differing}",
            rule="weights are loaded into the model that they were made for",
            remedy="read the architecture from the checkpoint with Architecture.from_directory",
        )
