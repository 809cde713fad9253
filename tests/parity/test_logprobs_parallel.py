"""token_logprobs on two tensor-parallel gloo processes equals one process and Megatron-Core's own layers.

Every rank holds half of the vocabulary. The faults planted below must each break the comparison, so a green
parity test means that the collectives are there and right.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from phimr_nemo.losses import IGNORED_LABEL, logprobs, token_logprobs_and_entropy

WORLD = 2
SEQUENCE, BATCH, WIDTH, VOCABULARY = 6, 2, 8, 22
TEMPERATURE, CHUNK_SIZE = 0.7, 5
EXACT = 1e-12
"""float64: the same sums in another order."""
FLOAT32 = 1e-5
"""float32 logits in another order of summation: WIDTH * 2^-24 * sum |h| |w|, here at most about 20."""

Results = dict[str, Tensor]
Worker = Callable[[], Results]


def make_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [s, b, h], weight [v, h], labels [s, b] and a random gradient for the log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCE, BATCH, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    labels[1, 0] = labels[-1, 1] = IGNORED_LABEL
    upstream = torch.randn(SEQUENCE, BATCH, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, labels, upstream


def one_process(dtype: torch.dtype = torch.float64, temperature: float = TEMPERATURE) -> Results:
    hidden, weight, labels, upstream = make_case(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    values, entropy = token_logprobs_and_entropy(
        hidden, weight, labels, temperature=temperature, chunk_size=CHUNK_SIZE
    )
    ((values + entropy) * upstream).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "logprobs": values.detach(),
        "entropy": entropy.detach(),
        "hidden_gradient": hidden.grad,
        "weight_gradient": weight.grad,
    }


def two_processes(
    sequence_parallel: bool, dtype: torch.dtype, temperature: float, *, with_entropy: bool = True
) -> Results:
    """What this rank computes, its slices gathered back into whole tensors."""
    rank = dist.get_rank()
    hidden, weight, labels, upstream = make_case(dtype)
    local_hidden = (hidden.chunk(WORLD)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    local_weight = weight.chunk(WORLD)[rank].clone().requires_grad_()
    values, entropy = token_logprobs_and_entropy(
        local_hidden,
        local_weight,
        labels,
        temperature=temperature,
        tp_group=dist.group.WORLD,
        sequence_parallel=sequence_parallel,
        chunk_size=CHUNK_SIZE,
    )
    ((values + entropy if with_entropy else values) * upstream).sum().backward()
    assert local_hidden.grad is not None
    assert local_weight.grad is not None
    return {
        "logprobs": values.detach(),
        "entropy": entropy.detach(),
        "hidden_gradient": all_gather(local_hidden.grad) if sequence_parallel else local_hidden.grad,
        "weight_gradient": all_gather(local_weight.grad),
    }


def all_gather(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


# --- the planted faults: each replaces one function of the module ------------------------------------------


def keep_partial_hidden_gradient(gradient: Tensor, tp_group: Any, sequence_parallel: bool) -> Tensor:
    return gradient.chunk(WORLD)[dist.get_rank()].contiguous() if sequence_parallel else gradient


def merge_without_rescaling(maximum: Tensor, sums: Tensor, tp_group: Any) -> Tensor:
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
    dist.all_reduce(sums, group=tp_group)
    return maximum


def merge_nothing(maximum: Tensor, sums: Tensor, tp_group: Any) -> Tensor:
    return maximum


def columns_without_offset(labels: Tensor, local_vocabulary: int, tp_group: Any) -> tuple[Tensor, Tensor]:
    return labels % local_vocabulary, torch.ones_like(labels, dtype=torch.bool)


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "hidden_gradient_not_reduced": (
        "reduce_hidden_gradient",
        keep_partial_hidden_gradient,
        "hidden_gradient",
    ),
    "sums_not_rescaled": ("_merge_statistics", merge_without_rescaling, "logprobs"),
    "nothing_merged": ("_merge_statistics", merge_nothing, "logprobs"),
    "every_rank_owns_every_label": ("local_columns", columns_without_offset, "weight_gradient"),
}


def run_all_cases() -> Results:
    results: Results = {}
    for sequence_parallel in (False, True):
        prefix = f"sp={sequence_parallel}"
        for name, value in two_processes(sequence_parallel, torch.float64, TEMPERATURE).items():
            results[f"{prefix}/{name}"] = value
        for fault, (attribute, broken, _) in FAULTS.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(logprobs, attribute, broken)
                for name, value in two_processes(sequence_parallel, torch.float64, TEMPERATURE).items():
                    results[f"{prefix}/{fault}/{name}"] = value
    hidden, weight, labels, _ = make_case(torch.float64)
    nothing = logprobs.token_logprobs(
        hidden,
        weight.chunk(WORLD)[dist.get_rank()],
        torch.full_like(labels, IGNORED_LABEL),
        tp_group=dist.group.WORLD,
    )
    results["all_ignored"] = nothing
    return results


def run_megatron() -> Results:
    """Megatron's ColumnParallelLinear and vocab_parallel_cross_entropy, and ours, on the same slices."""
    from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel

    # Megatron allocates its communication buffers on "the current CUDA device"; here that is the CPU.
    torch.cuda.current_device = lambda: "cpu"
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    rank = parallel_state.get_tensor_model_parallel_rank()
    results: Results = {}
    for sequence_parallel in (False, True):
        hidden, weight, labels, upstream = make_case(torch.float32)
        config = ModelParallelConfig(
            tensor_model_parallel_size=WORLD, sequence_parallel=sequence_parallel, use_cpu_initialization=True
        )
        layer = tensor_parallel.ColumnParallelLinear(
            WIDTH, VOCABULARY, config=config, init_method=torch.nn.init.zeros_, bias=False
        )
        with torch.no_grad():
            layer.weight.copy_(weight.chunk(WORLD)[rank])
        local = (hidden.chunk(WORLD)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        logits, _ = layer(local)
        ignored = labels == IGNORED_LABEL
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.masked_fill(ignored, 0))
        values = torch.where(ignored, 0.0, -losses)
        (values * upstream).sum().backward()
        prefix = f"sp={sequence_parallel}"
        results[f"{prefix}/megatron/logprobs"] = values.detach()
        results[f"{prefix}/megatron/hidden_gradient"] = all_gather(local.grad) if sequence_parallel else local.grad
        results[f"{prefix}/megatron/weight_gradient"] = all_gather(layer.weight.grad)
        for name, value in two_processes(sequence_parallel, torch.float32, 1.0, with_entropy=False).items():
            results[f"{prefix}/ours/{name}"] = value
    return results


