"""`phimr show`: which views a directory has, what is in them, how they are filtered, and what the terminal prints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from shown import HOSTILE, QUESTIONS, SAMPLES, curated, evaluation, response, row, runs, write_records
from typer.testing import CliRunner
from typing_extensions import Never

from phimr_nemo.cli.main import app
from phimr_nemo.config import PrepareConfig, load_config
from phimr_nemo.data.prepare.stage import run_prepare
from phimr_nemo.errors import UserError
from phimr_nemo.show.items import (
    MOST_REASONS,
    OTHER_REASONS,
    VERDICTS,
    Cells,
    View,
    Wanted,
    index_of,
    response_of,
    select,
)
from phimr_nemo.show.records import Records
from phimr_nemo.show.views import find_views
from phimr_nemo.store.shards import rows_to_table, write_shard


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs(tmp_path_factory.mktemp("shown") / "runs")


@pytest.fixture(scope="module")
def views(root: Path) -> dict[str, View]:
    return {view.name: view for view in find_views(root)}


def found(view: View, **wanted: object) -> list[int]:
    return select(view, Wanted(**wanted)).tolist()  # type: ignore[arg-type]


def test_everything_below_a_directory_is_a_view(views: dict[str, View]) -> None:
    assert [(name, view.kind) for name, view in views.items()] == [
        ("mine, seed 0", "questions"),
        ("grpo", "samples"),
        ("preferences/pairs", "pairs"),
        ("verdicts", "rollouts"),
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` leaves of a source with a row without an answer, and one question twice."""
    root = tmp_path_factory.mktemp("prepared")
    rows = [
        {"question": "How many days has one week?", "answer": "7"},
        {"question": "How many days has a leap year <b>?", "answer": "366"},
        {"question": "How many days has ONE week?", "answer": "7"},
        {"question": "And without an answer?", "answer": ""},
    ]
    source = root / "mine.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    given = [f"run.output={root / 'out'}", f"sources=[{{name: mine, path: {source}}}]", "workers=1"]
    run_prepare(load_config(PrepareConfig, Path("conf/prepare/tiny.yaml"), given), no_model)
    return root / "out"


def no_model(*_: object) -> Never:
    raise AssertionError("nobody is asked")


def test_what_prepare_dropped_is_a_view_with_the_reasons(prepared: Path) -> None:
    [view] = [view for view in find_views(prepared.parent) if view.kind == "drops"]
    assert view.name == "out/drops"
    told = {
        drop["reason"]: drop for drop in map(json.loads, (prepared / "drops.jsonl").read_text("utf-8").splitlines())
    }
    assert set(view.index.names) == set(told)
    same = next(reason for reason in told if "duplicate" in reason)
    [number] = found(view, reason=same)
    [item] = view.fetch([number])
    dropped, like = item.panes
    assert dropped[0].text == "How many days has ONE week?\n\nanswer: 7"
    assert dropped[0].notes == (same,)
    assert like[0].text == "How many days has one week?\n\nanswer: 7"
    assert like[0].notes == ("kept, of mine",)
    # What is like nothing stands alone.
    [alone] = view.fetch([next(n for n in range(len(view.index)) if n != number)])
    assert alone.panes[1] == ()
    assert found(view, text="one WEEK") == [number]
    said = shown(prepared.parent, "--view", "drops", "--reason", same)
    assert "How many days has ONE week?" in said
    assert "not graded" not in said


def test_a_damaged_list_of_drops_is_named(tmp_path: Path) -> None:
    (tmp_path / "drops.jsonl").write_text('{"source": "a"}\n', "utf-8")
    with pytest.raises(UserError, match=r"drops\.jsonl has a line that cannot be read"):
        find_views(tmp_path)


def test_stages_stand_side_by_side_in_the_recipes_order(views: dict[str, View]) -> None:
    view = views["mine, seed 0"]
    assert view.panes == ("base", "SFT", "another")
    assert view.index.right.T.tolist() == [[0, 1, 0, 2, 1, 0], [2, 1, 0, 2, 0, 1], [2] * QUESTIONS]
    assert view.index.total.tolist() == [[SAMPLES] * 3] * QUESTIONS
    [item] = view.fetch([2])
    assert (item.id, item.question, item.answer) == ("p2", "What is $1 \\cdot 2$?", "2")
    assert [[one.extracted for one in pane] for pane in item.panes] == [["3", "3"], ["3", "3"], ["2", "2"]]
    assert item.panes[0][0].thinking + item.panes[0][0].answer == response(3)
    # Text is read by number, in whatever order.
    assert [one.id for one in view.fetch([5, 0, 3])] == ["p5", "p0", "p3"]


def test_curation_says_what_became_of_every_rollout(views: dict[str, View]) -> None:
    view = views["verdicts"]
    notes = {
        (item.id, place): one.notes
        for item in view.fetch(range(len(view.index)))
        for place, one in enumerate(item.panes[0])
    }
    assert notes == {
        ("p1", 0): ("midtrain: kept",),
        ("p1", 1): ("midtrain: duplicate response",),
        ("p2", 0): ("midtrain: verdict wrong",),
        ("p3", 0): ("cut off", "midtrain: cut off"),
        ("p4", 0): ("midtrain: special token in text",),
        ("p5", 0): ("midtrain: kept",),
    }
    assert [view.fetch(found(view, reason=reason))[0].id for reason in ("duplicate", "SPECIAL token")] == ["p1", "p4"]


