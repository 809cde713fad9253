"""Transformer Engine's own Python on this CPU: `enter()` makes it importable, over the kernels of ``te_kernels``.

Called once in a process, before anything of Megatron's is imported. What is pretended, and to whom: Transformer
Engine and the settings that follow from having it (``BELIEVERS``) see a Hopper GPU; everything else sees none, so
that processes, devices and data are those of a CPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

FOLDER: Final = Path(__file__).resolve().parents[2] / ".venv-te"
BELIEVERS: Final = ("transformer_engine", "phimr_nemo.model.megatron.configuration")
HOPPER: Final = (9, 0)
REASON: Final = "Transformer Engine's Python is absent (make setup-te; Linux on x86-64 and Python 3.10 to 3.12)"


def is_there() -> bool:
    """Whether `make setup-te` has been run."""
    return (FOLDER / "transformer_engine").is_dir()


def _asks(frame: Any) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(BELIEVERS)


class _Stream:
    """A CUDA stream or event; there is one order of things on a CPU."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = None

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    wait_stream = synchronize = wait_event = record = wait = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Stream()

    def query(self) -> bool:
        return True


def enter() -> None:
    """Put Transformer Engine on the path, over our kernels, and make Megatron and NeMo run on this CPU."""
    import torch

    if "transformer_engine" in sys.modules:
        raise RuntimeError("Transformer Engine, or somebody's stand-in of it, is imported already")
    sys.path[:0] = [str(FOLDER), str(Path(__file__).parent)]
    # Read when it is imported: no compiled library is looked for.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    # Without it a warning says so.
    os.environ["NVTE_FRAMEWORK"] = "none"
    # As in a job (Megatron asks for it): one queue keeps products and exchanges in order.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    # Triton's kernels are interpreted, its own library's too: read when that is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    # Compiling takes longer than everything that is computed.
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    torch._dynamo.config.disable = True
    _pretend(torch)
    import te_kernels

    sys.modules["transformer_engine_torch"] = te_kernels
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda _: None
    from phimr_nemo.training import platform

    platform.prepare()
    import transformer_engine.pytorch

    _wait_once()
    # The devices that it names are the CPU.
    replaced: dict[str, Callable[..., Any]] = {
        "canonicalize_device": lambda _=None: torch.device("cpu"),
        "_get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine"):
            vars(module).update({old: new for old, new in replaced.items() if hasattr(module, old)})


def enter_with_trainers() -> None:
    """The same, with the trainers imported once, for all runs, and their gradients added in float32.

    Apex's products are in the image, and Megatron wants to know them there; nothing here calls them.
    """
    apex = types.ModuleType("fused_weight_gradient_mlp_cuda")
    apex.__spec__ = ModuleSpec(apex.__name__, None)
    sys.modules[apex.__name__] = apex
    enter()
    from phimr_nemo.losses import products, vocabulary

    vocabulary.has_wide_products = products.has_wide_products = lambda operand: True  # noqa: ARG005
    _import_trainers()


def plain_with_trainers() -> None:
    """Without Transformer Engine: the project as it is on a CPU."""
    from phimr_nemo.training import platform

    platform.prepare()
    _import_trainers()


def _import_trainers() -> None:
    import torch.utils.tensorboard  # noqa: F401

    import phimr_nemo.align.dpo.stage
    import phimr_nemo.align.grpo.stage
    import phimr_nemo.supervised.stage  # noqa: F401


class _Once:
    """A request between processes that may be waited for again, as NCCL's may: gloo's would wait for ever."""

    def __init__(self, request: Any) -> None:
        self.request = request

    def wait(self) -> None:
        request, self.request = self.request, None
        if request is not None:
            request.wait()


def _wait_once() -> None:
    """Context parallelism's backward waits for each of its requests twice."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    communicate = context_parallel.flash_attn_p2p_communicate

    def communicate_once(*arguments: Any) -> list[_Once]:
        return [_Once(request) for request in communicate(*arguments)]

    context_parallel.flash_attn_p2p_communicate = communicate_once


def _pretend(torch: Any) -> None:
    """What Transformer Engine asks of CUDA."""
    properties = SimpleNamespace(major=HOPPER[0], minor=HOPPER[1], multi_processor_count=132, name="Hopper")
    cuda = torch.cuda
    cuda.get_device_properties = lambda *_: properties
    cuda.get_device_capability = lambda *_: HOPPER
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx = SimpleNamespace(
        range_push=lambda *_: None, range_pop=lambda *_: None, range=lambda *_: contextlib.nullcontext()
    )
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *_: _Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()
    torch.version.cuda = "12.9"
    available = cuda.is_available
    cuda.is_available = lambda: _asks(sys._getframe(1)) or available()
    torch.Tensor.is_cuda = property(lambda _: _asks(sys._getframe(1)))


@contextlib.contextmanager
def without_transformer_engine() -> Iterator[None]:
    """The project's own modules in plain PyTorch, in a process of the lane."""
    from phimr_nemo.model.megatron import configuration, gpt

    modules: list[Any] = [configuration, gpt]
    kept: list[Callable[[], bool]] = [module.has_transformer_engine for module in modules]
    for module in modules:
        module.has_transformer_engine = lambda: False
    try:
        yield
    finally:
        for module, function in zip(modules, kept, strict=True):
            module.has_transformer_engine = function
