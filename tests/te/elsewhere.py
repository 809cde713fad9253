"""A device of its own, ``elsewhere``, on this CPU: its tensors compute there and refuse to be mixed with CPU tensors.

What a GPU does with a tensor that somebody made without `device=`: an error where the two meet. As on a GPU, numbers
without dimensions may come from the CPU, indices too, and copies go both ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME: Final = "elsewhere"
CPU: Final = torch.device("cpu")
COPIES: Final = (aten._to_copy.default, aten.copy_.default)
ANSWERS: Final = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
)
INDEXING: Final = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)

waits: list[str] = []
"""Operations that made the CPU wait for the device, in order."""


class Elsewhere(Tensor):
    """A tensor on the device; `held` computes."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held})"

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    here = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.dim() > 0]
    there = [x for x in leaves if isinstance(x, Elsewhere)]
    indexed = function in INDEXING and isinstance(args[0], Elsewhere)
    if here and there and function not in COPIES and not (indexed and all(not x.is_floating_point() for x in here)):
        shapes = [tuple(x.shape) for x in here]
        raise RuntimeError(f"Expected all tensors to be on the same device: {function} mixes in CPU's {shapes}")
    if there and _is_waited_for(function, args, kwargs):
        waits.append(str(function))
    device = kwargs.get("device")
    if here and function in COPIES and (there or _is_there(device)) and not _is_queued(function, args, kwargs):
        waits.append("copy to the device")
    if device is not None:
        kwargs = {**kwargs, "device": CPU}
    if kwargs.get("layout") is not None and kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": None}
    held = {id(x.held): x for x in there}
    out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    goes_home = device is not None and torch.device(device).type == "cpu"
    if function is aten._to_copy.default and goes_home:
        waits.append("copy to the CPU")
        return out
    if function is aten.copy_.default:
        if there and not isinstance(args[0], Elsewhere):
            waits.append("copy to the CPU")
        return args[0]
    if goes_home:
        return out

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, Elsewhere):
            return x
        return held.get(id(x)) if id(x) in held else Elsewhere(x)

    return tree_map(wrap, out)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _is_queued(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if function is aten.copy_.default and len(args) > 2:
        return bool(args[2])
    return bool(kwargs.get("non_blocking", False))


def _is_waited_for(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the CPU needs a number from the device to go on, or an index is copied there first."""
    if function in INDEXING:
        return any(x is not None and (x.dtype == torch.bool or not isinstance(x, Elsewhere)) for x in args[1])
    if function is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return function in ANSWERS


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Elsewhere) else x


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _then_moved(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return factory(data, *args, device=device, **kwargs)
        return factory(data, *args, **kwargs).to(device)

    return made


_library: Any = None


def install() -> torch.device:
    """Register the device, once in a process; the device."""
    global _library
    if _library is None:
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
        _library = torch.library.Library("_", "IMPL")
        # What is asked for on the device and has no tensor of it among its arguments: factories, copies to it.
        _library.fallback(lambda function, *args, **kwargs: _run(function, args, kwargs), "PrivateUse1")
        # These go past every place where Python could answer.
        for name in ("tensor", "as_tensor"):
            setattr(torch, name, _then_moved(getattr(torch, name)))
    return torch.device(NAME, 0)
