"""What the GPU tests need; without it they are skipped, with the reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The GPU, with Megatron's groups of one process, and float32 products in float32."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.training.distributed import start_process_group

    torch.backends.cuda.matmul.allow_tf32 = False
    start_process_group(ParallelConfig(), seed=0)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["torch", "transformer_engine"])
def modules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose layers the model is made of: our own in plain PyTorch, or Transformer Engine's."""
    if request.param == "transformer_engine":
        needs_transformer_engine()
    else:
        for module in ("configuration", "gpt"):
            monkeypatch.setattr(f"phimr_nemo.model.megatron.{module}.has_transformer_engine", lambda: False)
    return str(request.param)


@pytest.fixture
def transformer_engine() -> None:
    """For tests of what only Transformer Engine can do."""
    needs_transformer_engine()


def needs_transformer_engine() -> None:
    """Skip without it."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the small model, in float32."""
    from compare import SMALL, make_checkpoint

    directory = tmp_path_factory.mktemp("small") / "hf"
    make_checkpoint(directory, SMALL)
    return directory
