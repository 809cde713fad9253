"""What each rank does in the optimizer's parity tests: train, save, load into a fresh optimizer, go on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import model_worker as worker
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from phimr_nemo.config import ParallelConfig

LEARNING_RATE = 1e-2


class Training:
    """A few optimizer steps on one batch, with or without Megatron's distributed optimizer."""

    def __init__(self, directory: str, layout: ParallelConfig, *, sharded: bool, dtype: torch.dtype) -> None:
        self.layout, self.sharded = layout, sharded
        self.model = worker.build(directory, layout, dtype=dtype)
        if dtype == torch.bfloat16:
            self.model.bfloat16()
        self.wrapped = DistributedDataParallel(
            self.model.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded),
            self.model,
        )
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LEARNING_RATE,
                min_lr=LEARNING_RATE,
                weight_decay=0.1,
                adam_beta2=0.95,
                clip_grad=1.0,
                use_distributed_optimizer=sharded,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
            ),
            [self.wrapped],
        )

    def step(self) -> float | None:
        """One step; the mean loss on the last stage."""
        ids, labels = worker.batch()
        mine = range(parallel_state.get_data_parallel_rank(), worker.ROWS, self.layout.data)
        micro = [{"input_ids": ids[row, None], "labels": labels[row, None]} for row in mine]
        valid = int((labels >= 0).sum())
        seen: list[Tensor] = []

        def head(inputs: dict[str, Tensor], output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            seen.append(output.detach().sum() / valid)
            return output.sum(), (inputs["labels"] >= 0).sum().int(), {}

        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        worker.run(self.wrapped, micro, head, forward_only=False)
        self.optimizer.step()
        if not seen:
            return None
        loss = torch.stack(seen).sum()
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        return float(loss)

    def state(self, *, loading: bool) -> dict[str, Any]:
        model = self.model.sharded_state_dict()
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading)}

    def save(self, path: Path) -> None:
        if dist.get_rank() == 0:
            path.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(loading=False), str(path))

    def load(self, path: Path) -> None:
        loaded = dist_checkpointing.load(self.state(loading=True), str(path))
        self.model.load_state_dict(loaded["model"], strict=False)
        self.optimizer.load_state_dict(loaded["optimizer"])


def curve(directory: str, layout: ParallelConfig, sharded: bool, dtype: torch.dtype, steps: int) -> list[float]:
    """The losses of a few steps (empty before the last pipeline stage)."""
    training = Training(directory, layout, sharded=sharded, dtype=dtype)
    return known(training.step() for _ in range(steps))


def both_curves(
    directory: str, layout: ParallelConfig, sharded: bool, steps: int, path: str
) -> tuple[list[float], list[float]]:
    """The losses, and the same with a save, a fresh model and optimizer, and a load after half of the steps."""
    first = Training(directory, layout, sharded=sharded, dtype=torch.float32)
    before = [first.step() for _ in range(steps // 2)]
    first.save(Path(path))
    straight = [*before, *(first.step() for _ in range(steps - steps // 2))]
    second = Training(directory, layout, sharded=sharded, dtype=torch.float32)
    second.load(Path(path))
    return known(straight), known([*before, *(second.step() for _ in range(steps - steps // 2))])


def known(losses: Iterable[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None]