def worker_main(rank: int, directory: str, work: Worker) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD)
    torch.save(work(), Path(directory) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_on_two_processes(directory: Path, work: Worker) -> list[Results]:
    mp.spawn(worker_main, args=(str(directory), work), nprocs=WORLD)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def parallel_results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_on_two_processes(tmp_path_factory.mktemp("logprobs"), run_all_cases)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("rank", range(WORLD))
def test_two_processes_equal_one(parallel_results: list[Results], rank: int, sequence_parallel: bool) -> None:
    for name, expected in one_process().items():
        actual = parallel_results[rank][f"sp={sequence_parallel}/{name}"]
        torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(parallel_results: list[Results], fault: str, sequence_parallel: bool) -> None:
    name = FAULTS[fault][2]
    expected = one_process()[name]
    worst = max(
        float((result[f"sp={sequence_parallel}/{fault}/{name}"] - expected).abs().max())
        for result in parallel_results
    )
    assert worst > 1e-3


def test_all_labels_ignored_is_all_zero(parallel_results: list[Results]) -> None:
    for result in parallel_results:
        assert torch.equal(result["all_ignored"], torch.zeros(SEQUENCE, BATCH, dtype=torch.float64))


def test_equals_megatrons_own_output_layer_and_loss(tmp_path: Path) -> None:
    for result in run_on_two_processes(tmp_path, run_megatron):
        for prefix in ("sp=False", "sp=True"):
            for name in ("logprobs", "hidden_gradient", "weight_gradient"):
                torch.testing.assert_close(
                    result[f"{prefix}/ours/{name}"],
                    result[f"{prefix}/megatron/{name}"],
                    rtol=FLOAT32,
                    atol=FLOAT32,
                    msg=lambda m, where=f"{prefix} {name}": f"{where}: {m}",
                )
