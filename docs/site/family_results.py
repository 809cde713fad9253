"""The table of docs/families.md with a full quickstart of each family, made of one stored file.

    python docs/site/family_results.py --record RUN=CPU_SECONDS ...
    python docs/site/family_results.py [--check]

`--record` reads finished quickstarts of one family each, with what `time` said of the command, user and system
together, and writes `bench/results/<date>-families.json`. Every call writes the table between its marks, from the
newest such file; `--check` only tells whether it is there. So no figure is typed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

REPOSITORY: Final = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "bench")]

import quickstart_results
from common import between

from phimr_nemo.report.scores import Entry
from phimr_nemo.report.tables import percent

PAGE: Final = REPOSITORY / "docs" / "families.md"
NAME: Final = "docs/site/family_results.py"
BEGIN: Final = f"<!-- families: begin, by {NAME} -->"
END: Final = "<!-- families: end -->"
MINUTE: Final = 60.0


class Run(NamedTuple):
    """A full quickstart of one family.

    Attributes:
        family: its model_type.
        date: of the last evaluation.
        code: commits of the models.
        cpu_seconds: of the whole command, user and system, all its processes together.
        entries: a row each, of one seed.
    """

    family: str
    date: str
    code: Sequence[str]
    cpu_seconds: float
    entries: Sequence[Entry]


class Families(NamedTuple):
    """What was measured.

    Attributes:
        machine: on what.
        samples: per question.
        temperature: of the samples.
        runs: in the order of the table.
    """

    machine: Mapping[str, Any]
    samples: int
    temperature: float
    runs: Sequence[Run]


def newest() -> Path:
    """The stored file of the last date.

    Raises:
        LookupError: nothing has been recorded.
    """
    found = max(quickstart_results.RESULTS.glob("*-families.json"), default=None)
    if found is None:
        raise LookupError(f"no {quickstart_results.RESULTS}/*-families.json: run {NAME} --record")
    return found


def read(path: Path) -> Families:
    """A stored file."""
    told = json.loads(path.read_text("utf-8"))
    runs = [Run(**{**one, "entries": [Entry(**entry) for entry in one["entries"]]}) for one in told.pop("runs")]
    return Families(**told, runs=runs)


def record(finished: Mapping[Path, float]) -> Families:
    """The figures of finished quickstarts of one seed each.

    Args:
        finished: their output directories -> CPU seconds of the command.

    Raises:
        UserError: an evaluation is damaged.
        LookupError: an evaluation is not there.
    """
    from phimr_nemo.model import Architecture

    runs, found = [], None
    for root, seconds in finished.items():
        found = quickstart_results.record([root])
        family = Architecture.from_directory(next(root.glob("seed-*")) / "grpo" / "hf").family
        runs.append(Run(family, found.date, found.code, seconds, found.entries))
    if found is None:
        raise LookupError("no run is named")
    return Families(found.machine, found.samples, found.temperature, runs)


def store(found: Families) -> Path:
    """Write the figures; returns the file."""
    runs = [one._asdict() | {"entries": [asdict(entry) for entry in one.entries]} for one in found.runs]
    path = quickstart_results.RESULTS / f"{max(one.date for one in found.runs)}-families.json"
    path.write_text(json.dumps(found._asdict() | {"runs": runs}, indent=1) + "\n", "utf-8")
    return path


def table(found: Families) -> str:
    """The lines of docs/families.md."""
    stages = [entry.row for entry in found.runs[0].entries]
    header = ("family", *stages, "CPU minutes")
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for run in found.runs:
        shares = [f"{percent(entry.pass1)} ± {percent(entry.stderr)}" for entry in run.entries]
        lines.append(f"| `{run.family}` | {' | '.join(shares)} | {run.cpu_seconds / MINUTE:.1f} |")
    first, commits = found.runs[0].entries[0], sorted({commit for run in found.runs for commit in run.code})
    samples = "one sample" if found.samples == 1 else f"{found.samples} samples"
    measured = (
        f"pass@1 in per cent ± SE (clustered by question) on {first.n:,} held-out problems, {samples} each at "
        f"T={found.temperature:g}, seed {first.seed}, {max(run.date for run in found.runs)}, code "
        f"{', '.join(f'`{commit}`' for commit in commits)}, {found.machine['cores']} cores of "
        f"{found.machine['processor']}; CPU minutes of the whole command, user and system, beside other work."
    )
    return "\n".join((*lines, "", measured))


def made() -> str:
    """docs/families.md as it should be."""
    return between(PAGE.read_text("utf-8"), BEGIN, END, table(read(newest())))


def _finished(text: str) -> tuple[Path, float]:
    path, _, seconds = text.rpartition("=")
    return Path(path), float(seconds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--record", nargs="+", type=_finished, metavar="RUN=CPU_SECONDS", help="finished quickstarts")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page differs")
    options = parser.parse_args()
    if options.record:
        print(store(record(dict(options.record))))
    text = made()
    if not options.check:
        PAGE.write_text(text, "utf-8")
    elif PAGE.read_text("utf-8") != text:
        sys.exit(f"not the figures of {newest().name}: {PAGE.name}; run python {NAME}")


if __name__ == "__main__":
    main()
