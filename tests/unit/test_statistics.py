"""Each statistic against enumeration or its direct formula."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from phimr_nemo.evaluate.statistics import (
    majority_at_k,
    mean_and_clustered_error,
    mean_and_error,
    paired_bootstrap,
    pass_at_k,
)


def majority_score(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer of these samples is correct, counted out; what maj@k is the expectation of.

    All samples graded correct count as one answer, however they are written; wrong ones are told apart by
    their text; a sample with no answer ("" and not correct) has no vote.

    Args:
        answers: the extracted answer of each sample.
        correct: whether it was graded correct.

    Returns:
        1, 0, or at a tie of m answers 1/m if the correct one is among them. 0 when nobody votes.
    """
    votes: Counter[tuple[bool, str]] = Counter()
    for answer, is_correct in zip(answers, correct, strict=True):
        if is_correct:
            votes[(True, "")] += 1
        elif answer:
            votes[(False, answer)] += 1
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [vote for vote, count in votes.items() if count == most]
    return sum(is_correct for is_correct, _ in winners) / len(winners)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_equals_enumeration(samples: int) -> None:
    for correct in range(samples + 1):
        outcomes = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(outcomes, k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_impossible_pass_at_k_is_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, correct, k)


def random_samples(counts: list[int], seed: int) -> dict[str, list[bool]]:
    rng = random.Random(seed)
    return {f"q{q}": [rng.random() < (q + 1) / 10 for _ in range(n)] for q, n in enumerate(counts)}


def test_clustered_error_equals_the_error_of_question_means_at_equal_counts() -> None:
    samples = random_samples([8] * 9, seed=1)
    means = np.array([np.mean(values) for values in samples.values()])
    mean, error = mean_and_clustered_error(samples)
    assert mean == pytest.approx(means.mean())
    assert error == pytest.approx(means.std(ddof=1) / math.sqrt(9))


def test_clustered_error_equals_the_pairwise_formula_at_unequal_counts() -> None:
    """Miller's form: independent variance plus the covariance of every pair within a question."""
    samples = random_samples([3, 8, 1, 5, 12], seed=2)
    flat = np.array([x for values in samples.values() for x in values], dtype=float)
    cluster = np.array([q for q, values in enumerate(samples.values()) for _ in values])
    residuals = flat - flat.mean()
    same = cluster[:, None] == cluster[None, :]
    variance = (np.outer(residuals, residuals) * same).sum() / len(flat) ** 2 * 5 / 4
    mean, error = mean_and_clustered_error(samples)
    assert mean == pytest.approx(flat.mean())
    assert error == pytest.approx(math.sqrt(variance))


def test_repeating_a_sample_does_not_shrink_the_error() -> None:
    """Planted fault for unclustered errors: 16 identical samples of a question are worth one."""
    once = {f"q{q}": [q % 3 == 0] for q in range(12)}
    repeated = {question: values * 16 for question, values in once.items()}
    assert mean_and_clustered_error(repeated) == pytest.approx(mean_and_clustered_error(once))
    unclustered = math.sqrt((1 / 3) * (2 / 3) / (12 * 16))
    assert mean_and_clustered_error(repeated)[1] > 3 * unclustered


def test_one_question_has_no_error() -> None:
    mean, error = mean_and_clustered_error({"q": [True, False, False, False]})
    assert mean == 0.25
    assert math.isnan(error)


@pytest.mark.parametrize("samples", [{}, {"q": [True], "r": []}])
def test_a_score_of_nothing_is_refused(samples: dict[str, list[bool]]) -> None:
    with pytest.raises(ValueError, match="at least one question"):
        mean_and_clustered_error(samples)


@pytest.mark.parametrize(
    ("answers", "correct", "wanted"),
    [
        (["7", "7", "8"], [False, False, True], 0.0),
        (["1/2", "0.5", "3", "3", "4"], [True, True, False, False, False], 0.5),
        (["1/2", "0.5", "\\frac12", "3", "3"], [True, True, True, False, False], 1.0),
        (["", "", "", "5"], [False, False, False, True], 1.0),
        (["", ""], [False, False], 0.0),
        (["1", "2", "3"], [True, False, False], 1 / 3),
        (["1", "2", "3"], [False, False, False], 0.0),
    ],
)
def test_majority(answers: list[str], correct: list[bool], wanted: float) -> None:
    assert majority_score(answers, correct) == pytest.approx(wanted)


