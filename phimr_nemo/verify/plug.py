"""A grader of the user's own, for a domain that is not mathematics: a function named in the configuration.

`grader: module:function` names a function of two strings, the response and the problem's answer (which may hold
whatever the domain needs, such as JSON), that returns a :class:`~phimr_nemo.verify.verdict.Verdict`. It is imported
and called only in the sandboxed worker processes, under the limits of mathematics. The name comes from the
configuration, never from data; the module is looked for where Python looks: an installed package, or PYTHONPATH.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

from phimr_nemo.errors import UserError
from phimr_nemo.store.content import file_sha256
from phimr_nemo.store.records import VerdictName
from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS, Verdict

GraderFunction = Callable[[str, str], Verdict]

RULE: Final = "grader is MODULE:FUNCTION, a function (response, answer) -> phimr_nemo.verify.Verdict"
REMEDY: Final = "correct the name, or put the module's directory into PYTHONPATH"
CONFINED: Final = "a call opens and imports nothing: do both at the top of the module"
MAX_RESPONSE_CHARS: Final = 150_000
"""A longer response is graded by its end, where the final answer stands."""
MAX_REASON_CHARS: Final = 200
DIGEST_CHARS: Final = 12


def plugged_name(spec: str) -> str:
    """What verdicts record as their grader: the function's name and a hash of its module's source.

    An edited grader is another grader, so that shards that the old one graded are graded again.

    Raises:
        UserError: not MODULE:FUNCTION, or no such module.
    """
    module, _, function = spec.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UserError(f"grader {spec!r}", rule=RULE, remedy="for example my_domain.grading:grade")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"grader {spec!r}: {error}", rule=RULE, remedy=REMEDY) from error
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise UserError(f"grader {spec!r}: there is no module {module}", rule=RULE, remedy=REMEDY)
    return f"{spec} {file_sha256(Path(found.origin))[:DIGEST_CHARS]}"


def import_grader(spec: str) -> GraderFunction:
    """The function itself; for worker processes.

    Raises:
        Exception: whatever the import of the module raises.
        TypeError: no such function, or one that does not take two arguments.
    """
    module, _, name = spec.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise TypeError(f"{module} has no function {name}")
    inspect.signature(function).bind("response", "answer")
    return function


def ask_grader(function: GraderFunction, response: str, answer: str) -> dict[str, Any]:
    """A verdict as the worker sends it; what is no verdict, or an exception, is the verdict "error"."""
    try:
        verdict = function(response, answer)
    except Exception as error:  # noqa: BLE001 - it is the user's function; the answer that breaks it is reported
        reason = f"the grader failed: {type(error).__name__}: {error}"
        confined = f" ({CONFINED})" if isinstance(error, (ImportError, PermissionError)) else ""
        return {"verdict": "error", "extracted": "", "reason": reason + confined}
    if not isinstance(verdict, Verdict) or verdict.verdict not in get_args(VerdictName):
        return {"verdict": "error", "extracted": "", "reason": f"the grader returned {type(verdict).__name__}"}
    return {
        "verdict": verdict.verdict,
        "extracted": str(verdict.extracted)[:MAX_ANSWER_CHARS],
        "reason": str(verdict.reason)[:MAX_REASON_CHARS],
    }
