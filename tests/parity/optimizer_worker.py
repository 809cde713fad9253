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

from phimr_nemo.align.offload import HostMemory, gradient_tensors, optimizer_tensors
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


def state_away_between_steps(
    directory: str, layout: ParallelConfig, sharded: bool, dtype: torch.dtype, steps: int, fault: bool
) -> dict[str, Any]:
    """The losses and weights of a few steps, with what only an update needs in the host's memory between them.

    Args:
        directory, layout, sharded, dtype, steps: as above.
        fault: the moments come back as another parameter's.
    """
    training = Training(directory, layout, sharded=sharded, dtype=dtype)
    # Before there are moments, as a run that begins does.
    memory = HostMemory(
        lambda: optimizer_tensors(training.optimizer, training.wrapped), lambda: gradient_tensors(training.wrapped)
    )
    memory.put_away()
    memory.bring_back()
    losses, freed = [training.step()], 0
    copied = list(optimizer_tensors(training.optimizer, training.wrapped))
    zeroed = list(gradient_tensors(training.wrapped))
    numbers = sum(parameter.numel() for parameter in training.model.parameters())
    held = sum(tensor.nbytes for tensor in copied if tensor.numel() > 1)
    for _ in range(steps - 1):
        before = [tensor.clone() for tensor in copied]
        freed = memory.put_away()
        assert memory.put_away() == 0
        assert [tensor.untyped_storage().nbytes() for tensor in (*copied, *zeroed)] == [0] * len(copied + zeroed)
        # Other tensors take the memory meanwhile.
        others = [torch.full_like(tensor, 7.0) for tensor in before]
        memory.bring_back()
        memory.bring_back()
        del others
        assert all(torch.equal(a, b) for a, b in zip(copied, before, strict=True))
        assert not any(tensor.any() for tensor in zeroed)
        if fault:
            same = [tensor for tensor in copied if tensor.numel() > 1]
            same[0].flatten()[:2] = same[0].flatten()[:2].flip(0)
        losses.append(training.step())
    weights = torch.cat([parameter.detach().flatten().float() for parameter in training.model.parameters()])
    return {
        "losses": known(losses),
        "weights": weights,
        "numbers": numbers,
        "copied": held,
        "zeroed": sum(tensor.nbytes for tensor in zeroed),
        "freed": freed,
    }


def weights_after(
    directory: str, layout: ParallelConfig, sharded: bool, dtype: torch.dtype, steps: int
) -> tuple[list[float], Tensor]:
    """The losses and weights of a few steps."""
    training = Training(directory, layout, sharded=sharded, dtype=dtype)
    losses = known(training.step() for _ in range(steps))
    return losses, torch.cat([parameter.detach().flatten().float() for parameter in training.model.parameters()])


def known(losses: Iterable[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None]
