"""A terminal recording as an SVG that plays: real commands in a pseudo-terminal, with the timing of their output.

    python docs/site/recording.py runs/quickstart

writes docs/recording.svg from a finished quickstart. It has CSS keyframes and no script, font or network, so a page
may show it as a picture. Waits are cut; the bar above the terminal says how long the commands took.
"""

from __future__ import annotations

import codecs
import fcntl
import itertools
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

REPOSITORY: Final = Path(__file__).resolve().parents[2]
TARGET: Final = REPOSITORY / "docs" / "recording.svg"
COLUMNS: Final = 94
ROWS: Final = 30
LONGEST: Final = 20.0
"""Seconds of a recording."""
LONGEST_WAIT: Final = 0.6
MOST_OUTPUT: Final = 1.2
"""Seconds from a command's start to its end; what takes longer is played faster."""
KEY_SECONDS: Final = 0.018
READING_SECONDS: Final = (1.4, 4.4, 3.6)
"""How long what each command has said stays before the next is typed, or before the recording begins again."""
BEFORE_RUNNING: Final = 0.4
QUANTUM: Final = 0.02
"""What appears within so many seconds appears at once."""
CELL_WIDTH: Final = 7.8
LINE_HEIGHT: Final = 17
PADDING: Final = 12
BAR_HEIGHT: Final = 30
READ_BYTES: Final = 1 << 16
PROMPT: Final = "$ "
ESCAPE: Final = re.compile(r"\x1b\[(?P<codes>[\d;]*)(?P<command>[A-Za-z])")
HALVES: Final = re.compile(r"(?:\x1b(?:\[[\d;]*)?|\r)\Z")
"""What a read may end with whose rest is in the next."""
CLASSES: Final = {1: "b", 2: "d", **{base + n: f"c{n}" for base in (30, 90) for n in range(8)}}
"""What `select graphic rendition` codes are drawn as."""
COLORS: Final = ("#6e7681", "#ff7b72", "#3fb950", "#d29922", "#58a6ff", "#bc8cff", "#39c5cf", "#f0f6fc")
STYLE: Final = f"""
.term text{{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#e6edf3}}
.term text{{unicode-bidi:bidi-override}}
.title{{font:12px system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;fill:#9198a1;text-anchor:middle}}
.term .b{{font-weight:700}}.term .d{{fill:#9198a1}}.term .p{{fill:#3fb950}}
{"".join(f".term .c{n}{{fill:{color}}}" for n, color in enumerate(COLORS))}
@media (prefers-reduced-motion:reduce){{*{{animation:none!important}}}}
"""


class Output(NamedTuple):
    """Some characters, and the second at which they came."""

    at: float
    text: str


class Cell(NamedTuple):
    """A character on the screen.

    Attributes:
        text: the character.
        kind: classes of its look.
        at: the second at which it appears.
    """

    text: str
    kind: str
    at: float


