"""What the threat model in SECURITY.md rules out is in no source file: code from data, shells, unpacked archives."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = [path for part in ("phimr_nemo", "recipes", "bench") for path in sorted((REPOSITORY / part).rglob("*.py"))]
SCRIPTS = [*sorted((REPOSITORY / "slurm").rglob("*.sh")), REPOSITORY / ".ci" / "run"]
FORBIDDEN_CALLS = {
    "eval": "code from text",
    "exec": "code from text",
    "compile": "code from text",
    "__import__": "code from text",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "asyncio.create_subprocess_shell": "a shell",
    "pickle.load": "a pickle",
    "pickle.loads": "a pickle",
    "marshal.load": "a pickle",
    "marshal.loads": "a pickle",
    "shelve.open": "a pickle",
    "pandas.read_pickle": "a pickle",
    "pd.read_pickle": "a pickle",
    "torch.jit.load": "a pickle",
    "yaml.load": "objects from YAML",
    "yaml.unsafe_load": "objects from YAML",
    "yaml.full_load": "objects from YAML",
    "shutil.unpack_archive": "an archive unpacked",
    "tempfile.mktemp": "a name that another may take first",
    "ssl._create_unverified_context": "an unchecked certificate",
}
FORBIDDEN_METHODS = {"extractall": "an archive unpacked", "extract_all": "an archive unpacked"}
FORBIDDEN_IMPORTS = {
    "tarfile",
    "zipfile",
    "shelve",
    "marshal",
    "dill",
    "cloudpickle",
    "joblib",
    "telnetlib",
    "ftplib",
}
# A keyword that must stand there, with this value.
NEEDED_KEYWORDS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
}
FORBIDDEN_KEYWORDS = {"shell": True, "verify": False, "trust_remote_code": True, "allow_pickle": True}
# Who may name pickle at all, and why.
PICKLE_HOMES = {
    "phimr_nemo/model/files/distindex.py": "reads the index of a distributed checkpoint with inert classes",
    "phimr_nemo/model/files/plaindata.py": "compares the names in such an index with a list",
    "phimr_nemo/model/files/fp8state.py": "reads Transformer Engine's state with the names of its recipes alone",
    "phimr_nemo/model/files/distcheckpoint.py": "writes such an index, as Megatron reads it",
}
# Who may read and write archives, and why.
ARCHIVE_HOMES = {"bench/gpu_bundle.py": "what it has written itself, compared by hash with its manifest before"}
ARCHIVES = {"tarfile", "zipfile"}
# Who may listen on every interface, and why.
SERVERS_FOR_OTHERS = {
    "phimr_nemo/jobs/server_node.py": "rollout servers of other nodes; it refuses to start them without a key"
}
EVERYWHERE = re.compile(r"\b0\.0\.0\.0\b")


def dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def problems(text: str, name: str) -> Iterator[str]:
    """What a source file does that the threat model rules out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            for imported in [module] if module else [alias.name for alias in getattr(node, "names", [])]:
                if imported in ARCHIVES and name in ARCHIVE_HOMES:
                    continue
                if imported.split(".")[0] in FORBIDDEN_IMPORTS:
                    yield f"imports {imported}"
                if imported.split(".")[0] in ("pickle", "_pickle") and name not in PICKLE_HOMES:
                    yield "a pickle (import)"
        elif isinstance(node, ast.ClassDef):
            bases = {dotted(base) for base in node.bases}
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            if "pickle.Unpickler" in bases and "find_class" not in methods:
                yield "a pickle (any class)"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and EVERYWHERE.search(node.value):
            if name not in SERVERS_FOR_OTHERS:
                yield "a server for everyone"
        elif isinstance(node, ast.Call):
            yield from call_problems(node)


def call_problems(node: ast.Call) -> Iterator[str]:
    called = dotted(node.func)
    if called in FORBIDDEN_CALLS:
        yield FORBIDDEN_CALLS[called]
    if isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS:
        yield FORBIDDEN_METHODS[node.func.attr]
    if called == "pickle.Unpickler":
        yield "a pickle (any class)"
    given = {item.arg: item.value.value for item in node.keywords if isinstance(item.value, ast.Constant)}
    if called in NEEDED_KEYWORDS:
        keyword, value = NEEDED_KEYWORDS[called]
        if given.get(keyword) is not value:
            yield f"{called} without {keyword}={value}"
    for keyword, value in FORBIDDEN_KEYWORDS.items():
        if given.get(keyword) is value:
            yield f"{keyword}={value}"
    if any(item.arg == "trust_remote_code" and not isinstance(item.value, ast.Constant) for item in node.keywords):
        yield "trust_remote_code that is no constant"