def test_majority_does_not_depend_on_the_order() -> None:
    answers, correct = ["a", "b", "b", "c", "c"], [False, True, True, False, False]
    for order in itertools.permutations(range(5)):
        assert majority_score([answers[i] for i in order], [correct[i] for i in order]) == 0.5


def test_paired_bootstrap_equals_the_enumerated_bootstrap_distribution() -> None:
    """With 4 questions there are 4^4 equally likely resamples; their mean and quantiles are exact."""
    first, second = [0.0, 0.25, 0.5, 1.0], [0.5, 0.25, 1.0, 0.75]
    differences = np.array(second) - np.array(first)
    every = np.array([differences[list(i)].mean() for i in itertools.product(range(4), repeat=4)])
    got = paired_bootstrap(first, second, resamples=20_500, confidence=0.8, seed=3)
    assert got.mean == pytest.approx(differences.mean())
    # Five standard errors of the estimated spread, whose relative error is at most about 1/sqrt(2 n).
    assert got.stderr == pytest.approx(every.std(), rel=5 / math.sqrt(2 * 20_500))
    assert got.low == pytest.approx(np.quantile(every, 0.1), abs=1e-12)
    assert got.high == pytest.approx(np.quantile(every, 0.9), abs=1e-12)


def test_pairing_removes_what_the_questions_share() -> None:
    hard_and_easy = [0.0] * 50 + [1.0] * 50
    better = [min(1.0, value + 0.1) for value in hard_and_easy]
    got = paired_bootstrap(hard_and_easy, better, resamples=2_000, confidence=0.95, seed=0)
    assert got.mean == pytest.approx(0.05)
    # Differences are 0.1 or 0 in equal parts: spread 0.05 / sqrt(100), not that of the accuracies, 0.05.
    assert got.stderr == pytest.approx(0.005, rel=0.1)
    assert got.low > 0


def test_paired_bootstrap_is_reproducible_and_antisymmetric() -> None:
    first, second = [0.1, 0.9, 0.4], [0.3, 0.5, 0.8]
    there = paired_bootstrap(first, second, resamples=500, confidence=0.9, seed=4)
    assert there == paired_bootstrap(first, second, resamples=500, confidence=0.9, seed=4)
    back = paired_bootstrap(second, first, resamples=500, confidence=0.9, seed=4)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))


@pytest.mark.parametrize(
    ("first", "second", "confidence"), [([], [], 0.9), ([1.0], [1.0, 0.0], 0.9), ([1.0], [0.0], 1.0)]
)
def test_unpaired_input_is_refused(first: list[float], second: list[float], confidence: float) -> None:
    with pytest.raises(ValueError, match="questions at confidence"):
        paired_bootstrap(first, second, resamples=10, confidence=confidence, seed=0)


def test_mean_and_error_over_seeds() -> None:
    mean, error = mean_and_error([0.2, 0.5, 0.8])
    assert (mean, error) == pytest.approx((0.5, 0.3 / math.sqrt(3)))
    assert math.isnan(mean_and_error([0.5])[1])
    with pytest.raises(ValueError, match="no values"):
        mean_and_error([])


@pytest.mark.parametrize("seed", range(12))
def test_majority_at_k_equals_enumeration(seed: int) -> None:
    """Every draw of k scored by itself; few kinds of answers, so that ties are frequent."""
    rng = random.Random(seed)
    answers = [rng.choice(["", "5", "6", "7"]) for _ in range(rng.randint(1, 9))]
    correct = [answer == "5" or rng.random() < 0.1 for answer in answers]
    sizes = list(range(1, len(answers) + 1))
    got = majority_at_k(answers, correct, sizes)
    for k in sizes:
        draws = list(itertools.combinations(range(len(answers)), k))
        each = [majority_score([answers[i] for i in draw], [correct[i] for i in draw]) for draw in draws]
        assert got[k] == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_majority_of_many_samples_is_exact_at_both_ends() -> None:
    """64 samples: maj@1 is the accuracy, maj@64 the vote of all."""
    rng = random.Random(1)
    answers = [str(rng.choice([1, 1, 2, 3, 4])) for _ in range(64)]
    correct = [answer == "1" for answer in answers]
    got = majority_at_k(answers, correct, [1, 16, 64])
    assert got[1] == pytest.approx(sum(correct) / 64, rel=1e-12)
    assert got[64] == pytest.approx(majority_score(answers, correct))
    assert got[1] < got[16] <= 1.0


@pytest.mark.parametrize("k", [0, 3])
def test_an_impossible_majority_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="maj@"):
        majority_at_k(["1", "2"], [True, False], [k])
