"""docs/code.md names places that are there, for every package and for many changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FEWEST_CHANGES = 30
PLACE = re.compile(r"`((?:phimr_nemo|conf|slurm|tests|recipes|bench)/[\w/.-]*)`")


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "code.md").read_text("utf-8")


def test_every_place_is_there(page: str, repository: Path) -> None:
    places = set(PLACE.findall(page))
    assert len(places) > FEWEST_CHANGES
    assert sorted(place for place in places if not (repository / place).exists()) == []


def test_every_package_has_a_row(page: str, repository: Path) -> None:
    packages = {path.parent.name for path in (repository / "phimr_nemo").glob("*/__init__.py")}
    rows = {row.split("`")[1].removeprefix("phimr_nemo/") for row in page.splitlines() if row.startswith("| `phimr")}
    assert packages - rows == set()


def test_many_changes_have_a_place(page: str) -> None:
    table = page.partition("| to change | go to |")[2].splitlines()[2:]
    rows = [row for row in table if row.startswith("| ")]
    assert len(rows) >= FEWEST_CHANGES
    assert [row for row in rows if not PLACE.search(row)] == []
