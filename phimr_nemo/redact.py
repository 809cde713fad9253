"""Secrets stay in the environment or in a file: they are left out of texts, logs and tracebacks.

The only home of what counts as one: values of variables whose names say so, kinds of keys that can be told by their
form, and what stands where a key stands (an address, a header, a setting of such a name).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import quote

from phimr_nemo.text.printable import printable

_WORDS: Final = (
    r"api_?keys?|keys?|tokens?|secrets?|pass|passwd|passwords?|passphrases?|pwd|pat|pats|auth|bearer|credentials?|webhook"
    r"|cookies?|signature|pgpass(?:word)?|apikeys?|accesskeys?|secretkeys?|jwts?|hmac|otp"
)
SECRET_VARIABLE: Final = re.compile(rf"(?i)(?:^|_)(?:{_WORDS})\d*(?:_|$)")
"""The names of environment variables that hold a secret, by custom."""

SECRET_SETTING: Final = re.compile(
    r"(?i)^(?:.*_)?(?:api_?key|access_?key|secret_?key|account_?key|auth_?key|signing_?key|private_?key|token|secret"
    r"|password|passwd|pwd|passphrase|authorization|bearer|credentials?|cookies?|jwt|hmac)\d*$"
)
"""The names of settings whose text is a secret, whatever it looks like: words with _ between them."""
_BETWEEN_WORDS: Final = re.compile(r"-|(?<=[a-z0-9])(?=[A-Z])")
"""In names like X-Auth-Key and refreshToken."""

MIN_SECRET_CHARS: Final = 12
"""A shorter value of such a variable is a switch or a word; leaving it out would garble ordinary text."""

MIN_MIXED_CHARS: Final = 8
"""Unless it mixes letters and digits, which words do not."""

SECRET_SHAPE: Final = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|nvapi-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|gsk_[A-Za-z0-9]{20,}|r8_[A-Za-z0-9]{20,}|xai-[A-Za-z0-9]{20,}"
    r"|pplx-[A-Za-z0-9]{20,}|wandb_v\d_[A-Za-z0-9_]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}"
    r"|dckr_pat_[A-Za-z0-9_-]{20,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|hvs\.[A-Za-z0-9_-]{20,}|tvly-[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})"
    r"|\b(?:api_org_[A-Za-z0-9]{20,}|dapi[0-9a-f]{32}|fw_[A-Za-z0-9]{20,}|ms-[0-9a-f]{8}-[0-9a-f-]{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
)
"""Keys that can be told by their form: Hugging Face, OpenAI and its kin, NVIDIA, GitHub, GitLab, Slack, AWS, Google,
Groq, Replicate, xAI, Perplexity, W&B, npm, PyPI, Docker, SendGrid, Stripe, Vault, Tavily, Databricks, Fireworks,
ModelScope, signed web tokens, private keys."""

_HEADER: Final = re.compile(r"(?i)(?:(?<=\bbearer )|(?<=\bbasic ))(?=[^\s'\",;]*[0-9]|[^\s'\",;]{20,})[^\s'\",;]{8,}")
_AUTHORIZATION: Final = re.compile(
    r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer|token)\s+)[^\s'\",;\[]{4,}"
)
_QUERY: Final = re.compile(rf"(?i)(?<=[?&;])((?:[\w-]*[_-])?(?:{_WORDS}|sig|key))=[^&\s'\"#]+")
_WEBHOOK: Final = re.compile(
    r"(?i)(://(?:hooks\.slack\.com/services/|discord(?:app)?\.com/api/webhooks/\d+/|api\.telegram\.org/bot"
    r"|outlook\.office\.com/webhook/|[\w.-]+\.webhook\.office\.com/webhookb2/))[^\s'\"]+"
)
_NAMED: Final = (
    r"(?:[\w-]*[_-])?(?:(?:api|access|secret|account|auth|subscription)[_-]?key|client[_-]key[_-]data|token|secret"
    r"|(?:pg)?password|passwd|passphrase|pwd)"
)
_VALUE: Final = r"[^\s'\",;&@]"
_MIXED: Final = rf"(?={_VALUE}*[0-9])(?={_VALUE}*[A-Za-z])(?!\[secret\]){_VALUE}"
"""Letters and digits, as words do not have them."""
_ASSIGNED: Final = re.compile(
    rf"(?i)(?<![\w-])(?!\w*_env\b)((?:{_NAMED}['\"]?\s*[:=]|--{_NAMED}\s)\s*['\"]?){_MIXED}{{{MIN_SECRET_CHARS},}}"
)
_LOGIN: Final = re.compile(r"(?i)(\blogin\s+\S+\s+password\s+)\S+")
_COOKIE: Final = re.compile(
    r"(?i)(\b(?:set-)?cookie['\"]?[ \t]{0,8}:[ \t]{0,8}['\"]?)(?=[^\r\n'\"=]{1,80}=)[^\r\n'\"]+"
)
_USER: Final = re.compile(r"((?:(?<=\s-u )|(?<=--user ))[^\s:]+:)[^\s'\"]+")
"""curl's."""
_BEFORE_HOST: Final = re.compile(rf"(?i)(?<![\w/.:+-])(?!mailto:)([\w.+-]+:){_MIXED}{{{MIN_MIXED_CHARS},}}(?=@[\w-])")
_KEY: Final = re.compile(rf"(?i)((['\"])key\2\s*:\s*['\"]){_MIXED}{{{MIN_SECRET_CHARS},}}")
"""In JSON: a bare `key = ...` is any key of a mapping."""
_OPTION: Final = re.compile(
    r"(\b(?:(?:mysql|mariadb)[\w-]*[^\n|;&]{0,200}?\s-p|sshpass\s+-p\s*|redis-cli\b[^\n|;&]{0,200}?\s-a\s+)['\"]?)[^\s'\"]+"
)
"""Passwords behind an option of one letter."""
URL_CREDENTIALS: Final = re.compile(r"(?<=://)(?!git@)[^/\s'\"?#]+(?=@)")
REPLACEMENT: Final = "[secret]"
_NAME: Final = re.compile(r"[A-Z][A-Z0-9]{0,15}(?:_[A-Z0-9]{1,15})*")


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of an environment's secret variables, the longest first."""
    found = {value.strip() for name, value in environment.items() if SECRET_VARIABLE.search(name)}
    return sorted(filter(_can_be_secret, found), key=len, reverse=True)


