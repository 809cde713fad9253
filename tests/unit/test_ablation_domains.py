"""The ablations of a second domain and of teachers: solver, plans, and the tables worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
from results import plain_result

from phimr_nemo.config import load_config
from phimr_nemo.config.ablations import SecondDomainConfig, TeachersConfig
from phimr_nemo.evaluate.evaluate import write_result
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.records import Kind
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import finish, rows_to_table, write_shard
from recipes.ablations import second_domain, teachers
from recipes.ablations.rewriting import QUESTION, draw_problems, solve, write_solutions

CONF = Path(__file__).resolve().parents[2] / "conf" / "ablations"
TOKENS = ("A#", "#A", "B#", "#B")
RULES = {"A##A": "", "B##B": "", "A##B": "#BA#", "B##A": "#AB#"}


def normal_form(program: str) -> str:
    """By rewriting the text itself, the rightmost pair first: the system's result does not depend on the order."""
    text = program.replace(" ", "")
    while found := [place for pair in RULES for place in (text.rfind(pair),) if place >= 0]:
        place = max(found)
        text = text[:place] + RULES[text[place : place + 4]] + text[place + 4 :]
    return " ".join(text[i : i + 2] for i in range(0, len(text), 2))


def test_every_program_of_up_to_five_tokens_is_reduced() -> None:
    for length in range(1, 6):
        for program in itertools.product(TOKENS, repeat=length):
            text = " ".join(program)
            response = solve(text, random.Random(0), 0.0)
            box = re.fullmatch(r"<think>\n(.*)\n</think>\nThe answer is \\boxed\{(.*)\}\.", response, re.S)
            assert box is not None
            assert box[2] == normal_form(text)
            assert box[1].split("\n")[0] == text


def test_a_mistake_is_one_wrong_rewriting() -> None:
    """`A# #A` vanishes; wrongly, the two change places and do not face each other any more."""
    assert "\\boxed{#A A#}" in solve("A# #A", random.Random(0), 1.0)
    assert "\\boxed{}" in solve("A# #B", random.Random(0), 1.0)
    assert "\\boxed{#B A#}" in solve("#B A#", random.Random(0), 1.0)


def test_problems_and_verifier_of_reasoning_gym(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is absent (requirements/domains.txt)")
    from recipes.ablations.rewriting_grader import grade

    train, heldout = (draw_problems(40, seed=1, heldout=part) for part in (False, True))
    assert not {row["program"] for row in train} & {row["program"] for row in heldout}
    for row in (*train, *heldout):
        assert row["question"] == QUESTION.format(program=row["program"])
        assert row["answer"] == normal_form(row["program"])
        assert grade(solve(row["program"], random.Random(0), 0.0), row["answer"]).verdict == "correct"
        assert grade("\\boxed{A# #A}", row["answer"]).verdict == "wrong"
        assert grade("no box", row["answer"]).verdict == "unparsable"
    write_solutions(tmp_path / "solutions.jsonl", train, each=2, seed=0, mistake_rate=0.0)
    lines = [json.loads(line) for line in (tmp_path / "solutions.jsonl").read_text("utf-8").splitlines()]
    assert [line["question"] for line in lines] == [row["question"] for row in train for _ in range(2)]


def domain_config(root: Path) -> SecondDomainConfig:
    for seed in (0, 1):
        for name in second_domain.NEEDED:
            RunDirectory(root / "quickstart" / f"seed-{seed}" / name).finish()
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}"]
    return load_config(SecondDomainConfig, CONF / "second_domain.yaml", settings)


def text_of(steps: list[Step], name: str) -> str:
    (step,) = (step for step in steps if step.name == name)
    return str(step)


def test_the_domain_is_named_where_answers_are_graded_and_nowhere_else(tmp_path: Path) -> None:
    steps = [step for step in second_domain.plan(domain_config(tmp_path)) if step.output.parent.name == "seed-1"]
    graded = {step.name for step in steps if f"grader={second_domain.GRADER}" in step.arguments}
    assert graded == {"verdicts", "evaluate-zero-shot", "evaluate-maths", "evaluate-random"}
    one, other = text_of(steps, "sft-maths"), text_of(steps, "sft-random")
    assert one.replace("sft-maths", "sft-random").replace("/grpo/hf", "/base/hf") == other
    assert "problems.kind=file" not in text_of(steps, second_domain.KEPT)


def scored(directory: Path, scores: dict[str, float], unparsable: float = 0.0) -> None:
    mean = sum(scores.values()) / len(scores)
    result = plain_result(mean, questions=len(scores), unparsable=unparsable, per_question=scores)
    directory.mkdir(parents=True, exist_ok=True)
    write_result(directory / "results.json", result, {})
    RunDirectory(directory).finish()


