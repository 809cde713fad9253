"""token_logprobs against torch's own log_softmax, gradcheck, and bounds derived from the number formats."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phimr_nemo.config import OutputFormat
from phimr_nemo.errors import UserError
from phimr_nemo.losses import IGNORED_LABEL, token_logprobs, token_logprobs_and_entropy

VOCABULARY, WIDTH = 37, 8


def make_case(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, ignored: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    if ignored:
        labels.view(-1)[::3] = IGNORED_LABEL
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def full_logits_reference(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    chosen = logprobs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == IGNORED_LABEL, 0.0, chosen)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shape", [(11,), (5, 3)])
def test_value_and_gradients_equal_log_softmax(shape: tuple[int, ...], temperature: float, chunk_size: int) -> None:
    hidden, weight, labels = make_case(*shape)
    upstream = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    expected = full_logits_reference(hidden, weight, labels, temperature)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    actual = token_logprobs(hidden, weight, labels, temperature=temperature, chunk_size=chunk_size)
    gradients = torch.autograd.grad((actual * upstream).sum(), (hidden, weight))

    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class ProductsCounted(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("chunk_size", "chunks"), [(11, 1), (1000, 1), (4, 3), (1, 11)])
def test_a_chunk_s_product_is_kept_for_the_backward_pass(chunk_size: int, chunks: int, with_entropy: bool) -> None:
    """Of each chunk logits, and gradients of hidden states and weight; logits once more but of one chunk."""
    function = token_logprobs_and_entropy if with_entropy else token_logprobs
    hidden, weight, labels = make_case(11, ignored=False)
    with ProductsCounted() as products:
        found = function(hidden, weight, labels, chunk_size=chunk_size)
        sum(part.sum() for part in found).backward()
    assert products.count == 4 * chunks - 1


@pytest.mark.parametrize("chunk_size", [4, 1000])
def test_a_second_backward_pass_gives_the_same_gradients(chunk_size: int) -> None:
    """The gradient is written over the chunk that was kept."""
    hidden, weight, labels = make_case(11)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, labels, temperature=0.7, chunk_size=chunk_size)
    value = (logprobs - entropy**2).sum()
    first = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    for found, again in zip(first, torch.autograd.grad(value, (hidden, weight)), strict=True):
        assert torch.equal(found, again)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_far_apart_give_gradients_of_certainty(with_entropy: bool) -> None:
    """exp(-2000) is 0 in float64: probabilities 1 and 0, no NaN of their logarithms."""
    hidden, weight = torch.tensor([[1.0]]).double(), torch.tensor([[0.0], [2000.0]]).double().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, torch.tensor([0]))
    (gradient,) = torch.autograd.grad((logprobs + with_entropy * entropy).sum(), weight)
    assert logprobs.item() == -2000.0
    assert gradient.flatten().tolist() == [1.0, -1.0]


def test_gradcheck_float64() -> None:
    hidden, weight, labels = make_case(4, 2)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, labels, temperature=0.7, chunk_size=3), (hidden, weight)
    )


def test_uniform_distribution_by_hand() -> None:
    """W = 0 makes p = 1/V: log p = -ln V, entropy ln V, dlogp/dW_v = ([v = y] - 1/V) h."""
    hidden = torch.tensor([[1.0, 2.0]])
    weight = torch.zeros(4, 2, requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, torch.tensor([2]))
    assert logprobs.item() == pytest.approx(-math.log(4))
    assert entropy.item() == pytest.approx(math.log(4))
    logprobs.sum().backward()
    expected = torch.tensor([[-0.25, -0.5], [-0.25, -0.5], [0.75, 1.5], [-0.25, -0.5]])
    torch.testing.assert_close(weight.grad, expected)


def test_ignored_labels_give_zero_and_no_gradient() -> None:
    hidden, weight, labels = make_case(6)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, labels)
    ignored = labels == IGNORED_LABEL
    assert (logprobs[ignored] == 0).all()
    assert (entropy[ignored] == 0).all()
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[ignored] == 0).all()
    assert (hidden.grad[~ignored] != 0).any(dim=1).all()


def test_all_labels_ignored() -> None:
    hidden, weight, _ = make_case(3)
    logprobs = token_logprobs(hidden, weight, torch.full((3,), IGNORED_LABEL))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, 0.0, 0.0]
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().sum() == 0
    assert weight.grad.abs().sum() == 0


def test_frozen_weight_or_hidden() -> None:
    hidden, weight, labels = make_case(5)
    (both,) = torch.autograd.grad(token_logprobs(hidden, weight, labels).sum(), hidden)
    (alone,) = torch.autograd.grad(token_logprobs(hidden, weight.detach(), labels).sum(), hidden)
    assert torch.equal(both, alone)
    (both,) = torch.autograd.grad(token_logprobs(hidden, weight, labels).sum(), weight)
    (alone,) = torch.autograd.grad(token_logprobs(hidden.detach(), weight, labels).sum(), weight)
    assert torch.equal(both, alone)


def test_weight_shared_with_the_embedding_collects_both_gradients() -> None:
    """Tied embeddings: d/dW of log p(W[x] W^T) is the sum of both uses, as autograd gives for full logits."""
    _, weight, labels = make_case(7)
    inputs = torch.arange(7)
    token_logprobs(weight[inputs], weight, labels).sum().backward()
    reference = weight.detach().clone().requires_grad_()
    full_logits_reference(reference[inputs], reference, labels, 1.0).sum().backward()
    torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-12, atol=1e-12)


def test_entropy_equals_its_definition() -> None:
    hidden, weight, labels = make_case(9, ignored=False)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, labels, temperature=0.6, chunk_size=4)
    distribution = torch.softmax(hidden @ weight.T / 0.6, dim=-1)
    torch.testing.assert_close(entropy, torch.special.entr(distribution).sum(-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(logprobs, token_logprobs(hidden, weight, labels, temperature=0.6, chunk_size=4))


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_of_the_entropy_equal_its_definition(temperature: float, chunk_size: int) -> None:
    """Together with those of the log-probabilities, and alone; ignored labels give none."""
    hidden, weight, labels = make_case(5, 3)
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    probabilities = torch.softmax(hidden @ weight.T / temperature, dim=-1)
    exact = torch.where(labels == IGNORED_LABEL, 0.0, torch.special.entr(probabilities).sum(-1))
    both = (full_logits_reference(hidden, weight, labels, temperature) * first + exact * second).sum()
    alone = (exact * second).sum()
    for factor, expected in ((first, both), (torch.zeros_like(first), alone)):
        logprobs, entropy = token_logprobs_and_entropy(
            hidden, weight, labels, temperature=temperature, chunk_size=chunk_size
        )
        found = torch.autograd.grad((logprobs * factor + entropy * second).sum(), (hidden, weight))
        wanted = torch.autograd.grad(expected, (hidden, weight), retain_graph=True)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_huge_logits_stay_finite() -> None:
    """float32 exp overflows at 88.7; logits of 1e4 must not."""
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[1e4], [1e4 - 1.0]])
    expected = -math.log1p(math.exp(-1.0))
    assert token_logprobs(hidden, weight, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("output_format", ["own", "fp32"])
def test_bfloat16_within_its_derived_bound(output_format: OutputFormat) -> None:
    """Only the logits and the gradients' matrix products are rounded to bfloat16 (unit roundoff u = 2^-8).

    With logits in float32 only the latter are, and |dz| is 0 but for float32. Else |dz| <= u |z|, and
    log p = z_y - lse(z) is 2-Lipschitz in the maximum norm: error <= 2 u max|z| (+ fp32).
    p_v is then off by a factor within exp(+-2 u max|z|), so that the logit gradient [v = y] - p_v is off by
    e_v = p_v (exp(2 u max|z|) - 1) + u |[v = y] - p_v|, and the hidden gradient by |e| |W| + u |result|. The
    weight's gradient rounds each chunk's product and the final sum.
    """
    unit, float32_slack = 2.0**-8, 1e-5
    of_logits = unit if output_format == "own" else 0.0
    hidden, weight, labels = make_case(12, dtype=torch.bfloat16, ignored=False)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = full_logits_reference(exact_hidden, exact_weight, labels, 1.0)
    exact.sum().backward()
    actual = token_logprobs(hidden, weight, labels, chunk_size=5, output_format=output_format)
    actual.sum().backward()
    assert actual.dtype == torch.float32

    logits = (exact_hidden @ exact_weight.T).detach()
    largest = logits.abs().amax(dim=1)
    errors = (actual - exact).abs()
    assert (errors <= 2 * of_logits * largest + float32_slack).all()
    # Which the rounding of the logits is well beyond.
    assert bool((errors > 100 * float32_slack).any()) == (output_format == "own")

    probabilities = torch.softmax(logits, dim=1)
    exact_logit_gradient = torch.nn.functional.one_hot(labels, VOCABULARY) - probabilities
    by_logits = probabilities * torch.expm1(2 * of_logits * largest).unsqueeze(1)
    logit_error = by_logits + unit * exact_logit_gradient.abs()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert exact_hidden.grad is not None
    assert exact_weight.grad is not None
    hidden_bound = logit_error @ exact_weight.abs() + unit * (exact_logit_gradient.abs() @ exact_weight.abs())
    assert ((hidden.grad - exact_hidden.grad).abs() <= hidden_bound + float32_slack).all()
    weight_bound = logit_error.T @ exact_hidden.abs() + 2 * unit * (exact_logit_gradient.abs().T @ exact_hidden.abs())
    assert ((weight.grad - exact_weight.grad).abs() <= weight_bound + float32_slack).all()


def test_weight_gradient_does_not_lose_bits_with_the_number_of_chunks() -> None:
    """One token per chunk: 512 equal contributions of 0.5 (two words, W = 0, h = 1) are exactly 256.

    Summed in bfloat16, 0.5 no longer changes a total of 128 (spacing 1, ties to even), so that is what a
    bfloat16 accumulator would return.
    """
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(hidden, weight, torch.zeros(512, dtype=torch.int64), chunk_size=1).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[256.0], [-256.0]]


def test_autocast_changes_nothing() -> None:
    hidden, weight, labels = make_case(5, dtype=torch.float32)
    plain = token_logprobs(hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_logprobs(hidden, weight, labels), plain)


def test_the_logits_of_all_tokens_never_exist() -> None:
    """Forward or backward, no tensor has more than chunk_size * vocabulary elements, inputs aside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight, labels = make_case(400, dtype=torch.float32)
    with Recorder():
        token_logprobs(hidden, weight, labels, chunk_size=4).sum().backward()
    assert largest <= max(4 * VOCABULARY, hidden.numel(), weight.numel())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": torch.tensor([0, VOCABULARY, 1])}, str(VOCABULARY)),
        ({"labels": torch.tensor([0, -1, 1])}, "-1"),
        ({"labels": torch.tensor([0, 1])}, "(2,)"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH + 1, dtype=torch.float64)}, str(WIDTH + 1)),
        ({"temperature": 0.0}, "0.0"),
        ({"temperature": float("nan")}, "nan"),
        ({"chunk_size": 0}, "chunk_size 0"),
    ],
)
def test_bad_input_is_one_clear_error(change: dict[str, object], named: str) -> None:
    hidden, weight, labels = make_case(3)
    arguments: dict[str, object] = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(UserError) as caught:
        token_logprobs(**arguments)  # type: ignore[arg-type]
    assert named in str(caught.value)


def test_importing_the_package_needs_no_torch() -> None:
    check = "import sys, phimr_nemo.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_unknown_name_is_an_attribute_error() -> None:
    import phimr_nemo.losses

    with pytest.raises(AttributeError, match="no_such_loss"):
        _ = phimr_nemo.losses.no_such_loss
