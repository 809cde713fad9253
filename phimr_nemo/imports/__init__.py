"""Import upstream packages for what is used of them.

NeMo's, Lightning's and torchmetrics' packages import every model, data set and metric of theirs before the first of
their modules can be had. After :func:`lean_imports` the packages of `NAMES` are entered without that: a submodule is
imported alone, a name of the table from the submodule that defines it, and any other name still runs the whole
`__init__`, then and once. So nothing is missing; it is loaded later, or never. Likewise Megatron's fused functions,
which its modules hand to torch's compiler when they are imported, are handed over when they are called.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

NAMES: Final[Mapping[str, Mapping[str, str]]] = {
    "nemo.collections.common": {},
    "nemo.collections.common.parts": {},
    "nemo.collections.common.tokenizers": {
        "AutoTokenizer": "huggingface.auto_tokenizer",
        "ByteLevelTokenizer": "bytelevel_tokenizers",
        "SentencePieceTokenizer": "sentencepiece_tokenizer",
        "TiktokenTokenizer": "tiktoken_tokenizer",
        "TokenizerSpec": "tokenizer_spec",
    },
    "nemo.collections.llm": {
        "GPTConfig": "gpt.model.base",
        "GPTModel": "gpt.model.base",
        "MambaModel": "gpt.model.ssm",
        "SSMConfig": "gpt.model.ssm",
    },
    "nemo.collections.llm.gpt": {},
    "nemo.collections.llm.gpt.model": {},
    "nemo.collections.llm.inference": {},
    "nemo.collections.llm.modelopt": {},
    "nemo.collections.llm.modelopt.distill": {},
    "nemo.collections.llm.recipes": {},
    "nemo.collections.llm.recipes.tp_overlap_configs": {},
    "nemo.collections.nlp": {},
    "nemo.collections.nlp.data": {},
    "nemo.collections.nlp.data.language_modeling": {},
    "nemo.collections.nlp.data.language_modeling.megatron": {},
    "nemo.collections.nlp.models": {},
    "nemo.collections.nlp.modules": {},
    "nemo.collections.nlp.modules.common": {},
    "nemo.collections.nlp.modules.common.megatron": {},
    "nemo.collections.nlp.parts": {},
    "nemo_run": {"Config": "config", "Partial": "config"},
    # `metric` and `utilities` import one another: the latter has to come first, as in the package's own `__init__`.
    "torchmetrics": {
        "Metric": "utilities.checks",
        "MetricCollection": "collections",
        "__version__": "__about__",
    },
}
"""Package -> its public names that are used: the submodule that defines each."""

LOGGER: Final = "_logger"
"""The one name that the head of torchmetrics' `__init__` makes for its own modules."""

UNUSED: Final[Mapping[str, str]] = {"modelopt": "modelopt", "sklearn": "transformers.utils.import_utils"}
"""Packages that others import where they are installed, for what nothing here calls -> who looks whether they are."""

COMPILING: Final = ("megatron.core.jit", "nemo.collections.nlp.modules.common.megatron.utils")
"""Modules that take torch.compile for a decorator, which loads the compiler at import and is mostly not called."""

STAR: Final = "__all__"
"""What `from package import *` asks for; the import system asks for other names with underscores, in passing."""


class _Package(ModuleType):
    """A package whose `__init__` has not run."""

    def __getattr__(self, name: str) -> Any:
        if name == LOGGER:
            return logging.getLogger(self.__name__)
        home = NAMES[self.__name__].get(name)
        if home is None and name.startswith("__") and name != STAR:
            raise AttributeError(name)
        if home is not None:
            value = getattr(importlib.import_module(f"{self.__name__}.{home}"), name)
        else:
            value = self._submodule(name)
        if value is None:
            return self._all(name)
        setattr(self, name, value)
        return value

    def _all(self, name: str) -> Any:
        """A name of the package as upstream made it: all of it, from here on."""
        spec = self.__spec__
        assert spec is not None
        assert isinstance(spec.loader, _Later)
        self.__class__ = ModuleType  # type: ignore[assignment]
        _show_hidden()
        spec.loader.package.exec_module(self)
        return getattr(self, name)

    def _submodule(self, name: str) -> ModuleType | None:
        full = f"{self.__name__}.{name}"
        try:
            return importlib.import_module(full)
        except ModuleNotFoundError as error:
            if error.name != full:
                raise
            return None


class _Later(Loader):
    """Loads a package without running its `__init__`."""

    def __init__(self, package: Loader) -> None:
        self.package = package

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it for later."""


class _CompilingLater(Loader):
    """Loads a module of `COMPILING`, which finds :func:`compile_when_called` for torch.compile."""

    def __init__(self, module: Loader) -> None:
        self.module = module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.module.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        compiler = torch.compile
        torch.compile = functools.partial(compile_when_called, compiler)
        try:
            self.module.exec_module(module)
        finally:
            torch.compile = compiler


def compile_when_called(
    compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **settings: Any
) -> Any:
    """`compiler(function, **settings)` at the first call.

    Args:
        compiler: torch.compile.
        function: of tensors; None makes a decorator with the settings, as torch.compile does.
        settings: of the compiler.
    """
    if function is None:
        return functools.partial(compile_when_called, compiler, **settings)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        from torch.compiler import is_compiling

        # Part of a function that is being compiled: it becomes a part of that one's graph.
        if is_compiling():
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(compiler(function, **settings))
        return compiled[0](*args, **kwargs)

    return called


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in NAMES and fullname not in COMPILING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = (_Later if fullname in NAMES else _CompilingLater)(spec.loader)
        return spec


def _show_hidden() -> None:
    for name in UNUSED:
        if sys.modules.get(name, sys) is None:
            del sys.modules[name]


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """Enter the packages of `NAMES` lazily from here on; within it, take those of `UNUSED` for not installed."""
    collecting = gc.isenabled()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    # None is Python's own mark of a package that is not there.
    hidden = [name for name, asking in UNUSED.items() if not {name, asking} & sys.modules.keys()]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    # Modules live as long as the process: looking for garbage among them takes a fifth of the time.
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        _show_hidden()
