"""The end of the quickstart: three questions as they were answered, right or wrong, and a line that can be typed."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.jobs.closing import SHOWN_CHARS, answers, to_type
from phimr_nemo.store.shards import finish, rows_to_table, write_shard


def verdict(number: int, sample: int, response: str, verdict: str) -> dict[str, Any]:
    return {
        "id": f"{number}-{sample}",
        "problem_id": str(number),
        "question": f"What is {number}+1?",
        "answer": str(number + 1),
        "response": response,
        "sample_index": sample,
        "seed": 0,
        "teacher": "own",
        "tokens": 3,
        "finish_reason": "stop",
        "verdict": verdict,
        "extracted": "",
        "reason": "",
        "grader": "g",
        "domain": None,
        "difficulty": None,
        "metadata": "{}",
    }


def test_the_first_response_to_each_of_three_questions_with_its_verdict(tmp_path: Path) -> None:
    rows = [
        verdict(number, sample, f"<think>\nx\n</think>\nIt is {sample}.", "wrong")
        for number in range(5)
        for sample in range(2)
    ]
    rows[0] |= {"response": "so\nIt is \\boxed{1}.", "verdict": "correct"}
    rows[2] |= {"response": "a" * 300 + "\x1b[2J"}
    rows[4] |= {"response": ""}
    write_shard(tmp_path / "verdicts", 0, rows_to_table(rows, "verdicts"), kind="verdicts")
    finish(tmp_path / "verdicts", kind="verdicts", config={}, counts={})
    cut = "a" * (SHOWN_CHARS - 4) + "\\x1b[2J"
    assert list(answers(tmp_path)) == [
        "  What is 0+1?",
        "    It is \\boxed{1}.  [correct; the answer is 1]",
        "  What is 1+1?",
        f"    {cut}  [wrong; the answer is 2]",
        "  What is 2+1?",
        "    (nothing)  [wrong; the answer is 3]",
    ]


def test_the_environment_is_activated_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a directory with a space in its name, and from elsewhere."""
    environment = tmp_path / "my venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "activate").touch()
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    dot, script, both, *command = shlex.split(to_type("chat", "runs/a b"))
    assert (dot, both, command) == (".", "&&", ["phimr", "chat", "runs/a b"])
    assert Path(script).is_file()
    program = environment / "bin" / "phimr"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{environment / 'bin'}{os.pathsep}{tmp_path}")
    assert to_type("chat", "runs/a b") == "phimr chat 'runs/a b'"
