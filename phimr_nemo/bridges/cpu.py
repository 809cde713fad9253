"""Megatron-Bridge where there is no GPU: everything that its import wants and a CPU machine lacks, in this one place.

Megatron-Core 0.19 and Megatron-Bridge 0.6 import Triton and Transformer Engine whether or not a kernel of theirs is
ever called, and ask for Python 3.12 for one decorator. A stand-in computes nothing; called, it raises. Which device
tensors go to is ``phimr_nemo.training.platform``'s, as for the Megatron-Core of the trainers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import typing
from typing import Any, Final

import torch
import typing_extensions

from phimr_nemo.training import platform

MEGATRON: Final = "megatron.core.models.gpt.gpt_model"
"""Imported before Transformer Engine's stand-in exists, so that Megatron-Core takes its own layers."""
PAGED_STASH: Final = "megatron.core.transformer.moe.ops.paged_stash"


def prepare() -> None:
    """Make ``megatron.bridge`` importable and usable in this process, before anything of Megatron is imported.

    Does nothing where there is a CUDA device.
    """
    if torch.cuda.is_available():
        return
    if not hasattr(typing, "override"):
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    if importlib.util.find_spec("triton") is None:
        _add_paged_stash()
    importlib.import_module(MEGATRON)
    platform.prepare()
    # Asked for before every reduction of gradients, used with CUDA graphs alone.
    torch.cuda.current_stream = lambda *_: None
    if importlib.util.find_spec("transformer_engine") is None:
        _add_transformer_engine()


def _add_paged_stash() -> None:
    """The one file of Triton kernels that Megatron-Core imports unconditionally (it stores experts' activations)."""
    kernels = {name: _absent(name) for name in ("paged_stash_copy_kernel", "paged_stash_pop_kernel")}
    _module(PAGED_STASH, GLOBAL_BLOCK_SIZE=1024, **kernels)


def _add_transformer_engine() -> None:
    """A ``transformer_engine.pytorch`` with the names that adapters (PEFT) mention; none can be built."""
    layers = {name: _absent(name) for name in ("Linear", "LayerNormLinear", "GroupedLinear")}
    operations = _module("transformer_engine.pytorch.ops", Sequential=_absent("ops.Sequential"))
    pytorch = _module("transformer_engine.pytorch", ops=operations, **layers)
    pytorch.__path__ = []
    # Older than every feature that is asked for.
    package = _module("transformer_engine", pytorch=pytorch, __version__="0.0.0")
    package.__path__ = []


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    # torch and transformers look for a package before they look at it.
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


def _absent(name: str) -> type:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"{name} needs a GPU")

    return type(name.rpartition(".")[2], (torch.nn.Module,), {"__init__": refuse})
