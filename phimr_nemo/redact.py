"""Secrets stay in the environment or in a file: they are left out of texts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

SECRET_VARIABLE: Final = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|passwd|password|credentials?)$")
"""The names of environment variables that hold a secret, by custom."""

MIN_SECRET_CHARS: Final = 12
"""A shorter value of such a variable is a switch or a word; leaving it out would garble ordinary text."""

SECRET_SHAPE: Final = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|nvapi-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16})\b"
)
"""Keys that can be told by their prefix: Hugging Face, OpenAI and its kin, NVIDIA, GitHub, GitLab, Slack, AWS."""

URL_CREDENTIALS: Final = re.compile(r"(?<=://)[^/\s@:'\"]*:[^/\s@'\"]+(?=@)")
REPLACEMENT: Final = "[secret]"


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of an environment's secret variables, the longest first."""
    found = {
        value
        for name, value in environment.items()
        if SECRET_VARIABLE.search(name) and len(value.strip()) >= MIN_SECRET_CHARS
    }
    return sorted((value.strip() for value in found), key=len, reverse=True)


def redact(text: str) -> str:
    """A text without the secrets of this process's environment, known kinds of keys and passwords in addresses."""
    for value in secret_values(os.environ):
        text = text.replace(value, REPLACEMENT)
    return URL_CREDENTIALS.sub(REPLACEMENT, SECRET_SHAPE.sub(REPLACEMENT, text))
