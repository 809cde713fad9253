"""Dependencies point one way, heavy packages stay where they belong, and light modules stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TIERS = (
    {"", "errors", "redact", "imports", "text", "process", "store", "config", "endpoint"},
    {"losses", "data", "verify"},
    {"model"},
    {"generate"},
    {"evaluate", "plan"},
    {"report"},
    {"show"},
    {"training"},
    {"supervised", "align", "bridges"},
    {"jobs"},
    {"cli"},
    # A recipe is the command.
    {"recipes"},
)
LIGHT = (
    "phimr_nemo",
    "phimr_nemo.errors",
    "phimr_nemo.store.atomic",
    "phimr_nemo.store.records",
    "phimr_nemo.store.shards",
    "phimr_nemo.store.runs",
    "phimr_nemo.store.check",
    "phimr_nemo.config",
    "phimr_nemo.endpoint",
    "phimr_nemo.verify",
    "phimr_nemo.jobs.preflight",
    "phimr_nemo.plan.command",
    "phimr_nemo.jobs.doctor",
    "phimr_nemo.cli.main",
)
HEAVY = ("torch", "transformers", "nemo", "nemo_run", "megatron", "nemo_aligner", "lightning", "vllm", "datasets")
# The parts that a package may be imported in, and in how many files.
MAX_MEGATRON_FILES = 26
# In the process, in the server, in its workers.
MAX_VLLM_FILES = 3
HOMES = {
    "megatron": ({"model", "losses", "training", "supervised", "align", "bridges"}, MAX_MEGATRON_FILES),
    "nemo": ({"training", "supervised", "align"}, None),
    "nemo_aligner": ({"align"}, None),
    "nemo_run": ({"recipes", "jobs"}, None),
    "vllm": ({"generate"}, MAX_VLLM_FILES),
    "trl": ({"bridges"}, 1),
}
POINTER = re.compile(r"(phimr_nemo|recipes)(\.\w+)*:\w+")
OWN_NAME = re.compile(r"(phimr_nemo|recipes)(\.\w+)*(:\w+)?")


def part_of(module: str) -> str:
    """The part of the house that a dotted name belongs to."""
    names = module.partition(":")[0].split(".")
    if names[0] == "recipes":
        return "recipes"
    return names[1] if len(names) > 1 else ""


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Every module that a file imports, in functions too, or names in a string as "package.module:function"."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            # `from package import module` names the module in its second half.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and POINTER.fullmatch(node.value):
            yield node.value


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    for package in ("phimr_nemo", "recipes"):
        for path in sorted((root / package).rglob("*.py")):
            names = path.relative_to(root).with_suffix("").parts
            yield ".".join(names[:-1] if names[-1] == "__init__" else names), path


def tier_of(part: str) -> int:
    found = [number for number, parts in enumerate(TIERS) if part in parts]
    assert found, f"{part!r} has no tier: give it a place in TIERS"
    return found[0]


def upward_imports(root: Path) -> list[str]:
    """Imports of a higher tier, as "importer -> imported"."""
    return [
        f"{module} -> {name}"
        for module, path in sources(root)
        for name in imported_names(path, module)
        if OWN_NAME.fullmatch(name) and tier_of_name(root, name) > tier_of(part_of(module))
    ]


def tier_of_name(root: Path, name: str) -> int:
    """The tier of an imported name; a plain attribute of the package itself belongs to the lowest."""
    part = part_of(name)
    is_module = name.startswith("recipes") or any(
        (root / "phimr_nemo" / f"{part}{end}").exists() for end in ("", ".py")
    )
    return tier_of(part) if is_module else 0


def homeless_imports(root: Path) -> list[str]:
    """Heavy packages outside the parts that may import them, or in too many files."""
    problems, files = [], defaultdict(set)
    for module, path in sources(root):
        for name in imported_names(path, module):
            package = name.split(".")[0]
            if package in HOMES:
                files[package].add(module)
                if part_of(module) not in HOMES[package][0]:
                    problems.append(f"{module} imports {package}")
    for package, modules in files.items():
        most = HOMES[package][1]
        if most is not None and len(modules) > most:
            problems.append(f"{package} is imported in {len(modules)} files: {sorted(modules)}")
    return problems


def test_dependencies_point_one_way(repository: Path) -> None:
    assert upward_imports(repository) == []


def test_heavy_packages_stay_at_home(repository: Path) -> None:
    assert homeless_imports(repository) == []


@pytest.mark.parametrize(
    ("place", "code", "found"),
    [
        ("store/x.py", "import phimr_nemo.training.adam\n", "phimr_nemo.store.x -> phimr_nemo.training.adam"),
        ("store/x.py", "def f():\n    from phimr_nemo.model import a\n", "phimr_nemo.store.x -> phimr_nemo.model.a"),
        ("data/x.py", "from phimr_nemo import cli\n", "phimr_nemo.data.x -> phimr_nemo.cli"),
        ("data/x.py", "from .. import generate\n", "phimr_nemo.data.x -> phimr_nemo.generate"),
        ("model/__init__.py", "from ..align.dpo import x\n", "phimr_nemo.model -> phimr_nemo.align.dpo.x"),
        ("generate/x.py", "import recipes.native\n", "phimr_nemo.generate.x -> recipes.native"),
        ("data/x.py", "F = 'phimr_nemo.training.adam:Adam'\n", "phimr_nemo.data.x -> phimr_nemo.training.adam:Adam"),
    ],
)
def test_an_upward_import_is_found(place: str, code: str, found: str, tmp_path: Path) -> None:
    for part in ("store", "data", "model", "generate", "align", "training", "cli"):
        (tmp_path / "phimr_nemo" / part).mkdir(parents=True)
    (tmp_path / "phimr_nemo" / place).write_text(code, "utf-8")
    assert upward_imports(tmp_path) == [found]


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("data/x.py", "from phimr_nemo import __version__\nfrom phimr_nemo.store.shards import finish\n"),
        ("generate/x.py", "from ..data import chat\nfrom . import sampler\n"),
        ("training/x.py", "def f():\n    from phimr_nemo.generate import local\n"),
    ],
)
def test_a_downward_import_is_not(place: str, code: str, tmp_path: Path) -> None:
    for part in ("data", "generate", "training"):
        (tmp_path / "phimr_nemo" / part).mkdir(parents=True)
    (tmp_path / "phimr_nemo" / place).write_text(code, "utf-8")
    assert upward_imports(tmp_path) == []


def test_a_heavy_package_away_from_home_is_found(tmp_path: Path) -> None:
    for part in ("data", "generate"):
        (tmp_path / "phimr_nemo" / part).mkdir(parents=True)
    (tmp_path / "phimr_nemo" / "data" / "x.py").write_text("def f():\n    import nemo_aligner.utils\n", "utf-8")
    names = [f"phimr_nemo.generate.a{number}" for number in range(MAX_VLLM_FILES + 1)]
    for name in names:
        (tmp_path / f"{name.replace('.', '/')}.py").write_text("from vllm import LLM\n", "utf-8")
    assert homeless_imports(tmp_path) == [
        "phimr_nemo.data.x imports nemo_aligner",
        f"vllm is imported in {len(names)} files: {names}",
    ]


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_light_modules_import_nothing_heavy() -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [n for n in {HEAVY!r} if n in sys.modules]\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr


def test_a_heavy_import_would_be_seen() -> None:
    done = run_python("import sys, phimr_nemo, torch; sys.exit('torch' in sys.modules)")
    assert done.returncode == 1
