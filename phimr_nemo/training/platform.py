"""CPU or CUDA: the one place that knows. `prepare()` is the first call of every worker.

Megatron-Core and NeMo are written for CUDA: they name the device in factory calls and ask for its index and its
random state. Where CUDA is available `prepare` changes nothing. Where it is not, it redirects those calls to the
CPU, so that the same trainers run over gloo. Each redirection says who needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import types
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.utils._device import _device_constructors

from phimr_nemo.process.memory import keep_freed_memory

CPU: Final = torch.device("cpu")

# Factories that Megatron-Core calls with device="cuda" or pin_memory: optimizer, gradient clipping and buffers,
# pipeline schedules, checkpoint exchange; in 0.19 masks of windowed attention as well.
_FACTORIES: Final = ("empty", "empty_like", "ones", "tensor", "zeros")

# What cannot be asked for by a call: cuBLAS wants it before its first product, NCCL before its first group (sums in
# the network have an order of their own), and Transformer Engine's attention where it is built.
_DETERMINISTIC: Final = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def device() -> torch.device:
    """The device of this worker's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def backend() -> str:
    """The torch.distributed backend: nccl with CUDA, else gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def make_deterministic() -> None:
    """Choose kernels that give the same bits every time; before the process groups are started.

    Megatron's own part is its `deterministic_mode`.
    """
    os.environ.update(_DETERMINISTIC)
    torch.use_deterministic_algorithms(True)


@functools.cache
def prepare() -> None:
    """Make Megatron-Core and NeMo run on this machine; nothing to do with CUDA, idempotent without."""
    if torch.cuda.is_available():
        return
    keep_freed_memory()
    _redirect_devices()
    _redirect_random_state()
    _redirect_type_names()
    _redirect_nemo()
    _redirect_products()
    if not any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex")):
        from phimr_nemo.training.adam import install

        install()


def _redirect_products() -> None:
    """Products of gradients and inputs are added to Megatron's buffers at once, as Apex's do on a GPU."""
    from megatron.core.tensor_parallel import layers

    from phimr_nemo.losses.vocabulary import accumulate_weight_gradient

    def add_product(inputs: torch.Tensor, gradient: torch.Tensor, total: torch.Tensor) -> None:
        accumulate_weight_gradient(total, gradient, inputs)

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
        layers._grad_accum_fusion_available = True


def _redirect_devices() -> None:
    """Tensors that are asked for on the GPU are made on the CPU."""
    # Used as device=torch.cuda.current_device() all over Megatron-Core and NeMo.
    torch.cuda.current_device = lambda: CPU
    # Megatron waits for the GPU after every exchange between pipeline stages.
    torch.cuda.synchronize = lambda *_: None
    # `with torch.device(...)` knows factories by identity and collects them once: torch's own, before the wrapping.
    _device_constructors()
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

    # NeMo compiles functions with torch.jit when it is imported; the compiler knows factories by identity.
    builtins = torch.jit._builtins
    builtins._register_builtin(made_on_cpu, builtins._find_builtin(factory))
    return made_on_cpu


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


def _redirect_nemo() -> None:
    """NeMo moves a loaded checkpoint to the GPU and asserts that there is one."""
    if importlib.util.find_spec("nemo") is None:
        return
    import nemo.lightning.io.pl as nemo_io

    nemo_io._fix_tensors_device = lambda checkpoint: checkpoint
