"""Repetition of responses of real length: the vectorised measure against its definition with a set of grams.

    python bench/repetition.py [--quick] [--responses FILE.jsonl] [--shortest 3000] [--count 300]
                               [--characters 15000]

FILE holds JSON lines with a text column `response`; without it, responses are made: lines of arithmetic, some of
them copied from further up. The baseline is the same measure, gram after gram in Python. Both run in this process on
one core, three times, and the best CPU time counts. Values must be equal, to the last bit.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import re
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from common import machine, print_result, versions

from phimr_nemo.data.repetition import GRAM_TOKENS, MAX_CHARS, repetition

REPEATS = 3
MILLISECONDS = 1000
COPIED_SHARE = 0.15
QUICK = {"count": 40}
TOKEN = re.compile(r"[A-Za-z]{1,16}|\S")


def by_definition(text: str) -> float:
    """The baseline: every gram, as the bytes of its tokens' numbers, is looked up in the set of those before it."""
    tokens = TOKEN.findall(text[-MAX_CHARS:])
    vocabulary: dict[str, int] = {}
    numbers = array("I", [vocabulary.setdefault(token, len(vocabulary)) for token in tokens])
    data, width = numbers.tobytes(), numbers.itemsize
    seen: set[bytes] = set()
    characters = counted_to = 0
    for start in range(len(tokens) - GRAM_TOKENS + 1):
        gram = data[start * width : (start + GRAM_TOKENS) * width]
        if gram in seen:
            end = start + GRAM_TOKENS
            characters += sum(map(len, tokens[max(start, counted_to) : end]))
            counted_to = end
        else:
            seen.add(gram)
    return characters / sum(map(len, tokens)) if characters else 0.0


def made(count: int, characters: int) -> list[str]:
    texts = []
    for number in range(count):
        rng = random.Random(number)
        lines: list[str] = []
        while sum(map(len, lines)) < characters:
            a, b = rng.randrange(10_000), rng.randrange(1, 1000)
            copied = lines and rng.random() < COPIED_SHARE
            lines.append(rng.choice(lines) if copied else f"Let x = {a}; then x + {b} = {a + b}, hence 2x = {2 * a}.")
        texts.append("\n".join(lines))
    return texts


def recorded(path: Path, count: int, shortest: int) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        texts = (json.loads(line)["response"] for line in lines)
        return list(itertools.islice((text for text in texts if len(text) >= shortest), count))


def milliseconds(function: Callable[[str], float], texts: list[str]) -> tuple[float, list[float]]:
    """CPU milliseconds a response, and the values."""
    best, values = float("inf"), []
    for _ in range(REPEATS):
        started = time.process_time()
        values = [function(text) for text in texts]
        best = min(best, time.process_time() - started)
    return best / len(texts) * MILLISECONDS, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="seconds")
    parser.add_argument("--responses", type=Path, help="JSON lines (.gz) with a column response")
    parser.add_argument("--shortest", type=int, default=3000, help="characters of a response that is taken from FILE")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--characters", type=int, default=15_000, help="of a made response")
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    if options.responses:
        texts = recorded(options.responses, options.count, options.shortest)
    else:
        texts = made(options.count, options.characters)
    ours, values = milliseconds(repetition, texts)
    baseline, expected = milliseconds(by_definition, texts)
    if values != expected:
        raise SystemExit("the two measures differ")
    mean = sum(map(len, texts)) / len(texts)
    print(f"{len(texts)} responses of {mean:,.0f} characters in the mean; CPU milliseconds per response")
    print(f"| ours | {ours:.3f} |\n| by definition | {baseline:.3f} |")
    print_result(
        {
            "bench": "repetition",
            "ours": round(ours, 3),
            "peer": {"name": "a set of grams in Python", "milliseconds": round(baseline, 3)},
            "ratio": round(baseline / ours, 2),
            "responses": len(texts),
            "characters": round(mean),
            "versions": versions("numpy"),
            "machine": machine(),
        }
    )


if __name__ == "__main__":
    main()
