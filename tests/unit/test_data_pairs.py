"""Preference pairs of one question: near misses by their definition, random ones by their seed, nothing lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimr_nemo.data.fate import Fate
from phimr_nemo.data.pairs import Response, common_beginning, common_steps, length_ratio, pair_up, steps

OPTIONS: dict[str, Any] = {
    "mode": "near_miss",
    "nearness": "common_steps",
    "max_per_problem": 2,
    "max_length_ratio": None,
    "seed": 0,
}


def responses(side: str, texts: list[str]) -> list[Response]:
    return [Response(f"{side}{number}", text) for number, text in enumerate(texts)]


def test_steps_are_lines_and_sentences_without_case_and_spaces() -> None:
    text = "First,  x = 2. Then X = 3!\n\n  first, X = 2.\nSo 2.5; done"
    assert steps(text) == {"first, x = 2.", "then x = 3!", "so 2.5;", "done"}
    assert common_steps(steps("a\nb\nc"), steps("c\nb\nd")) == 2 / 4
    assert common_steps(steps("a"), steps("b")) == 0
    assert common_steps(steps(""), steps("\n")) == 1


def test_beginnings() -> None:
    assert common_beginning("abcd", "abxyz") == 2 / 5
    assert common_beginning("abc", "abc") == 1
    assert common_beginning("abc", "abcdef") == 3 / 6
    assert common_beginning("", "") == 0


def test_a_near_miss_has_the_same_steps_wherever_they_stand() -> None:
    right = responses("r", ["Let x = 2.\nSquare it: 4.\nAdd one: 5.", "By induction.\nSo 5."])
    wrong = responses("w", ["Guess: 7.", "Hm.\nSquare it: 4.\nLet x = 2.\nAdd two: 6.", "So 5.\nBy parity.\nSo 6."])
    pairs, fates = pair_up(right, wrong, **OPTIONS)
    assert [(chosen.id, rejected.id) for chosen, rejected in pairs] == [("r0", "w1"), ("r1", "w2")]
    assert fates == {"r0": Fate.KEPT, "w1": Fate.KEPT, "r1": Fate.KEPT, "w2": Fate.KEPT, "w0": Fate.NO_PARTNER}


def test_of_equally_near_pairs_the_more_similar_length_wins() -> None:
    pairs, _ = pair_up(responses("r", ["a" * 10]), responses("w", ["b" * 30, "c" * 12, "d" * 5]), **OPTIONS)
    assert [rejected.id for _, rejected in pairs] == ["w1"]


def test_by_beginning_the_pair_that_parts_last_is_nearest() -> None:
    right, wrong = responses("r", ["2+2=4, so 4", "hm, 4"]), responses("w", ["hm, what", "no idea", "2+2=4, so 5"])
    pairs, _ = pair_up(right, wrong, **{**OPTIONS, "nearness": "common_beginning"})
    assert [(chosen.text, rejected.text) for chosen, rejected in pairs] == [
        ("2+2=4, so 4", "2+2=4, so 5"),
        ("hm, 4", "hm, what"),
    ]


def test_lengths_can_be_matched() -> None:
    right, wrong = responses("r", ["x" * 10]), responses("w", ["y" * 21, "z" * 20])
    pairs, fates = pair_up(right, wrong, **{**OPTIONS, "max_length_ratio": 2.0})
    assert [(chosen.id, rejected.id) for chosen, rejected in pairs] == [("r0", "w1")]
    assert fates["w0"] == Fate.UNLIKE_LENGTHS
    assert length_ratio(right[0], wrong[0]) == length_ratio(wrong[0], right[0]) == 2.1


@pytest.mark.parametrize("mode", ["random", "delta"])
def test_drawn_pairs_depend_on_the_seed_alone(mode: str) -> None:
    right = responses("r", [f"right {i}" for i in range(6)])
    wrong = responses("w", [f"wrong {i}" for i in range(6)])
    drawn = [pair_up(right, wrong, **{**OPTIONS, "mode": mode, "seed": seed})[0] for seed in range(12)]
    assert drawn[3] == pair_up(right, wrong, **{**OPTIONS, "mode": mode, "seed": 3})[0]
    assert len({pairs[0] for pairs in drawn}) > 1


def test_a_text_is_never_both_sides_of_a_pair() -> None:
    """Two models may say the same; then the other of each is paired, and what is left says why."""
    strong, weak = responses("s", ["same", "better"]), responses("w", ["same", "worse"])
    for seed in range(8):
        pairs, _ = pair_up(strong, weak, **{**OPTIONS, "mode": "delta", "seed": seed})
        assert all(one.text != other.text for one, other in pairs)
    pairs, fates = pair_up(strong[:1], weak[:1], **{**OPTIONS, "mode": "delta"})
    assert pairs == []
    assert fates == {"s0": Fate.NO_PARTNER, "w0": Fate.NO_PARTNER}


TEXTS = st.lists(st.text("ab\n. ", min_size=1, max_size=12), max_size=5, unique=True)
RATIOS = st.sampled_from([None, 1.0, 2.0])


@settings(deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["near_miss", "random", "delta"]), RATIOS, st.integers(1, 3), st.booleans())
def test_every_response_has_one_fate_and_is_used_once(
    good: list[str], bad: list[str], mode: str, ratio: float | None, most: int, by_steps: bool
) -> None:
    right, wrong = responses("r", good), responses("w", bad)
    nearness = "common_steps" if by_steps else "common_beginning"
    options = {**OPTIONS, "mode": mode, "nearness": nearness, "max_length_ratio": ratio, "max_per_problem": most}
    pairs, fates = pair_up(right, wrong, **options)
    assert set(fates) == {response.id for response in (*right, *wrong)}
    used = [response.id for pair in pairs for response in pair]
    assert sorted(used) == sorted(name for name, fate in fates.items() if fate == Fate.KEPT)
    assert len(set(used)) == len(used)
    assert len(pairs) <= most
    fitting = [
        (one, other)
        for one, other in itertools.product(right, wrong)
        if one.text != other.text and (ratio is None or length_ratio(one, other) <= ratio)
    ]
    assert set(pairs) <= set(fitting)
    partners = {response.id for pair in fitting for response in pair}
    partners |= {response.id for response in (*right, *wrong) if response.text in set(good) & set(bad)}
    assert {name for name, fate in fates.items() if fate == Fate.UNLIKE_LENGTHS} == set(fates) - partners
    # Greedy and complete: nothing that fits is left over while there is room.
    if len(pairs) < most:
        assert all(a.id in used or b.id in used for a, b in fitting)
    if mode == "near_miss" and fitting:
        measure = {
            (a, b): common_steps(steps(a.text), steps(b.text)) if by_steps else common_beginning(a.text, b.text)
            for a, b in fitting
        }
        assert measure[pairs[0]] == pytest.approx(max(measure.values()))
