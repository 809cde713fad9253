"""The repetition measure against a brute force over all pairs of grams, and on loops of every kind."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from phimr_nemo.data import repetition as module
from phimr_nemo.data.repetition import GRAM_TOKENS, MAX_CHARS, REPETITIVE_ABOVE, repetition


def brute_force(text: str, size: int = GRAM_TOKENS) -> float:
    """The definition, written down: every pair of equal grams marks the tokens of the later one."""
    tokens = re.findall(r"[A-Za-z]{1,16}|\S", text)
    repeated = [False] * len(tokens)
    for later in range(len(tokens) - size + 1):
        for earlier in range(later):
            if tokens[earlier : earlier + size] == tokens[later : later + size]:
                repeated[later : later + size] = [True] * size
    total = sum(map(len, tokens))
    return sum(len(token) for token, mark in zip(tokens, repeated, strict=True) if mark) / total if total else 0.0


def random_text(rng: random.Random) -> str:
    """Words with planted repeats: pieces of the text so far are copied into it."""
    words: list[str] = []
    for _ in range(rng.randrange(1, 12)):
        if words and rng.random() < 0.5:
            start = rng.randrange(len(words))
            words += words[start : start + rng.randrange(60)]
        else:
            words += [rng.choice(["so", "we", "get", "x^2", "= 7,", "\\frac{1}{2}", "等"]) for _ in range(30)]
    return " ".join(words)


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_brute_force(seed: int) -> None:
    text = random_text(random.Random(seed))
    assert repetition(text) == pytest.approx(brute_force(text), abs=1e-12)


def test_a_planted_fault_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    almost_a_gram = " ".join(f"w{chr(97 + index)}" for index in range(GRAM_TOKENS - 1))
    text = f"{almost_a_gram} first {almost_a_gram} second"
    assert repetition(text) == brute_force(text) == 0.0
    monkeypatch.setattr(module, "GRAM_TOKENS", GRAM_TOKENS - 1)
    assert repetition(text) != pytest.approx(brute_force(text), abs=1e-12)


@pytest.mark.parametrize("copies", [2, 5, 50])
def test_copies_of_a_passage_count_all_but_once(copies: int) -> None:
    rng = random.Random(0)
    passage = " ".join(f"{rng.choice('abcdefgh')}{index:03d}" for index in range(40))
    assert repetition("\n".join([passage] * copies)) == pytest.approx((copies - 1) / copies)


@pytest.mark.parametrize("loop", ["wait, ", "a", "9", "1.", "\\frac{", "再想一想。", "Hmm\n\n"])
def test_a_loop_is_repetitive_with_and_without_spaces(loop: str) -> None:
    prefix = "Let x be the number of apples. Then 3x + 4 = 19, so x = 5. "
    assert repetition(prefix + loop * 2000) > 0.9
    assert repetition(prefix) == 0.0


@pytest.mark.parametrize("text", ["", " \n", "short", "x " * (GRAM_TOKENS - 1)])
def test_a_text_shorter_than_a_gram_repeats_nothing(text: str) -> None:
    assert repetition(text) == 0.0


def test_of_a_long_text_the_end_is_judged() -> None:
    rng = random.Random(1)
    fresh = " ".join(str(rng.getrandbits(64)) for _ in range(MAX_CHARS // 15))
    assert len(fresh) > MAX_CHARS
    assert repetition(fresh) == 0.0
    assert repetition("loop again " * 100_000 + fresh) == 0.0
    assert repetition(fresh + "loop again " * 100_000) > REPETITIVE_ABOVE


SIGNS = ["a", "Ab", "x ", "\n", "1", "等", "\u3000", "\x1c", "é", "\ud800", "z" * 17, "B" * 33, "\\frac", "𝑥"]


@pytest.mark.parametrize("seed", range(20))
def test_every_kind_of_character_equals_the_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(SIGNS) for _ in range(rng.randrange(150)))
    text += text[rng.randrange(len(text) + 1) :] + text[: rng.randrange(len(text) + 1)]
    assert repetition(text) == brute_force(text)


@pytest.mark.parametrize("hashes", ["one for all", "one for both of two"])
def test_grams_of_equal_hash_that_differ_are_told_apart(hashes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [random_text(random.Random(seed)) for seed in range(10)]
    expected = [brute_force(text) for text in texts]
    own = module._hashes
    kept = 0 if hashes == "one for all" else 3
    monkeypatch.setattr(module, "_hashes", lambda *place: own(*place) & np.uint64(kept))
    assert [repetition(text) for text in texts] == expected
    # The planted fault: without the comparison in full, the hash alone is believed.
    monkeypatch.setattr(module, "_are_equal", lambda *_: True)
    assert [repetition(text) for text in texts] != expected


def test_a_hostile_text_takes_no_more_than_its_size() -> None:
    """A square of comparisons would be 10^11 here."""
    assert repetition("ab" * (MAX_CHARS // 2)) > 0.99
    assert repetition("a " * (MAX_CHARS // 2)) > 0.99
    rng = random.Random(2)
    assert repetition("".join(rng.choice("01") for _ in range(MAX_CHARS))) > 0
