"""What the documents show is run: every block, in order, in a fresh tree, in a shell in which nothing is activated.

A block is run unless the word behind its language says what a test machine lacks (`NOT_RUN`). The presets of the tree
are made small, so that the whole quickstart takes minutes; the commands are the documents' own, letter by letter. The
program `phimr` itself is run by `make quickstart` and by the first block that has it; in those behind, each of its
commands is a copy of one process that has imported what it needs (`warm_phimr.py`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm_phimr import Server

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_RUN = {
    "cluster": "needs Slurm or servers on other nodes (tests/slurm runs the chain on a real Slurm)",
    "container": "installs into a NeMo container",
    "data": "needs files that the reader brings",
    "developer": "is how this test is run",
    "file": "is a file's content and no command",
    "gpu": "needs a GPU",
    "hours": "takes hours",
    "hub": "uploads",
    "network": "downloads",
    "weights": "needs a model of billions of parameters",
}
BLOCK = re.compile(r"^```(?P<language>bash|python)(?:[ ](?P<word>\w+))?\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
SELF = "make test\n"
"""What runs this test."""
SMALL: Mapping[str, Mapping[str, str]] = {
    "quickstart/tiny.yaml": {
        "train_problems": "700",
        "heldout_problems": "16",
        "rl_problems": "240",
        "evaluation_samples": "2",
    },
    "midtrain/tiny.yaml": {"epochs": "4"},
    "dpo/tiny.yaml": {"micro_batch": "4", "global_batch": "4"},
    # A round of samples, so that there is something to show.
    "grpo/tiny.yaml": {"steps": "10", "prompts_per_step": "4"},
}
SECONDS = 900
WARM = REPOSITORY / "tests" / "warm_phimr.py"


@dataclass(frozen=True)
class Block:
    """A block of a document.

    Attributes:
        document: its path in the tree.
        line: where it begins.
        language: bash or python.
        word: of `NOT_RUN`; None = it is run.
        text: what it says.
    """

    document: str
    line: int
    language: str
    word: str | None
    text: str

    @property
    def is_run(self) -> bool:
        return self.word is None and self.text != SELF

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: Path, root: Path) -> Iterator[Block]:
    text = document.read_text("utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(str(document.relative_to(root)), line, match["language"], match["word"], match["text"])


def documents(root: Path) -> list[Path]:
    """The README first: the others go on from what it made."""
    return [root / "README.md", root / "recipes" / "README.md", *sorted((root / "docs").glob("*.md"))]


ALL = [block for document in documents(REPOSITORY) for block in blocks(document, REPOSITORY)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is tracked, with this interpreter's environment as its .venv and small presets."""
    environment = Path(sys.prefix)
    if not (environment / "setup.stamp").is_file():
        pytest.skip("the documents set up their environment with `make setup`; this one is another")
    root = tmp_path_factory.mktemp("documents") / "phimr-nemo"
    done = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout: there is no list of tracked files")
    for name in filter(None, done.stdout.decode().split("\0")):
        source = REPOSITORY / name
        if source.is_symlink() or source.is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, root / name, follow_symlinks=False)
            if not source.is_symlink():
                # Older than the environment's stamp: it is set up.
                os.utime(root / name, (0, 0))
    (root / ".venv").symlink_to(environment)
    for name, values in SMALL.items():
        path = root / "conf" / name
        text = path.read_text("utf-8")
        for key, value in values.items():
            text, count = re.subn(rf"(?m)^{key}: .*$", f"{key}: {value}", text)
            assert count == 1, f"{name}: {key}"
        path.write_text(text, "utf-8")
    return root


@pytest.fixture(scope="module")
def environment(tree: Path) -> dict[str, str]:
    """A shell's that has just been opened."""
    home = tree.parent / "home"
    home.mkdir()
    return {
        "HOME": str(home),
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "TERM": "dumb",
        "LANG": "C.UTF-8",
        # The environment's own installation is another tree.
        "PYTHONPATH": str(tree),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "MPLBACKEND": "Agg",
    }


@pytest.fixture(scope="module")
def warm(tree: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """What a shell reads before a block so that `phimr` needs no start of its own."""
    server = Server(python=tree / ".venv" / "bin" / "python", cwd=tree, env=environment)
    try:
        yield f'phimr() {{ {sys.executable} -I -S {shlex.quote(str(WARM))} run {server.name} "$@"; }}\n'
    finally:
        server.stop()


@pytest.fixture(scope="module")
def transcript(
    tree: Path, environment: Mapping[str, str], request: pytest.FixtureRequest
) -> dict[str, tuple[int, float, str]]:
    """Exit code, seconds and output of every block that was run; a document ends with its first failure."""
    results = {}
    prelude = ""
    activated = ""
    failed: set[str] = set()
    for block in ALL:
        if not block.is_run or block.document in failed:
            continue
        code = block.text if block.language == "bash" else f"python - <<'END'\n{block.text}END\n"
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-euo", "pipefail", "-c", activated + prelude + code],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        results[str(block)] = (done.returncode, time.monotonic() - started, done.stdout)
        if done.returncode:
            failed.add(block.document)
        if "bin/activate" in block.text:
            activated = block.text
        elif activated and not prelude:
            prelude = request.getfixturevalue("warm")
    kept = os.environ.get("PHIMR_TRANSCRIPT")
    if kept:
        lines = [
            f"$ {name}\n{out}\n# exit code {code}, {spent:.1f} s" for name, (code, spent, out) in results.items()
        ]
        Path(kept).write_text("\n".join(lines), "utf-8")
    return results


@pytest.mark.parametrize("block", [block for block in ALL if block.is_run], ids=str)
def test_a_block_works_as_typed(block: Block, transcript: Mapping[str, tuple[int, float, str]]) -> None:
    assert str(block) in transcript, "an earlier block of this document failed"
    code, _, output = transcript[str(block)]
    assert code == 0, f"{block.text}\n{output[-4000:]}"


@pytest.mark.parametrize("block", [block for block in ALL if block.word is not None], ids=str)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert block.word in NOT_RUN


def test_the_readme_activates_before_its_first_phimr() -> None:
    front = [block for block in ALL if block.document == "README.md"]
    activates = next(i for i, block in enumerate(front) if "bin/activate" in block.text)
    assert activates < next(i for i, block in enumerate(front) if re.search(r"(?m)^phimr ", block.text))
    assert [block.text for block in front if block.text.startswith("make")] == ["make quickstart\n", SELF]
