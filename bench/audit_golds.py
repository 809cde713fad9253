r"""The audit's class of real gold answers: each against itself, rewritten, and with a value changed.

Truth is known by construction: a rewriting changes spaces, commands of size and the brackets' commands, nothing that
is said; a change puts another number in place of one. Where :mod:`audit_truth` can read a gold, it must agree.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from audit_arithmetic import CannotRead, Undefined
from audit_classes import FRAMES, Pair
from audit_truth import same_number

from phimr_nemo.data.sources.problems import read_problems
from phimr_nemo.errors import UserError
from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS

KIND: Final = "golds of problem sets"
UNCHANGEABLE: Final = re.compile(r"\\(?:[dt]?frac|sqrt|binom)\s*[0-9]|\(-1\)\^|\(?\b[A-J]\)")
r"""A number in such a gold may change and the answer not: ``\frac431`` is ``\frac43``, ``(-1)^{n-1}`` is
``(-1)^{n-13}``, and behind a choice's letter a value says nothing more."""
WORD: Final = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2}")
CHANGED: Final = re.compile(r"(?<![0-9.])(?!0[0-9])[0-9]+(?![0-9]*\.[0-9])(?![0-9])")
"""A whole number, to which one can be added."""
ENDINGS: Final = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def golds(directory: Path) -> list[str]:
    """The distinct gold answers of all problem files, in their order.

    Raises:
        UserError: no file, or one that holds no problems.
    """
    files = [path for path in sorted(directory.iterdir()) if path.name.endswith(ENDINGS)]
    if not files:
        raise UserError(
            f"{directory} has no problem files",
            rule=f"they end in {', '.join(ENDINGS)}",
            remedy="name another folder",
        )
    found: dict[str, None] = {}
    for path in files:
        for row in read_problems(path).select(["answer"]).to_pylist():
            answer = str(row["answer"]).strip()
            if 0 < len(answer) <= MAX_ANSWER_CHARS and r"\boxed" not in answer:
                found[answer] = None
    return list(found)


def rewritten(gold: str) -> dict[str, str]:
    """How written -> the same answer."""
    ways = {
        "display fractions": re.sub(r"\\frac(?![a-z])", r"\\dfrac", gold),
        "small fractions": re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", gold),
        "sized brackets": gold
        if r"\left" in gold or "{" in gold
        else re.sub(r"\(([^()]*)\)", r"\\left(\1\\right)", gold),
        "plain brackets": re.sub(r"\\(?:left|right)(?=[()\[\]|])", "", gold),
        "no spaces after commas": gold if "text" in gold or WORD.search(gold) else re.sub(r",\s+", ",", gold),
        "dollars inside": f"${gold}$"
        if "$" not in gold and "text" not in gold and gold.count("{") == gold.count("}")
        else gold,
    }
    return {how: text for how, text in ways.items() if text != gold}


def changed(gold: str, draw: random.Random) -> dict[str, str]:
    """What was changed -> another answer."""
    value_begins = gold.rfind("=") + 1  # what an equation's left side says is not its value
    found = list(CHANGED.finditer(gold, value_begins))
    if not found or UNCHANGEABLE.search(gold):
        return {}
    place = draw.choice(found)
    value = int(place.group())
    ways = {
        "a number + 1": f"{value + 1}",
        "a number's last digit": str(value - 1 if value else 3),
        "a digit more": f"{value}{draw.randint(1, 9)}",
    }
    texts = {how: gold[: place.start()] + text + gold[place.end() :] for how, text in ways.items()}
    return {how: text for how, text in texts.items() if not _same_where_read(gold, text)}


def _same_where_read(gold: str, text: str) -> bool:
    try:
        return same_number(gold, text)
    except (CannotRead, Undefined, KeyError, ValueError, ZeroDivisionError, OverflowError):
        return False


def gold_pairs(directory: Path, seed: int) -> Iterator[Pair]:
    """Every gold against itself, rewritten and changed."""
    draw = random.Random(seed)
    for gold in golds(directory):
        for correct, ways in ((True, {"itself": gold, **rewritten(gold)}), (False, changed(gold, draw))):
            for how, text in ways.items():
                yield Pair(
                    KIND,
                    how,
                    gold,
                    text,
                    draw.choice(FRAMES) % text if "%" not in text else rf"$\boxed{{{text}}}$",
                    correct,
                )
