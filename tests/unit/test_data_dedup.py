"""Duplicates against a brute force, the choice of the kept row, and determinism."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.config import NearDuplicatesConfig
from phimr_nemo.data.prepare.candidates import digest
from phimr_nemo.data.prepare.dedup import (
    EXACT,
    EXACT_OTHER_ANSWER,
    KEPT,
    NEAR,
    SHINGLE_TOKENS,
    Candidates,
    Duplicates,
    Signer,
    band_keys,
    band_names,
    find_duplicates,
    first_row,
)
from phimr_nemo.data.prepare.narrow import narrow_schema
from phimr_nemo.data.sources.normalise import comparison_tokens, numbers

PERMUTATIONS = 250
PIECE = 3
NEAR_CONFIG = NearDuplicatesConfig(threshold=0.7, permutations=PERMUTATIONS)
WORDS = (
    "farmer",
    "boat",
    "triangle",
    "circle",
    "apples",
    "tank",
    "train",
    "coin",
    "ladder",
    "prime",
    "sum",
    "area",
    "speed",
    "water",
    "rope",
    "garden",
)


def written(
    directory: Path, questions: list[str], answers: list[str] | None = None, ranks: list[int] | None = None
) -> Candidates:
    """The narrow columns of questions, in pieces of three."""
    signer = Signer(PERMUTATIONS)
    files, starts = [], [0]
    for piece, start in enumerate(range(0, len(questions), PIECE)):
        rows = []
        for place in range(start, min(start + PIECE, len(questions))):
            tokens = comparison_tokens(questions[place])
            signature = signer.sign(tokens)
            told = {"numbers": digest(" ".join(numbers(tokens))), "answer": digest((answers or ["a"] * 99)[place])}
            keys = band_keys(**told, signature=signature)
            rows.append(
                {
                    "row": first_row(piece) + place - start,
                    **dict.fromkeys(("question", "bare"), digest(" ".join(tokens))),
                    **told,
                    "rank": (ranks or [0] * 99)[place],
                    "signature": signature.astype("<u4").tobytes(),
                    **dict(zip(band_names(len(keys)), keys.tolist(), strict=True)),
                }
            )
        files.append(directory / f"narrow-{piece}.parquet")
        pq.write_table(pa.Table.from_pylist(rows, schema=narrow_schema(PERMUTATIONS)), files[-1])
        starts.append(starts[-1] + len(rows))
    return Candidates(files, np.array(starts))


def decide(
    questions: list[str],
    answers: list[str] | None = None,
    ranks: list[int] | None = None,
    near: NearDuplicatesConfig | None = NEAR_CONFIG,
) -> Duplicates:
    with tempfile.TemporaryDirectory() as directory:
        return find_duplicates(written(Path(directory), questions, answers, ranks), near)


def jaccard(one: str, other: str) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        tokens = comparison_tokens(text)
        return {tuple(tokens[i : i + SHINGLE_TOKENS]) for i in range(max(1, len(tokens) - SHINGLE_TOKENS + 1))}

    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


BASE = "A farmer fills a tank with 30 litres of water and his boat carries 12 apples along the garden rope today."


def test_exact_duplicates_differ_only_in_what_does_not_count() -> None:
    found = decide(["Find $x^{2}$.", "What is 3?", "find x^2", "find  \\(x^2\\)"], ["4", "3", "4", "5"])
    assert found.kept.tolist() == [0, 1, 0, 0]
    assert found.reason.tolist() == [KEPT, KEPT, EXACT, EXACT_OTHER_ANSWER]


def test_a_near_duplicate_needs_the_same_numbers_and_the_same_answer() -> None:
    one_word = BASE.replace("garden", "yard")
    assert jaccard(BASE, one_word) > 0.7
    assert decide([BASE, one_word]).reason.tolist() == [KEPT, NEAR]
    assert decide([BASE, BASE.replace("30", "31")]).reason.tolist() == [KEPT, KEPT]
    assert decide([BASE, one_word], ["4", "5"]).reason.tolist() == [KEPT, KEPT]


def test_a_question_whose_only_number_is_its_answer() -> None:
    """Digests of number and answer are then equal; a hash in which they cancel would take 15 for 17."""
    question = "Let a and b be nonnegative reals such that sin(ax + b) = sin 15x for all integers. Find the least a."
    found = decide([question, question.replace("15", "17")], ["15", "17"])
    assert found.reason.tolist() == [KEPT, KEPT]


def test_the_most_informative_row_is_kept_then_the_earliest() -> None:
    questions = [BASE, BASE.upper(), BASE.replace("garden", "yard"), BASE + " "]
    assert decide(questions, ranks=[0, 3, 5, 3]).kept.tolist() == [2, 2, 2, 2]
    assert decide(questions, ranks=[1, 1, 1, 1]).kept.tolist() == [0, 0, 0, 0]


def test_no_chain_of_near_duplicates() -> None:
    """b is near a and c is near b, but c is not near a: b is dropped for a, so c stays."""
    a = " ".join(f"w{chr(97 + index)}" for index in range(26))
    b = a.replace("wc", "xc")
    c = b.replace("wr", "xr").replace("wx", "xx")
    assert jaccard(a, b) > 0.75
    assert jaccard(a, c) < 0.6
    assert jaccard(b, c) > 0.55
    found = decide([a, b, c], near=NearDuplicatesConfig(threshold=0.55, permutations=PERMUTATIONS))
    assert found.kept[1] == 0
    for index, kept in enumerate(found.kept.tolist()):
        assert found.kept[kept] == kept
        if index != kept:
            assert jaccard([a, b, c][index], [a, b, c][kept]) > 0.4


def mutated(rng: random.Random) -> list[str]:
    questions: list[str] = []
    for _ in range(60):
        if questions and rng.random() < 0.5:
            words = rng.choice(questions).split()
            for _ in range(rng.randrange(4)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        else:
            words = [rng.choice(WORDS) for _ in range(40)]
        questions.append(" ".join(words))
    return questions


@pytest.mark.parametrize("seed", range(8))
def test_near_duplicates_equal_a_brute_force_away_from_the_threshold(seed: int) -> None:
    questions = mutated(random.Random(seed))
    found = decide(questions)
    kept = [index for index in range(len(questions)) if found.reason[index] == KEPT]
    # The estimate's standard deviation is below 0.03, so 0.12 to either side is sure.
    for position, index in enumerate(kept):
        assert all(jaccard(questions[index], questions[other]) < 0.82 for other in kept[:position])
    for index in range(len(questions)):
        if found.reason[index] == NEAR:
            assert jaccard(questions[index], questions[found.kept[index]]) > 0.58
            assert found.reason[found.kept[index]] == KEPT


def test_the_brute_force_sees_a_planted_miss() -> None:
    questions = mutated(random.Random(0))
    assert max(jaccard(a, b) for i, a in enumerate(questions) for b in questions[:i]) > 0.82


def test_signatures_estimate_jaccard_and_are_the_same_every_time() -> None:
    signer = Signer(PERMUTATIONS)
    other = BASE.replace("boat", "ship")
    one, two = signer.sign(comparison_tokens(BASE)), Signer(PERMUTATIONS).sign(comparison_tokens(other))
    assert (one == two).mean() == pytest.approx(jaccard(BASE, other), abs=0.1)
    assert np.array_equal(one, Signer(PERMUTATIONS).sign(comparison_tokens(BASE)))
    assert signer.sign(["x"]).shape == (PERMUTATIONS,)


def test_without_near_duplicates_only_exact_ones_are_found() -> None:
    questions = [BASE, BASE.replace("garden", "yard"), BASE]
    assert decide(questions, near=None).reason.tolist() == [KEPT, KEPT, EXACT]


def chosen_one_by_one(questions: list[str], ranks: list[int], threshold: float) -> list[int]:
    """The rule as it reads, over all pairs: each question from the best on goes to the most similar kept one."""
    signatures = [Signer(PERMUTATIONS).sign(comparison_tokens(question)) for question in questions]
    kept: dict[int, int] = {}
    for worse in sorted(range(len(questions)), key=lambda index: (-ranks[index], index)):
        found = [
            (float((signatures[worse] == signatures[one]).mean()), ranks[one], -one)
            for one in kept
            if kept[one] == one
        ]
        best = max((one for one in found if one[0] >= threshold), default=None)
        kept[worse] = worse if best is None else -best[2]
    return [kept[index] for index in range(len(questions))]


@pytest.mark.parametrize("rows", [4, 1 << 17])
def test_the_sort_out_of_core_decides_as_one_loop_does(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0.8 a pair of near duplicates meets in a band but once in 10,000."""
    monkeypatch.setattr("phimr_nemo.data.outofcore.GROUP_ROWS", rows)
    questions = list(dict.fromkeys(mutated(random.Random(99))))
    ranks = [index * 7 % 5 for index in range(len(questions))]
    found = decide(questions, ranks=ranks, near=NearDuplicatesConfig(threshold=0.8, permutations=PERMUTATIONS))
    assert found.kept.tolist() == chosen_one_by_one(questions, ranks, 0.8)
    assert (found.reason == NEAR).sum() > 3
    assert found.kept.tolist() != chosen_one_by_one(questions, [0] * len(ranks), 0.8)
