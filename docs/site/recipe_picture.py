"""The recipe as a plan with its result: how data becomes training sets, what each stage takes, and what it scores.

An SVG without scripts, fonts or network, legible from 400 pixels on, in a light and in a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

WIDTH: Final = 640
HEIGHT: Final = 436
COLUMN: Final = 128
"""Of which each stage has one."""
BOX_WIDTH: Final = 112
BOX_HEIGHT: Final = 46
DATA_TOP: Final = 14
BUS: Final = 74
"""Where the training sets part."""
STAGE_TOP: Final = 116
FLOOR: Final = 388
TALLEST: Final = 190
"""Of a bar of 100 %."""
BAR_WIDTH: Final = 56
CAP: Final = 6
DOT: Final = 3
GAP: Final = 7
LINE: Final = 17
BASELINE: Final = 5
"""From the middle of a line of text down to its baseline."""
MADE: Final = (("problems", "prepare"), ("rollouts", "generate"), ("verdicts", "verify"))
"""Records, and the command that makes them."""
SETS: Final = ("training sets", "curate, pack")
TAKES: Final = ("", "packed rows", "conversations", "pairs", "prompts")
"""What curation makes for each stage."""
COMMANDS: Final = ("", "midtrain", "sft", "dpo", "grpo")
STYLE: Final = """
svg{font:14px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
.page{fill:#fff}.box{fill:#f6f8fa;stroke:#8c959f}.stage{fill:#ddf4ff;stroke:#0969da}text{fill:#1f2328;text-anchor:middle}
.small{font-size:13px;fill:#59636e}.score{font-weight:600;font-size:16px}.bar{fill:#54aeff}
path{stroke:#59636e;fill:none;stroke-width:1.5}.error{stroke:#1f2328}.dot{fill:#0550ae}
@media (prefers-color-scheme:dark){.page{fill:#0d1117}.box{fill:#161b22;stroke:#6e7681}
.stage{fill:#10233b;stroke:#4493f8}text{fill:#e6edf3}.small{fill:#9198a1}.bar{fill:#1f6feb}path{stroke:#9198a1}
.error{stroke:#e6edf3}.dot{fill:#a5d6ff}}
"""


class Bar(NamedTuple):
    """A stage's result; shares, not per cent.

    Attributes:
        name: of the stage.
        mean: over the seeds.
        error: its standard error; NaN for one seed.
        each: per seed.
    """

    name: str
    mean: float
    error: float
    each: Sequence[float]


def _text(x: float, y: float, words: str, kind: str = "plain") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def _box(middle: float, top: float, kind: str, words: str, under: str, width: float = BOX_WIDTH) -> list[str]:
    """A box with a name, and under it what makes it, or nothing."""
    frame = (
        f'<rect class="{kind}" x="{middle - width / 2:g}" y="{top}" width="{width:g}" height="{BOX_HEIGHT}" rx="6"/>'
    )
    center = top + BOX_HEIGHT / 2 + BASELINE
    if not under:
        return [frame, _text(middle, center, words)]
    return [frame, _text(middle, center - LINE / 2, words), _text(middle, center + LINE / 2, under, "small")]


def _way(path: str) -> str:
    return f'<path d="{path}" marker-end="url(#head)"/>'


def _middle(column: int) -> float:
    return COLUMN * (column + 0.5)


def _data() -> list[str]:
    """The upper half: records, and the sets that the stages take."""
    middle = DATA_TOP + BOX_HEIGHT / 2
    last = len(TAKES) - 1
    parts = []
    for n, (name, command) in enumerate(MADE):
        parts += _box(_middle(n), DATA_TOP, "box", name, command)
        parts.append(_way(f"M{_middle(n) + BOX_WIDTH / 2:g} {middle:g}H{_middle(n + 1) - BOX_WIDTH / 2 - 2:g}"))
    center = (_middle(len(MADE)) + _middle(last)) / 2
    parts += _box(center, DATA_TOP, "box", *SETS, width=COLUMN + BOX_WIDTH)
    parts.append(f'<path d="M{center:g} {DATA_TOP + BOX_HEIGHT}V{BUS}M{_middle(1):g} {BUS}H{_middle(last):g}"/>')
    for n, name in enumerate(TAKES):
        if name:
            parts.append(f'<path d="M{_middle(n):g} {BUS}v6"/>')
            parts.append(_text(_middle(n), BUS + LINE + 2, name, "small"))
            parts.append(_way(f"M{_middle(n):g} {BUS + LINE + 8}V{STAGE_TOP - 2}"))
    return parts


def picture(bars: Sequence[Bar], below: Sequence[str]) -> str:
    """The SVG.

    Args:
        bars: the base and the four stages, in order.
        below: lines under them.

    Raises:
        ValueError: other than five bars.
    """
    if len(bars) != len(TAKES):
        raise ValueError(f"{len(bars)} bars: the recipe is a base and four stages")
    parts = _data()
    for n, bar in enumerate(bars):
        parts += _stage(n, bar)
    for n, line in enumerate(reversed(below)):
        parts.append(_text(WIDTH / 2, HEIGHT - GAP - LINE * n, line, "small"))
    label = f"The recipe's stages and their pass@1: {', '.join(f'{bar.name} {100 * bar.mean:.1f} %' for bar in bars)}"
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path d="M0 0L7 4L0 8" stroke-width="1.2"/></marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(label)}">\n<style>{STYLE}</style><defs>{head}</defs>\n'
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>\n'
        + "\n".join(filter(None, parts))
        + "\n</svg>\n"
    )


def _stage(n: int, bar: Bar) -> list[str]:
    """A stage's box, the way from the one before, and its result."""
    x = _middle(n)
    parts = _box(x, STAGE_TOP, "stage" if n else "box", bar.name, COMMANDS[n])
    if n:
        middle = STAGE_TOP + BOX_HEIGHT / 2
        parts.append(_way(f"M{x - COLUMN + BOX_WIDTH / 2:g} {middle:g}H{x - BOX_WIDTH / 2 - 2:g}"))
    height = TALLEST * bar.mean
    top = FLOOR - height
    place = f'x="{x - BAR_WIDTH / 2:g}" y="{top:.1f}" width="{BAR_WIDTH}" height="{height:.1f}"'
    parts.append(f'<rect class="bar" {place} rx="2"/>')
    error = 0.0 if math.isnan(bar.error) else TALLEST * bar.error
    if error:
        caps = "".join(f"M{x - CAP:g} {end:.1f}h{2 * CAP}" for end in (top - error, top + error))
        ends = f"{caps}M{x:g} {top - error:.1f}v{2 * error:.1f}"
        parts.append(f'<path class="error" d="{ends}"/>')
    heights = [FLOOR - TALLEST * share for share in bar.each]
    parts += [f'<circle class="dot" cx="{x + BAR_WIDTH / 4:g}" cy="{y:.1f}" r="{DOT}"/>' for y in heights]
    highest = min([top - error, *(y - DOT for y in heights)])
    parts.append(_text(x, round(highest - GAP, 1), f"{100 * bar.mean:.1f}", "score"))
    return parts
