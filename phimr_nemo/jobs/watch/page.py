"""The page of a running pipeline: one file that loads itself again until the pipeline ends, without a script."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.jobs.status import progress_of
from phimr_nemo.jobs.watch.pipeline import Pipeline, Said, Step
from phimr_nemo.report.page import render
from phimr_nemo.report.run import DRAWN, STAGE_NAMES
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.progress import duration
from phimr_nemo.store.runs import read_metrics
from phimr_nemo.text.printable import printable

WIDTH, HEIGHT = 320, 120
"""Of a curve, in the units of its drawing."""
MARGIN: Final = 6
MOST_POINTS: Final = 160
"""Of a curve: more are one point together, their mean."""
FIGURES: Final = 4
TEMPLATE: Final = """{% extends "page" %}
{% block title %}{{ title }}{% endblock %}
{% block head %}{% if refresh %}<meta http-equiv="refresh" content="{{ refresh }}">{% endif %}{% endblock %}
{% block style %}
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.scroll { overflow-x: auto; }
th, .scroll td { padding: 4px 12px 4px 0; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .82rem; }
tr:last-child td { border-bottom: 0; }
.done { color: #2f7d3a; } .running { color: #2f5f96; font-weight: 600; } .stopped, .unreadable { color: #b4322b; }
.progress { height: 8px; border-radius: 5px; background: var(--drop); overflow: hidden; margin-top: 14px; }
.progress i { display: block; height: 100%; background: var(--kept); }
svg { width: 100%; height: auto; display: block; }
polyline { fill: none; stroke: var(--bar); stroke-width: 1.6; vector-effect: non-scaling-stroke; }
@media (max-width: 520px) { th, .scroll td { padding-right: 8px; font-size: .8rem; }
  .scroll td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 7em; } }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin-top: 6px; }
{% endblock %}
{% block body %}
<h1>{{ title }}</h1>
<div class="soft">{{ summary }}</div>
<div class="progress"><i style="width: {{ percent }}%"></i></div>
<div class="tiles">
{% for tile in tiles %}<div class="tile"><b>{{ tile.value }}</b><span class="soft">{{ tile.name }}</span></div>
{% endfor %}</div>
<h2>Steps</h2>
<section class="card"><div class="scroll"><table><thead><tr>
{% for name in header %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row.cells %}<td{% if loop.index == 2 %} class="{{ row.state }}"{% endif %}>
{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></section>
{% if curves %}<h2>Learning curves</h2>
<div class="pictures">
{% for curve in curves %}<figure><figcaption>{{ curve.title }}</figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ curve.title }}">
<polyline points="{{ curve.points }}"></polyline></svg>
<div class="soft">{{ curve.range }}</div></figure>
{% endfor %}</div>{% endif %}
{% if said %}<h2>The last responses</h2>
{% for one in said %}<section class="card"><div class="head"><h3>{{ one.question }}</h3>
<span class="badge">{{ one.verdict }}</span></div>
<div class="soft">{{ one.facts }}</div><div class="text" dir="auto">{{ one.text }}</div></section>
{% endfor %}{% endif %}
<footer class="soft">{{ footer }}</footer>
{% endblock %}
"""


def write_live_page(found: Pipeline, root: Path, path: Path, *, every: float) -> None:
    """Write the page of a pipeline.

    Args:
        found: where it stands.
        root: its directory.
        path: the file.
        every: seconds after which the page loads itself again; not once the pipeline is over.

    Raises:
        UserError: the file cannot be written.
    """
    steps = found.steps
    scores = [step for step in steps if step.score.startswith("pass@1")]
    tiles = [
        {"name": "steps done", "value": f"{found.done} of {len(steps)}"},
        {"name": "so far", "value": duration(found.taken)},
    ]
    if found.done < len(steps):
        more = f", and {found.unknown} steps of unknown time" if found.unknown else ""
        tiles.append({"name": f"to go{more}", "value": duration(found.left)})
    if scores:
        best = max(scores, key=lambda step: float(step.score.split()[1]))
        tiles.append({"name": f"best pass@1: {best.name}", "value": best.score.removeprefix("pass@1 ")})
    state = "ended" if found.is_over else f"loads itself again every {max(1, round(every))} s"
    text = render(
        TEMPLATE,
        title=printable(root.name or str(root)),
        refresh=0 if found.is_over else max(1, round(every)),
        summary=f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}; {state}",
        percent=f"{100 * found.done / max(len(steps), 1):.1f}",
        tiles=tiles,
        header=("step", "state", "score", "done", "time", "to go"),
        rows=[{"cells": _cells(step), "state": step.state.replace(" ", "-")} for step in steps],
        curves=_curves(steps),
        width=WIDTH,
        height=HEIGHT,
        said=[_said(one) for one in found.said],
        footer="Written by phimr status --watch.",
    )
    atomic_write_text(path, text)


def _cells(step: Step) -> list[str]:
    return [
        printable(step.name),
        step.state,
        printable(step.score),
        "" if step.status is None else progress_of(step.status),
        "" if step.seconds is None else duration(step.seconds),
        "" if step.state == "done" or step.left is None else duration(step.left),
    ]


def _said(one: Said) -> dict[str, str]:
    numbers = [f"the answer is {one.answer}", one.run]
    numbers += [] if one.response.reward is None else [f"reward {one.response.reward:g}"]
    return {
        "question": printable(one.question),
        "verdict": one.response.verdict or "not graded",
        "facts": printable(", ".join(numbers)),
        "text": printable(one.response.text.strip() or "(nothing)"),
    }


def _curves(steps: Sequence[Step]) -> list[dict[str, str]]:
    found = []
    for step in steps:
        if step.status is None:
            continue
        try:
            lines = list(read_metrics(Path(step.status.path)))
        except UserError:
            continue  # its row says that it is unreadable
        for metric, title in DRAWN.get(step.status.stage, {}).items():
            points = _points(lines, metric)
            if points:
                found.append(
                    {"title": printable(f"{step.name} ({STAGE_NAMES[step.status.stage]}): {title}"), **points}
                )
    return found


def _points(lines: Sequence[Mapping[str, Any]], metric: str) -> dict[str, str]:
    """A metric as the points of a line, and in words from where to where; empty without values."""
    values = [
        (float(line["step"]), float(line[metric]))
        for line in lines
        if isinstance(line.get(metric), int | float) and math.isfinite(line[metric])
    ]
    if not values:
        return {}
    size = math.ceil(len(values) / MOST_POINTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    means = [tuple(math.fsum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*means, strict=True))
    points = [
        (
            MARGIN + (WIDTH - 2 * MARGIN) * ((step - left) / (right - left) if right > left else 0.5),
            HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * ((value - low) / (high - low) if high > low else 0.5),
        )
        for step, value in means
    ]
    return {
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        "range": f"{values[-1][1]:.{FIGURES}g} at step {values[-1][0]:,.0f}; "
        f"between {low:.{FIGURES}g} and {high:.{FIGURES}g}",
    }
