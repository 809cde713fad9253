"""Foreign text is shown: no escape sequence reaches a terminal, and no tag a page."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from phimr_nemo.errors import UserError, exit_with_message
from phimr_nemo.jobs.status import status, status_table
from phimr_nemo.report.tables import Table, markdown, markdown_text
from phimr_nemo.store.runs import RUN_FILE
from phimr_nemo.text.printable import FILLERS, printable, say

HOSTILE = (
    *("\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\x90q\x9c", "\rover", "\b\b", "\x00", "\x7f", "\u202eturned"),
    *("a\u3164b", "a\u115fb", "a\u034fb", "a\u2800b"),
    *("\u2066x", "\u200b", "\u2028", "\ufeff", "\U000e0041", "\x0b", "\x0c", "\x85"),
)
OBEYED = {character for text in HOSTILE for character in text if not character.isprintable()} | FILLERS


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_would_obey_is_shown(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not OBEYED & set(printable(text))
    say(f"a {text} b")
    assert not OBEYED & set(capsys.readouterr().out)
    with pytest.raises(SystemExit), exit_with_message():
        raise UserError(f"a {text}", rule=text, remedy=text)
    assert not OBEYED & set(capsys.readouterr().err)


def test_ordinary_text_stays() -> None:
    text = "√2 = 1.41…\n\tΔ 日本 é 😀 [bold]x[/]"
    assert printable(text) == text


def test_logs_hold_none(repository: Path) -> None:
    code = (
        "import logging, sys\nfrom phimr_nemo.errors import exit_with_message\nwith exit_with_message():\n"
        "    logging.basicConfig()\n    logging.warning('a %s', sys.argv[1])\n    raise RuntimeError(sys.argv[1])\n"
    )
    text = "".join(item for item in HOSTILE if "\0" not in item)
    environment = {**os.environ, "PYTHONPATH": str(repository), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", code, text]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    said = done.stderr.decode("utf-8")
    assert "RuntimeError" in said
    assert "WARNING" in said
    assert not OBEYED & set(said)


def test_a_runs_name_and_stage_are_shown(tmp_path: Path) -> None:
    run = tmp_path / "run\x1b[2J\u202e"
    run.mkdir()
    (run / RUN_FILE).write_text(json.dumps({"stage": "sft\x1b]0;x\x07", "starts": []}), "utf-8")
    raw = io.StringIO()
    Console(file=raw, width=200).print(status_table(status(tmp_path), tmp_path))
    assert "run" in raw.getvalue()
    assert not OBEYED & set(raw.getvalue())


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "<img src=x onerror=y>", "a|b", "a\nb", "\x1b[2J", "[x](javascript:y)", "a & b"]
)
def test_a_cell_of_markdown_holds_no_tag(text: str) -> None:
    for shown in (markdown_text(text), markdown(Table("t", ("run",), ((text,),))).splitlines()[2]):
        assert "<" not in shown
        assert "](" not in shown.replace("]\\(", "")
        assert not OBEYED & set(shown)
    assert markdown(Table("t", ("run",), ((text,),))).count("|") == 6


def test_a_loggers_record_keeps_its_arguments_when_there_is_nothing_to_hide() -> None:
    record = logging.getLogRecordFactory()("n", logging.INFO, "p", 1, "%s of %d", ("a", 2), None)
    assert (record.getMessage(), record.args) == ("a of 2", ("a", 2))
