"""The quickstart's figures in README.md, docs/results.md and both pictures are those of one stored file."""

from __future__ import annotations

import html
import math
import re
import statistics
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import quickstart_results
import recording
from common import between
from quickstart_results import BEGIN, END, Difference, Quickstarts
from recipe_picture import Bar, picture

from phimr_nemo.report.scores import Entry
from phimr_nemo.report.tables import percent

SHARES = {"base": (0.0, 0.0), "SFT": (0.5, 0.7), "SFT without mid-training": (0.1, 0.2)}
MOST_BYTES = 300_000
FEWEST_RECORDED_SECONDS = 5.0
LINES_OF_THE_README = 200
PICTURES = (quickstart_results.PICTURE, recording.TARGET)


def measured(each: tuple[float, ...] = (0.3, -0.1)) -> Quickstarts:
    entries = [
        Entry(row, seed, 100, share, 0.01) for row, shares in SHARES.items() for seed, share in enumerate(shares)
    ]
    differences = [Difference(*rows, each, 0.02) for rows in quickstart_results.DIFFERENCES]
    return Quickstarts(
        "2026-01-02", ["abc"], {"cores": 2, "processor": "Z80"}, 4, 0.6, [60.0, 90.0], entries, differences
    )


def shown(path: Path) -> str:
    """The words of a picture, without its tags."""
    text = path.read_text("utf-8")
    found = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    return " ".join(" ".join(map(html.unescape, found)).split())


def test_the_documents_and_the_picture_have_the_figures_of_the_newest_file() -> None:
    differ = [path.name for path, text in quickstart_results.made().items() if path.read_text("utf-8") != text]
    assert differ == [], f"python {quickstart_results.NAME} writes them again"


def test_a_typed_figure_is_replaced() -> None:
    made = between(f"a\n{BEGIN}\n| SFT | 99.9 |\n{END}\nb", BEGIN, END, quickstart_results.front(measured()))
    assert "99.9" not in made
    assert made.startswith(f"a\n{BEGIN}\n| stage |")
    assert made.endswith(f"{END}\nb")
    with pytest.raises(ValueError, match="no marks"):
        between("a", BEGIN, END, "b")


def test_means_and_errors_are_those_of_the_seeds() -> None:
    lines = quickstart_results.page(measured()).splitlines()
    row = next(line for line in lines if line.startswith("| SFT |"))
    mean, error = 100 * statistics.mean(SHARES["SFT"]), 100 * statistics.stdev(SHARES["SFT"]) / math.sqrt(2)
    assert row == f"| SFT | {mean:.1f} | 1.0 | {error:.1f} | 50.0, 70.0 | - |"
    gain = next(line for line in lines if line.startswith("| DPO minus SFT |"))
    assert gain == "| DPO minus SFT | +10.0 ± 20.0 (2.0) | +30.0, -10.0 |"


def test_a_gain_that_a_seed_does_not_have_is_told() -> None:
    gains = [Difference("SFT", "DPO", (0.1, 0.2), 0.01), Difference("DPO", "GRPO", (0.1, 0.0), 0.01)]
    assert quickstart_results.gains(gains[:1]) == "Every stage adds to the one before it in each of the two seeds."
    assert quickstart_results.gains(gains).endswith("all two seeds: GRPO minus DPO is above 0 in 1.")


def test_the_recording_shows_the_table_of_the_stored_file() -> None:
    rows = quickstart_results.paper_table(quickstart_results.read(quickstart_results.newest()).entries)
    words = shown(recording.TARGET)
    missing = [
        expected
        for row in rows
        if (
            expected
            := f"{row.row} {percent(row.pass1)} {percent(row.seed_stderr)} {', '.join(map(percent, row.each))}"
        )
        not in words
    ]
    assert missing == [], f"python {quickstart_results.NAME} --record RUN records it again"


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_needs_nothing_else(path: Path) -> None:
    text = path.read_text("utf-8")
    assert path.stat().st_size < MOST_BYTES
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert names <= {"svg", "style", "defs", "marker", "path", "rect", "circle", "g", "text"}
    assert re.findall(r"href|@import|@font-face|url\((?!#)", text) == []


def test_the_recording_plays_for_at_most_twenty_seconds_and_stands_still_where_that_is_wished() -> None:
    text = recording.TARGET.read_text("utf-8")
    seconds = set(re.findall(r"animation:\w+ ([\d.]+)s", text))
    assert len(seconds) == 1
    assert FEWEST_RECORDED_SECONDS < float(seconds.pop()) <= recording.LONGEST
    assert "prefers-reduced-motion" in text


def test_what_a_command_writes_is_recorded_when_it_comes(tmp_path: Path) -> None:
    write = "import sys, time; print('\\033[32mone\\033[0m', flush=True); time.sleep(1.0); print(sys.stdout.isatty())"
    command = f'"{sys.executable}" -c "{write}"'
    screen, seconds, took = recording.play([command], [1.0], tmp_path, {"PATH": "/usr/bin:/bin"})
    lines = {"".join(cell.text for cell in line): line for line in screen.lines}
    one, two = lines["one"], lines["True"]
    assert {cell.kind for cell in one} == {"c2"}
    assert 0 < two[0].at - one[0].at <= recording.LONGEST_WAIT + 1e-9
    assert took >= 1.0
    typed = [cell.at for line in screen.lines for cell in line if cell.kind == "b"]
    assert typed == sorted(typed)
    assert len(typed) == len(command)
    drawn = recording.svg(screen, seconds, "a title")
    assert f"{100 * round(two[0].at / recording.QUANTUM) * recording.QUANTUM / seconds:.3f}%{{opacity:1}}" in drawn


def test_a_wait_is_cut_and_a_long_output_played_faster() -> None:
    assert recording._shortened([0.1, 50.0]) == pytest.approx([0.1, 0.1 + recording.LONGEST_WAIT])
    many = recording._shortened([float(second) for second in range(1, 11)])
    assert many == pytest.approx([recording.MOST_OUTPUT * n / 10 for n in range(1, 11)])


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\rb", "a\x07"])
def test_what_the_recording_cannot_show_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="the recording knows"):
        recording.Screen().write(text, 0.0)


def test_lines_leave_the_screen_at_its_lower_end() -> None:
    screen = recording.Screen()
    for row in range(recording.ROWS + 3):
        screen.write(f"line {row}\n", row / 10)
    drawn = recording.svg(screen, 10.0, "t")
    assert f".scroll{{transform:translateY({-3 * recording.LINE_HEIGHT}px)" in drawn
    assert drawn.count("translateY") == 1 + 1 + 3


def test_a_recording_that_takes_too_long_is_an_error() -> None:
    with pytest.raises(ValueError, match="at most 20"):
        recording.svg(recording.Screen(), 20.1, "t")


def test_bars_are_as_high_as_their_shares() -> None:
    bars = [Bar(str(n), n / 4, 0.0, (n / 4,)) for n in range(5)]
    root = ElementTree.fromstring(picture(bars, ("below",)))
    heights = [float(one.attrib["height"]) for one in root.iter() if one.attrib.get("class") == "bar"]
    assert heights == pytest.approx([heights[-1] * n / 4 for n in range(5)], abs=0.06)
    with pytest.raises(ValueError, match="4 bars"):
        picture(bars[:4], ())


def test_the_readme_is_short() -> None:
    assert len(quickstart_results.README.read_text("utf-8").splitlines()) <= LINES_OF_THE_README