def outputs(command: str, cwd: Path, environment: Mapping[str, str]) -> Iterator[Output]:
    """Run a command in a pseudo-terminal; what it writes, with the seconds since it began.

    Raises:
        RuntimeError: it fails.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    began = time.monotonic()
    process = subprocess.Popen(
        ["bash", "--noprofile", "--norc", "-c", command],
        cwd=cwd,
        env={**environment, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    decoder, kept = codecs.getincrementaldecoder("utf-8")("replace"), ""
    try:
        while True:
            try:
                read = os.read(ours, READ_BYTES)
            except OSError:  # Linux: nobody holds the other end any more.
                break
            if not read:
                break
            text = kept + decoder.decode(read)
            half = HALVES.search(text)
            kept = half[0] if half else ""
            yield Output(time.monotonic() - began, text.removesuffix(kept))
    finally:
        os.close(ours)
        code = process.wait()
    if code:
        raise RuntimeError(f"{command!r} ended with exit code {code}")


class Screen:
    """Lines as a terminal of `COLUMNS` has them; what is written is never changed, so no line has two states."""

    def __init__(self) -> None:
        self.lines: list[list[Cell]] = [[]]
        self._kinds: list[str] = []

    def write(self, text: str, at: float, kind: str = "") -> None:
        """Add text.

        Raises:
            ValueError: it moves the cursor, or writes over something.
        """
        place = 0
        for match in ESCAPE.finditer(text):
            self._plain(text[place : match.start()], at, kind)
            if match["command"] != "m":
                raise ValueError(f"the recording knows colors and no {match[0]!r}")
            self._style([int(code or 0) for code in match["codes"].split(";")])
            place = match.end()
        self._plain(text[place:], at, kind)

    def _style(self, codes: Sequence[int]) -> None:
        for code in codes:
            if code in CLASSES:
                self._kinds.append(CLASSES[code])
            else:
                self._kinds.clear()

    def _plain(self, text: str, at: float, kind: str) -> None:
        for character in text.replace("\r\n", "\n"):
            if character == "\n":
                self.lines.append([])
                continue
            if not character.isprintable():
                raise ValueError(f"the recording knows no control character {character!r}")
            if len(self.lines[-1]) == COLUMNS:
                self.lines.append([])
            self.lines[-1].append(Cell(character, " ".join(filter(None, (kind, *self._kinds))), at))

    def begin_line(self) -> None:
        """Go to a new line, unless this one is empty, as a prompt does."""
        if self.lines[-1]:
            self.lines.append([])


def play(
    commands: Sequence[str], reading: Sequence[float], cwd: Path, environment: Mapping[str, str]
) -> tuple[Screen, float, float]:
    """Type and run commands.

    Args:
        commands: for bash.
        reading: seconds that the output of each stays alone.
        cwd, environment: of the commands.

    Returns:
        The screen, the seconds that the recording takes, and those that the commands took.

    Raises:
        RuntimeError: a command fails.
        ValueError: one writes what `Screen` does not know.
    """
    screen, now, took = Screen(), 0.0, 0.0
    for command, pause in zip(commands, reading, strict=True):
        screen.begin_line()
        screen.write(PROMPT, now, "p")
        for character in command:
            now += KEY_SECONDS
            screen.write(character, now, "b")
        now += BEFORE_RUNNING
        screen.begin_line()
        said = list(outputs(command, cwd, environment))
        for output, at in zip(said, _shortened([output.at for output in said]), strict=True):
            screen.write(output.text, now + at)
        took += said[-1].at if said else 0.0
        now += MOST_OUTPUT + pause
    return screen, now, took


def _shortened(moments: Sequence[float]) -> list[float]:
    """The moments of a command's output with no wait over `LONGEST_WAIT`, and all of them within `MOST_OUTPUT`."""
    found: list[float] = []
    for before, at in itertools.pairwise((0.0, *moments)):
        found.append((found[-1] if found else 0.0) + min(at - before, LONGEST_WAIT))
    faster = min(1.0, MOST_OUTPUT / found[-1]) if found and found[-1] else 1.0
    return [at * faster for at in found]


def svg(screen: Screen, seconds: float, title: str) -> str:
    """The recording.

    Raises:
        ValueError: it takes longer than `LONGEST`.
    """
    if seconds > LONGEST:
        raise ValueError(f"a recording of {seconds:.1f} s: at most {LONGEST:.0f}")
    times: dict[int, str] = {}
    texts, scrolls = [], {0: 0}
    for row, line in enumerate(screen.lines):
        column = 0
        for (kind, moment), cells in itertools.groupby(line, key=lambda cell: (cell.kind, round(cell.at / QUANTUM))):
            text = "".join(cell.text for cell in cells)
            scrolls[moment] = max(scrolls.get(moment, 0), row + 1 - ROWS)
            if text.strip():
                known = times.setdefault(moment, f"t{len(times)}")
                texts.append(_run(row, column, text, " ".join(filter(None, (known, kind)))))
            column += len(text)
    frames = [_appears(name, moment * QUANTUM / seconds, seconds) for moment, name in times.items()]
    width, height = COLUMNS * CELL_WIDTH + 2 * PADDING, ROWS * LINE_HEIGHT + 2 * PADDING + BAR_HEIGHT
    inner = f'x="{PADDING}" y="{BAR_HEIGHT + PADDING}" width="{COLUMNS * CELL_WIDTH:g}" height="{ROWS * LINE_HEIGHT}"'
    lights = "".join(f'<circle cx="{PADDING + 6 + 18 * n}" cy="15" r="5" fill="#6e7681"/>' for n in range(3))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">\n<style>{STYLE}'
        f"{chr(10).join(frames)}\n{_scrolling(scrolls, seconds)}</style>\n"
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#0d1117" stroke="#30363d"/>{lights}\n'
        f'<text class="title" x="{width / 2:g}" y="19">{escape(title)}</text>\n'
        f'<svg class="term" {inner}><g class="scroll">\n{chr(10).join(texts)}\n</g></svg>\n</svg>\n'
    )


