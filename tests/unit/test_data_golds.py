"""Questions whose sources disagree or tell no answer: found, settled by the stated rule, graded and trained truly."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import (
    CurateConfig,
    GoldConfig,
    PrepareConfig,
    RunConfig,
    SourceConfig,
    VerifyConfig,
)
from phimr_nemo.config.data import MidtrainSet, PairSet, PromptSet
from phimr_nemo.config.generation import RecordProblems
from phimr_nemo.config.rules import RuleBroken
from phimr_nemo.data.curate.stage import run_curate
from phimr_nemo.data.prepare.golds import Candidate, Settled, settle
from phimr_nemo.errors import UserError
from phimr_nemo.generate.stage import read_configured_problems
from phimr_nemo.jobs.composed import run_prepare, run_verify
from phimr_nemo.store.shards import read_manifest, read_table
from phimr_nemo.verify.answer import Grader

QUESTION = "A farmer has 3 pens with 4 sheep each and sells 5 of them. How many remain?"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1) as one:
        yield one


def decide(grader: Grader, *members: tuple[str, str, list[str]], voted: bool = False, **rule: Any) -> Settled:
    """The decision about one question; a member is a source, its answer, and final answers of its solutions."""
    candidates = [
        Candidate(index, source, answer, voted, tuple(said)) for index, (source, answer, said) in enumerate(members)
    ]
    (settled,) = settle([candidates], GoldConfig(**rule), grader)
    return settled


def test_equal_answers_in_other_words_are_no_conflict(grader: Grader) -> None:
    settled = decide(grader, ("a", "\\frac{1}{2}", []), ("b", "0.5", []), ("c", '["1/2", "half"]', []))
    assert (settled.answer, settled.conflict, settled.voted, settled.lost) == (
        "\\frac{1}{2}",
        False,
        False,
        frozenset(),
    )


def test_verified_solutions_vote_between_published_answers(grader: Grader) -> None:
    settled = decide(grader, ("a", "12", ["9"]), ("b", "7", ["7", "7.0"]))
    assert (settled.answer, settled.conflict, settled.voted) == ("7", True, False)
    assert settled.lost == {0}
    assert settled.own == {0: "12", 1: "7"}


@pytest.mark.parametrize(
    ("first", "second", "rule"),
    [
        (["12"], ["7"], {}),  # below the quorum
        (["12", "12.0"], ["7", "7.0"], {}),  # no majority
        ([], ["7", "7.0"], {"quorum": None}),  # no vote is wanted
        ([], ["7", "7.0"], {"quorum": 3}),
        (["8", "8.0", "9"], ["7", "7.0"], {}),  # most solutions agree with neither
    ],
)
def test_without_such_a_vote_nobody_wins(
    grader: Grader, first: list[str], second: list[str], rule: dict[str, Any]
) -> None:
    settled = decide(grader, ("a", "12", first), ("b", "7", second), **rule)
    assert (settled.answer, settled.conflict, settled.lost) == (None, True, {0, 1})


def test_a_trusted_source_wins_over_votes(grader: Grader) -> None:
    members: tuple[tuple[str, str, list[str]], ...] = (("a", "12", []), ("b", "7", ["7", "7.0"]), ("c", "8", []))
    assert decide(grader, *members, trusted=("a",)).answer == "12"
    assert decide(grader, *members, trusted=("c", "a")).lost == {0, 1}
    # A trusted source that contradicts itself decides nothing.
    assert decide(grader, *members, ("c", "9", []), trusted=("c",)).answer == "7"


def test_solutions_vote_where_nobody_tells_an_answer(grader: Grader) -> None:
    settled = decide(grader, ("ot3", "", ["10"]), ("ot3", "", ["7"]), ("ot3", "", ["7.0"]), ("ot3", "", ["7"]))
    assert (settled.answer, settled.voted, settled.conflict) == ("7", True, False)
    assert set(settled.own.values()) == {"7"}
    assert decide(grader, ("ot3", "", ["7"])).answer is None
    assert decide(grader, ("ot3", "", ["7", "7", "8", "8"])).answer is None
    assert decide(grader, ("ot3", "", ["7", "7"]), quorum=None).answer is None


def test_a_vote_never_stands_against_a_published_answer(grader: Grader) -> None:
    settled = decide(grader, ("ot3", "", ["7", "7", "7"]), ("gold", "12", []))
    assert (settled.answer, settled.voted, settled.conflict) == ("12", False, True)
    assert settled.lost == {0}
    # A publisher's own vote is one, too.
    assert decide(grader, ("omr", "7", []), voted=True).voted


def test_every_order_of_sources_gives_the_same_decision(grader: Grader) -> None:
    members = [("a", "12", ["12"]), ("b", "7", ["7", "7"]), ("c", "", ["7"])]
    assert {decide(grader, *order).answer for order in itertools.permutations(members)} == {"7"}


def prepared(tmp_path: Path, sources: dict[str, list[dict[str, Any]]], **rule: Any) -> Path:
    configs = []
    for name, rows in sources.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        preset = "openthoughts3" if "conversations" in rows[0] else None
        response = "response" if "response" in rows[0] else None
        configs.append(SourceConfig(name=name, path=str(path), preset=preset, response=response))  # type: ignore[arg-type]
    output = tmp_path / "prepared"
    run_prepare(
        PrepareConfig(
            run=RunConfig(output=output, seed=0), sources=tuple(configs), golds=GoldConfig(**rule), shard_size=100
        )
    )
    return output


def verdicts(output: Path) -> Path:
    graded = output.parent / "verdicts"
    run_verify(
        VerifyConfig(
            run=RunConfig(output=graded, seed=0), rollouts=output / "rollouts", workers=1, deadline_seconds=30.0
        )
    )
    return graded


def curated(graded: Path, name: str = "curated", *, twice: bool = False, **sets: Any) -> Path:
    output = graded.parent / name
    named = (graded, graded) if twice else graded
    run_curate(CurateConfig(run=RunConfig(output=output, seed=0), verdicts=named, workers=1, **sets))
    return output


def solution(value: int, words: str = "") -> str:
    return f"<think>\n{words or 'We count.'}\n</think>\n\nSo \\boxed{{{value}}}"


def ot3(value: int, words: str, question: str = QUESTION) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": solution(value, words)}]
    return {"difficulty": 8, "source": "x", "domain": "math", "conversations": turns}


CONFLICT = {
    "a": [{"question": QUESTION, "answer": "12", "response": [solution(12, "Three by four.")]}],
    "b": [
        {
            "question": f"{QUESTION} Let's think step by step.",
            "answer": "7",
            "response": [solution(7), solution(7, "7.")],
        }
    ],
}
PAIRS = PairSet(mode="random", nearness="common_steps", max_per_problem=4)
PROMPTS = PromptSet(min_pass=0.0, max_pass=1.0, hard_below=0.5, min_samples=2)


def test_solutions_of_the_other_source_never_become_negatives(tmp_path: Path) -> None:
    output = prepared(tmp_path, CONFLICT)
    (problem,) = read_table(output / "problems", "problems").to_pylist()
    assert (problem["source"], problem["answer"]) == ("b", "7")
    rollouts = read_table(output / "rollouts", "rollouts").to_pylist()
    assert {row["problem_id"] for row in rollouts} == {problem["id"]}
    assert sorted((row["answer"], json.loads(row["metadata"]).get("gold")) for row in rollouts) == [
        *[("12", "disputed")],
        *[("7", None)] * 2,
    ]
    graded = read_table(verdicts(output), "verdicts").to_pylist()
    assert Counter((row["answer"], row["verdict"]) for row in graded) == {
        ("7", "correct"): 2,
        ("12", "gold_unreadable"): 1,
    }
    with pytest.raises(UserError, match=r"the pairs set of .* would be empty"):
        curated(output.parent / "verdicts", pairs=PAIRS)


def test_an_unsettled_question_keeps_its_rollouts_and_trains_nothing(tmp_path: Path) -> None:
    output = prepared(tmp_path, CONFLICT, quorum=None)
    (problem,) = read_table(output / "problems", "problems").to_pylist()
    assert (problem["answer"], json.loads(problem["metadata"])) == ("", {"gold": "disputed"})
    assert {row["answer"] for row in read_table(output / "rollouts", "rollouts").to_pylist()} == {"7", "12"}
    counts = read_manifest(output / "problems", "problems").counts
    assert counts["conflicts: no answer settled"] == counts["conflicts: a against b"] == 1
    graded = verdicts(output)
    assert set(read_table(graded, "verdicts")["verdict"].to_pylist()) == {"gold_unreadable"}
    table, read = read_configured_problems(RecordProblems(kind="records", path=output / "problems"), 0)
    assert (table.num_rows, read) == (0, {"read": 0, "problems without an answer, passed over": 1})


def test_a_voted_gold_makes_prompts_and_pairs_only_when_asked_for(tmp_path: Path) -> None:
    rows = [ot3(10, "Two less."), ot3(7, "Five less."), ot3(7, "Twelve less five."), ot3(7, "Minus five.")]
    output = prepared(tmp_path, {"ot3": rows})
    (problem,) = read_table(output / "problems", "problems").to_pylist()
    assert (problem["answer"], json.loads(problem["metadata"])["gold"]) == ("7", "vote")
    graded = verdicts(output)
    assert Counter(read_table(graded, "verdicts")["verdict"].to_pylist()) == {"correct": 3, "wrong": 1}
    with pytest.raises(UserError, match="gold is a vote"):
        curated(graded, pairs=PAIRS)
    with pytest.raises(UserError, match="gold is a vote"):
        curated(graded, prompts=PROMPTS)
    asked = curated(
        graded,
        "asked",
        midtrain=MidtrainSet(max_per_problem=8),
        pairs=PairSet(mode="random", nearness="common_steps", max_per_problem=4, voted_golds=True),
        prompts=PromptSet(min_pass=0.0, max_pass=1.0, hard_below=0.5, min_samples=2, voted_golds=True),
    )
    assert read_manifest(asked / "midtrain", "conversations").rows == 3
    assert read_manifest(asked / "pairs", "pairs").rows == 1
    assert read_manifest(asked / "prompts", "prompts").rows == 1


def test_verdicts_that_are_named_twice_count_once(tmp_path: Path) -> None:
    rows = [{"question": QUESTION, "answer": "7", "response": [solution(7), solution(8), solution(9, "No.")]}]
    graded = verdicts(prepared(tmp_path, {"mine": rows}))
    once = curated(graded, "once", prompts=PROMPTS)
    twice = curated(graded, "twice", twice=True, prompts=PROMPTS)
    first, second = (read_table(path / "prompts", "prompts").to_pylist() for path in (once, twice))
    assert first == second
    assert first[0]["pass_rate"] == pytest.approx(1 / 3)
    counts = [dict(read_manifest(path / "prompts", "prompts").counts) for path in (once, twice)]
    assert counts[0] == counts[1]


def test_a_trusted_source_is_one_of_the_sources() -> None:
    source = SourceConfig(name="a", path="a.jsonl")
    with pytest.raises((RuleBroken, UserError), match=r"golds\.trusted names"):
        PrepareConfig(
            run=RunConfig(output=Path("out"), seed=0),
            sources=(source,),
            golds=GoldConfig(trusted=("b",)),
            shard_size=1,
        )
    with pytest.raises((RuleBroken, UserError), match="of a path on this machine"):
        SourceConfig(name="a", path="a.jsonl", revision="main")