def test_no_source_file_does_what_is_ruled_out() -> None:
    assert len(SOURCES) > 100
    found = {
        name: sorted(set(wrong))
        for path in SOURCES
        if (wrong := list(problems(path.read_text("utf-8"), name := str(path.relative_to(REPOSITORY)))))
    }
    assert found == {}


def test_the_homes_of_pickle_are_there() -> None:
    for name in PICKLE_HOMES:
        assert "pickle" in (REPOSITORY / name).read_text("utf-8")


@pytest.mark.parametrize(
    "planted",
    [
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "import os\nos.system(f'rm {name}')",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import asyncio\nasyncio.create_subprocess_shell(command)",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust)",
        "import tarfile",
        "archive.extractall(place)",
        "import shutil\nshutil.unpack_archive(path, place)",
        "import httpx\nhttpx.Client(verify=False)",
        "HOST = '0.0.0.0'",
        "import tempfile\ntempfile.mktemp()",
    ],
)
def test_a_planted_one_is_found(planted: str) -> None:
    assert list(problems(planted, "phimr_nemo/x.py"))


@pytest.mark.parametrize(
    "ordinary",
    [
        "model.eval()",
        "re.compile(pattern)",
        "import subprocess\nsubprocess.run(['ls', name], check=True)",
        "import torch\ntorch.load(path, weights_only=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "version = '10.0.0.01'",
    ],
)
def test_an_ordinary_line_is_not(ordinary: str) -> None:
    assert list(problems(ordinary, "phimr_nemo/x.py")) == []


def test_an_unpickler_of_any_class_is_found_in_its_home_too() -> None:
    home = next(iter(PICKLE_HOMES))
    assert list(problems("import pickle\npickle.loads(data)", home)) == ["a pickle"]
    assert list(problems("import pickle\nclass U(pickle.Unpickler):\n    pass", home)) == ["a pickle (any class)"]
    assert list(problems("import pickle\npickle.dumps(data)", home)) == []


def test_an_archive_is_read_in_its_home_alone_and_there_file_by_file() -> None:
    home = next(iter(ARCHIVE_HOMES))
    assert list(problems("import tarfile\ntar.extractfile(member)", home)) == []
    assert list(problems("import tarfile", "phimr_nemo/x.py")) == ["imports tarfile"]
    assert list(problems("import tarfile\ntar.extractall(place, filter='data')", home)) == ["an archive unpacked"]


# A value of a user's that a shell would read again.
SHELL_AGAIN = re.compile(r"(?<![\w-])(eval|source\s+<\(|(ba)?sh\s+-\w*c)\b")
ALLOWED_SHELL = {".ci/run": "its command is a constant"}


def shell_problems(text: str) -> list[str]:
    code = [line.split(" #")[0] for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in code if SHELL_AGAIN.search(line)]


def test_no_script_has_a_shell_read_a_value_again() -> None:
    assert len(SCRIPTS) > 10
    for path in SCRIPTS:
        name = str(path.relative_to(REPOSITORY))
        found = shell_problems(path.read_text("utf-8"))
        if name in ALLOWED_SHELL:
            assert all("$" not in line.split("-c", 1)[1] for line in found), name
        else:
            assert found == [], name


@pytest.mark.parametrize("planted", ['eval "$command"', 'bash -c "run $name"', "sh -ec $x", 'source <(echo "$x")'])
def test_a_script_that_does_is_found(planted: str) -> None:
    assert shell_problems(f"#!/bin/bash\n{planted}\n") == [planted]


def test_every_claim_of_the_threat_model_names_a_test_that_is_there() -> None:
    text = (REPOSITORY / "SECURITY.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) >= 20
    for file, test in named:
        path = REPOSITORY / file
        assert path.is_file(), file
        if test:
            assert f"def {test}(" in path.read_text("utf-8"), f"{file}::{test}"
