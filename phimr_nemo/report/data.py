"""`phimr data report`: what came in, what was dropped and why, and what is left, as pictures and one HTML page.

Everything is read from manifests, from the small tables that `curate` leaves, and from narrow columns (verdicts,
lengths, pass rates), never from the text of responses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.curate.shape import LENGTH_BINS, SHAPE_FILE, TIERS
from phimr_nemo.errors import UserError
from phimr_nemo.report import data_figures as figures
from phimr_nemo.report.collect import is_data_step
from phimr_nemo.report.data_page import TEMPLATE
from phimr_nemo.report.page import embedded_png, render
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.check import recorded_kind
from phimr_nemo.store.records import KINDS, Kind
from phimr_nemo.store.shards import MANIFEST, Manifest, read_manifest

if TYPE_CHECKING:
    import pyarrow as pa

PAGE: Final = "report.html"
DROPPED: Final = "dropped: "
INPUT: Final = "input: "
GRADED: Final = ("correct", "wrong", "unparsable", "timeout", "error", "gold_unreadable")
# Rows of these kinds are made of others: one input row may give none or several.
ROLLOUTS_A_PAIR: Final = 2
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """A finished record directory.

    Attributes:
        name: its path under the directory that was asked for.
        path: the directory.
        kind: of its records.
        manifest: what made it and what is in it.
        inputs: names of the steps that it was made from, or file names where those are not in the report.
    """

    name: str
    path: Path
    kind: Kind
    manifest: Manifest
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A PNG with its title."""

    title: str
    path: Path


def write_data_report(roots: Sequence[Path], out: Path) -> Path:
    """Write PNGs and one self-contained HTML page about all finished record directories under some directories.

    Args:
        roots: directories, searched with everything below them.
        out: where the files go.

    Returns:
        The page.

    Raises:
        UserError: there is no finished record directory, or a manifest or table is damaged.
    """
    steps = find_steps(roots)
    pictures = draw(steps, out)
    path = out / PAGE
    atomic_write_text(path, page(roots, steps, pictures))
    return path


def find_steps(roots: Sequence[Path]) -> list[Step]:
    """Every finished record directory of a data step under `roots`, each after those that it was made from.

    Raises:
        UserError: there is none, or a manifest is damaged.
    """
    found: dict[Path, tuple[str, Path, Kind]] = {}
    for root in roots:
        for path in sorted(root.rglob(MANIFEST)):
            kind = recorded_kind(path.parent)
            if kind is not None and is_data_step(path):
                below = path.parent.relative_to(root)
                name = str(root.name / below if len(roots) > 1 or below == Path() else below)
                found.setdefault(path.resolve(), (name, path.parent, kind))
    if not found:
        raise UserError(
            f"no finished record directory under {[str(root) for root in roots]}",
            rule="a report is made of directories that data steps have finished",
            remedy="give the output directory of generate, verify, curate or pack, or one above them",
        )
    manifests = {name: read_manifest(path, kind) for name, path, kind in found.values()}
    made = {manifest.content: name for name, manifest in reversed(manifests.items())}
    steps = []
    for name, path, kind in found.values():
        manifest = manifests[name]
        inputs = tuple(made.get(content, given) for given, content in manifest.inputs.items())
        steps.append(Step(name, path, kind, manifest, inputs))
    return sorted(steps, key=lambda step: (KINDS.index(step.kind), step.name))


def page(roots: Sequence[Path], steps: Sequence[Step], pictures: Sequence[Picture]) -> str:
    """The HTML page; every name and reason in it is escaped."""
    made = sorted({f"phimr-nemo {step.manifest.versions.get('phimr-nemo', 'unknown')}" for step in steps})
    return render(
        TEMPLATE,
        roots=[root.name or str(root) for root in roots],
        tiles=tiles(steps),
        pictures=[{"title": picture.title, "data": embedded_png(picture.path)} for picture in pictures],
        steps=[_card(step) for step in steps],
        versions="Made by " + ", ".join(made) + ".",
    )


def tiles(steps: Sequence[Step]) -> list[dict[str, str]]:
    """The numbers that one looks for first."""
    found = []
    for kind in KINDS:
        rows = sum(step.manifest.rows for step in steps if step.kind == kind)
        if rows:
            found.append({"name": "packed rows" if kind == "rows" else kind, "value": f"{rows:,}"})
        if kind == "verdicts" and rows:
            right = sum(step.manifest.counts.get("correct", 0) for step in steps if step.kind == kind)
            found.append({"name": "of the verdicts are correct", "value": f"{right / rows:.1%}"})
    return found


def _card(step: Step) -> dict[str, Any]:
    """What the page says of one step: a bar for what came in, each reason to drop, and what is kept."""
    counts = step.manifest.counts
    drops = {name.removeprefix(DROPPED): count for name, count in counts.items() if name.startswith(DROPPED)}
    came = {name.removeprefix(INPUT): count for name, count in counts.items() if name.startswith(INPUT)}
    parts = {name: counts[name] for name in GRADED if name in counts} if step.kind == "verdicts" else {}
    kept = step.manifest.rows
    total = max([*came.values(), kept, sum(drops.values()), 1])
    lines = [_line(f"{name} in", count, total, "came") for name, count in came.items()]
    lines += [_line(name, count, total, "drop") for name, count in sorted(drops.items(), key=lambda item: -item[1])]
    lines += [_line(name, count, total, "kept" if name == "correct" else "drop") for name, count in parts.items()]
    label = f"{step.kind} written"
    if step.kind == "pairs":
        label = f"pairs written, {ROLLOUTS_A_PAIR} rollouts each"
    # A pair holds two of the rollouts that came in, so that the bars add up.
    width = kept * ROLLOUTS_A_PAIR if step.kind == "pairs" and came else kept
    lines.append({**_line(label, width, total, "came" if parts else "kept"), "count": f"{kept:,}"})
    others = sorted(set(counts) - set(parts) - {f"{DROPPED}{name}" for name in drops} - {f"{INPUT}{n}" for n in came})
    facts = [f"{name}: {counts[name]:,}" for name in others]
    shards = len(step.manifest.shards)
    facts.append("1 shard" if shards == 1 else f"{shards:,} shards")
    return {"name": step.name, "kind": step.kind, "inputs": step.inputs, "lines": lines, "facts": facts}


