"""What the pipeline stages and data-parallel ranks of a policy tell each other beside gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from phimr_nemo.training import platform


def global_sums(results: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Sums over micro-batches and data-parallel ranks, equal on all ranks; only last stages bring results."""
    box: list[dict[str, float] | None] = [None]
    if results:
        names = sorted(results[0])
        totals = torch.stack([torch.stack([result[name].double() for name in names]) for result in results]).sum(0)
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        box = [dict(zip(names, totals.tolist(), strict=True))]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(box, source, parallel_state.get_pipeline_model_parallel_group())
    assert box[0] is not None
    return box[0]


def broadcast_from_last_stage(values: Tensor) -> Tensor:
    """The last pipeline stage's tensor on all stages, which hold one of the same shape and dtype."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return values
    sent = values.to(platform.device())
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(sent, source, parallel_state.get_pipeline_model_parallel_group())
    return sent.cpu()
