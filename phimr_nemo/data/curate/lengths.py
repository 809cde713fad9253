"""How many tokens a conversation has in training, so that no set holds what its stage refuses.

A byte-level tokenizer never makes more tokens of a text than it has bytes. So a conversation is tokenised only where
its bytes leave the matter open, which few of the short ones do, and is otherwise known to fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.data.rows.tokenize import Frame, fast_tokenizer, prompt_frame
from phimr_nemo.data.tokenizer import panics_as_messages
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.content import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

Lengths = npt.NDArray[np.int32]

CHARACTERS_PER_TOKEN: Final = 3.3
"""Of mathematical English under Phi-4-mini's tokenizer, for responses whose tokens are unknown."""
NO_FRAME: Final = Frame("", "", (), "")
FRAME_TOKENS: Final = 32
"""Of a chat template with its system text, where there is no tokenizer to count them."""


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens as the stages do.

    Attributes:
        file: the tokenizer.json; None = lengths are estimated.
        frame: what the chat template writes around a question.
        limit: of conversations; up to here an upper bound will do, since they fit. None = no length is wanted.
        prompt_limit: the same of prompts.
        sha256: of the tokenizer, a part of what the lengths were made of.
    """

    file: Path | None = None
    frame: Frame = NO_FRAME
    limit: int | None = None
    prompt_limit: int | None = None
    sha256: str = ""

    def count(
        self, questions: pa.StringArray, responses: pa.StringArray, recorded: npt.NDArray[np.int32]
    ) -> tuple[Lengths, Lengths]:
        """Tokens of conversations, and of their prompts, [rows] each.

        Args:
            questions, responses: [rows].
            recorded: tokens of the responses as their teacher counted, negative = unknown, [rows].

        Returns:
            Numbers that are exact wherever they are above the limit, and otherwise no smaller than the tokens; where
            there is no tokenizer, estimates.
        """
        import pyarrow.compute as pc

        if self.file is None:
            prompts = np.ceil(pc.utf8_length(questions).to_numpy() / CHARACTERS_PER_TOKEN) + FRAME_TOKENS
            estimated = pc.utf8_length(responses).to_numpy() / CHARACTERS_PER_TOKEN
            lengths = prompts + np.where(recorded >= 0, recorded, np.ceil(estimated))
            return lengths.astype(np.int32), prompts.astype(np.int32)
        around = len((self.frame.before + self.frame.after + self.frame.end).encode())
        prompts = pc.binary_length(questions).to_numpy() + around
        lengths = prompts + pc.binary_length(responses).to_numpy()
        tokenizer, bounded = _tokenizer(self.file)
        for limit, counted, ends in ((self.limit, lengths, responses), (self.prompt_limit, prompts, None)):
            if limit is None:
                continue
            for index in np.flatnonzero((counted > limit) | (not bounded)).tolist():
                text = f"{self.frame.before}{questions[index].as_py()}{self.frame.after}"
                counted[index] = _count(
                    tokenizer, text if ends is None else text + ends[index].as_py() + self.frame.end
                )
        return lengths.astype(np.int32), prompts.astype(np.int32)


def token_counter(
    directory: Path | None, file: Path, *, limit: int | None, prompt_limit: int | None = None
) -> TokenCounter:
    """The counter of a tokenizer's directory.

    Args:
        directory: with a tokenizer.json and a chat template; None = estimates.
        file: where the tokenizer is written as the stages have it, for processes without transformers.
        limit: the smallest number of tokens that a conversation is compared with; None = none is.
        prompt_limit: the same of a prompt.

    Raises:
        UserError: the directory holds no tokenizer with a chat template, or its chat template changes the question.
    """
    if directory is None or (limit is None and prompt_limit is None):
        return TokenCounter()
    tokenizer = load_tokenizer(directory)
    atomic_write_text(file, tokenizer.backend_tokenizer.to_str())
    return TokenCounter(file, prompt_frame(tokenizer), limit, prompt_limit, file_sha256(file))


@lru_cache(maxsize=1)
def _tokenizer(file: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether a text's bytes bound its tokens: byte-level, and nothing is rewritten before."""
    settings = json.loads(file.read_text("utf-8"))
    bounded = settings.get("normalizer") is None and "ByteLevel" in json.dumps(settings.get("pre_tokenizer"))
    return fast_tokenizer(file), bounded


def _count(tokenizer: Tokenizer, text: str) -> int:
    with panics_as_messages():
        return len(tokenizer.encode(text, add_special_tokens=False).ids)
