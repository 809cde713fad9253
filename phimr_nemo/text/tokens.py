"""Special tokens as text: what must not stand in a question or a response, where it would forge a turn."""

from __future__ import annotations

import re
from typing import Final

START: Final = "<|"
"""What every such token begins with; a search for it is much faster than the pattern, and most texts have none."""
SPECIAL_TOKEN: Final = re.compile(r"<\|/?\w+\|>")


def spells_special_token(text: str) -> bool:
    """Whether a text spells a token like `<|end|>`, which would forge a turn of the conversation."""
    return START in text and SPECIAL_TOKEN.search(text) is not None
