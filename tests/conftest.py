"""Fixtures that every test directory shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


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
