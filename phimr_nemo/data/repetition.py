"""How much of a response repeats itself: a rule-based measure, in linear time and bounded memory.

The measure is the one of Gopher's repetition rules (Rae et al. 2021, arXiv 2112.11446, table A1), the share of
characters inside duplicate n-grams, with three changes for long mathematical reasoning. Only later occurrences
count, not the first, so that what a reader would call new is never counted. A gram is 24 tokens long, since a
derivation repeats its formulas and 5 to 10 words often without looping. And a token is a run of letters or one
other sign, so that a loop without a space, or in a language without spaces, is seen as well.
"""

from __future__ import annotations

import re
from array import array
from typing import Final

# Letters come in pieces of bounded length, so that one endless "word" is a loop as well.
_TOKEN: Final = re.compile(r"[A-Za-z]{1,16}|\S")
GRAM_TOKENS: Final = 24
# A loop is at the end of a response: of a longer text the end is judged.
MAX_CHARS: Final = 1_000_000
REPETITIVE_ABOVE: Final = 0.3
"""From here on a response counts as repetitive. Of 5,428 recorded responses to competition questions,
1.2 % of the right ones lie above, and 98 % of the wrong ones longer than 60,000 characters (loops)."""


def repetition(text: str) -> float:
    """The share of a text that repeats what stands earlier in it.

    With tokens t_1..t_N (a run of up to 16 letters, or one other sign that is no space), the gram at i is
    (t_i, ..., t_{i+23}). A token is repeated when it lies in a gram that equals a gram starting further left.
    The share is the characters of repeated tokens over the characters of all tokens. A text of k copies of one
    long passage gives (k - 1) / k.

    Args:
        text: a response; of one longer than `MAX_CHARS` its last `MAX_CHARS` characters count.

    Returns:
        A share in [0, 1]; 0 for a text of fewer than two grams.
    """
    tokens = _TOKEN.findall(text[-MAX_CHARS:])
    vocabulary: dict[str, int] = {}
    numbers = array("I", [vocabulary.setdefault(token, len(vocabulary)) for token in tokens])
    data, width = numbers.tobytes(), numbers.itemsize
    seen: set[bytes] = set()
    repeated_chars = 0
    counted_to = 0
    for start in range(len(tokens) - GRAM_TOKENS + 1):
        gram = data[start * width : (start + GRAM_TOKENS) * width]
        if gram in seen:
            end = start + GRAM_TOKENS
            repeated_chars += sum(map(len, tokens[max(start, counted_to) : end]))
            counted_to = end
        else:
            seen.add(gram)
    return repeated_chars / sum(map(len, tokens)) if repeated_chars else 0.0