def test_the_domains_table(tmp_path: Path) -> None:
    """Seed 0 gains (.5, 1) by teaching and seed 1 (.5, .5): 75 and 50, so 62.5 +- 12.5."""
    config = domain_config(tmp_path)
    taught = {0: {"a": 0.5, "b": 1.0}, 1: {"a": 0.5, "b": 0.5}}
    for seed in (0, 1):
        out = config.output / f"seed-{seed}"
        scored(tmp_path / "quickstart" / f"seed-{seed}" / "evaluate-grpo", {"m": 1.0, "n": 0.5})
        scored(out / second_domain.KEPT, {"m": 0.5, "n": 0.0})
        scored(out / "evaluate-zero-shot", {"a": 0.0, "b": 0.0}, unparsable=0.25)
        scored(out / "evaluate-maths", taught[seed])
        scored(out / "evaluate-random", {"a": 0.5, "b": 0.0})
    text = second_domain.report(config)
    assert "| rewriting: taught minus zero-shot | +62.5 | 12.5 | +75.0 (25.0) | +50.0 (0.0) |" in text
    assert "| mathematics: afterwards minus before | -50.0 | 0.0 |" in text
    assert "| rewriting: after mathematics minus from random weights | +37.5 | 12.5 |" in text
    stored = json.loads((config.output / second_domain.TABLE_JSON).read_text("utf-8"))
    zero_shot = stored["table"][second_domain.ROWS["zero-shot"]]
    assert zero_shot == {
        second_domain.REWRITING: [0.0, 0.0],
        second_domain.PARSED: [75.0, 75.0],
        second_domain.MATHS: [75.0, 75.0],
    }
    assert (config.output / second_domain.PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def teachers_config(root: Path) -> TeachersConfig:
    RunDirectory(root / "quickstart" / "seed-0" / "base").finish()
    settings = [f"quickstarts=[{root / 'quickstart'}]", f"output={root / 'out'}"]
    return load_config(TeachersConfig, CONF / "teachers.yaml", settings)


def test_the_teachers_differ_in_what_is_named(tmp_path: Path) -> None:
    config = teachers_config(tmp_path)
    steps = [*teachers.data_steps(config), *teachers.training_steps(config)]
    assert len(steps) == 6 * len(config.teachers)
    careful, terse = (text_of(steps, f"rollouts-{name}") for name in ("careful-10", "terse-10"))
    assert careful.replace("careful-10", "terse-10").replace("style=careful", "style=terse") == terse
    for name in ("curated", "rows", "midtrain", "evaluate"):
        one, other = (text_of(steps, f"{name}-{teacher}") for teacher in ("careful-10", "terse-50"))
        assert one.replace("careful-10", "terse-50") == other


def verdicts(answers: dict[str, str], right: str) -> list[dict[str, object]]:
    text = dict.fromkeys(("question", "answer", "response", "teacher", "reason", "grader", "domain"), "")
    numbers: dict[str, object] = {"sample_index": 0, "seed": 0, "tokens": 1, "difficulty": None, "metadata": "{}"}
    return [
        {
            **text,
            **numbers,
            "id": problem,
            "problem_id": problem,
            "finish_reason": "stop",
            "extracted": answer,
            "verdict": "correct" if answer == right else "wrong" if answer else "unparsable",
        }
        for problem, answer in answers.items()
    ]


def test_agreement_is_counted_without_the_gold_answer() -> None:
    """Five problems whose answer is 7. They agree on three: twice on 7 and once on 8; no answer agrees with none."""
    kind: Kind = "verdicts"
    first = rows_to_table(verdicts({"a": "7", "b": "7", "c": "8", "d": "", "e": "7"}, "7"), kind)
    second = rows_to_table(verdicts({"e": "9", "a": "7", "b": "7", "c": "8", "d": ""}, "7"), kind)
    found = teachers.cross_check(first, second)
    assert (found.problems, found.right, found.agreed, found.agreed_right) == (5, 3, 3, 2)
    assert found.measures() == {
        teachers.ALONE: 60.0,
        teachers.AGREED: 60.0,
        teachers.PRECISION: 100 * 2 / 3,
        teachers.RECALL: 100 * 2 / 3,
    }
    nothing = teachers.cross_check(first.slice(3, 1), second)
    assert math.isnan(nothing.measures()[teachers.PRECISION])


def test_the_cross_table_has_every_pair_in_both_directions(tmp_path: Path) -> None:
    config = teachers_config(tmp_path)
    for name in config.teachers:
        directory = config.output / "seed-0" / f"verdicts-{name}"
        right = "8" if name == "terse-50" else "7"
        write_shard(directory, 0, rows_to_table(verdicts({"a": right, "b": "7"}, "7"), "verdicts"), kind="verdicts")
        finish(directory, kind="verdicts", config={}, counts={})
        RunDirectory(directory).finish()
    lines = [line for line in teachers.cross_report(config).splitlines() if "checked by" in line]
    assert len(lines) == 4 * 3
    (line,) = (line for line in lines if line.startswith("| terse-50, checked by careful-10 |"))
    assert [cell.split()[0] for cell in line.split("|")[2:-1]] == ["50.0", "50.0", "100.0", "100.0"]
