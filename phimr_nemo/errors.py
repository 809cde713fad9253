"""The errors a user can cause or meet, and the exit codes that scripts rely on."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

from phimr_nemo.redact import keep_secrets_from_output, redact
from phimr_nemo.text.printable import printable

EXIT_DONE: Final = 0
EXIT_INTERNAL: Final = 1
EXIT_USER: Final = 2
EXIT_PREEMPTED: Final = 3
LONGEST_PATH: Final = 4095
LONGEST_NAME: Final = 255
"""Bytes, on Linux; temporary names and files in a directory need some of them."""
SHOWN_CHARS: Final = 100
REQUIREMENT: Final = re.compile(r"(?P<name>[\w.-]+).*\bextra == ['\"](?P<extra>\w+)['\"]")
DISTRIBUTIONS: Final = {
    "lightning": "nemo-toolkit",
    "megatron": "megatron-core",
    "nemo": "nemo-toolkit",
    "nemo_aligner": "nemo-toolkit",
}
"""Module -> what brings it, where the names differ; NeMo-Aligner comes beside NeMo (requirements/aligner.txt)."""


class UserError(Exception):
    """A mistake in the user's input: names the value, the rule it breaks and the remedy.

    Args:
        problem: what was found, with the offending value in it.
        rule: what would have been right.
        remedy: what to do about it.
    """

    def __init__(self, problem: str, *, rule: str, remedy: str) -> None:
        super().__init__(problem, rule, remedy)
        self.problem, self.rule, self.remedy = problem, rule, remedy

    def __str__(self) -> str:
        return f"{self.problem}\n  rule:   {self.rule}\n  remedy: {self.remedy}"

    def __reduce__(self) -> tuple[object, tuple[str, str, str]]:
        """Survive the trip back from a worker process (keyword arguments do not by default)."""
        return _rebuild_user_error, (self.problem, self.rule, self.remedy)


def _rebuild_user_error(problem: str, rule: str, remedy: str) -> UserError:
    return UserError(problem, rule=rule, remedy=remedy)


class Preempted(Exception):
    """The run was asked to stop, has saved its state, and continues when it is started again."""


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Around a program: the user's mistake becomes one clear message and exit code 2, a preemption 3.

    One of several ranks hands its message to the launcher that started it, so that it is shown once. What the
    terminal's encoding lacks is written as an escape.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    keep_secrets_from_output()
    try:
        yield
    except UserError as error:
        _refuse(error)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _refuse(path_too_long(str(error.filename)))
    except ModuleNotFoundError as error:
        absent = missing_extra(error.name or "")
        if absent is None:
            raise
        _refuse(absent)
    except Preempted as stopped:
        _tell(str(stopped), {"preempted": str(stopped)})
        sys.exit(EXIT_PREEMPTED)


def path_too_long(path: str) -> UserError:
    """The message about a path that no file system takes."""
    shown = path if len(path) <= SHOWN_CHARS else f"{path[:SHOWN_CHARS]}..."
    return UserError(
        f"the path {shown} has {len(os.fsencode(path)):,} bytes",
        rule=f"a path has at most {LONGEST_PATH:,} bytes, and each name in it at most {LONGEST_NAME}",
        remedy="use a shorter one",
    )


def missing_extra(module: str) -> UserError | None:
    """The message about a module that one of the package's extras brings; None about any other."""
    package = module.partition(".")[0]
    wanted = DISTRIBUTIONS.get(package, package).replace("_", "-")
    try:
        required = importlib.metadata.requires("phimr-nemo") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in required:
        found = REQUIREMENT.match(requirement)
        if found is not None and found["name"].replace("_", "-").lower() == wanted:
            return UserError(
                f"the package {package} is not installed",
                rule=f"this needs the extra {found['extra']!r} of phimr-nemo",
                remedy=f"pip install 'phimr-nemo[{found['extra']}]'; in a checkout make setup, which pins versions",
            )
    return None


def _refuse(error: UserError) -> NoReturn:
    message = redact(str(error))
    _tell(f"error: {message}", {"user_error": [redact(part) for part in (error.problem, error.rule, error.remedy)]})
    sys.exit(EXIT_USER)


def _tell(message: str, facts: dict[str, object]) -> None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        print(printable(message), file=sys.stderr)
        return
    # In torchrun's own form, so that torchrun without our launcher shows it too.
    Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time()), **facts}), "utf-8")
