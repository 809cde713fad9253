"""Fixtures that every test directory shares."""

from __future__ import annotations

import gc
import logging
import os
import re
from pathlib import Path

import pytest
from warm_phimr import Phimr

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("phimr_nemo", "recipes")
MAX_NAME_CHARS = 60
NOT_A_WORD = re.compile(r"[^A-Za-z0-9.=+<>/-]+")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name the cases of a test in plain words: no bytes (some hold the clock), no escapes, no memory addresses.

    Returns:
        The name of the value; its argument's for what has no words (pytest numbers those); None for pytest's own.
    """
    if isinstance(val, bytes):
        return argname
    if isinstance(val, str):
        return NOT_A_WORD.sub(" ", val).strip()[:MAX_NAME_CHARS].strip() or argname
    if callable(val) and getattr(val, "__name__", "<lambda>") == "<lambda>":
        return argname
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: none of them is at work alone when all others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What all test modules have imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def every_logger_speaks() -> None:
    """No test hears less because a library that an earlier one imported raised the root's level or silenced us.

    An experiment of NeMo-Run, for one, leaves the root at the level of its own log.
    """
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name, logger in logging.Logger.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] in OURS:
            logger.disabled = False
            logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs for testing; they do not ship with the project."""
    path = Path(os.environ.get("PHIMR_SHARED_DATA", str(REPOSITORY.parent / "shared" / "data")))
    if not path.is_dir():
        pytest.skip(f"real input data is absent (no {path.name} directory; set PHIMR_SHARED_DATA)")
    return path


def _interpreter_of(environment: str, absent: str) -> Path:
    """The Python of an environment beside the trainers'; the test is skipped where it is absent."""
    interpreter = REPOSITORY / environment / "bin" / "python"
    if not interpreter.is_file():
        pytest.skip(absent)
    return interpreter


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of the environment that has vLLM and transformers 5 (`make setup-vllm`)."""
    return _interpreter_of(
        ".venv-vllm", "vLLM's environment is absent (make setup-vllm; Linux and Python 3.11 or newer)"
    )


@pytest.fixture(scope="session")
def bridge_python() -> Path:
    """The interpreter of the environment that has Megatron-Bridge and TRL (`make setup-bridge`)."""
    return _interpreter_of(
        ".venv-bridge",
        "Megatron-Bridge's environment is absent (make setup-bridge; Linux and Python 3.11 or 3.12)",
    )


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """The interpreter of the environment with the newest releases of other people's libraries (`make clients`)."""
    return _interpreter_of(".venv-clients", "the environment of the newest clients is absent (make clients)")


@pytest.fixture(scope="session")
def vllm_variables() -> dict[str, str]:
    """The environment of a process that runs `vllm_python`: offline, small, one thread, nothing compiled."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Compiling the sampler takes longer than a test.
        "TORCH_COMPILE_DISABLE": "1",
    }


@pytest.fixture(scope="session")
def vllm_phimr(vllm_python: Path, vllm_variables: dict[str, str]) -> Phimr:
    """`phimr` there, with vLLM imported once."""
    return Phimr("generate", "evaluate", "vllm", python=vllm_python, **vllm_variables)
