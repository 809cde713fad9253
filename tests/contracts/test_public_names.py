"""The Python surface: what the packages export, what they need for it, and that their examples are true."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TORCHLESS = (
    "phimr_nemo.verify",
    "phimr_nemo.data.packing",
    "phimr_nemo.data.pairs",
    "phimr_nemo.evaluate.statistics",
)
"""Work as a whole without torch; the other packages of the surface are imported without it."""
SURFACE = (*TORCHLESS, "phimr_nemo.losses", "phimr_nemo.model")
ABSENT = (
    "torch",
    "transformers",
    "nemo",
    "nemo_aligner",
    "megatron",
    "lightning",
    "datasets",
    "duckdb",
    "matplotlib",
)
PROMPT = ">>> "
REPOSITORY = Path(__file__).resolve().parents[2]


def dotted(path: Path) -> str:
    names = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


EXAMPLES = sorted(
    dotted(path)
    for path in (REPOSITORY / "phimr_nemo").rglob("*.py")
    if PROMPT in path.read_text("utf-8") and "bridges" not in path.parts
)
"""Modules with examples; those of the bridges need Megatron-Bridge, which lives in another environment."""


def without_heavy_packages(program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process in which the heavy packages are as if they were not installed."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )


def test_public_names_are_there_without_torch() -> None:
    program = (
        "import importlib\n"
        f"for name in {SURFACE!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__all__ and len(set(module.__all__)) == len(module.__all__), name\n"
        f"for name in {TORCHLESS!r}:\n"
        "    exec(f'from {name} import *', {})\n"
        "from phimr_nemo.model import Architecture\n"
    )
    done = without_heavy_packages(program)
    assert done.returncode == 0, done.stderr


def test_a_name_that_needs_torch_is_refused_without_it() -> None:
    done = without_heavy_packages("from phimr_nemo.losses import token_logprobs\n")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("name", SURFACE)
def test_every_public_name_is_an_attribute(name: str) -> None:
    module = importlib.import_module(name)
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


@pytest.mark.parametrize(
    "name", ["phimr_nemo.data.packing", "phimr_nemo.data.pairs", "phimr_nemo.evaluate.statistics"]
)
def test_what_has_no_underscore_and_is_defined_there_is_public(name: str) -> None:
    tree = ast.parse((REPOSITORY / f"{name.replace('.', '/')}.py").read_text("utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {one for one in defined if not one.startswith("_")} <= set(importlib.import_module(name).__all__)


NOT_PUBLIC = ("__init__", "fused")
"""Modules of the losses without names of their own for others; Triton's kernels need Triton to be imported."""


def test_the_losses_export_what_their_modules_do() -> None:
    losses = importlib.import_module("phimr_nemo.losses")
    public: list[str] = []
    for path in sorted((REPOSITORY / "phimr_nemo" / "losses").glob("*.py")):
        if path.stem not in NOT_PUBLIC:
            module = importlib.import_module(f"phimr_nemo.losses.{path.stem}")
            names = getattr(module, "__all__", [])
            assert [name for name in names if getattr(losses, name) is not getattr(module, name)] == []
            public += names
    assert sorted(public) == list(losses.__all__) == sorted(dir(losses))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", TORCHLESS)
def test_the_surface_has_examples(name: str) -> None:
    module = importlib.import_module(name)
    inner = {module.__name__, *(getattr(getattr(module, public), "__module__", "") for public in module.__all__)}
    assert inner & set(EXAMPLES)


def test_an_example_that_is_not_true_is_found() -> None:
    module = ModuleType("wrong")
    module.__doc__ = ">>> 1 + 1\n3\n"
    assert doctest.testmod(module, report=False).failed == 1
