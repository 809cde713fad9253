"""Commands of the documents that no test machine can run still parse; tests/documents runs all others."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from warm_phimr import phimr

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md"))
FRONT = ("README.md", "recipes/README.md", "CONTRIBUTING.md")
DOCUMENTS = (*FRONT, "bench/results/README.md", *DOCS)
BLOCK = re.compile(r"^```(?:bash|sh|shell)(?P<word> \w+)?\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
# Commands of the system that a README may use; what they do is not ours to check.
SYSTEM = {"git", "cd", "cp", "source", "export", "pip", "python3", "tail", "cat", "less", "ls", "."}
MUST_STAND = {"README.md": ("make quickstart", "make test")}


def commands(document: str, *, run: bool) -> Iterator[str]:
    """The commands of a document's bash blocks, continued lines joined, comments dropped.

    Args:
        document: its path in the tree.
        run: those that tests/documents runs, or those with a word that says why it does not.
    """
    path = REPOSITORY / document
    for block in BLOCK.finditer(path.read_text("utf-8") if path.is_file() else ""):
        if run != (block["word"] is None):
            continue
        for line in re.sub(r"\s*\\\n\s*", " ", block["text"]).splitlines():
            for part in re.split(r"\s*(?:&&|\|\||;|\|)\s*", strip_comment(line)):
                if part:
                    yield part


def strip_comment(line: str) -> str:
    return "" if line.lstrip().startswith("#") else re.split(r"\s+#\s", line.strip())[0]


ALL = [(document, command) for document in DOCUMENTS for command in commands(document, run=False)]


def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", **(env or {})}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=120, check=False
    )


def check(command: str) -> None:
    """Fail unless the command parses, as far as that can be told without running it."""
    words = shlex.split(command)
    settings = {}
    while words and ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    program, arguments = words[0], words[1:]
    if program == "make":
        targets = [word for word in arguments if "=" not in word]
        done = run("make", "-n", "-o", "setup", *arguments)
        assert done.returncode == 0, done.stderr
        assert targets, f"{command}: no target"
    elif program in ("phimr", ".venv/bin/phimr", ".venv-vllm/bin/phimr"):
        check_phimr(arguments)
    elif program in ("sbatch", "bash") or program.startswith("slurm/"):
        check_slurm(words, settings)
    elif program in ("python", ".venv/bin/python"):
        check_python(arguments)
    elif program.startswith(".venv/bin/"):
        assert Path(sys.executable).with_name(Path(program).name).exists(), f"{program} is not installed"
    else:
        assert program in SYSTEM, f"{command}: unknown command {program!r}"


def check_phimr(arguments: list[str]) -> None:
    # --help checks the options, --dry-run the values as well.
    overrides_only = all("=" in word or word.startswith("-") for word in arguments[1:])
    can_dry_run = (
        arguments
        and arguments[0] in {*STAGES, "quickstart"}
        and (arguments[0] != "verify" or (overrides_only and len(arguments) > 1))
    )
    extra = "--dry-run" if can_dry_run and "--help" not in arguments else "--help"
    if extra not in arguments:
        arguments = [*arguments, extra]
    done = phimr(*arguments, place=REPOSITORY, variables={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr


def check_slurm(words: list[str], settings: dict[str, str]) -> None:
    script = next(word for word in words if word.startswith("slurm/"))
    options, arguments = words[: words.index(script)], words[words.index(script) + 1 :]
    # The first component's, of a heterogeneous job.
    nodes = next((word.partition("=")[2] for word in options if word.startswith("--nodes=")), None)
    if nodes is not None:
        settings = {**settings, "SLURM_JOB_NUM_NODES": nodes}
    assert (REPOSITORY / script).is_file(), f"{script} does not exist"
    assert run("bash", "-n", script).returncode == 0
    done = run("bash", script, *arguments, env={**settings, "DRY_RUN": "1"})
    assert done.returncode == 0, done.stderr
    stage = Path(script).stem
    if stage in STAGES:
        printed = shlex.split(done.stdout)
        start = printed.index("phimr_nemo.cli") + 2
        assert printed[start - 1] == stage
        assert printed[start] == "--config"
        load_config(STAGES[stage], Path(printed[start + 1]), printed[start + 2 :])


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        path = REPOSITORY / (arguments[1].replace(".", "/") + ".py")
        package = REPOSITORY / arguments[1].replace(".", "/") / "__main__.py"
        assert path.is_file() or package.is_file() or arguments[1] in ("venv", "pip", "pytest"), arguments
    elif arguments[0] != "-c":
        assert (REPOSITORY / arguments[0]).is_file(), arguments


@pytest.mark.parametrize(("document", "command"), ALL, ids=[f"{d}: {c[:60]}" for d, c in ALL])
def test_documented_command_parses(document: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize("document", FRONT)
def test_the_document_is_there_and_shows_commands(document: str) -> None:
    shown = [*commands(document, run=True), *commands(document, run=False)]
    assert shown, f"{document} is absent or has no bash block"


@pytest.mark.parametrize(("document", "needed"), sorted(MUST_STAND.items()))
def test_the_first_commands_are_documented(document: str, needed: tuple[str, ...]) -> None:
    written = list(commands(document, run=True))
    for command in needed:
        assert command in written


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "phimr sft --no-such-option",
        "phimr no-such-command",
        "phimr data report --no-such-option",
        "phimr data no-such-command",
        "phimr sft --config conf/sft/tiny.yaml no_such.key=1",
        "sbatch slurm/no-such-script.sh",
        "sbatch slurm/sft.sh no_such.key=1",
        "slurm/pipeline.sh no-such-stage:a=1",
        "python bench/no_such_file.py --quick",
        "no-such-program",
    ],
)
def test_a_command_that_cannot_work_is_found(command: str) -> None:
    with pytest.raises((AssertionError, UserError)):
        check(command)


def test_blocks_are_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# x\n```bash\nA=1 make test  # why\n# comment\nphimr sft \\\n  a=1 && cd x\n```\n```text\nnot this\n```\n"
    (tmp_path / "README.md").write_text(text, "utf-8")
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    assert list(commands("README.md", run=True)) == ["A=1 make test", "phimr sft a=1", "cd x"]