def _can_be_secret(value: str) -> bool:
    mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    if len(value) < (MIN_MIXED_CHARS if mixed else MIN_SECRET_CHARS):
        return False
    # A file with the secret, or a socket to whoever knows it.
    with contextlib.suppress(OSError, ValueError):
        return not (value.startswith(("/", "~")) and Path(value).expanduser().exists())
    return True


def redact(text: str) -> str:
    """A text without the secrets of this process's environment, known kinds of keys and passwords in addresses."""
    for value in secret_values(os.environ):
        for written in (value, quote(value, safe="")):
            text = text.replace(written, REPLACEMENT)
    text = _WEBHOOK.sub(rf"\1{REPLACEMENT}", text)
    for pattern in (SECRET_SHAPE, URL_CREDENTIALS, _HEADER):
        text = pattern.sub(REPLACEMENT, text)
    text = _QUERY.sub(rf"\1={REPLACEMENT}", text)
    for pattern in (_COOKIE, _LOGIN, _USER, _BEFORE_HOST, _AUTHORIZATION, _ASSIGNED, _KEY, _OPTION):
        text = pattern.sub(rf"\1{REPLACEMENT}", text)
    return text


def is_secret_setting(name: str, text: str) -> bool:
    """Whether a setting's name says that its text is a secret."""
    return SECRET_SETTING.match(_BETWEEN_WORDS.sub("_", name)) is not None and len(text) >= MIN_MIXED_CHARS


def shown_variable(name: str) -> str:
    """The name of an environment variable for a message; what may be the key itself is not repeated."""
    is_name = name in os.environ or (_NAME.fullmatch(name) is not None and redact(name) == name)
    return name if is_name else "that was named (not repeated here: it may be the key itself)"


def keep_secrets_from_output() -> None:
    """Leave secrets, and what a terminal would obey, out of what this process logs and of its last traceback."""
    sys.excepthook = _print_exception
    threading.excepthook = lambda given: _print_exception(given.exc_type, given.exc_value, given.exc_traceback)
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = make(*arguments, **options)
        # A record whose arguments do not fit is reported where it is formatted.
        with contextlib.suppress(TypeError, ValueError):
            text = made.getMessage()
            if (clean := printable(redact(text))) != text:
                made.msg, made.args = clean, ()
        if made.exc_info and made.exc_info[0] is not None:
            made.exc_text = _shown(traceback.format_exception(*made.exc_info)).rstrip("\n")
        return made

    record.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


def _print_exception(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is None or issubclass(kind, SystemExit):
        return
    sys.stderr.write(_shown(traceback.format_exception(kind, error, trace)))


def _shown(lines: Sequence[str]) -> str:
    return printable(redact("".join(lines)))