def _line(name: str, count: int, total: int, role: str) -> dict[str, str]:
    return {"name": name, "count": f"{count:,}", "percent": f"{min(100 * count / total, 100):.2f}", "role": role}


def draw(steps: Sequence[Step], out: Path) -> list[Picture]:
    """Draw what the steps allow to be drawn."""
    pictures: list[Picture] = []

    def picture(title: str, file: str) -> Path:
        pictures.append(Picture(title, out / file))
        return out / file

    figures.draw_funnel(funnel(steps), picture("Records after each step", "funnel.png"))
    tables = {step.path: read_shape(step.path / SHAPE_FILE) for step in steps if (step.path / SHAPE_FILE).is_file()}
    overall = {step.path.parent for step in steps} | {step.path.parent.parent for step in steps}
    for number, shape_file in enumerate(path / SHAPE_FILE for path in sorted(overall)):
        if shape_file.is_file():
            shape = read_shape(shape_file)
            order = [*(name for name in GRADED if name in shape), *sorted(shape.keys() - set(GRADED))]
            by_verdict = {name: shape[name].sum(axis=0) for name in order if shape[name].any()}
            name = f"lengths-by-verdict-{number}.png"
            title = f"Length of rollouts, by verdict ({shape_file.parent.name})"
            figures.draw_lengths(by_verdict, picture(title, name), stacked=True)
    lengths, tiers = {}, {}
    for step in steps:
        for series, table in tables.get(step.path, {}).items():
            lengths[step.name if series == "kept" else f"{step.name}: {series}"] = table.sum(axis=0)
            if series == "kept":
                tiers[step.name] = table.sum(axis=1)
    if lengths:
        figures.draw_lengths(lengths, picture("Length of responses in each set", "lengths.png"), stacked=False)
    tiers = {step.name: difficulty_of(step) for step in steps if step.kind in ("problems", "verdicts")} | tiers
    if any(counts[:-1].any() for counts in tiers.values()):
        figures.draw_difficulty(tiers, picture("Difficulty", "difficulty.png"))
    prompts = [step for step in steps if step.kind == "prompts"]
    if prompts:
        rates, hard = (np.concatenate(part) for part in zip(*(pass_rates(step) for step in prompts), strict=True))
        figures.draw_pass_rates(rates, hard, picture("Pass rate of the RL prompts", "pass-rates.png"))
    return pictures


def funnel(steps: Sequence[Step]) -> dict[str, int]:
    """Records after each step, the verified ones among the verdicts too."""
    counts: dict[str, int] = {}
    for step in steps:
        counts[step.name] = step.manifest.rows
        if step.kind == "verdicts" and "correct" in step.manifest.counts:
            counts[f"{step.name}: correct"] = step.manifest.counts["correct"]
    return counts


def read_shape(path: Path) -> Mapping[str, Counts]:
    """The tables of a `shape.json`, [tiers, bins] each; lengths alone count as of unknown difficulty.

    Raises:
        UserError: the file holds something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        tables = {}
        for name, numbers in values.items():
            table = np.asarray(numbers, np.int64)
            if table.shape == (LENGTH_BINS,):
                table = np.vstack([np.zeros((len(TIERS) - 1, LENGTH_BINS), np.int64), table])
            tables[str(name)] = table.reshape(len(TIERS), LENGTH_BINS)
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged: {error}",
            rule=f"it holds tables of {len(TIERS)} x {LENGTH_BINS} whole numbers",
            remedy="delete it and the manifest beside it, then run `phimr curate` again: shards are kept",
        ) from error
    return tables


def difficulty_of(step: Step) -> Counts:
    """Rows by tier, [tiers], from that column alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = np.zeros(len(TIERS), np.int64)
    for table in _columns(step, ["difficulty"]):
        places = pc.fill_null(pc.index_in(table["difficulty"], value_set=pa.array(TIERS[:-1])), len(TIERS) - 1)
        counts += np.bincount(places.to_numpy(), minlength=len(TIERS))
    return counts


def pass_rates(step: Step) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Pass rate and mark of every prompt, [prompts]."""
    tables = [
        (table["pass_rate"].to_numpy(), table["hard"].to_numpy()) for table in _columns(step, ["pass_rate", "hard"])
    ]
    rates, hard = zip(*tables, strict=True)
    return np.concatenate(rates), np.concatenate(hard).astype(np.bool_)


def _columns(step: Step, columns: list[str]) -> Iterator[pa.Table]:
    """Narrow columns of one shard after the other. Checksums are not compared: they would need all of the text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in step.manifest.shards:
        try:
            table = pq.read_table(step.path / name, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"shard {step.path / name} cannot be read: {error}",
                rule="the shards that a manifest names are there and whole",
                remedy=f"run `phimr data check {step.path}`",
            ) from error
        yield table