def test_a_survey_that_is_not_there_is_said(tmp_path: Path) -> None:
    curated(tmp_path)
    for file in (tmp_path / "curated" / "survey").glob("narrow-00000.*"):
        file.unlink()
    [view] = find_views(tmp_path)
    assert view.note.startswith("What curation dropped is not known: the survey of ")
    assert all(not one.notes or one.notes == ("cut off",) for item in view.fetch([0, 1]) for one in item.panes[0])


def test_filters_are_what_they_say(views: dict[str, View]) -> None:
    view = views["mine, seed 0"]
    right = view.index.right / SAMPLES
    assert found(view) == list(range(QUESTIONS))
    assert found(view, verdict="wrong", pane=1) == np.flatnonzero(right[:, 1] < 1).tolist()
    assert found(view, verdict="wrong") == np.flatnonzero((right < 1).any(axis=1)).tolist()
    assert found(view, verdict="timeout") == []
    assert found(view, change="gained", pane=1) == np.flatnonzero(right[:, 1] > right[:, 0]).tolist() == [0, 5]
    assert found(view, change="lost", pane=1) == [4]
    assert found(view, change="lost") == []
    # The problem's id, the question, the answer that was read, any response, in capitals or not.
    assert found(view, text="P3") == [3]
    assert found(view, text="CDOT 5") == [5]
    assert found(view, text="</script>") == [4]
    assert found(view, text="boxed{1}") == [0, 1]
    assert found(view, text="boxed{1}", verdict="wrong", pane=0) == [0, 1]
    assert found(views["grpo"], step=20) == [0, 1]
    assert found(views["grpo"], text="what is 2") == [1, 3]
    assert found(views["preferences/pairs"], text="ONE IS TWO") == [0]


def test_samples_of_grpo_go_from_the_newest_step_back(views: dict[str, View]) -> None:
    view = views["grpo"]
    items = view.fetch(range(4))
    assert [(item.id, item.facts) for item in items] == [
        ("p1", ("step 20",)), ("p2", ("step 20",)), ("p1", ("step 10",)), ("p2", ("step 10",)),
    ]  # fmt: skip
    assert [(one.reward, one.notes) for one in items[0].panes[0]] == [
        (1.0, ("trained on",)), (-1.0, ("cut off",)), (-1.0, ("cut off",)),
    ]  # fmt: skip


def test_a_pair_has_its_sides(views: dict[str, View]) -> None:
    [item] = views["preferences/pairs"].fetch([0])
    assert [pane[0].text for pane in item.panes] == [response(1, "one is one"), response(2, "one is two")]
    assert [pane[0].verdict for pane in item.panes] == ["correct", "wrong"]


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        ("<think>a</think> b", "<think>a</think>"),
        ("no thinking", ""),
        ("<think>never ends", "<think>never ends"),
        ("<think>a</think>", "<think>a</think>"),
        ("<think>a</think>b<|im_end|>more", "<think>a</think>"),
        ("", ""),
    ],
)
def test_thinking_is_told_from_the_answer_and_nothing_is_lost(text: str, thinking: str) -> None:
    shown = response_of(text)
    assert shown.thinking == thinking
    assert shown.text == text


def test_rare_reasons_share_a_bit() -> None:
    reasons: list[str | None] = [f"reason {n:02}" for n in range(40) for _ in range(2 if n < MOST_REASONS else 1)]
    count = len(reasons)
    nothing = np.zeros(count, np.int64)
    cells = Cells(np.arange(count), nothing, nothing, [reasons], nothing)
    index = index_of(count, 1, cells)
    assert index.names == (*(f"reason {n:02}" for n in range(MOST_REASONS)), OTHER_REASONS)
    assert index.reasons.tolist() == [1 << min(int(str(reason)[-2:]), MOST_REASONS) for reason in reasons]
    assert index.verdicts.tolist() == [[1 << VERDICTS.index("correct")]] * count


def test_the_index_is_a_count_of_the_rows(views: dict[str, View]) -> None:
    for view in views.values():
        items = view.fetch(range(len(view.index)))
        assert view.index.total.tolist() == [[len(pane) for pane in item.panes] for item in items]
        assert view.index.right.tolist() == [
            [sum(one.verdict == "correct" for one in pane) for pane in item.panes] for item in items
        ]
        longest = [max((one.tokens or 0) for pane in item.panes for one in pane) for item in items]
        assert view.index.tokens.tolist() == longest


def test_a_run_that_is_being_written_shows_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "verdicts"
    write_shard(path, 0, rows_to_table([row(0, 0, is_right=True)], "verdicts"), kind="verdicts")
    write_shard(path, 1, rows_to_table([row(1, 0, is_right=True)], "verdicts"), kind="verdicts")
    (path / "part-00001.json").unlink()
    (path / ".part-00002.parquet.tmp").write_bytes(b"begun")
    assert len(Records(path)) == 1
    [view] = find_views(tmp_path)
    assert [item.id for item in view.fetch([0])] == ["p0"]


