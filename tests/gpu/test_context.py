"""Context parallelism on two GPUs: the same log-probabilities and gradients as on one. Skipped with fewer."""

from __future__ import annotations

from pathlib import Path

import compare
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

RANKS = 2
MARGIN = 3.0

pytestmark = pytest.mark.gpu


def run_rank(rank: int, ranks: int, directory: Path, scratch: Path, packed: bool, own_modules: bool) -> None:
    """What one of the ranks does; rank 0 leaves the outcome in a file."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.model.megatron import configuration
    from phimr_nemo.model.megatron import gpt as megatron

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.FileStore(str(scratch / f"rendezvous-{ranks}"), ranks)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    model_parallel_cuda_manual_seed(0)
    if own_modules:
        for module in (configuration, megatron):
            vars(module)["has_transformer_engine"] = lambda: False
    model = compare.build(directory, torch.bfloat16, device, ParallelConfig(context=ranks))
    if packed:
        ids, documents = compare.packed_row(model.architecture, device)
        outcome = compare.run_ours(model, ids, ids.roll(-1, dims=1), documents)
    else:
        outcome = compare.run_ours(model, *compare.batch(model.architecture, device))
    if rank == 0:
        torch.save((outcome.nll.cpu(), outcome.gradients), scratch / f"outcome-{ranks}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} GPUs")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_two_ranks_equal_one(checkpoint: Path, tmp_path: Path, modules: str, packed: bool) -> None:
    found = {}
    for ranks in (1, RANKS):
        arguments = (ranks, checkpoint, tmp_path, packed, modules == "torch")
        torch.multiprocessing.spawn(run_rank, args=arguments, nprocs=ranks)
        found[ranks] = torch.load(tmp_path / f"outcome-{ranks}", weights_only=True)
    expected = compare.expected_bfloat16(compare.SMALL.num_hidden_layers)
    # Log-probabilities are of the logits' size, and both sides are rounded.
    assert compare.relative_error(found[RANKS][0], found[1][0]) < MARGIN * expected
    assert compare.gradient_error(found[RANKS][1], found[1][1]) < MARGIN * 2 * expected
