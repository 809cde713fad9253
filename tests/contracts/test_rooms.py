"""The rooms of the house: no circle of imports between files or folders, few modules a folder, few in the root."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

MAX_MODULES = 15
"""A folder, its `__init__.py` among them."""
MAX_LOOSE = 3
"""Modules in the root of the package, its `__init__.py` among them."""

Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of everything in the package."""
    found = {}
    for path in sorted((root / "phimr_nemo").rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imports(root: Path) -> Graph:
    """Module -> the modules of the package that it imports, at its top or in a function."""
    named = modules(root)
    graph: Graph = {}
    for module, path in named.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in named else node.module for name in inner}
        graph[module] = {name for name in found if name in named and name != module}
    return graph


def folder_of(path: Path, root: Path) -> str:
    """The folder of a module; a module that lies loose beside subfolders is a folder of its own."""
    has_subfolders = any((inner / "__init__.py").exists() for inner in path.parent.iterdir())
    place = path.with_suffix("") if has_subfolders and path.name != "__init__.py" else path.parent
    return ".".join(place.relative_to(root).parts)


def folders(root: Path) -> Graph:
    named = modules(root)
    graph: Graph = {}
    for module, imported in imports(root).items():
        own = folder_of(named[module], root)
        others = {folder_of(named[name], root) for name in imported}
        graph.setdefault(own, set()).update(others - {own})
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle of a graph, from a node back to it; nothing where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_between_files(repository: Path) -> None:
    assert circle(imports(repository)) == []


def test_no_circle_between_folders(repository: Path) -> None:
    assert circle(folders(repository)) == []


def test_folders_are_small(repository: Path) -> None:
    sizes = Counter(path.parent for path in modules(repository).values())
    assert {str(folder): size for folder, size in sizes.items() if size > MAX_MODULES} == {}
    assert sizes[repository / "phimr_nemo"] <= MAX_LOOSE


@pytest.mark.parametrize(
    "files",
    [
        {"data/a.py": "from phimr_nemo.data.b import x\n", "data/b.py": "def f():\n    import phimr_nemo.data.a\n"},
        {"data/a.py": "from phimr_nemo.data import b\n", "data/b.py": "from phimr_nemo.data import a\n"},
    ],
    ids=["a late import closes it", "modules named after from"],
)
def test_a_circle_inside_a_folder_is_found(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path, files)
    assert set(circle(imports(tmp_path))) == {"phimr_nemo.data.a", "phimr_nemo.data.b"}


def test_a_circle_of_folders_without_one_of_files_is_found(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "data/a.py": "from phimr_nemo.model.a import x\n",
            "data/b.py": "",
            "model/a.py": "",
            "model/b.py": "from phimr_nemo.data.b import x\n",
        },
    )
    assert circle(imports(tmp_path)) == []
    assert set(circle(folders(tmp_path))) == {"phimr_nemo.data", "phimr_nemo.model"}


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / "phimr_nemo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text, "utf-8")
