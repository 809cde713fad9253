"""Documents and --help use the field's words; words of our own that stopped readers stay out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from phimr_nemo.cli.help import key_lines
from phimr_nemo.cli.main import STAGE_HELP, app

INSTEAD = {
    r"\ba (CPU )?second\b(?= *(\||\(|,|and GPU|on the|of the|$))": "per second, per CPU-second",
    r"\bCPU seconds?\b(?= *(per|a)\b)": "CPU-seconds",
    r"\b(seconds|steps|samples|solutions|tokens|pairs|responses|prompts|rows|problems|rollouts|bytes|optimizer) an? "
    r"(step|stage|question|problem|seed|row|prompt|shard|recipe|response|token|GPU|round)\b": "per",
    r"(?<!-)(?<!_)\bpeers?\b": "baseline",
    r"\bright (answers?|responses?|solutions?|ones?)\b": "correct",
    r"\bkept out of training\b|\bdocuments kept out\b": "held out",
    r"\bstderr, (questions|seeds)\b": "SE (clustered by question), SE (across seeds)",
    r"\b(three|without the|all|no) remed(y|ies)\b": "stabilization techniques",
    r"\barms?\b(?= (is|are) unstable)": "no configuration diverged",
    r"\bkillable\b": "sandboxed worker processes",
    r"\bcurrencies travel\b": "artifact formats",
    r"\bhouse rules\b|\bRules of the house\b": "code conventions",
    r"\bits company\b": "pass@1, pass@k, maj@k",
    r"\bhas no say\b": "is ignored",
    r"\bforth and back\b": "back and forth",
    r"\bIn kind\b": "qualitatively",
    r"\b[Tt]alk to (a model|what came out)\b": "chat with the model",
    r"\btold apart\b": "distinguished; reward accuracy",
    r"\b2\.4 generation\b": "the image's tag",
}
"""A pattern of our own -> the field's word."""
EXAMPLES = (
    "tokens a second (memory)",
    "CPU seconds a step",
    "8 samples a question",
    "optimizer a GPU",
    "a peer",
    "the right answers",
    "rows kept out of training",
    "stderr, seeds",
    "the three remedies",
    "no arm is unstable",
    "killable workers",
    "two currencies travel",
    "Rules of the house",
    "pass@1 and its company",
    "the rest has no say",
    "forth and back",
    "In kind this is",
    "talk to what came out",
    "pairs told apart",
    "a container of the 2.4 generation",
)
REPOSITORY = Path(__file__).resolve().parents[2]
# Not the changelog: what was written of earlier versions stays.
FRONT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/README.md")
DOCUMENTS = [*(REPOSITORY / name for name in FRONT), *sorted((REPOSITORY / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def found(text: str) -> list[str]:
    """What to write instead, for each of our own words in a text; code is left alone."""
    prose = CODE.sub("", text)
    return [
        f"{match.group(0)!r} -> {instead}"
        for pattern, instead in INSTEAD.items()
        for match in re.finditer(pattern, prose, re.MULTILINE)
    ]


def helps() -> Iterator[tuple[str, str]]:
    runner = CliRunner()
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        yield name, runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
    for stage in STAGE_HELP:
        yield f"keys of {stage}", " ".join(" ".join(line.split()) for line in key_lines(stage))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_document_uses_the_fields_words(document: Path) -> None:
    assert found(document.read_text("utf-8")) == []


def test_help_uses_the_fields_words() -> None:
    assert {name: words for name, text in helps() if (words := found(text))} == {}


def literals(module: Path) -> Iterator[str]:
    """The strings of a module that can be printed: all but its docstrings."""
    tree = ast.parse(module.read_text("utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_what_is_printed_uses_the_fields_words() -> None:
    modules = sorted((REPOSITORY / "phimr_nemo").rglob("*.py"))
    told = {str(module.relative_to(REPOSITORY)): found("\n".join(literals(module))) for module in modules}
    assert {module: words for module, words in told.items() if words} == {}


@pytest.mark.parametrize("text", EXAMPLES)
def test_a_word_of_our_own_is_found(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize("text", ["a second Ctrl-C ends it", "the right column", "`--peer NAME`", "DPO pairs"])
def test_plain_english_and_code_are_left_alone(text: str) -> None:
    assert found(text) == []
