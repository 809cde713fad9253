"""The table of the families' quickstarts in docs/families.md has the figures of one stored file."""

from __future__ import annotations

import family_results
import pytest
from common import between
from family_results import BEGIN, END, Families, Run

from phimr_nemo.jobs.quickstart import ROWS
from phimr_nemo.model.families import FAMILIES
from phimr_nemo.report.scores import Entry

MEASURED = Families(
    {"cores": 2, "processor": "Z80"},
    1,
    0.6,
    [
        Run(
            family,
            "2026-01-02",
            ["abc"],
            90.0,
            [Entry("base", 3, 1024, 0.0, 0.0), Entry("SFT", 3, 1024, share, 0.01)],
        )
        for family, share in (("llama", 0.5), ("qwen3", 0.75))
    ],
)


def test_the_page_has_the_figures_of_the_newest_file() -> None:
    assert family_results.PAGE.read_text("utf-8") == family_results.made(), f"python {family_results.NAME}"


def test_the_stored_runs_are_whole_quickstarts_of_known_families() -> None:
    runs = family_results.read(family_results.newest()).runs
    names = [run.family for run in runs]
    assert len(set(names)) == len(names)
    assert set(names) <= set(FAMILIES)
    for run in runs:
        assert [entry.row for entry in run.entries] == [row for _, row in ROWS]
        assert all(0.0 <= entry.pass1 <= 1.0 for entry in run.entries)


def test_a_typed_figure_is_replaced() -> None:
    made = between(f"a\n{BEGIN}\n| `qwen3` | 99.9 |\n{END}\nb", BEGIN, END, family_results.table(MEASURED))
    assert "99.9" not in made
    assert "| family | base | SFT | CPU minutes |" in made
    assert "| `llama` | 0.0 ± 0.0 | 50.0 ± 1.0 | 1.5 |" in made
    assert "| `qwen3` | 0.0 ± 0.0 | 75.0 ± 1.0 | 1.5 |" in made
    assert (
        "on 1,024 held-out problems, one sample each at T=0.6, seed 3, 2026-01-02, code `abc`, 2 cores of Z80" in made
    )


def test_what_is_stored_is_read_again(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_results.quickstart_results, "RESULTS", tmp_path)
    with pytest.raises(LookupError, match="--record"):
        family_results.newest()
    path = family_results.store(MEASURED)
    assert path.name == "2026-01-02-families.json"
    assert family_results.newest() == path
    assert family_results.read(path) == MEASURED
