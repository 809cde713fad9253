"""`phimr STAGE -h`: every key is there, every example can be typed, a key typed as an option is explained."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from phimr_nemo import __version__
from phimr_nemo.cli.help import examples, key_lines
from phimr_nemo.cli.main import app
from phimr_nemo.config import STAGES, load_config
from phimr_nemo.config.common import Schedule
from phimr_nemo.config.load import flat, read_preset
from phimr_nemo.errors import UserError

COMMANDS = (*STAGES, "quickstart")


def help_of(*words: str) -> str:
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_key_of_a_preset_is_named(stage: str) -> None:
    """The presets' own keys, read by another way than the help reads the dataclasses."""
    text = help_of(stage, "-h")
    assert text == help_of(stage, "--help")
    named = set(re.findall(r"^  ([a-z_0-9.]+)  ", text, re.MULTILINE))
    for preset in sorted(Path("conf", stage).glob("*.yaml")):
        keys = {key for key, value in flat(read_preset(preset)).items() if not isinstance(value, list)}
        assert keys <= named, preset
    assert {"run.output", "run.seed"} <= named


def test_a_command_without_a_word_takes_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`phimr quickstart` alone is the whole recipe."""
    begun: list[object] = []
    monkeypatch.setattr("phimr_nemo.jobs.quickstart.run_quickstart", lambda *given, **_: begun.extend(given))
    assert CliRunner().invoke(app, ["quickstart"]).exit_code == 0
    assert begun == [Path("conf/quickstart/tiny.yaml"), [0], Path("runs/quickstart"), []]


@pytest.mark.parametrize("stage", COMMANDS)
def test_every_example_is_shown_and_can_be_typed(stage: str) -> None:
    shown = help_of(stage, "-h")
    for line in examples(stage):
        assert f"  {line}\n" in shown
        words = shlex.split(line)
        assert words[:2] == ["phimr", stage]
        if "--config" in words:
            rest = [word for word in words[4:] if "=" in word]
            load_config(STAGES[stage], Path(words[3]), rest)


def test_a_key_is_described() -> None:
    (line,) = (line for line in key_lines("sft") if line.startswith("  optim.schedule  "))
    assert set(line.split()[1].split("|")) == set(get_args(Schedule))
    (line,) = (line for line in key_lines("dpo") if line.startswith("  beta  float"))
    assert line.endswith("strength of the implied KL penalty.")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("sft", "--optim.lr", "1e-3"), "write optim.lr=1e-3"),
        (("sft", "--optim.lr=1e-3"), "write optim.lr=1e-3"),
        (("sft", "-optim.lr=1e-3", "x"), "optim.lr=1e-5"),
        (("midtrain", "--max_steps", "3"), "write max_steps=3"),
        (("grpo", "--engine.kind", "--dry-run"), "write engine.kind=VALUE"),
        (("dpo", "--beta", "base=x"), "write beta=VALUE"),
        (("verify", "--workers.x=2"), "write workers.x=2"),
    ],
)
def test_a_setting_written_as_an_option_is_explained(words: tuple[str, ...], remedy: str) -> None:
    done = CliRunner().invoke(app, [*words])
    assert isinstance(done.exception, UserError | SystemExit)
    if isinstance(done.exception, UserError):
        assert done.exception.remedy == remedy


def test_an_option_of_its_own_stays_one() -> None:
    done = CliRunner().invoke(app, ["verify", "--workers", "2", "--confg", "x"])
    assert done.exit_code == 2
    assert "--config" in done.output


def test_the_version() -> None:
    assert help_of("--version") == f"phimr-nemo {__version__}\n"


def test_help_in_two_spellings() -> None:
    assert help_of("-h") == help_of("--help")
