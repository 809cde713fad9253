r"""The audit of graders: its pairs are right and wrong as they say, and its reader and its counts can be trusted."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from fractions import Fraction
from math import comb, factorial
from pathlib import Path

import audit_golds
import audit_graders
import pytest
import verify_audit
from audit_arithmetic import CannotRead, mp
from audit_classes import CLASSES, FRAMES, Pair, WrongTruth, checked, make_pairs
from audit_shapes import same_alone, same_intervals, same_matrix, same_quantity, same_set, same_tuple
from audit_truth import evaluate, same_function, same_number
from audit_write import Case

SAMPLE = 120


def pair(correct: bool, *, kind: str = "integers", gold: str = "1", answer: str = "1") -> Pair:
    return Pair(kind, "as it is", gold, answer, rf"$\boxed{{{answer}}}$", correct)


# ---- truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_every_truth_is_confirmed_by_a_second_reading(kind: str) -> None:
    """`make_pairs` raises where the generator and the reader differ; both kinds of answers must occur."""
    pairs = list(make_pairs(kind, SAMPLE, seed=7))
    truths = Counter(each.correct for each in pairs)
    assert truths[True] >= 10
    assert truths[False] >= 20
    assert len({(each.gold, each.answer) for each in pairs}) == len(pairs)
    assert all(each.response in [frame % each.answer for frame in FRAMES] for each in pairs)
    assert pairs == list(make_pairs(kind, SAMPLE, seed=7))


@pytest.mark.parametrize(
    "case",
    [
        Case("1024", wrong=[("a power", "2^{10}")]),
        Case("1024", right=[("a power", "2^{11}")]),
        Case("2^{400}", wrong=[("a product", r"2^{399} \cdot 2")]),
        Case("2^{400}", right=[("one less", "2^{400}-1")]),
        Case(r"\frac{\sqrt{2}}{2}", wrong=[("over the root", r"\frac{1}{\sqrt{2}}")]),
    ],
    ids=["right, called wrong", "wrong, called right", "large and right", "large and wrong", "a surd"],
)
def test_a_generator_that_errs_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault."""
    monkeypatch.setitem(CLASSES, "planted", (lambda _: case, same_number))
    with pytest.raises(WrongTruth, match="planted"):
        list(make_pairs("planted", 5, seed=0))


def test_exchanged_truths_of_any_class_are_found() -> None:
    for kind, (_, same) in CLASSES.items():
        for each in make_pairs(kind, 20, seed=3):
            with pytest.raises(WrongTruth):
                checked(Pair(kind, each.change, each.gold, each.answer, each.response, not each.correct), same)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"12{,}345{,}678", Fraction(12345678)),
        (r"-3\frac{1}{2}", Fraction(-7, 2)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"1.\overline{09}", Fraction(12, 11)),
        (r"2 \times 10^{-3}", Fraction(1, 500)),
        (r"\frac{10!}{3!7!}", Fraction(comb(10, 3))),
        (r"\binom{50}{20}+20!", Fraction(comb(50, 20) + factorial(20))),
        (r"2^{1000}-1", Fraction(2**1000 - 1)),
        (r"\left(\frac{1}{2}\right)^{98}", Fraction(1, 2**98)),
        (r"\left\lfloor\frac{-7}{2}\right\rfloor", Fraction(-4)),
        (r"\left\lceil\frac{-7}{2}\right\rceil", Fraction(-3)),
        (r"-2^2", Fraction(-4)),
        (r"\sqrt[3]{-27}+|{-5}|", Fraction(2)),
        (r"17 \bmod 5", Fraction(2)),
        (r"\frac12+\frac34", Fraction(5, 4)),
    ],
)
def test_the_reader_knows_exact_values(text: str, value: Fraction) -> None:
    assert evaluate(text) == value


def test_the_reader_agrees_with_closed_forms() -> None:
    """cos 36 degrees is half the golden ratio; the others from the addition theorems."""
    golden = (1 + mp.sqrt(5)) / 2
    for text, value in {
        r"2\cos\frac{\pi}{5}": golden,
        r"\sin^2\frac{\pi}{8}": (2 - mp.sqrt(2)) / 4,
        r"\cos 15^\circ": (mp.sqrt(6) + mp.sqrt(2)) / 4,
        r"\log_2 3 \cdot \log_3 2": mp.mpf(1),
        r"\frac{\ln 8}{\ln 2}": mp.mpf(3),
        r"e^{i\pi}+1+i^2": mp.mpf(-1),
        r"2\sin x\cos x": mp.sin(mp.mpf(2) / 3),
    }.items():
        assert mp.almosteq(evaluate(text, {"x": Fraction(1, 3)}), value, abs_eps=mp.mpf(10) ** -50), text


@pytest.mark.parametrize("text", ["", "3 apples", r"\int x", "2 +", "(1", "x", "9^{9^{9}}", "1,2,3", r"\frac{1}"])
def test_the_reader_refuses_what_it_cannot_read(text: str) -> None:
    with pytest.raises(CannotRead):
        evaluate(text)


def test_what_cancels_is_nothing_and_what_is_tiny_is_not() -> None:
    assert same_number(r"6 \cdot \left(\sin\frac{\pi}{6}\right)-3", "0")
    assert not same_number(r"\sin\pi", r"10^{-45}")
    assert not same_number("2^{-98}", "2^{-99}")
    assert not same_number(r"\sqrt{2}", r"\sqrt{2}+10^{-30}")


