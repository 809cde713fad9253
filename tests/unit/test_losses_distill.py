"""The objectives of on-policy distillation against the whole vocabulary, enumerated means and values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phimr_nemo.config import OutputFormat
from phimr_nemo.errors import UserError
from phimr_nemo.losses import (
    IGNORED_LABEL,
    PolicyBatch,
    TeacherStates,
    dapo_loss,
    reverse_kl_loss,
    sampled_reverse_kl_loss,
    token_logprobs,
    token_reverse_kl,
)

VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 8, 11
TEMPERATURE = 0.7
EXACT = {"rtol": 1e-11, "atol": 1e-12}
OPEN = {"clip_low": 0.99, "clip_high": 1e9}
"""No ratio is clipped."""


def make_case(*shape: int) -> tuple[Tensor, Tensor, Tensor, TeacherStates]:
    generator = torch.Generator().manual_seed(0)
    numbers = {"generator": generator, "dtype": torch.float64}
    hidden = torch.randn(*shape, WIDTH, **numbers).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, **numbers).requires_grad_()
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    labels.view(-1)[::3] = IGNORED_LABEL
    teacher = TeacherStates(
        torch.randn(*shape, TEACHER_WIDTH, **numbers), torch.randn(VOCABULARY, TEACHER_WIDTH, **numbers)
    )
    return hidden, weight, labels, teacher


def whole_reverse_kl(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: TeacherStates) -> Tensor:
    """By torch's own softmax and sum, from all logits."""
    student = torch.log_softmax(hidden @ weight.T / TEMPERATURE, dim=-1)
    taught = torch.log_softmax(teacher.hidden @ teacher.weight.T / TEMPERATURE, dim=-1)
    return torch.where(labels == IGNORED_LABEL, 0.0, (student.exp() * (student - taught)).sum(dim=-1))


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("shape", [(11,), (5, 3)])
def test_value_and_gradient_in_chunks_are_those_of_the_whole_softmax(shape: tuple[int, ...], chunk_size: int) -> None:
    hidden, weight, labels, teacher = make_case(*shape)
    upstream = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = whole_reverse_kl(hidden, weight, labels, teacher)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))

    logprobs, divergence = token_reverse_kl(
        hidden, weight, labels, teacher, temperature=TEMPERATURE, chunk_size=chunk_size
    )
    gradients = torch.autograd.grad((divergence * upstream).sum(), (hidden, weight))

    torch.testing.assert_close(divergence, expected, **EXACT)
    torch.testing.assert_close(logprobs, token_logprobs(hidden, weight, labels, temperature=TEMPERATURE), **EXACT)
    assert not logprobs.requires_grad
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(("student", "of_teacher"), [("fp32", "fp32"), ("own", "fp32"), ("fp32", "own")])
def test_logits_in_float32_are_those_of_the_same_numbers(student: OutputFormat, of_teacher: OutputFormat) -> None:
    """Of matrices in bfloat16, against float64. Either side's logits rounded to bfloat16 are the planted fault."""
    hidden, weight, labels, teacher = make_case(11)
    short = [tensor.detach().bfloat16() for tensor in (hidden, weight, teacher.hidden, teacher.weight)]
    exact = [tensor.double() for tensor in short]
    expected = whole_reverse_kl(exact[0], exact[1], labels, TeacherStates(exact[2], exact[3]))
    _, divergence = token_reverse_kl(
        *(short[0], short[1], labels, TeacherStates(short[2], short[3], of_teacher)),
        temperature=TEMPERATURE,
        chunk_size=4,
        output_format=student,
    )
    # Float32's unit roundoff times some tens of operations on numbers of at most some tens.
    bound = 100 * 2.0**-24 * float(expected.max() + 100)
    error = float((divergence - expected).abs().max())
    assert (error < bound) == (student == of_teacher == "fp32"), error


def test_the_gradient_is_that_of_finite_differences() -> None:
    hidden, weight, labels, teacher = make_case(4, 2)
    assert torch.autograd.gradcheck(
        lambda h, w: token_reverse_kl(h, w, labels, teacher, temperature=0.7, chunk_size=3)[1], (hidden, weight)
    )


def test_two_words_by_hand() -> None:
    """Student (1/2, 1/2), teacher (1/4, 3/4): KL = ln 2 / 2 + ln(2/3) / 2 = ln(4/3) / 2; dKL/dz = +-ln(3) / 4."""
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    teacher = TeacherStates(torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [math.log(3)]]).double())
    _, divergence = token_reverse_kl(torch.ones(1, 1, dtype=torch.float64), weight, torch.tensor([0]), teacher)
    assert divergence.item() == pytest.approx(math.log(4 / 3) / 2)
    divergence.sum().backward()
    expected = torch.tensor([[math.log(3) / 4], [-math.log(3) / 4]]).double()
    torch.testing.assert_close(weight.grad, expected)


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient() -> None:
    hidden, weight, labels, _ = make_case(6)
    _, divergence = token_reverse_kl(hidden, weight, labels, TeacherStates(hidden.detach(), weight.detach()))
    divergence.sum().backward()
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), **EXACT)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden.grad), **EXACT)


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels, teacher = make_case(6)
    large = TeacherStates(1e3 * teacher.hidden.float(), teacher.weight.float())
    _, divergence = token_reverse_kl(1e3 * hidden.float(), weight.float(), labels, large)
    assert torch.isfinite(divergence).all()
    assert (divergence >= -1e-2).all()


