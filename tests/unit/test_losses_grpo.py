"""The policy losses against plain Python loops over the published formulas, and properties of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.losses import (
    PolicyBatch,
    PolicyLoss,
    centered_advantages,
    dapo_loss,
    dr_grpo_loss,
    group_advantages,
    grpo_loss,
    gspo_loss,
    k3_kl,
    truncated_importance_weights,
)
from phimr_nemo.losses.advantages import ADVANTAGE_EPSILON

LOW, HIGH, KL, BUDGET = 0.2, 0.28, 0.3, 16
CLIP: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH}
LENGTHS = (5, 2, 7, 1)
ALL_LOSSES: dict[str, Callable[..., PolicyLoss]] = {
    "grpo": grpo_loss,
    "dr_grpo": partial(dr_grpo_loss, max_new_tokens=BUDGET),
    "dapo": dapo_loss,
    "gspo": gspo_loss,
}


def make_case(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(LENGTHS), max(LENGTHS), generator=generator, dtype=torch.float64)

    logprobs = -noise(1.0).abs()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return {
        "logprobs": logprobs.clone().requires_grad_(),
        "old_logprobs": logprobs + noise(0.4),
        "advantages": torch.tensor([1.5, -0.7, 0.4, -1.2], dtype=torch.float64),
        "loss_mask": mask,
        "ref_logprobs": logprobs + noise(0.5),
        "importance_weights": noise(1.0).abs(),
    }


def call(name: str, case: dict[str, Tensor], **options: Any) -> PolicyLoss:
    tensors = {key: options.pop(key) for key in ("ref_logprobs", "importance_weights") if key in options}
    names = ("logprobs", "old_logprobs", "advantages", "loss_mask")
    batch = PolicyBatch(*(case[key] for key in names), **tensors)
    return ALL_LOSSES[name](batch, **({**CLIP, **options}))


def loops(name: str, case: dict[str, Tensor], low: float = LOW, high: float = HIGH) -> tuple[float, int]:
    """The published formulas, token by token in plain Python: (loss sum, denominator), with KL and weights."""
    totals, means = [], []
    for i, length in enumerate(LENGTHS):
        new, old, ref, weight = (
            case[key][i, :length].tolist()
            for key in ("logprobs", "old_logprobs", "ref_logprobs", "importance_weights")
        )
        advantage = float(case["advantages"][i])
        mean_log_ratio = sum(n - o for n, o in zip(new, old, strict=True)) / length
        losses = []
        for n, o, r, w in zip(new, old, ref, weight, strict=True):
            ratio = math.exp(mean_log_ratio if name == "gspo" else n - o)
            clipped = max(1 - low, min(1 + high, ratio))
            kl = math.exp(r - n) - (r - n) - 1
            losses.append(-w * min(ratio * advantage, clipped * advantage) + KL * kl)
        totals.append(sum(losses))
        means.append(sum(losses) / length)
    if name in ("grpo", "gspo"):
        return sum(means), len(LENGTHS)
    return sum(totals), sum(LENGTHS) if name == "dapo" else len(LENGTHS) * BUDGET


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_equals_plain_loops(name: str, seed: int) -> None:
    case = make_case(seed)
    result = call(
        name,
        case,
        ref_logprobs=case["ref_logprobs"],
        kl_coefficient=KL,
        importance_weights=case["importance_weights"],
    )
    loss_sum, denominator = loops(name, case)
    assert result.loss_sum.item() == pytest.approx(loss_sum, rel=1e-12)
    assert result.denominator.item() == denominator
    new, old, ref = (
        case[key].detach()[case["loss_mask"]].tolist() for key in ("logprobs", "old_logprobs", "ref_logprobs")
    )
    # KL(old || new) from tokens of the old policy, KL(new || ref) from tokens taken as the new policy's.
    kl_to_old = sum(math.exp(n - o) - (n - o) - 1 for n, o in zip(new, old, strict=True))
    kl_to_reference = sum(math.exp(r - n) - (r - n) - 1 for n, r in zip(new, ref, strict=True))
    assert result.metrics["kl_to_old"].item() == pytest.approx(kl_to_old, rel=1e-12)
    assert result.metrics["kl_to_reference"].item() == pytest.approx(kl_to_reference, rel=1e-12)
    assert result.metrics["tokens"].item() == sum(LENGTHS)
    assert result.metrics["sequences"].item() == len(LENGTHS)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradients_equal_finite_differences(name: str) -> None:
    """The seed leaves no ratio within 1e-3 of a kink, which the test checks, so differences are valid."""
    case = make_case(3)
    ratios = (case["logprobs"] - case["old_logprobs"]).detach().exp()[case["loss_mask"]]
    assert min((ratios - (1 - LOW)).abs().min(), (ratios - (1 + HIGH)).abs().min()) > 1e-3

    def loss(logprobs: Tensor) -> Tensor:
        changed = case | {"logprobs": logprobs}
        return call(name, changed, ref_logprobs=case["ref_logprobs"], kl_coefficient=KL).loss_sum

    assert torch.autograd.gradcheck(loss, (case["logprobs"],))


def test_first_update_is_the_plain_policy_gradient() -> None:
    """old = new: every ratio is 1 and d loss / d logprob = -A_i / |o_i| (GRPO, GSPO), -A_i (DAPO, Dr. GRPO)."""
    for name in ALL_LOSSES:
        case = make_case()
        case["old_logprobs"] = case["logprobs"].detach().clone()
        result = call(name, case)
        result.loss_sum.backward()
        per_token = -case["advantages"].unsqueeze(1) * case["loss_mask"]
        if name in ("grpo", "gspo"):
            per_token = per_token / torch.tensor(LENGTHS).unsqueeze(1)
        torch.testing.assert_close(case["logprobs"].grad, per_token, rtol=1e-12, atol=1e-12, msg=name)
        assert result.metrics["ratio"].item() == pytest.approx(sum(LENGTHS))
        assert result.metrics["kl_to_old"].item() == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient", "clipped"),
    [
        (1.5, 1.0, False, "clipped_high"),  # already raised enough
        (1.5, -1.0, True, None),  # raised although it is bad: push back
        (0.5, -1.0, False, "clipped_low"),  # already lowered enough
        (0.5, 1.0, True, None),  # lowered although it is good: push back
        (1.25, 1.0, True, None),  # inside: the upper bound is 1.28, not 1.2
        (0.75, -1.0, False, "clipped_low"),  # outside: the lower bound is 0.8, not 0.72
    ],
)
def test_clip_removes_the_gradient_on_the_right_side_only(
    ratio: float, advantage: float, has_gradient: bool, clipped: str | None
) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    batch = PolicyBatch(logprobs, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1))
    result = grpo_loss(batch, clip_low=LOW, clip_high=HIGH)
    result.loss_sum.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0)
    for name in ("clipped_low", "clipped_high"):
        assert result.metrics[name].item() == int(name == clipped)


def test_gspo_clips_whole_responses() -> None:
    """Token ratios e^0.5 and e^-0.5 are far outside GRPO's clip, but their geometric mean is 1."""
    logprobs = torch.tensor([[0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    batch = PolicyBatch(logprobs, torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2))
    gspo = gspo_loss(batch, **CLIP)
    assert gspo.loss_sum.item() == pytest.approx(-1.0)
    assert gspo.metrics["clipped_high"].item() == 0
    grpo = grpo_loss(batch, **CLIP)
    assert grpo.loss_sum.item() == pytest.approx(-(1 + HIGH + math.exp(-0.5)) / 2)
    assert grpo.metrics["clipped_high"].item() == 1


def test_how_each_normalisation_weighs_a_long_response() -> None:
    """First update, A = 1 for both, 1 and 3 tokens, budget 16: weight of one token of the long response."""
    expected = {"grpo": 1 / (2 * 3), "dr_grpo": 1 / (2 * 16), "dapo": 1 / 4, "gspo": 1 / (2 * 3)}
    for name, weight in expected.items():
        logprobs = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
        batch = PolicyBatch(logprobs, logprobs.detach(), torch.ones(2), mask)
        result = ALL_LOSSES[name](batch, **CLIP)
        (result.loss_sum / result.denominator).backward()
        assert logprobs.grad is not None
        assert logprobs.grad[1].tolist() == pytest.approx([-weight] * 3), name


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_sums_over_micro_batches_equal_the_whole_batch(name: str) -> None:
    case = make_case()
    whole = call(name, case)
    parts = [call(name, {key: value[rows] for key, value in case.items()}) for rows in (slice(0, 1), slice(1, 4))]
    assert sum(part.loss_sum for part in parts).item() == pytest.approx(whole.loss_sum.item(), rel=1e-12)
    assert sum(part.denominator for part in parts) == whole.denominator
    for metric, value in whole.metrics.items():
        assert sum(part.metrics[metric] for part in parts).item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_what_lies_outside_the_mask_does_not_matter(name: str) -> None:
    clean, dirty = make_case(), make_case()
    options = {"kl_coefficient": KL}
    with torch.no_grad():
        for key in ("logprobs", "old_logprobs", "ref_logprobs", "importance_weights"):
            dirty[key][~dirty["loss_mask"]] = float("nan")
    results = []
    for case in (clean, dirty):
        result = call(
            name,
            case,
            ref_logprobs=case["ref_logprobs"],
            importance_weights=case["importance_weights"],
            **options,
        )
        result.loss_sum.backward()
        results.append(result)
    assert results[0].loss_sum.item() == results[1].loss_sum.item()
    assert results[0].metrics == results[1].metrics
    assert torch.equal(clean["logprobs"].grad, dirty["logprobs"].grad)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_a_response_masked_out_counts_nowhere(name: str) -> None:
    case = make_case()
    kept = call(name, {key: value[:3] for key, value in case.items()})
    masked = case | {"loss_mask": case["loss_mask"].clone()}
    masked["loss_mask"][3] = False
    result = call(name, masked)
    assert result.loss_sum.item() == pytest.approx(kept.loss_sum.item(), rel=1e-12)
    assert result.denominator == kept.denominator


def test_huge_ratio_stays_finite() -> None:
    logprobs = torch.tensor([[200.0, -200.0]], requires_grad=True)
    reference = -logprobs.detach()
    batch = PolicyBatch(logprobs, torch.zeros(1, 2), torch.tensor([-1.0]), torch.ones(1, 2), ref_logprobs=reference)
    result = grpo_loss(batch, **CLIP, kl_coefficient=1.0)
    result.loss_sum.backward()
    assert torch.isfinite(result.loss_sum)
    assert logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all()


# --- advantages ----------------------------------------------------------------------------------------------


def test_group_advantages_equal_the_statistics_module() -> None:
    rewards = [1.0, -1.0, 0.5, 1.0, 1.0, -1.0, 0.25]
    groups = [7, 3, 7, 7, 3, 3, 7]
    by_group = {g: [r for r, h in zip(rewards, groups, strict=True) if h == g] for g in set(groups)}
    actual = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    centered = centered_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups))
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        mean, deviation = statistics.mean(by_group[group]), statistics.stdev(by_group[group])
        assert centered[i].item() == pytest.approx(reward - mean, rel=1e-12)
        assert actual[i].item() == pytest.approx((reward - mean) / (deviation + ADVANTAGE_EPSILON), rel=1e-12)