def test_points_tell_functions_apart() -> None:
    assert same_function(r"\lfloor\frac{n}{2}\rfloor", r"\frac{2n-1+(-1)^n}{4}")
    assert not same_function(r"\lfloor\frac{n}{2}\rfloor+1", r"\lceil\frac{n}{2}\rceil")
    assert not same_function("|x|", "x")
    assert not same_function("x^{2023}+1", "x^{2023}+x+1")
    assert same_function(r"\frac{1}{x}-\frac{1}{x+1}", r"\frac{1}{x(x+1)}")


def test_structures_are_compared_part_by_part() -> None:
    assert same_tuple(r"\left(1,\frac{1}{2}\right)", "x=1, y=0.5")
    assert not same_tuple("(1,2)", "(2,1)")
    assert same_set("1, 2", r"\{2, 1\}")
    assert not same_set("1, 2", "1, 2, 2, 3")
    assert same_intervals(r"(-\infty,1]\cup (3,\infty)", r"x > 3 \text{ or } x \le 1")
    assert not same_intervals("[0,1)", "0 \\le x \\le 1")
    assert same_matrix(r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{bmatrix} \frac{2}{2} & 2 \end{bmatrix}")
    assert same_quantity(r"3\text{ km}", r"3000\text{ m}")
    assert not same_quantity(r"3\text{ m}^2", r"3\text{ m}")
    assert not same_alone("7", r"7 \text{ or } 8")


# ---- golds -------------------------------------------------------------------------------------------------------


def test_golds_are_paired_with_themselves_rewritings_and_changes(tmp_path: Path) -> None:
    rows = [
        {"problem": f"Q{n}", "answer": a} for n, a in enumerate([r"\frac{1}{2}", "(1, 2)", "B", "1.5", "12", "12"])
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pairs = list(audit_golds.gold_pairs(tmp_path, seed=0))
    assert [each.gold for each in pairs if each.change == "itself"] == [r"\frac{1}{2}", "(1, 2)", "B", "1.5", "12"]
    of_half = {each.answer: each.correct for each in pairs if each.gold == r"\frac{1}{2}"}
    assert of_half[r"\dfrac{1}{2}"]
    assert sorted(of_half.values()) == [False] * 3 + [True] * 3
    assert {each.answer for each in pairs if each.gold == "(1, 2)" and each.correct} >= {
        "(1,2)",
        r"\left(1, 2\right)",
    }
    assert not [each for each in pairs if each.gold in ("B", "1.5") and not each.correct]
    assert {each.answer for each in pairs if each.gold == "12" and not each.correct} >= {"13", "11"}


def test_a_change_that_changes_nothing_is_left_out() -> None:
    r"""The zeroth power of two and of three are both one."""
    assert "a number + 1" not in {
        how
        for seed in range(20)
        for how, text in audit_golds.changed("2^0", random.Random(seed)).items()
        if text == "3^0"
    }


# ---- counting ----------------------------------------------------------------------------------------------------


def test_errors_are_counted_by_class() -> None:
    pairs = [pair(True), pair(True), pair(True), pair(False), pair(False), pair(False, kind="surds")]
    accepted = [True, False, None, True, None, False]
    counts = verify_audit.count(pairs, [{"accepted": each} for each in accepted])
    assert counts["integers"] == Counter(right=3, wrong=2, given_up=2, false_positives=1, false_negatives=2)
    assert verify_audit.totals(counts)["wrong"] == 3
    rows = [{"accepted": each, "why": ""} for each in accepted]
    assert [row["error"] for row in verify_audit.findings(pairs, rows)] == ["false positive"] + ["false negative"] * 2


def test_the_time_of_every_process_counts_once() -> None:
    """Three processes: up to 5, up to 3 and up to 2 seconds."""
    assert verify_audit.processor_seconds([1.0, 5.0, 0.5, 3.0, 0.0, 2.0]) == pytest.approx(10.0)
    assert verify_audit.processor_seconds([]) == 0.0


def test_a_sample_takes_every_class_and_lies_in_the_larger_one() -> None:
    pairs = verify_audit.all_pairs(600, seed=1)
    assert len(pairs) >= 600
    small, large = (verify_audit.sample(pairs, share, seed=1) for share in (0.1, 0.4))
    assert {each.kind for each in small} == set(CLASSES)
    assert set(small) <= set(large) < set(pairs)
    assert verify_audit.sample(pairs, 1.0, seed=1) == pairs


def test_a_grader_that_hangs_or_fails_gives_up_on_that_pair_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_graders, "ITEM_SECONDS", 0.05)

    def decide(row: dict[str, str]) -> bool:
        if row["answer"] == "hang":
            while True:
                with contextlib.suppress(Exception):  # as graders do
                    sum(range(1000))
        return bool(int(row["answer"]))

    rows = [{"gold": "1", "answer": answer, "response": ""} for answer in ("1", "hang", "x", "0")]
    assert list(audit_graders.each_alone(rows, decide)) == [
        (True, ""),
        (None, "time"),
        (None, "ValueError"),
        (False, ""),
    ]


def test_our_grader_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    pairs = [pair(True, gold="2x+1", answer="1+2x"), pair(False, answer="2"), pair(True, gold="0.5", answer="1/2")]
    verdicts, seconds = verify_audit.run_grader(verify_audit.OURS, pairs, tmp_path)
    assert [verdict["accepted"] for verdict in verdicts] == [True, False, True]
    assert seconds > 0
