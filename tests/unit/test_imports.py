"""What is imported: a dry run no trainer, a run of a stage only what it uses; and nothing that is there is lost.

What a user sees first is the project's own: libraries say nothing while a stage is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "phimr_lazy_example"
# Each was imported by every training stage when NeMo's, Lightning's and torchmetrics' packages were entered whole.
UNUSED_BY_TRAINING = (
    *("modelopt", "sklearn", "nltk", "numba", "peft", "datasets", "scipy.signal", "wandb", "nemo.collections.asr"),
    *("torchmetrics.functional.text.bert", "nemo.collections.llm.recipes", "nemo.collections.llm.gpt.model.llama"),
    *("nemo.collections.nlp.models.nlp_model", "transformers.trainer", "nemo.collections.llm.api"),
    *("nemo.collections.common.losses", "nemo.collections.common.tokenizers.regex_tokenizer"),
    *("nemo_run.run.experiment", "leptonai", "paramiko", "networkx"),
)
TRAINERS = (
    "torch",
    "transformers",
    "nemo",
    "nemo_run",
    "megatron",
    "nemo_aligner",
    "lightning",
    "pandas",
    "matplotlib",
)
DATA_STAGES = ("base", "generate", "verify", "pack", "evaluate", "export")
TRAINING_STAGES = ("midtrain", "grpo")
LOAD = """
import json, sys
from phimr_nemo.jobs.launch import stage_function
for stage in sys.argv[1].split():
    assert callable(stage_function(stage))
