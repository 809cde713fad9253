"""Responses that a GRPO run keeps: which ones, and how they are read back (`phimr show` is in test_show.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.align.grpo.responses import response_rows
from phimr_nemo.align.grpo.rollouts import Prompt, Rollout
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.store.responses import drop_later, kept_steps, read_responses, write_responses

GROUP = 3
PROMPTS = [Prompt(f"p{number}", str(number), (1,), False, f"What is {number}?") for number in range(8)]


class Words:
    """A tokenizer of the project's, but for its words: a token is one."""

    def __init__(self) -> None:
        self._tokenizer = build_tokenizer(synthetic_corpus())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(f"w{number}" for number in ids)

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """No response here ends with one of them."""
        return [-1 - place for place in range(len(tokens))]


WORDS = Words()


def rollout(slot: int, sample: int) -> Rollout:
    right = (slot + sample) % 2 == 0
    return Rollout(
        slot, sample, slot % len(PROMPTS), tuple(range(sample + 1)), (-0.1,) * (sample + 1),
        is_truncated=sample == 2, is_correct=right, reward_parts={"correctness": 1.0 if right else -1.0},
        verdict="correct" if right else "wrong",
    )  # fmt: skip


def rows(count: int, step: int = 7) -> list[dict[str, Any]]:
    rollouts = [rollout(slot, sample) for slot in range(8) for sample in range(GROUP)]
    return response_rows(rollouts, PROMPTS, {0, 4}, WORDS, step=step, count=count)


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (3, 1), (5, 1), (6, 2), (100, 8)])
def test_whole_groups_are_kept_and_one_at_least(count: int, groups: int) -> None:
    found = rows(count)
    assert len(found) == GROUP * groups
    prompts = [row["prompt_id"] for row in found]
    assert [prompts.count(name) for name in dict.fromkeys(prompts)] == [GROUP] * groups
    # The best of a group first.
    for place in range(0, len(found), GROUP):
        rewards = [row["reward"] for row in found[place : place + GROUP]]
        assert rewards == sorted(rewards, reverse=True)


def test_a_row_says_what_became_of_its_response() -> None:
    by_place = {(row["prompt_id"], row["sample"]): row for row in rows(100)}
    # Rollouts 0 and 4 are trained on: slot 0, sample 0, and slot 1, sample 1.
    assert {place for place, row in by_place.items() if row["trained"]} == {("p0", 0), ("p1", 1)}
    assert by_place["p2", 2] == {
        "step": 7, "prompt_id": "p2", "question": "What is 2?", "answer": "2", "sample": 2, "response": "w0 w1 w2",
        "verdict": "correct", "reward": 1.0, "tokens": 3, "truncated": True, "trained": False,
    }  # fmt: skip


def test_the_choice_is_the_steps_own() -> None:
    assert rows(3) == rows(3)
    chosen = {tuple(row["prompt_id"] for row in rows(3, step)) for step in range(20)}
    assert len(chosen) > 1


def test_what_is_written_is_read_and_later_steps_can_be_dropped(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_responses(tmp_path, step, rows(6, step))
    assert kept_steps(tmp_path) == [10, 20, 30]
    assert read_responses(tmp_path, 20) == rows(6, 20)
    drop_later(tmp_path, 20)
    assert kept_steps(tmp_path) == [10, 20]
    with pytest.raises(UserError, match=r"no responses of step 30\n.*steps 10, 20\n.*--step 20"):
        read_responses(tmp_path, 30)
    file = tmp_path / "responses" / "step-00000010.parquet"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="is not readable"):
        read_responses(tmp_path, 10)


@pytest.mark.parametrize(
    ("column", "values", "alone"),
    [
        ("x", pa.array([1]), True),
        ("step", pa.array([], pa.int64()), True),
        ("reward", pa.array(["much"]), False),
        ("question", pa.array([None], pa.string()), False),
        ("response", pa.DictionaryArray.from_arrays(pa.array([0] * 600_000, pa.int32()), ["x" * 2_000]), True),
    ],
    ids=["other columns", "no rows", "a word for a number", "nothing", "a gigabyte in a few bytes"],
)
def test_a_file_that_no_run_writes_is_refused(column: str, values: pa.Array, alone: bool, tmp_path: Path) -> None:
    others = {} if alone else {name: [value] for name, value in rows(1)[0].items()}
    (tmp_path / "responses").mkdir()
    pq.write_table(pa.table({**others, column: values}), tmp_path / "responses" / "step-00000001.parquet")
    with pytest.raises(UserError, match=r"is not readable|unpacks to more"):
        read_responses(tmp_path, None)


def test_the_report_has_a_table_of_them(tmp_path: Path) -> None:
    from phimr_nemo.report.collect import Ran
    from phimr_nemo.report.run import _responses

    hostile = "<script>x</script>\n| a | \x1b[2J" + "y" * 300
    write_responses(tmp_path, 10, rows(3))
    write_responses(tmp_path, 20, [{**row, "response": hostile} for row in rows(12, 20)])
    runs = [Ran("grpo", tmp_path, "grpo", {}, None, [], ""), Ran("dpo", tmp_path / "no", "dpo", {}, None, [], "")]
    [section] = _responses(runs)
    [table] = section.tables
    assert table.title == "grpo: step 20"
    assert table.note.startswith("8 of 12;")
    assert [row[:3] for row in table.rows] == [
        (row["verdict"], f"{row['reward']:g}", str(row["tokens"])) for row in rows(12, 20)[:8]
    ]
    assert all(row[-1] == "..." + "y" * 200 for row in table.rows)
