"""CPU or CUDA: the one place that knows. `prepare()` is the first call of every worker.

Megatron-Core and NeMo are written for CUDA: they name the device in factory calls, ask for its index, its
streams, its random state. Where CUDA is available `prepare` changes nothing. Where it is not, it redirects those
calls to the CPU, so that the same trainers run over gloo. Each redirection says who needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final

import torch

CPU: Final = torch.device("cpu")

# Factories that Megatron-Core and NeMo call with device="cuda" (optimizer, clip_grads, schedules, checkpointing).
_FACTORIES: Final = (
    "arange",
    "empty",
    "empty_like",
    "eye",
    "full",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
)
_CUDA_TENSOR_TYPES: Final = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor")


def device() -> torch.device:
    """The device of this worker's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def backend() -> str:
    """The torch.distributed backend: nccl with CUDA, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


@functools.cache
def prepare() -> None:
    """Make Megatron-Core and NeMo run on this machine; nothing to do with CUDA, idempotent without."""
    if torch.cuda.is_available():
        return
    if importlib.util.find_spec("nemo") is not None:
        # NeMo compiles functions with torch.jit when it is imported, and that accepts torch's own factories only.
        importlib.import_module("nemo.collections.llm")
    _redirect_devices()
    _redirect_streams()
    _redirect_random_state()
    _redirect_type_names()
    _redirect_nemo()
    if not any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex")):
        from phimr_nemo.train.adam import install

        install()


def _redirect_devices() -> None:
    """Tensors that are asked for on the GPU are made on the CPU."""
    # Used as device=torch.cuda.current_device() all over Megatron-Core and NeMo.
    torch.cuda.current_device = lambda: CPU
    torch.cuda.set_device = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # mcore: tied embedding weights, RNG, checkpoint exchange; NeMo and DDP: the model itself.
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made_on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "cuda":
            kwargs["device"] = CPU
        # Pinning needs a CUDA driver (mcore's batches and gradient buffers ask for it).
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made_on_cpu


class _NoStream:
    """Stands for a CUDA stream or event: on the CPU everything is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _redirect_streams() -> None:
    """Streams and profiler ranges that overlap communication on a GPU and mean nothing here."""
    torch.cuda.Stream = _NoStream
    torch.cuda.Event = _NoStream
    torch.cuda.current_stream = lambda *_: _NoStream()
    torch.cuda.default_stream = lambda *_: _NoStream()
    torch.cuda.stream = lambda *_: contextlib.nullcontext()


def _redirect_random_state() -> None:
    """Megatron's per-layout random states: kept in the CPU generator instead of the GPU's."""
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)


def _redirect_type_names() -> None:
    """Megatron's optimizers sort parameters by the name of their tensor type and accept CUDA's names alone."""
    named_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return named_type(self, dtype, *args, **kwargs)
        return str(named_type(self)).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_as_on_cuda
    for name in _CUDA_TENSOR_TYPES:
        setattr(torch.cuda, name, getattr(torch, name))


def _redirect_nemo() -> None:
    """NeMo moves a loaded checkpoint to the GPU and asserts that there is one."""
    if importlib.util.find_spec("nemo") is None:
        return
    import nemo.lightning.io.pl as nemo_io

    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint
