"""Weights between a Hugging Face directory and the Megatron model, under any tensor and pipeline layout.

Nothing here holds more than one full tensor: loading reads each rank's pieces, exporting assembles one tensor at a
time and hands it on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.files.shards import write_pieces
from phimr_nemo.model.megatron.gpt import PhiGPTModel
from phimr_nemo.model.table import (
    ADAPTER,
    Pieces,
    Placement,
    full_tensors,
    parts_in,
    parts_of,
    pieces,
    placement_of,
    tensor_shapes,
)

__all__ = ["adapter_tensors", "export_tensors", "load_tensors", "phi_model", "tensor_shapes", "write_pieces"]

WRAPPED: Final = ".to_wrap."
"""In the name of a matrix that has an adapter beside it (NeMo's LoRALinear)."""


@dataclass(frozen=True)
class _Held:
    """A parameter of this rank, and the adapter beside it: B A, scaled, is added to it.

    Attributes:
        inner: A, this rank's part.
        outer: B, this rank's part.
    """

    parameter: Tensor
    inner: Tensor | None = None
    outer: Tensor | None = None
    scale: float = 0.0


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
            parameter.copy_(_read(source, placement, part))


def _read(source: HFDirectory, full: Placement, where: Pieces) -> Tensor:
    """Pieces of a full tensor, from whichever tensors of the checkpoint it is made of."""
    if not full.parts:
        return source.read_pieces(full.name, where.axis, where.ranges)
    rows = [source.read_slice(name, 0, start, stop) for name, start, stop in parts_in(full, where.ranges)]
    return torch.cat(rows)


@torch.no_grad()
def export_tensors(models: Sequence[nn.Module], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Give the whole checkpoint, tensor by tensor, on every rank.

    Collective over the tensor- and pipeline-parallel groups: every rank of a model replica iterates to the end.

    Args:
        models: this rank's chunks, bare or wrapped.
        arch: the model.

    Yields:
        (Hugging Face name, full tensor in the parameters' dtype), in the same order on all ranks, on the model's
        device: who needs it elsewhere copies it. A tied head is not repeated. Adapters are merged into the matrices
        that they stand beside.
    """
    held = _held(models, arch)
    owners = _owning_stages(held)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(group)
    for wanted in full_tensors(arch):
        owner, dtype = owners[wanted.name]
        full = None
        if stage == owner:
            full = _assemble(_merged(held[wanted.name], wanted), wanted, arch)
        if len(stages) > 1:
            if full is None:
                full = torch.empty(wanted.shape, dtype=dtype, device=_device(models))
            dist.broadcast(full, src=stages[owner], group=group)
        assert full is not None
        for part in parts_of(wanted):
            yield part.name, full[part.start : part.stop]


@torch.no_grad()
def adapter_tensors(models: Sequence[nn.Module], arch: Architecture) -> list[tuple[str, Tensor, Tensor]]:
    """The whole adapters, on every rank: (Hugging Face name of the matrix, A [rank, in], B [out, rank]) on the CPU.

    Matrices that are parts of one in Megatron have A in common, and of B each its own rows. Collective over the
    tensor- and pipeline-parallel groups.

    Args:
        models: this rank's chunks, bare or wrapped.
        arch: the model.
    """
    placements = {placement.name: placement for placement in full_tensors(arch)}
    mine = {}
    for name, held in _held(models, arch).items():
        if held.inner is None or held.outer is None:
            continue
        placement = placements[name]
        rows, columns = placement.shape
        rank = _adapter_rank(held, placement)
        if placement.split == "columns":
            inner = _assemble(held.inner, Placement(name, (rank, columns), placement.split), arch)
            outer = _gathered(held.outer)
        else:
            inner = _gathered(held.inner)
            outer = _assemble(held.outer, Placement(name, (rows, rank), placement.split), arch)
        mine[name] = (inner.cpu(), outer.cpu())
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, mine, group=group)
    return [
        (part.name, inner, outer[part.start : part.stop])
        for stage in stages
        for name, (inner, outer) in stage.items()
        for part in parts_of(placements[name])
    ]


def _held(models: Sequence[nn.Module], arch: Architecture) -> dict[str, _Held]:
    """This rank's parameters by the tensors that they are parts of."""
    held: dict[str, _Held] = {}
    for chunk in models:
        model = phi_model(chunk)
        for name, parameter, placement in _parameters(chunk, arch):
            found = _Held(parameter.detach())
            if WRAPPED in name and name.endswith(".weight"):
                adapter: Any = model.get_submodule(name.partition(WRAPPED)[0]).adapter
                inner, outer = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
                found = _Held(parameter.detach(), inner, outer, model.adapter_scale)
            # A tied output layer comes after the embedding, or alone on the last stage.
            held.setdefault(placement.name, found)
    return held


def _adapter_rank(held: _Held, placement: Placement) -> int:
    assert held.inner is not None
    assert held.outer is not None
    # The side that is not split over the group beside the matrix has the whole rank.
    return held.inner.shape[0] if placement.split == "columns" else held.outer.shape[1]


def _merged(held: _Held, placement: Placement) -> Tensor:
    """This rank's part of a matrix, its adapter in it; if it has one, collective over the tensor-parallel group."""
    if held.inner is None or held.outer is None:
        return held.parameter
    is_by_columns = placement.split == "columns"
    inner = held.inner if is_by_columns else _gathered(held.inner)
    outer = _gathered(held.outer) if is_by_columns else held.outer
    update = outer.float() @ inner.float()
    return (held.parameter.float() + held.scale * update).to(held.parameter.dtype)


def _gathered(part: Tensor) -> Tensor:
    """The parts of the tensor-parallel group, one under the other."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


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


def _owning_stages(held: Mapping[str, _Held]) -> dict[str, tuple[int, torch.dtype]]:
    """Per checkpoint tensor, the first pipeline stage that has it, and its dtype there."""
    group = parallel_state.get_pipeline_model_parallel_group()
    by_stage: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(by_stage, {name: each.parameter.dtype for name, each in held.items()}, group=group)
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
    model = phi_model(chunk)
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for name, parameter in model.named_parameters():
        if ADAPTER in name:
            continue
        placement = placement_of(name.replace(WRAPPED, "."), layers, arch)
        if placement is None:
            raise UserError(
                f"the Megatron model has a parameter {name}",
                rule="every parameter has a tensor in a checkpoint of its family",
                remedy="build the model with phimr_nemo.model.build_model",
            )
        yield name, parameter, placement


def phi_model(chunk: nn.Module) -> PhiGPTModel:
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