def test_rollouts_are_shown_until_they_are_graded(tmp_path: Path) -> None:
    rows = [row(0, 0, is_right=True)]
    rollouts = [{key: rows[0][key] for key in rows[0] if key not in ("verdict", "extracted", "reason", "grader")}]
    path = write_records(tmp_path / "rollouts", "rollouts", [rollouts])
    [view] = find_views(tmp_path)
    assert (view.name, view.fetch([0])[0].panes[0][0].verdict) == ("rollouts", "")
    from phimr_nemo.store.shards import read_manifest

    content = read_manifest(path, "rollouts").content
    write_records(tmp_path / "verdicts", "verdicts", [rows], inputs={"rollouts": content})
    assert [view.name for view in find_views(tmp_path)] == ["verdicts"]


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing below .*\n.*\n.*run\.output of evaluate"):
        find_views(tmp_path)
    with pytest.raises(UserError, match="is no directory"):
        find_views(tmp_path / "absent")
    path = write_records(tmp_path / "verdicts", "verdicts", [[row(0, 0, is_right=True)]])
    file = path / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"part-00000\.parquet cannot be read.*\n.*\n.*phimr data check"):
        find_views(tmp_path)


def shown(root: Path, *options: str, columns: int = 120) -> str:
    done = CliRunner().invoke(
        app, ["show", str(root), *options], catch_exceptions=False, env={"COLUMNS": str(columns)}
    )
    assert done.exit_code == 0
    return done.output


def test_the_terminal_shows_question_gold_and_every_stage(root: Path) -> None:
    output = shown(root, "--search", "p0", "-n", "1")
    # First what there is.
    assert re.search(r"mine, seed 0 +6 +36 +61\.1 +base, SFT, another", output)
    assert re.search(r"preferences/pairs +1 +2 +50\.0", output)
    assert "question: What is $1 \\cdot 0$?" in output
    assert "answer:   0" in output
    line = next(line for line in output.splitlines() if line.startswith("base"))
    assert re.match(
        r"base \(0 of 2\): wrong, 10 tokens +SFT \(2 of 2\): correct, 10 tokens +another \(2 of 2\)", line
    )
    assert "not equal to the answer (read: 1)" in output
    assert "[thinking, 3 lines; --whole prints it]" in output
    assert "some steps" not in output
    assert output.rstrip().endswith("mine, seed 0: 1 of 1, of 6 in all")
    whole = shown(root, "--search", "p0", "-n", "1", "--whole")
    assert whole.count("some steps") == 3 * SAMPLES


def test_a_narrow_terminal_gets_one_response_after_the_other(root: Path) -> None:
    lines = shown(root, "--view", "mine", "--search", "p0", columns=60).splitlines()
    heads = [line for line in lines if re.match(r"(base|SFT|another) \(", line)]
    assert len(heads) == 3


def test_no_terminal_obeys_a_response(root: Path) -> None:
    output = shown(root, "--view", "mine", "--search", "owned", "--whole", columns=400)
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", output)
    assert "\\x1b[2J\\x1b]0;owned\\x07 \\u202egnp.exe\\u202c" in output
    assert "</script><script>document.title='owned'</script>" in output
    assert HOSTILE.splitlines()[0] in output


def test_views_panes_and_places_are_chosen(root: Path) -> None:
    assert "preferences/pairs: 1 of 1" in shown(root, "--view", "pairs")
    assert "grpo: 1 of 2, of 4 in all" in shown(root, "--view", "grpo", "--step", "10", "-n", "1", "--skip", "1")
    assert "reward -1, 9 tokens, cut off" in shown(root, "--view", "grpo")
    assert "nothing in grpo is like that: 4 items" in shown(root, "--view", "grpo", "--step", "5")
    assert shown(root, "--view", "mine", "--change", "lost", "--pane", "SFT").count("question:") == 1
    with pytest.raises(UserError, match=r"'e' is a part of .*\n.*views are"):
        shown(root, "--view", "e")
    with pytest.raises(UserError, match=r"'nine' is no view\n"):
        shown(root, "--view", "nine")
    with pytest.raises(UserError, match=r"is no pane of mine, seed 0\n.*'base', 'SFT'"):
        shown(root, "--view", "mine", "--pane", "GRPO")


def test_evaluations_with_other_seeds_are_views_of_their_own(tmp_path: Path) -> None:
    evaluation(tmp_path / "a", "SFT", [1, 2])
    evaluation(tmp_path / "b", "SFT", [1, 2])
    evaluation(tmp_path / "c", "SFT", [1, 2], seed=1)
    assert {view.name: view.panes for view in find_views(tmp_path)} == {
        "mine, seed 0": ("SFT", "SFT (b)"),
        "mine, seed 1": ("SFT",),
    }
    assert re.search(r"^SFT 1: correct.* SFT 2: wrong", shown(tmp_path, "--view", "seed 1", "-n", "1"), re.MULTILINE)