def test_group_of_two_by_hand() -> None:
    """+1 and -1: mean 0, sample deviation sqrt(2), advantages +-1 / (sqrt 2 + 1e-4)."""
    expected = 1 / (math.sqrt(2) + 1e-4)
    actual = group_advantages(torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0, 0]))
    assert actual.tolist() == pytest.approx([expected, -expected], rel=1e-12)


@pytest.mark.parametrize("reward", [0.1, -1.0, 1 / 3, 1e6])
def test_equal_rewards_and_lone_responses_teach_exactly_nothing(reward: float) -> None:
    rewards, groups = torch.full((4,), reward), torch.tensor([0, 0, 0, 9])
    assert group_advantages(rewards, groups).tolist() == [0.0] * 4
    assert centered_advantages(rewards, groups).tolist() == [0.0] * 4


# --- importance weights and KL -------------------------------------------------------------------------------


def test_truncated_importance_weights_by_hand() -> None:
    trainer = torch.tensor([[0.5, 0.9, 0.2]]).log().requires_grad_()
    sampler = torch.tensor([[0.25, 0.1, 0.4]]).log()
    weights = truncated_importance_weights(trainer, sampler, cap=3.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 3.0, 0.5]]))
    assert not weights.requires_grad


def test_k3_is_unbiased_and_never_negative() -> None:
    """E_pi[k3] = sum pi (ref/pi - 1 - log(ref/pi)) = 0 + KL(pi || ref), computed exactly over four outcomes."""
    policy = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.1, 0.25, 0.25], dtype=torch.float64)
    estimates = k3_kl(policy.log(), reference.log())
    exact = sum(float(p) * math.log(float(p / q)) for p, q in zip(policy, reference, strict=True))
    assert (policy * estimates).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (estimates >= 0).all()


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        ({"advantages": torch.ones(3)}, {}, "advantages"),
        ({"old_logprobs": torch.ones(4, 2)}, {}, "old_logprobs"),
        ({"loss_mask": torch.ones(4)}, {}, "loss_mask"),
        ({}, {"clip_low": 1.0}, "clip_low 1.0"),
        ({}, {"clip_high": -0.1}, "clip_high -0.1"),
        ({}, {"kl_coefficient": 0.1}, "kl_coefficient 0.1"),
        ({}, {"kl_coefficient": float("nan")}, "kl_coefficient nan"),
        ({}, {"importance_weights": torch.ones(4, 1)}, "importance_weights"),
    ],
)
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_bad_input_is_one_clear_error(
    name: str, change: dict[str, Tensor], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError) as caught:
        call(name, make_case() | change, **options)
    assert named in str(caught.value)


def test_bad_scalars_are_refused() -> None:
    case = make_case()
    with pytest.raises(UserError, match="max_new_tokens"):
        call("dr_grpo", case, max_new_tokens=0)
    with pytest.raises(UserError, match="cap"):
        truncated_importance_weights(case["logprobs"], case["old_logprobs"], cap=0.0)
    with pytest.raises(UserError, match="groups"):
        group_advantages(torch.ones(3), torch.ones(2))