"""
# Loaded on a GPU alone, of a trainer's package that was entered lazily.
ON_A_GPU = """
unused = [name for name in sys.argv[2].split() if name in sys.modules]
from pathlib import Path
from phimr_nemo.config import STAGES, load_config
from phimr_nemo.supervised import assembly
config = load_config(STAGES["midtrain"], Path("conf/midtrain/tiny.yaml"))
callback = assembly.tensor_overlap(config, make=lambda kind, **arguments: kind)
print(json.dumps({"unused": unused, "on a GPU": callback.__name__}))
"""


def python(program: str, *, path: Path | None = None) -> list[str]:
    """What a process prints last, as JSON."""
    found = os.pathsep.join([*([str(path)] if path else []), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result: list[str] = json.loads(done.stdout.splitlines()[-1])
    return result


def loaded(names: tuple[str, ...], program: str) -> list[str]:
    """Those of the modules that a process has imported when `program` has run."""
    return python(f"import json, sys\n{program}\nprint(json.dumps([n for n in {names!r} if n in sys.modules]))")


@pytest.mark.parametrize("stage", ["midtrain", "dpo", "grpo", "evaluate"])
def test_a_dry_run_imports_no_trainer(stage: str) -> None:
    arguments = ["phimr", stage, "--config", f"conf/{stage}/tiny.yaml", "--dry-run"]
    program = f"sys.argv = {arguments!r}\nfrom phimr_nemo.cli.main import main\ntry: main()\nexcept SystemExit: pass"
    assert loaded((*TRAINERS, "httpx"), program) == []


def test_help_imports_nothing_that_stages_work_with() -> None:
    program = (
        "sys.argv = ['phimr', '--help']\nfrom phimr_nemo.cli.main import main\ntry: main()\nexcept SystemExit: pass"
    )
    assert loaded((*TRAINERS, "httpx", "phimr_nemo.verify", "phimr_nemo.jobs.launch"), program) == []


@pytest.fixture(scope="module")
def trainers() -> subprocess.CompletedProcess[str]:
    """A process that has loaded the training stages, and then what they load on a GPU alone."""
    command = [sys.executable, "-c", LOAD + ON_A_GPU, " ".join(TRAINING_STAGES), " ".join(UNUSED_BY_TRAINING)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_training_stages_import_what_they_use(trainers: subprocess.CompletedProcess[str]) -> None:
    assert json.loads(trainers.stdout)["unused"] == []


def test_what_a_stage_imports_on_a_gpu_alone_is_found(trainers: subprocess.CompletedProcess[str]) -> None:
    assert json.loads(trainers.stdout)["on a GPU"] == "MegatronCommOverlapCallback"


def test_libraries_are_silent_while_training_stages_are_loaded(trainers: subprocess.CompletedProcess[str]) -> None:
    assert (trainers.returncode, trainers.stderr, len(trainers.stdout.splitlines())) == (0, "", 1)


def test_libraries_are_silent_while_data_stages_are_loaded() -> None:
    command = [sys.executable, "-c", LOAD, " ".join(DATA_STAGES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_it_the_same_stage_imports_what_it_does_not_use() -> None:
    found = loaded(UNUSED_BY_TRAINING, "import phimr_nemo.supervised.stage")
    assert {"sklearn", "scipy.signal", "modelopt", "torchmetrics.functional.text.bert", "leptonai"} <= set(found)


@pytest.fixture
def lazy(tmp_path: Path) -> Path:
    """A package whose `__init__` says when it runs, beside a table that names it."""
    root = tmp_path / PACKAGE
    root.mkdir()
    (root / "__init__.py").write_text(
        "import sys\nprint('whole', file=sys.stderr)\nsys.modules['phimr_ran'] = sys\n"
        f"from {PACKAGE}.part import here\nother = 'other'\n__all__ = ['here', 'other']\n"
    )
    (root / "part.py").write_text("here = 'here'\n")
    (root / "broken.py").write_text("import no_such_module_at_all\n")
    return tmp_path


@pytest.mark.parametrize(
    ("program", "ran"),
    [
        (f"from {PACKAGE}.part import here", False),
        (f"from {PACKAGE} import part", False),
        (f"from {PACKAGE} import here; assert here == 'here'", False),
        (f"import {PACKAGE}; assert not hasattr({PACKAGE}, '__wrapped__')", False),
        (f"from {PACKAGE} import other; assert other == 'other'", True),
        (f"from {PACKAGE} import *; assert (here, other) == ('here', 'other')", True),
        (f"import {PACKAGE}; assert not hasattr({PACKAGE}, 'nothing')", True),
    ],
    ids=["name of a submodule", "submodule", "name of the table", "passing", "other name", "star", "no such name"],
)
def test_a_package_runs_when_more_than_its_parts_is_asked_for(lazy: Path, program: str, ran: bool) -> None:
    before = (
        f"import json, sys, phimr_nemo.imports as imports\nimports.NAMES = {{{PACKAGE!r}: {{'here': 'part'}}}}\n"
        "with imports.lean_imports(): pass\n"
    )
    found = python(
        f"{before}{program}\nprint(json.dumps(['phimr_ran'] if 'phimr_ran' in sys.modules else []))", path=lazy
    )
    assert found == (["phimr_ran"] if ran else [])


def test_an_error_inside_a_submodule_is_not_taken_for_its_absence(lazy: Path) -> None:
    program = (
        f"import json, phimr_nemo.imports as imports\nimports.NAMES = {{{PACKAGE!r}: {{}}}}\n"
        f"with imports.lean_imports(): pass\ntry:\n    from {PACKAGE} import broken\n"
        "except ModuleNotFoundError as error: print(json.dumps([error.name]))"
    )
    assert python(program, path=lazy) == ["no_such_module_at_all"]


def test_what_is_hidden_while_a_stage_is_imported_is_there_afterwards() -> None:
    program = (
        "import gc, importlib.util, json\nfrom phimr_nemo.imports import lean_imports\n"
        "with lean_imports():\n    inside = importlib.util.find_spec('sklearn') is None and not gc.isenabled()\n"
        "after = importlib.util.find_spec('sklearn') is not None and gc.isenabled()\n"
        "print(json.dumps([str(inside), str(after)]))"
    )
    assert python(program) == ["True", "True"]


def test_upstream_packages_still_have_every_name() -> None:
    program = (
        "import json\nfrom phimr_nemo.imports import lean_imports\nwith lean_imports():\n"
        "    from nemo.collections.llm.gpt.model.base import GPTModel\n"
        "    from nemo.collections.common.tokenizers import TokenizerSpec\n"
        "    import nemo_run\n    plain = nemo_run.Config\n"
        "from nemo.collections import llm\nfrom nemo.collections.common import tokenizers\nimport torchmetrics\n"
        "assert llm.GPTModel is GPTModel and tokenizers.TokenizerSpec is TokenizerSpec\n"
        "print(json.dumps([llm.train.__module__, llm.LlamaModel.__name__, torchmetrics.Accuracy.__name__, "
        "nemo_run.Experiment.__name__, tokenizers.WordTokenizer.__name__]))\n"
        "assert nemo_run.Config is plain"
    )
    expected = ["nemo.collections.llm.api", "LlamaModel", "Accuracy", "Experiment", "WordTokenizer"]
    assert python(program) == expected


def test_a_fused_function_is_compiled_when_it_is_called_and_within_another_once() -> None:
    program = (
        "import functools, json, torch\nfrom phimr_nemo.imports import compile_when_called\n"
        "graphs = []\n"
        "def backend(graph, _):\n    graphs.append(graph)\n    return graph.forward\n"
        "fuser = functools.partial(compile_when_called, torch.compile)(backend=backend, fullgraph=True)\n"
        "inner = fuser(lambda x: x.sin())\nouter = fuser(lambda x, scale: inner(x) * scale)\n"
        "x, expected = torch.arange(4.0), torch.arange(4.0).sin() * 3\nassert not graphs\n"
        "for _ in range(2): assert torch.equal(outer(x, scale=3), expected)\n"
        "print(json.dumps([str(len(graphs))]))"
    )
    assert python(program) == ["1"]


def test_the_compiler_is_loaded_by_a_call_and_not_by_the_modules_that_have_fused_functions() -> None:
    program = (
        "import json, sys, torch\nfrom phimr_nemo.imports import lean_imports\nplain = torch.compile\n"
        "with lean_imports():\n    from megatron.core.fusions.fused_bias_swiglu import swiglu\n"
        "    import nemo.collections.nlp.modules.common.megatron.utils\n"
        "loaded = 'torch._inductor.compile_fx' in sys.modules\n"
        "torch.compiler.set_stance('force_eager')\n"
        "x = torch.arange(8.0)\nassert torch.compile is plain\n"
        "assert torch.equal(swiglu(x), torch.nn.functional.silu(x[:4]) * x[4:])\n"
        "print(json.dumps([str(loaded), str('torch._inductor.compile_fx' in sys.modules)]))"
    )
    assert python(program) == ["False", "True"]
