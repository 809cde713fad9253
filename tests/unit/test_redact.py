"""Secrets are refused in settings and left out of what is printed and recorded; ordinary text stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import process_time
from typing import Any

import pytest

from phimr_nemo.config import GenerateConfig, load_config
from phimr_nemo.config.load import refuse_secrets
from phimr_nemo.errors import UserError
from phimr_nemo.redact import REPLACEMENT, redact, secret_values, shown_variable

# Put together here, so that no file of the project looks as if it held one.
PLANTED = "plan" + "ted-" + "4f7c1e09aa"
SHAPED = {
    "hugging face": "hf" + "_" + "A1b2" * 8,
    "openai": "sk" + "-proj-" + "a1B2" * 6,
    "nvidia": "nvapi" + "-" + "x9" * 12,
    "github": "ghp" + "_" + "a1B2" * 9,
    "aws": "AKIA" + "A1B2C3D4E5F6G7H8",
}


MIXED = "s3cr3ts" + "ecr3tvalue"
SHAPED |= {
    "anthropic": "sk" + "-ant-api03-" + "a1" * 20,
    "google": "AI" + "za" + "b1" * 17 + "c",
    "groq": "gs" + "k_" + "a1" * 20,
    "replicate": "r8" + "_" + "a1" * 18,
    "wandb": "wandb" + "_v1_" + "a1" * 20,
    "web token": "ey" + "JhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefghijklmnop",
    "stripe": "sk" + "_live_" + "a1" * 12,
    "vault": "hvs" + "." + "a1" * 15,
    "tavily": "tvly" + "-" + "a1" * 15,
    "npm": "npm" + "_" + "a1" * 18,
    "temporary aws": "ASIA" + "A1B2C3D4E5F6G7H8",
    "databricks": "dapi" + "0a1b2c3d" * 4,
    "fireworks": "fw" + "_" + "a1B2" * 6,
    "organisation": "api_" + "org_" + "a1B2" * 8,
    "PGP": "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----\nabc\n-----END PGP " + "PRIVATE KEY BLOCK-----",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE\nabc\n-----END RSA " + "PRIVATE KEY-----",
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
    ("text", "left"),
    [
        ("http://{}@h:1/v1", "http://[secret]@h:1/v1"),
        ("https://u:{}@h/x", "https://[secret]@h/x"),
        ("https://u:p%40{}@h/x", "https://[secret]@h/x"),
        ("http://h/v1?api_key={}&n=1", "http://h/v1?api_key=[secret]&n=1"),
        ("http://h/v1?n=1&X-Amz-Signature={}", "http://h/v1?n=1&X-Amz-Signature=[secret]"),
        ("https://hooks.slack.com/services/{}", "https://hooks.slack.com/services/[secret]"),
        ("Authorization: Bearer {}", "Authorization: Bearer [secret]"),
        ("{{'authorization': 'bearer {}'}}", "{{'authorization': 'bearer [secret]'}}"),
        ("Authorization: Basic {}==", "Authorization: Basic [secret]"),
        ("Authorization: Basic dTpw", "Authorization: Basic [secret]"),
        ("http://h/v1;key={}", "http://h/v1;key=[secret]"),
        ("AccountKey={}", "AccountKey=[secret]"),
        ('{{"api_key": "{}"}}', '{{"api_key": "[secret]"}}'),
        ("OPENAI_API_KEY={}", "OPENAI_API_KEY=[secret]"),
        ("x-api-key: {}", "x-api-key: [secret]"),
        ("phimr x --api-key={} --n 1", "phimr x --api-key=[secret] --n 1"),
        ("phimr x --token {}", "phimr x --token [secret]"),
        ("password=a!{}$", "password=[secret]"),
        ("client-key-data: {}", "client-key-data: [secret]"),
        ("proxy me:{}@proxy.corp:3128", "proxy me:[secret]@proxy.corp:3128"),
        ("git+https://u:{}@github.com/a/b", "git+https://[secret]@github.com/a/b"),
        ("https://u:p@{}@h/x", "https://[secret]@h/x"),
        ("curl -u me:{} https://h", "curl -u me:[secret] https://h"),
        ("Cookie: session={}; a=b", "Cookie: [secret]"),
        ("Set-Cookie: sid={}; HttpOnly", "Set-Cookie: [secret]"),
        ("mysql -h db -u me -p{} prod", "mysql -h db -u me -p[secret] prod"),
        ("mysqldump --all -p'{}'", "mysqldump --all -p'[secret]'"),
        ("sshpass -p {} ssh h", "sshpass -p [secret] ssh h"),
        ("redis-cli -h r -a {} ping", "redis-cli -h r -a [secret] ping"),
        ("PGPASSWORD={} psql", "PGPASSWORD=[secret] psql"),
        ("MYSQL_PWD={}", "MYSQL_PWD=[secret]"),
        ('{{"key": "{}"}}', '{{"key": "[secret]"}}'),
        ("machine h login me password {}", "machine h login me password [secret]"),
        ("https://discord.com/api/webhooks/12/{}", "https://discord.com/api/webhooks/12/[secret]"),
        ("https://api.telegram.org/bot12:{}/sendMessage", "https://api.telegram.org/bot[secret]"),
        ("https://outlook.office.com/webhook/{}@x/y", "https://outlook.office.com/webhook/[secret]"),
    ],
)
def test_what_stands_where_a_secret_stands_is_left_out(text: str, left: str) -> None:
    assert redact(text.format(MIXED)) == left.format()


@pytest.mark.parametrize(
    "name",
    [
        *("AZURE_KEY1", "MY_PAT", "WANDB_AUTH", "OPENAI_API_KEYS", "AWS_ACCESS_KEY_ID", "PGPASS", "HF_TOKEN_READ"),
        *(
            "token",
            "DB_PWD",
            "SLACK_WEBHOOK_URL",
            "MY_APIKEY",
            "BEARER",
            "JWT_SECRET_2",
            "SMTP_PASSPHRASE",
            "JWT",
            "HMAC",
        ),
    ],
)
@pytest.mark.parametrize("value", [MIXED, "abc123-+", "cr3tsecABCDEFGHIJK==", "no digits, but long"])
def test_the_value_of_a_variable_of_such_a_name_is_left_out(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"a {value} b") == f"a {REPLACEMENT} b"
    with pytest.raises(UserError, match="holds a secret"):
        refuse_secrets({"extra_body": {"k": value}})


CAMEL = ("refreshToken", "apiKey", "X-Auth-Key", "cookie", "Set-Cookie", "signingKey", "jwt")


@pytest.mark.parametrize(
    "name", ["api_key", "X-API-Key", "authorization", "client_secret", "hf_token", "Password", *CAMEL]
)
def test_a_setting_of_such_a_name_is_refused_whatever_it_holds(name: str) -> None:
    with pytest.raises(UserError, match="holds a secret"):
        refuse_secrets({"extra_body": {name: "correct horse"}})


@pytest.mark.parametrize(
    "name", ["api_key_env", "max_tokens", "eos_token_id", "tokenizer", "key_value", "author", "eosTokenId", "hotkey"]
)
def test_a_setting_of_another_name_is_not(name: str) -> None:
    refuse_secrets({"extra_body": {name: "correct horse"}})


def test_a_file_that_a_variable_names_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path))
    assert redact(f"cannot open {tmp_path}/x") == f"cannot open {tmp_path}/x"


@pytest.mark.parametrize("key", [MIXED, "sk" + "-abc123abc123abc123", "AKIA" + "A1B2C3D4E5F6G7H8", "plainlowerwords"])
def test_a_key_in_place_of_a_variables_name_is_not_repeated(key: str) -> None:
    assert key not in shown_variable(key)
    overrides = ["run.output=out", "problems.path=p.jsonl", "teacher.engine.endpoint.model=m"]
    overrides += ["teacher.engine.endpoint.base_urls=[http://h/v1]", f"teacher.engine.endpoint.api_key_env={key}"]
    with pytest.raises(UserError) as caught:
        load_config(GenerateConfig, Path("conf/generate/paper.yaml"), overrides)
    assert key not in str(caught.value)
    assert "not repeated here" in str(caught.value)
    assert "teacher.engine.endpoint.api_key_env" in caught.value.problem


def test_the_name_of_a_variable_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("an_odd_name", "x")
    for name in ("ENDPOINT_KEY", "PHIMR_KEY", "KEY2", "an_odd_name"):
        assert shown_variable(name) == name


LOGS = """
import logging, sys, threading
from phimr_nemo.errors import exit_with_message
secret = sys.argv[1]
with exit_with_message():
    logging.basicConfig()
    logging.error("asked with %s", secret)
    try:
        raise ValueError(secret)
    except ValueError:
        logging.exception("failed")
    thread = threading.Thread(target=lambda: 1 // len(secret[:0]) if secret else None)
    thread.start(), thread.join()
    raise RuntimeError(f"http://u:{secret}@h/v1 and Bearer {secret}")
"""


def test_logs_and_tracebacks_hold_no_secret(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository), "MY_SITE_TOKEN": PLANTED}
    command = [sys.executable, "-c", LOGS, PLANTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert PLANTED not in done.stdout + done.stderr
    assert done.stderr.count("Traceback") == 3
    assert f"asked with {REPLACEMENT}" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert f"RuntimeError: http://{REPLACEMENT}@h/v1 and Bearer {REPLACEMENT}" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "git@github.com:a/b, ssh://git@github.com/a",
        "the bearer of basic knowledge",
        "token: 12, password = none, key: abc",
        "http://h/v1?n=1&monkey=2",
        "http://localhost:8000/v1",
        "runs/hf_model/sk-small",
        "teacher.engine.endpoint.api_key_env=MY_SITE_TOKEN",
        "tokens=12 key=value task-1234",
        "half of x@y is http://a/b:c",
        "mailto:name12345@site.org, https://h/a@b and a:b@c",
        "max_completion_tokens: 4096abcd4096",
        "--api-key-env MY_SITE_TOKEN2 cookie: a recipe",
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


@pytest.mark.parametrize("part", ["-", "a-", "a:", "a_", "token", "cookie: ", "login x password ", "https://", "--"])
def test_a_long_text_takes_no_time(part: str) -> None:
    started = process_time()
    redact(part * (100_000 // len(part)))
    assert process_time() - started < 5
