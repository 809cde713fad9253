"""Secrets are refused in settings and left out of what is printed and recorded; ordinary text stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import GenerateConfig, load_config
from phimr_nemo.config.load import refuse_secrets
from phimr_nemo.errors import UserError
from phimr_nemo.redact import REPLACEMENT, redact, secret_values

# Put together here, so that no file of the project looks as if it held one.
PLANTED = "plan" + "ted-" + "4f7c1e09aa"
SHAPED = {
    "hugging face": "hf" + "_" + "A1b2" * 8,
    "openai": "sk" + "-proj-" + "a1B2" * 6,
    "nvidia": "nvapi" + "-" + "x9" * 12,
    "github": "ghp" + "_" + "a1B2" * 9,
    "aws": "AKIA" + "A1B2C3D4E5F6G7H8",
}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SITE_TOKEN", PLANTED)


@pytest.mark.parametrize("secret", [PLANTED, *SHAPED.values()], ids=["environment", *SHAPED])
def test_a_secret_is_left_out_of_a_text(secret: str) -> None:
    assert redact(f"Bearer {secret}, twice: {secret}.") == f"Bearer {REPLACEMENT}, twice: {REPLACEMENT}."


def test_a_password_in_an_address_is_left_out() -> None:
    assert redact("http://me:pass@host:80/v1 and s3://k:v@b") == (
        f"http://{REPLACEMENT}@host:80/v1 and s3://{REPLACEMENT}@b"
    )


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/v1",
        "runs/hf_model/sk-small",
        "teacher.engine.endpoint.api_key_env=MY_SITE_TOKEN",
        "tokens=12 key=value task-1234",
        "half of x@y is http://a/b:c",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_which_variables_hold_secrets() -> None:
    environment = {
        "HF_TOKEN": "a" * 12,
        "OPENAI_API_KEY": "b" * 40,
        "DB_PASSWORD": "c" * 20,
        "KEY": "short",
        "TOKENIZERS_PARALLELISM": "f" * 20,
        "MONKEY": "g" * 20,
        "PATH": "h" * 20,
    }
    assert secret_values(environment) == ["b" * 40, "c" * 20, "a" * 12]


@pytest.mark.parametrize("secret", [PLANTED, *SHAPED.values(), "http://me:word@host/v1"])
@pytest.mark.parametrize("place", ["text", "list", "key", "part"])
def test_settings_that_hold_a_secret_are_refused_without_repeating_it(secret: str, place: str) -> None:
    places: dict[str, dict[str, Any]] = {
        "text": {"a": {"b": secret}},
        "list": {"a": [{"b": [1, secret]}]},
        "key": {"a": {secret: 1}},
        "part": {"a": {"b": f"--header={secret};"}},
    }
    with pytest.raises(UserError) as caught:
        refuse_secrets(places[place])
    assert "holds a secret" in caught.value.problem
    assert secret not in str(caught.value)
    assert "word" not in str(caught.value).replace("password", "")


def test_the_environment_cannot_be_interpolated_into_settings() -> None:
    overrides = ["problems.path=${oc.env:MY_SITE_TOKEN}", "run.output=out"]
    with pytest.raises(UserError, match="holds a secret"):
        load_config(GenerateConfig, Path("conf/generate/tiny.yaml"), overrides)


def run(repository: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phimr_nemo.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(repository), "MY_SITE_TOKEN": PLANTED}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_command_neither_prints_nor_records_a_secret(repository: Path, tmp_path: Path) -> None:
    """A secret as a value, as a key and as the name of a variable; then a run that has it in its environment."""
    tiny = ("generate", "--config", "conf/generate/tiny.yaml", "run.output=out")
    endpoint = ("generate", "run.output=out", "problems.path=p.jsonl", "teacher.engine.endpoint.model=m")
    for arguments in (
        (*tiny, f"problems.path={PLANTED}"),
        (*tiny, f"{PLANTED}=1"),
        (*endpoint, f"teacher.engine.endpoint.base_urls=[http://me:{PLANTED}@host/v1]"),
        (
            *endpoint,
            "teacher.engine.endpoint.base_urls=[http://host/v1]",
            f"teacher.engine.endpoint.api_key_env={PLANTED}",
        ),
    ):
        done = run(repository, tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        assert PLANTED not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run(repository, tmp_path, *tiny, "problems.count=4")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["command"][-1] == "problems.count=4"
    assert PLANTED not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or PLANTED.encode() not in path.read_bytes()
