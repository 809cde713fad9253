"""token_reverse_kl on two tensor-parallel gloo processes equals one process; the planted faults must break that."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from torch import Tensor

from phimr_nemo.losses import IGNORED_LABEL, TeacherStates, distill, token_reverse_kl

WORLD = 2
SEQUENCE, BATCH, WIDTH, TEACHER_WIDTH, VOCABULARY = 6, 2, 8, 10, 22
TEMPERATURE, CHUNK_SIZE = 0.7, 5
EXACT = 1e-12
"""float64: the same sums in another order."""

Results = dict[str, Tensor]


def case() -> tuple[Tensor, Tensor, Tensor, TeacherStates, Tensor]:
    """hidden [s, b, h], weight [v, h], labels [s, b], the teacher's states, and a gradient of the divergences."""
    generator = torch.Generator().manual_seed(0)
    numbers = {"generator": generator, "dtype": torch.float64}
    hidden, weight = torch.randn(SEQUENCE, BATCH, WIDTH, **numbers), torch.randn(VOCABULARY, WIDTH, **numbers)
    # Far apart, so that the ranks' maxima differ.
    weight[: VOCABULARY // 2] *= 3
    labels = torch.randint(VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    labels[1, 0] = labels[-1, 1] = IGNORED_LABEL
    teacher = TeacherStates(
        torch.randn(SEQUENCE, BATCH, TEACHER_WIDTH, **numbers), torch.randn(VOCABULARY, TEACHER_WIDTH, **numbers)
    )
    return hidden, weight, labels, teacher, torch.randn(SEQUENCE, BATCH, **numbers)


def results(*, tensor: bool = False, sequence: bool = False) -> Results:
    """Values and gradients, a rank's slices gathered back into whole tensors."""
    hidden, weight, labels, teacher, upstream = case()
    if sequence:
        rank = dist.get_rank()
        hidden, teacher = hidden.chunk(WORLD)[rank], teacher._replace(hidden=teacher.hidden.chunk(WORLD)[rank])
    if tensor:
        rank = dist.get_rank()
        weight, teacher = weight.chunk(WORLD)[rank], teacher._replace(weight=teacher.weight.chunk(WORLD)[rank])
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, divergence = token_reverse_kl(
        hidden,
        weight,
        labels,
        teacher,
        temperature=TEMPERATURE,
        tp_group=dist.group.WORLD if tensor else None,
        sequence_parallel=sequence,
        chunk_size=CHUNK_SIZE,
    )
    (divergence * upstream).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "logprobs": logprobs,
        "divergence": divergence.detach(),
        "hidden_gradient": _whole(hidden.grad) if sequence else hidden.grad,
        "weight_gradient": _whole(weight.grad) if tensor else weight.grad,
    }


def _whole(part: Tensor) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def without_rescaling(maxima: Tensor, sums: Tensor, tp_group: dist.ProcessGroup | None) -> None:
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=tp_group)
    dist.all_reduce(sums, group=tp_group)


def partial_gradient(gradient: Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    return gradient.chunk(WORLD)[dist.get_rank()].contiguous() if sequence_parallel else gradient


FAULTS = {
    "sums not rescaled": ("_merge", without_rescaling, "divergence"),
    "hidden gradient not reduced": ("reduce_hidden_gradient", partial_gradient, "hidden_gradient"),
}


def all_cases() -> dict[str, Results]:
    found = {f"sequence={sequence}": results(tensor=True, sequence=sequence) for sequence in (False, True)}
    for fault, (attribute, broken, _) in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, attribute, broken)
            found[fault] = results(tensor=True)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Results]]:
    found: list[dict[str, Results]] = run_distributed(all_cases, WORLD)
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ["sequence=False", "sequence=True"])
def test_two_ranks_of_the_vocabulary_are_one_process(ranks: list[dict[str, Results]], name: str) -> None:
    expected = results()
    for rank in ranks:
        assert all(difference(rank[name][key], value) < EXACT for key, value in expected.items())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_among_the_ranks_is_noticed(ranks: list[dict[str, Results]], fault: str) -> None:
    key = FAULTS[fault][2]
    assert difference(ranks[0][fault][key], results()[key]) > 1e-3
