"""Imports before a worker is confined: a confined worker opens no file, so what it has not imported it never will."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Final

PACKAGES: Final = (
    "antlr4",
    "phimr_nemo.verify.algebra",
    "phimr_nemo.verify.read",
    "sympy.assumptions",
    "sympy.calculus",
    "sympy.combinatorics",
    "sympy.concrete",
    "sympy.discrete",
    "sympy.functions",
    "sympy.integrals",
    "sympy.logic",
    "sympy.matrices",
    "sympy.ntheory",
    "sympy.physics.units",
    "sympy.polys",
    "sympy.series",
    "sympy.sets",
    "sympy.simplify",
    "sympy.solvers",
    "sympy.tensor",
)
"""Of these, functions import modules when they are called."""

_LEFT_OUT: Final = ("tests", "benchmarks", "_doc")
"""Not of use here, and some are slow to import."""


def preload_mathematics() -> None:
    """Import every module that comparing two answers may ask for."""
    import phimr_nemo.verify.compare
    import phimr_nemo.verify.extract
    import phimr_nemo.verify.mathverify
    import phimr_nemo.verify.symbolic  # noqa: F401

    for name in PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not found.name.endswith(_LEFT_OUT) and not any(f".{part}." in found.name for part in _LEFT_OUT):
                importlib.import_module(found.name)
