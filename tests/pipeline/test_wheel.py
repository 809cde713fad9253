"""The wheel, installed elsewhere and called from another directory, works as the source tree does."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from shown import evaluation

from phimr_nemo.config import STAGES

SOURCES = ("phimr_nemo", "recipes", "conf", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
NO_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info")
PROBLEMS = 24
# Python runs a module of this name at its start, in every process that it finds it from.
STARTED_FIRST = "sitecustomize.py"


@pytest.fixture(scope="session")
def installed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's files, as pip lays them out; the source tree is not in it."""
    root = tmp_path_factory.mktemp("wheel")
    tree = root / "tree"
    for name in SOURCES:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=NO_SOURCES)
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy2(source, tree / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(root), str(tree), cwd=root)
    shutil.rmtree(tree)
    [wheel] = root.glob("*.whl")
    pip("install", "--no-deps", "--no-index", "--target", str(root / "site"), str(wheel), cwd=root)
    return root / "site"


def pip(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def run(installed: Path, *arguments: str, cwd: Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """`phimr` of the installed wheel, called in another directory."""
    program = (
        f"import sys, phimr_nemo\nassert phimr_nemo.__file__.startswith({str(installed)!r})\n"
        f"sys.argv = ['phimr', *{list(arguments)!r}]\nfrom phimr_nemo.cli.main import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{cwd}", "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == expected, done.stderr
    return done


def closure(requirements: list[str]) -> set[str]:
    """The distributions that requirements bring, with what those require and no extras."""
    found: set[str] = set()
    waiting = requirements
    while waiting:
        name = normal(re.split(r"[^\w.-]", waiting.pop().strip(), maxsplit=1)[0])
        if name in found:
            continue
        found.add(name)
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another Python version or system
        waiting.extend(item for item in required if "extra ==" not in item)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_wheel_holds_every_preset_and_recipe_once(installed: Path, repository: Path) -> None:
    conf = {str(path.relative_to(repository)): path.read_bytes() for path in (repository / "conf").rglob("*.yaml")}
    there = {
        str(path.relative_to(installed / "phimr_nemo")): path.read_bytes()
        for path in installed.rglob("conf/*/*.yaml")
    }
    assert there == conf
    assert not (installed / "phimr_nemo" / "conf").is_symlink()
    recipes = {str(path.relative_to(repository)) for path in (repository / "recipes").rglob("*.py")}
    assert {str(path.relative_to(installed)) for path in (installed / "recipes").rglob("*.py")} == recipes


def test_every_stage_answers_from_another_directory(installed: Path, tmp_path: Path) -> None:
    assert "midtrain" in run(installed, "--help", cwd=tmp_path).stdout
    for stage in STAGES:
        preset = f"conf/{stage}/tiny.yaml"
        done = run(installed, stage, "--config", preset, "--dry-run", cwd=tmp_path)
        expected = (installed / "phimr_nemo" / preset).read_text()
        assert yaml.safe_load(done.stdout)["run"]["output"] == yaml.safe_load(expected)["run"]["output"]
    steps = run(installed, "quickstart", "--dry-run", cwd=tmp_path).stdout.splitlines()
    assert len(steps) > len(STAGES)
    assert list(tmp_path.iterdir()) == []


def test_remedies_name_files_that_are_there(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "sft", "--config", "conf/no/such.yaml", "--dry-run", cwd=tmp_path, expected=2)
    named = re.search(r"see the files in (\S+)", done.stderr)
    assert named is not None
    assert (tmp_path / named[1] / "sft" / "paper.yaml").is_file()
    done = run(installed, "sft", "--config", "conf/sft/small.yaml", "--dry-run", cwd=tmp_path, expected=2)
    assert "tiny.yaml" in done.stderr


def test_first_data_steps_of_the_tiny_preset(installed: Path, tmp_path: Path) -> None:
    steps = {
        "base": (),
        "generate": (f"problems.count={PROBLEMS}",),
        "verify": ("rollouts=runs/generate",),
        "curate": ("verdicts=runs/verify",),
        "pack": ("conversations=runs/curate/midtrain", "tokenizer=runs/base/hf"),
    }
    for stage, inputs in steps.items():
        run(
            installed,
            *(stage, "--config", f"conf/{stage}/tiny.yaml", f"run.output=runs/{stage}", *inputs),
            cwd=tmp_path,
        )
        facts = json.loads((tmp_path / "runs" / stage / "run.json").read_text())
        assert facts["versions"]["git"] == "unknown"
        assert (tmp_path / "runs" / stage / "DONE").is_file()


def test_the_grader_needs_the_light_core_alone(installed: Path, tmp_path: Path) -> None:
    rows = [
        {"response": f"So it is \\boxed{{{number + wrong}}}.", "answer": str(number)}
        for number in range(4)
        for wrong in (0, 1)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [metadata] = installed.glob("phimr_nemo-*.dist-info")
    required = importlib.metadata.PathDistribution(metadata).requires or []
    light = closure([item for item in required if "extra ==" not in item])
    assert {"math-verify", "numpy", "pyarrow"} <= light
    assert not {"torch", "transformers", "tokenizers", "duckdb", "matplotlib", "huggingface-hub", "httpx"} & light
    # Every other package of this environment is as if it were not installed, in the grader's processes as well.
    owners = importlib.metadata.packages_distributions()
    absent = sorted(name for name in owners if not {normal(owner) for owner in owners[name]} & {*light, "phimr-nemo"})
    assert {"torch", "nemo", "lightning", "pytest"} <= set(absent)
    (tmp_path / STARTED_FIRST).write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    run(installed, "verify", "in.jsonl", "out.jsonl", cwd=tmp_path)
    graded = [json.loads(line)["verdict"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert graded == ["correct", "wrong"] * 4
    # The rest of the light core, and what the data stages say without their packages.
    assert "phi4mini" in run(installed, "plan", "model=phi4mini", "stage=midtrain", "gpus=128", cwd=tmp_path).stdout
    done = run(
        installed,
        *("prepare", "--config", "conf/prepare/tiny.yaml", "run.output=prepared"),
        "sources=[{name: mine, path: in.jsonl, question: response}]",
        cwd=tmp_path,
        expected=2,
    )
    assert "pip install 'phimr-nemo[data]'" in done.stderr


def test_what_runs_say_is_shown_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    evaluation(tmp_path / "evaluate", "SFT", [1, 2])
    run(installed, "show", "evaluate", "--html", "page.html", cwd=tmp_path)
    # The page's script and style are files beside the modules.
    page = (tmp_path / "page.html").read_text("utf-8")
    for name in ("logic.js", "viewer.js", "viewer.css"):
        assert (installed / "phimr_nemo" / "show" / name).read_text("utf-8") in page