def test_another_number_of_words_is_refused() -> None:
    hidden, weight, labels, teacher = make_case(6)
    with pytest.raises(UserError, match=f"{VOCABULARY - 1} rows beside a student's of {VOCABULARY}"):
        token_reverse_kl(hidden, weight, labels, TeacherStates(teacher.hidden, teacher.weight[1:]))


# ---- from the sampled token alone --------------------------------------------------------------------------


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [3] of the student, with gradient; log-probabilities of an older student and of the teacher."""
    student = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old = torch.log_softmax(torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64), 0)
    teacher = torch.log_softmax(torch.tensor([-1.0, 0.8, 0.1], dtype=torch.float64), 0)
    return student, old, teacher


def mean_over_words(drawn_from: Tensor, old: Tensor, *, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exact mean of the sampled loss and of its gradient, where the token is drawn from `drawn_from` [3] (log)."""
    student, _, teacher = distributions()
    logprobs = torch.log_softmax(student, 0)
    # One response of one token for each word.
    loss = torch.stack(
        [
            sampled_reverse_kl_loss(
                logprobs[word].view(1, 1),
                old[word].view(1, 1),
                teacher[word].view(1, 1),
                torch.ones(1, 1),
                importance_weights=None if weights is None else weights[word].view(1, 1),
                **OPEN,
            ).loss_sum
            for word in range(3)
        ]
    )
    mean = (drawn_from.exp() * loss).sum()
    return mean.detach(), torch.autograd.grad(mean, student)[0]


def exact() -> tuple[Tensor, Tensor]:
    student, _, teacher = distributions()
    logprobs = torch.log_softmax(student, 0)
    value = (logprobs.exp() * (logprobs - teacher)).sum()
    return value.detach(), torch.autograd.grad(value, student)[0]


def test_the_sampled_loss_is_unbiased_of_value_and_gradient_on_policy() -> None:
    now = torch.log_softmax(distributions()[0], 0).detach()
    for ours, theirs in zip(mean_over_words(now, now), exact(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_the_sampled_loss_is_unbiased_on_tokens_of_an_older_policy() -> None:
    _, old, _ = distributions()
    for ours, theirs in zip(mean_over_words(old, old), exact(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_weights_make_it_unbiased_on_the_samplers_tokens() -> None:
    now = torch.log_softmax(distributions()[0], 0).detach()
    sampler = torch.log_softmax(torch.tensor([0.9, 0.0, -0.3], dtype=torch.float64), 0)
    for ours, theirs in zip(mean_over_words(sampler, now, weights=(now - sampler).exp()), exact(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_an_older_policy_without_its_ratio_is_noticed() -> None:
    """The planted fault: tokens of an older policy, taken for the present one's."""
    _, old, _ = distributions()
    now = torch.log_softmax(distributions()[0], 0).detach()
    assert (mean_over_words(old, now)[1] - exact()[1]).abs().max() > 0.01


def test_the_sampled_loss_is_dapos_with_an_advantage_a_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, teacher = (-torch.rand(2, 5, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    ours = sampled_reverse_kl_loss(logprobs, old, teacher, mask, clip_low=0.2, clip_high=0.2)
    advantages = teacher - logprobs
    expected = 0.0
    for row, column in mask.nonzero().tolist():
        ratio, advantage = (logprobs - old)[row, column].exp().item(), advantages[row, column].item()
        expected -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert ours.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    assert ours.denominator.item() == 7
    assert ours.metrics["reverse_kl"].item() == pytest.approx(-(advantages * mask).sum().item(), rel=1e-5)


def test_what_lies_outside_the_mask_does_not_matter() -> None:
    logprobs = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    found = sampled_reverse_kl_loss(logprobs, logprobs.detach(), torch.tensor([[-2.0, math.nan]]), mask, **OPEN)
    assert found.loss_sum.item() == pytest.approx(1.0)
    whole = reverse_kl_loss(torch.tensor([[0.5, math.nan]]), mask)
    assert whole.loss_sum.item() == whole.metrics["reverse_kl"].item() == 0.5
    assert whole.denominator.item() == 1


def test_advantages_of_neither_responses_nor_tokens_are_refused() -> None:
    values = torch.zeros(2, 3)
    with pytest.raises(UserError, match="do not fit"):
        dapo_loss(PolicyBatch(values, values, torch.zeros(3), torch.ones(2, 3)), clip_low=0.2, clip_high=0.2)
