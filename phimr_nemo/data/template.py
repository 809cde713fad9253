"""Chat templates of unknown origin: rendered once in a process that can be killed before this one renders them.

A template is a program. transformers runs it in a sandbox that keeps it from the machine, and not from looping for
hours or from making a text of gigabytes.
"""

from __future__ import annotations

import functools
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.process.memory import GIBIBYTE

MAX_TEMPLATE_CHARS: Final = 100_000
MAX_PROMPT_CHARS: Final = 100_000
"""What a template may put around a short question."""

CPU_SECONDS: Final = 5
WALL_SECONDS: Final = 60.0
MEMORY_BYTES: Final = GIBIBYTE
_ROOT: Final = str(Path(__file__).resolve().parents[2])
_BOOT: Final = "import sys; sys.path[:1] = [sys.argv[1]]; from phimr_nemo.data.template import main; main()"
_CONVERSATIONS: Final = (
    [{"role": "user", "content": "question"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "question"}],
    [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "<think>\nthought\n</think>\nanswer"},
        {"role": "user", "content": "second question"},
    ],
)
"""The first has to work, and none may take long; a template may refuse the others."""


def check_template(
    template: object, directory: Path, special_tokens: Mapping[str, Any], *, asks: bool = True
) -> None:
    """Refuse a template that does not render a question quickly and in little memory.

    Args:
        template: Jinja.
        directory: where it comes from, for a message.
        special_tokens: what the template may name: `eos_token` and its like.
        asks: whether it renders questions, and so has to hold them; a named one may be for tools alone.

    Raises:
        UserError: it does not.
    """
    tokens = {name: str(value) for name, value in special_tokens.items() if isinstance(value, str)}
    if isinstance(template, str):
        problem = _problem(template, tuple(sorted(tokens.items())), asks)
    else:
        problem = f"is no text: {template!r:.80}"
    if problem:
        raise UserError(
            f"the chat template in {directory} {problem}",
            rule=f"a template renders a question within {CPU_SECONDS} s and {MEMORY_BYTES // GIBIBYTE} GiB",
            remedy="download the tokenizer again, or give it the reasoning template: phimr adopt DIRECTORY TARGET",
        )


@functools.cache
def _problem(template: str, tokens: tuple[tuple[str, str], ...], asks: bool) -> str:
    if len(template) > MAX_TEMPLATE_CHARS:
        return f"has more than {MAX_TEMPLATE_CHARS:,} characters"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _BOOT, _ROOT],
            input=json.dumps({"template": template, "tokens": dict(tokens), "asks": asks}),
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"does not render a question within {WALL_SECONDS:g} s"
    if done.returncode == 0:
        return ""
    said = done.stdout.strip().splitlines()
    return said[-1] if said else f"does not render a question within {CPU_SECONDS} s of processor time"


def main() -> None:
    """Render the template that comes on standard input; says what is wrong with it on standard output."""
    given = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = CPU_SECONDS + int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    try:
        render = _environment().from_string(given["template"]).render
    except Exception as error:  # noqa: BLE001 - whatever Jinja says of it
        sys.exit(_say(f"is no Jinja: {type(error).__name__}: {str(error)[:200]}"))
    for index, turns in enumerate(_CONVERSATIONS):
        try:
            # transformers says that there are none; a template may rely on it.
            text = render(messages=turns, tools=None, documents=None, add_generation_prompt=True, **given["tokens"])
        except MemoryError:
            sys.exit(_say(f"needs more than {MEMORY_BYTES // GIBIBYTE} GiB to render a question"))
        except Exception as error:  # noqa: BLE001 - the template's own refusal among them
            if index == 0:
                sys.exit(_say(f"does not render a question: {type(error).__name__}: {str(error)[:200]}"))
            continue
        if index == 0 and given["asks"] and turns[0]["content"] not in text:
            sys.exit(_say("leaves the question out of the prompt"))
        if len(text) > MAX_PROMPT_CHARS:
            sys.exit(_say(f"makes {len(text):,} characters of a short question"))


def _say(problem: str) -> int:
    print(problem)
    return 1


def _environment() -> Any:
    """As transformers renders (`utils/chat_template_utils.py`), without importing it."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - so declared there

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return made
