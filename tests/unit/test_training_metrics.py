"""The table of metrics: a row for each name of a stage, in docs as in code, with a direction where it counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from phimr_nemo.config import STAGES
from phimr_nemo.training.metrics import METRICS, Stage, markdown_table, metrics_of
from phimr_nemo.training.plots import DISTILL_PANELS, DPO_PANELS, GRPO_PANELS, GRPO_TIMES, SUPERVISED_PANELS

TABLES: dict[Stage, str] = {
    **dict.fromkeys(("midtrain", "sft", "dpo"), "training.md"),
    "grpo": "grpo.md",
    "distill": "distill.md",
}


@pytest.mark.parametrize("stage", TABLES)
def test_a_name_means_one_thing_in_a_stage(stage: Stage) -> None:
    names = Counter(metric.name for metric in METRICS if stage in metric.stages)
    assert set(names.values()) == {1}


@pytest.mark.parametrize("stage", TABLES)
def test_the_docs_have_the_table_of_the_code(stage: Stage, repository: Path) -> None:
    assert markdown_table(metrics_of(stage).values()) in (repository / "docs" / TABLES[stage]).read_text("utf-8")


def test_an_outdated_table_would_be_seen(repository: Path) -> None:
    table = markdown_table(metrics_of("dpo").values()).replace("nats", "bits", 1)
    assert table not in (repository / "docs" / "training.md").read_text("utf-8")


@pytest.mark.parametrize("stage", TABLES)
def test_what_checkpoints_are_compared_by_has_a_direction(stage: Stage) -> None:
    checkpoint: Any = get_type_hints(STAGES[stage])["checkpoint"]
    choices = get_args(get_type_hints(checkpoint)["metric"])
    assert choices
    assert all(metrics_of(stage)[name].better in ("lower", "higher") for name in choices)


def test_every_curve_is_a_metric_of_its_stage() -> None:
    shown: dict[Stage, list[str]] = {
        "sft": list(SUPERVISED_PANELS),
        "dpo": [name for names in DPO_PANELS.values() for name in names],
        "grpo": [*GRPO_TIMES, *(name for names in GRPO_PANELS.values() for name in names)],
        "distill": [*GRPO_TIMES, *(name for names in DISTILL_PANELS.values() for name in names)],
    }
    for stage, names in shown.items():
        assert set(names) <= metrics_of(stage).keys()
    assert all(metrics_of("sft")[name].title for name in SUPERVISED_PANELS)
