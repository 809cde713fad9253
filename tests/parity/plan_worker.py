"""What each rank does in the planner's parity test: run one step of a tiny model and count what it holds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from phimr_nemo.config import OptimConfig, OutputFormat, ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.model.megatron import cpu_attention
from phimr_nemo.model.megatron.configuration import transformer_config
from phimr_nemo.model.megatron.gpt import build_model
from phimr_nemo.plan.memory import MicroBatch, Recompute
from phimr_nemo.training.optimizer import build_optimizer

WORDS = 100
RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Case:
    """One measured run.

    Attributes:
        documents: lengths of a packed row's documents, () for an unpacked batch.
        micro_batches: of the step, on each data-parallel rank.
        logits_bytes: that a chunk of logits may take.
        output_format: of the output layer.
    """

    arch: Architecture
    parallel: ParallelConfig
    dtype: str
    recompute: Recompute
    batch: MicroBatch
    documents: tuple[int, ...]
    micro_batches: int
    distributed: bool
    logits_bytes: int
    output_format: OutputFormat


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank.

    Attributes:
        stage: pipeline stage.
        kept: largest sum of what autograd kept for backward passes at one time.
        moving: largest sum of all tensors made during the step that existed at one time.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    kept: int
    moving: int


class Live:
    """Bytes of distinct storages that exist, and the most there ever were."""

    def __init__(self, outside: Iterable[Tensor]) -> None:
        self._outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._outside:
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def look(self) -> None:
        self._storages = {key: item for key, item in self._storages.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))


class EveryTensor(TorchDispatchMode):
    """Sees the result of every operation, in the backward pass too."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self._live.add(item)
        self._live.look()
        return result


def bytes_of(tensors: Iterable[Tensor], outside: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages, without those that others share."""
    known = {tensor.untyped_storage().data_ptr() for tensor in outside}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in known)


@contextlib.contextmanager
def kept_for_backward(live: Live) -> Iterator[None]:
    """Count what autograd keeps, while it keeps it."""

    def pack(tensor: Tensor) -> Tensor:
        live.add(tensor)
        live.look()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def inputs(case: Case) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(case.micro_batches):
        shape = (1, case.batch.tokens) if case.documents else (case.batch.sequences, case.batch.length)
        ids = torch.randint(WORDS, shape, generator=generator)
        item: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if case.documents:
            ends = torch.tensor([0, *torch.tensor(case.documents).cumsum(0).tolist()], dtype=torch.int32)
            item["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                max_seqlen_q=max(case.documents),
                max_seqlen_kv=max(case.documents),
            )
        yield item


def build(case: Case) -> DistributedDataParallel:
    parallel = case.parallel
    parallel_state.initialize_model_parallel(
        parallel.tensor, parallel.pipeline, context_parallel_size=parallel.context
    )
    model_parallel_cuda_manual_seed(1)
    config = transformer_config(
        case.arch,
        parallel,
        dtype=torch_dtype(case.dtype),
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **RECOMPUTE[case.recompute],
    )
    model = build_model(
        case.arch,
        config,
        max_length=case.arch.max_position_embeddings,
        longrope_policy="always_short",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        logits_bytes=case.logits_bytes,
        output_format=case.output_format,
    )
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed)
    return DistributedDataParallel(config, options, model)


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Moments and master weights of Megatron's optimizer."""
    inner = [part.optimizer for part in optimizer.chained_optimizers]
    parameters = [p for part in inner for group in part.param_groups for p in group["params"]]
    states = [value for part in inner for state in part.state.values() for value in state.values()]
    return [*parameters, *(value for value in states if isinstance(value, Tensor))]


def measure(case: Case) -> Measured:
    """Run a step and count."""
    model = build(case)
    optimizer, _ = build_optimizer(optim(case.distributed), [model], steps=1, dtype=torch_dtype(case.dtype))
    weights = list(model.parameters())
    gradients = [buffer.grad_data for buffer in model.buffers]
    states = optimizer_tensors(optimizer.megatron)
    model.train()
    model.zero_grad_buffer()
    held = [*weights, *gradients, *states]
    kept, everything = Live(held), Live(held)
    micro_batches = list(inputs(case))

    def head(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return output.sum(), torch.tensor(output.numel(), dtype=torch.int), {}

    def step(data: Iterator[dict[str, Any]], stage: Any) -> tuple[Tensor, Callable[..., Any]]:
        return stage(**next(data)), head

    # A CPU's tiles of scores are no part of the plan of a GPU, whose kernels never hold them.
    whole = mock.patch.object(cpu_attention, "TILED", range(0))
    with whole, EveryTensor(everything), kept_for_backward(kept):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=case.micro_batches,
            seq_length=micro_batches[0]["input_ids"].shape[1] // case.parallel.context,
            micro_batch_size=micro_batches[0]["input_ids"].shape[0],
            forward_only=False,
        )
    return Measured(
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        weights=bytes_of(weights),
        gradients=bytes_of(gradients),
        optimizer=bytes_of(states, outside=[*weights, *gradients]),
        kept=kept.peak,
        moving=everything.peak,
    )


def measure_without_recompute(case: Case) -> Measured:
    """The planted fault: the case says that activations are computed again, and they are not."""
    real = dict(RECOMPUTE[case.recompute])
    RECOMPUTE[case.recompute] = RECOMPUTE["none"]
    try:
        return measure(case)
    finally:
        RECOMPUTE[case.recompute] = real


def optim(distributed: bool) -> OptimConfig:
    return OptimConfig(
        lr=1e-3,
        min_lr=1e-3,
        warmup_fraction=0.0,
        schedule="constant",
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        clip_grad=1.0,
        distributed=distributed,
    )


def replaced(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)