def _run(row: int, column: int, text: str, kind: str) -> str:
    """Characters that look alike and appear together, as wide as the grid has them in whatever font there is."""
    ahead = len(text) - len(text.lstrip())
    shown = text.strip()
    x, y = (column + ahead) * CELL_WIDTH, (row + 1) * LINE_HEIGHT - 4
    # Runs of spaces would be drawn as one.
    plain = escape(shown).replace("  ", "\u00a0 ").replace("  ", "\u00a0 ")
    long = f' textLength="{len(shown) * CELL_WIDTH:.4g}"' if len(shown) > 1 else ""
    return f'<text class="{kind}" x="{x:.4g}" y="{y}"{long}>{plain}</text>'


def _appears(name: str, share: float, seconds: float) -> str:
    return (
        f"@keyframes {name}{{0%{{opacity:0}}{100 * share:.3f}%{{opacity:1}}}}"
        f".{name}{{animation:{name} {seconds:.2f}s step-end infinite}}"
    )


def _scrolling(scrolls: Mapping[int, int], seconds: float) -> str:
    """The lines that have left the screen at each moment."""
    steps, gone = [], 0
    for moment in sorted(scrolls):
        if scrolls[moment] > gone or moment == 0:
            gone = max(gone, scrolls[moment])
            steps.append(f"{100 * moment * QUANTUM / seconds:.3f}%{{transform:translateY({-gone * LINE_HEIGHT}px)}}")
    end = f"transform:translateY({-gone * LINE_HEIGHT}px)"
    return f"@keyframes scroll{{{''.join(steps)}}}.scroll{{{end};animation:scroll {seconds:.2f}s step-end infinite}}"


def quickstart_commands() -> tuple[str, ...]:
    """What the recording shows of a finished quickstart in runs/quickstart."""
    first = "runs/quickstart/seed-0"
    question = "Ann has 31 apples and gives 12 to Ben. How many apples are left?"
    return (
        f'echo "{question}" | phimr chat {first}/release/hf',
        f"phimr show {first} --view heldout --change gained --pane GRPO -n 1",
        "cut -d'|' -f2,3,5,8 runs/quickstart/table.md | column -ts'|'",
    )


def record_quickstart(roots: Sequence[Path]) -> Path:
    """Record `quickstart_commands` on finished quickstarts; returns the file.

    Args:
        roots: their output directories, with a directory `seed-N` each for their seeds.
    """
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs" / "quickstart"
        runs.mkdir(parents=True)
        for seed in sorted(path for root in roots for path in root.glob("seed-*/")):
            (runs / seed.name).symlink_to(seed.resolve())
        environment = {
            "HOME": place,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HUB_OFFLINE": "1",
            "LANG": "C.UTF-8",
        }
        report = f"phimr report runs/quickstart --out {shlex.quote(str(runs))}"
        subprocess.run(["bash", "-c", report], cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
        screen, seconds, took = play(quickstart_commands(), READING_SECONDS, Path(place), environment)
    title = f"phimr-nemo: the quickstart's model; waits are cut, the commands took {took:.0f} s"
    TARGET.write_text(svg(screen, seconds, title), "utf-8")
    return TARGET


if __name__ == "__main__":
    print(record_quickstart([Path(name) for name in sys.argv[1:]]))
