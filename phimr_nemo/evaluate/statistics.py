"""Scores with their uncertainty, as pure functions of graded samples.

The unit of sampling is the question: responses to one question are correlated, so errors are clustered by
question (Miller 2024, arXiv 2411.00640) and differences between models are paired by question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Difference",
    "majority_at_k",
    "mean_and_clustered_error",
    "mean_and_error",
    "paired_bootstrap",
    "pass_at_k",
]

BOOTSTRAP_CHUNK: Final = 1_000


def mean_and_clustered_error(samples: Mapping[str, Sequence[bool]]) -> tuple[float, float]:
    """pass@1 and its standard error, clustered by question.

    With x_qi in {0, 1}, N samples and Q questions::

        mean = sum_qi x_qi / N
        error = sqrt(Q / (Q - 1) * sum_q (sum_i (x_qi - mean))^2) / N

    which for equally many samples per question is the ordinary standard error of the questions' accuracies.

    Args:
        samples: question -> whether each of its samples is correct; at least one each.

    Returns:
        Mean, and standard error; the error is NaN for a single question, which tells nothing about others.

    Raises:
        ValueError: no question, or a question without samples.

    >>> mean, error = mean_and_clustered_error({"q1": [True, True], "q2": [False, True], "q3": [False, False]})
    >>> f"{mean:.3f} {error:.3f}"
    '0.500 0.289'
    """
    _check(samples)
    total = sum(len(values) for values in samples.values())
    mean = sum(sum(values) for values in samples.values()) / total
    questions = len(samples)
    if questions == 1:
        return mean, math.nan
    squares = sum((sum(values) - mean * len(values)) ** 2 for values in samples.values())
    return mean, math.sqrt(questions / (questions - 1) * squares) / total


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374).

    Args:
        samples: n, samples of the question.
        correct: c, the correct ones among them.
        k: how many are drawn, 1..n.

    Raises:
        ValueError: k is not in 1..n or c not in 0..n.

    >>> pass_at_k(samples=4, correct=1, k=2)
    0.5
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {correct} correct")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str], correct: Sequence[bool], samples: Sequence[int]) -> dict[int, float]:
    """maj@k: whether the most frequent answer among k samples drawn without replacement is correct, in expectation.

    All samples graded correct are one answer, however they are written; wrong ones are told apart by their text; a
    sample with no answer ("" and not correct) has no vote; at a tie of m answers the correct one has 1/m.

    With c correct votes and wrong answers of n_1, n_2, ... votes, it wins a draw of k with v votes when no wrong one
    has more, and shares it with the t that have v as well::

        maj@k = sum_v C(c, v) sum_t [x^(k - v) y^t] (1 + x)^silent prod_j P_j(x, y) / (t + 1) / C(n, k)
        P_j(x, y) = sum_{i < v} C(n_j, i) x^i + y C(n_j, v) x^v

    Args:
        answers: the extracted answer of each of the n samples.
        correct: whether it was graded correct.
        samples: the values of k, each 1..n.

    Returns:
        k -> maj@k.

    Raises:
        ValueError: a k is not in 1..n.

    >>> majority_at_k(["4", "4", "5"], [True, True, False], samples=[1, 3])
    {1: 0.6666666666666666, 3: 1.0}
    """
    total = len(answers)
    if not all(1 <= k <= total for k in samples):
        raise ValueError(f"maj@{list(samples)} of {total} samples")
    right = sum(correct)
    wrong = Counter(answer for answer, is_correct in zip(answers, correct, strict=True) if answer and not is_correct)
    silent = total - right - wrong.total()
    most = max(samples)
    won = np.zeros(most + 1)
    for votes in range(1, min(right, most) + 1):
        ways = _ways_to_draw_no_more(list(wrong.values()), silent, votes, most)
        shared = (ways / np.arange(1, len(ways) + 1)[:, None]).sum(axis=0)
        won[votes:] += math.comb(right, votes) * shared[: most + 1 - votes]
    return {k: float(won[k] / math.comb(total, k)) for k in samples}


def _ways_to_draw_no_more(counts: Sequence[int], silent: int, votes: int, most: int) -> npt.NDArray[np.float64]:
    """In how many ways m wrong and silent samples are drawn with no answer above `votes`: [answers at `votes`, m]."""
    ways = np.zeros((most // votes + 1, most + 1))
    ways[0] = [math.comb(silent, drawn) for drawn in range(most + 1)]
    for count in counts:
        product = np.zeros_like(ways)
        for drawn in range(min(count, votes - 1, most) + 1):
            product[:, drawn:] += math.comb(count, drawn) * ways[:, : most + 1 - drawn]
        if votes <= min(count, most):
            # More than most // votes answers at `votes` do not fit into a draw.
            product[1:, votes:] += math.comb(count, votes) * ways[:-1, : most + 1 - votes]
        ways = product
    return ways


@dataclass(frozen=True)
class Difference:
    """Model B's mean accuracy minus model A's on the same questions.

    Attributes:
        mean: the difference.
        low, high: percentile bootstrap interval.
        stderr: standard deviation of the bootstrap means.
    """

    mean: float
    low: float
    high: float
    stderr: float


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int, confidence: float, seed: int
) -> Difference:
    """Bootstrap the difference of two models over questions, pairs kept together.

    Args:
        first: model A's accuracy on each question.
        second: model B's on the same questions.
        resamples: bootstrap samples.
        confidence: mass of the interval, such as 0.95.
        seed: of the resampling.

    Raises:
        ValueError: no questions, unequal counts, or a confidence outside (0, 1).

    >>> paired_bootstrap([1.0, 0.5, 0.0], [1.0, 1.0, 0.5], resamples=1000, confidence=0.95, seed=0).mean
    0.3333333333333333
    """
    if not first or len(first) != len(second) or not 0.0 < confidence < 1.0:
        raise ValueError(f"{len(first)} and {len(second)} questions at confidence {confidence}")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    generator = np.random.Generator(np.random.Philox(key=seed))
    means = []
    for start in range(0, resamples, BOOTSTRAP_CHUNK):
        shape = (min(BOOTSTRAP_CHUNK, resamples - start), len(differences))
        means.append(differences[generator.integers(len(differences), size=shape)].mean(axis=1))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(differences.mean()), float(low), float(high), float(drawn.std()))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of independent values, such as one score per seed; the error of one value is NaN.

    Raises:
        ValueError: there are no values.

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896257)
    """
    if not values:
        raise ValueError("the mean of no values")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _check(samples: Mapping[str, Sequence[bool]]) -> None:
    if not samples or not all(len(values) for values in samples.values()):
        raise ValueError("a score needs at least one question, and a sample of each")
