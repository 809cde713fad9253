"""Signatures read from sources, and calls in sources held against them. Nothing is imported that is looked at."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Signature:
    """What may be passed.

    Attributes:
        positional: names of the parameters that may stand without their name, in order.
        named: those that may not.
        required: those of both without a default.
        any_positional: there is `*args`.
        any_named: there is `**kwargs`.
    """

    positional: tuple[str, ...]
    named: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    any_positional: bool = False
    any_named: bool = False

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Signature:
        sequences = {name: tuple(values[name]) for name in ("positional", "named", "required")}
        return Signature(**sequences, any_positional=values["any_positional"], any_named=values["any_named"])

    def faults(self, call: ast.Call) -> list[str]:
        """What is wrong with the arguments of a call."""
        starred = any(isinstance(argument, ast.Starred) for argument in call.args)
        names = [keyword.arg for keyword in call.keywords]
        given = {*self.positional[: len(call.args)], *filter(None, names)}
        found = []
        if len(call.args) > len(self.positional) and not self.any_positional and not starred:
            found.append(f"{len(call.args)} positional arguments, at most {len(self.positional)}")
        known = {*self.positional, *self.named}
        if not self.any_named:
            found += [f"no parameter {name}" for name in names if name is not None and name not in known]
        if not starred and None not in names:
            found += [f"{name} is not given" for name in self.required if name not in given]
        return found


def of_function(function: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> Signature:
    """The signature of a function; of a method without its first parameter."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    required = [a.arg for a in plain[: len(plain) - len(arguments.defaults)]]
    required += [a.arg for a, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value is None]
    static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in function.decorator_list)
    first = 1 if method and not static else 0
    own = {a.arg for a in plain[:first]}
    return Signature(
        tuple(a.arg for a in plain[first:]),
        tuple(a.arg for a in arguments.kwonlyargs),
        tuple(name for name in required if name not in own),
        arguments.vararg is not None,
        arguments.kwarg is not None,
    )


def fields(node: ast.ClassDef) -> tuple[str, ...]:
    """Annotated names of a class: its fields."""
    return tuple(
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    )


def definition(path: Path, name: str) -> ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef:
    """A class, function or method (`Class.method`) of a file; of several the last, behind overloads."""
    body: Sequence[ast.stmt] = ast.parse(path.read_text("utf-8")).body
    node: ast.stmt | None = None
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        node = next(item for item in reversed(body) if isinstance(item, kinds) and item.name == part)
        body = node.body
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return node


def imported(tree: ast.Module, package: str) -> dict[str, str]:
    """Local name -> full name of everything that a module takes from a package."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package
        for alias in node.names
    }


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call with what is called, as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
