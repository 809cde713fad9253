"""Conversations -> token ids and loss masks, many at a time, in processes that need no transformers.

The tokenizer and the prompt's frame are taken from the Hugging Face tokenizer once; a process then needs the
`tokenizers` library alone, a third of the memory and a fraction of a second to start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from phimr_nemo.data.chat import ASSISTANT, END, prompt_text
from phimr_nemo.data.packing import Document
from phimr_nemo.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS: Final = 64
"""Conversations; long ones have 20 K tokens, and the tokenizer needs about a hundred bytes for each token."""
# What a template that changes questions would change: spaces at the ends, line breaks, quotes, markup, capitals.
PROBES: Final = ("Q", ' \n What\'s 1 < 2 & "3"?\u00a0\t', "ÄßǅΣ {{x}} {% y %} \\boxed{1}\r\n")


@dataclass(frozen=True)
class Frame:
    """What the chat template writes around a question, and the tokens that no text may spell.

    Attributes:
        before, after: text around the question, up to and including `<|assistant|>`.
        special: the added tokens.
    """

    before: str
    after: str
    special: tuple[str, ...]


def prompt_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame of a tokenizer's chat template.

    Raises:
        UserError: the template changes the question.
    """
    marker = "question-goes-here"
    before, _, after = prompt_text(tokenizer, marker).partition(marker)
    for probe in PROBES:
        if prompt_text(tokenizer, probe) != before + probe + after:
            raise UserError(
                f"the chat template changes the question {probe!r}",
                rule="a chat template holds the question once and as it is",
                remedy="use a template that neither trims nor escapes the user's content",
            )
    return Frame(before, after, tuple(tokenizer.get_added_vocab()))


@lru_cache(maxsize=1)
def fast_tokenizer(path: Path, content: str = "") -> Tokenizer:  # noqa: ARG001 - another content is another call
    """The tokenizer of a tokenizer.json, kept for the next shard of the same content."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def tokenize(
    tokenizer: Tokenizer, frame: Frame, conversations: pq.ParquetFile, capacity: int
) -> tuple[list[Document], dict[str, int]]:
    """Token ids and loss masks of conversations, as :func:`phimr_nemo.data.chat.render_conversations` has them.

    Args:
        tokenizer: a Phi tokenizer.
        frame: of its chat template.
        conversations: a parquet file with the columns question and response.
        capacity: longer conversations are dropped.

    Returns:
        `(input_ids int32, loss_mask uint8)` of each conversation that is kept, and the counts "documents",
        "tokens" and drops by reason.
    """
    counts: Counter[str] = Counter()
    documents: list[Document] = []
    assistant = tokenizer.token_to_id(ASSISTANT)
    for texts in _texts(conversations, frame, counts):
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = np.array(encoding.ids, np.int32)
            if len(ids) > capacity:
                counts["dropped: longer than a row"] += 1
                continue
            mask = np.ones(len(ids), np.uint8)
            mask[: int(np.argmax(ids == assistant)) + 1] = 0
            documents.append((ids, mask))
            counts["documents"] += 1
            counts["tokens"] += len(ids)
    return documents, dict(counts)


def _texts(conversations: pq.ParquetFile, frame: Frame, counts: Counter[str]) -> Iterator[list[str]]:
    """Batches of rendered conversations."""
    for batch in conversations.iter_batches(BATCH_ROWS, columns=["question", "response"]):
        texts = []
        for question, response in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if any(token in question or token in response for token in frame.special):
                counts["dropped: special token in text"] += 1
            else:
                texts.append(f"{frame.before}{question}{frame.after}{response}{END}")
        yield texts
