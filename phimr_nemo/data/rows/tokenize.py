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

from phimr_nemo.data.chat import end_of_turn, forbidden_tokens, prompt_text, response_part
from phimr_nemo.data.packing import Document
from phimr_nemo.data.tokenizer import panics_as_messages
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import question_number

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

COLUMNS: Final = ("question", "response", "history", "finish_reason")
BATCH_ROWS: Final = 64
"""Conversations; long ones have 20 K tokens, and the tokenizer needs about a hundred bytes for each token."""
# What a template that changes questions would change: spaces at the ends, line breaks, quotes, markup, capitals.
PROBES: Final = ("Q", ' \n What\'s 1 < 2 & "3"?\u00a0\t', "ÄßǅΣ {{x}} {% y %} \\boxed{1}\r\n")


@dataclass(frozen=True)
class Frame:
    """What the chat template writes around a question, and the tokens that no text may spell.

    Attributes:
        before, after: text around the question, up to where the response begins.
        special: the tokens that no text may spell.
        end: the token that ends a response.
    """

    before: str
    after: str
    special: tuple[str, ...]
    end: str


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
    return Frame(before, after, forbidden_tokens(tokenizer), end_of_turn(tokenizer))


@lru_cache(maxsize=1)
def fast_tokenizer(path: Path, content: str = "") -> Tokenizer:  # noqa: ARG001 - another content is another call
    """The tokenizer of a tokenizer.json, kept for the next shard of the same content."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def tokenize(
    tokenizer: Tokenizer, frame: Frame, conversations: pq.ParquetFile, capacity: int
) -> tuple[list[Document], list[int], dict[str, int]]:
    """Token ids and loss masks of conversations, as :func:`phimr_nemo.data.chat.render_conversations` has them.

    Args:
        tokenizer: of the model.
        frame: of its chat template.
        conversations: a parquet file with the columns question and response.
        capacity: longer conversations are dropped.

    Returns:
        `(input_ids int32, loss_mask uint8)` of each conversation that is kept, the number of its question, and the
        counts "documents", "tokens" and drops by reason.
    """
    counts: Counter[str] = Counter()
    documents: list[Document] = []
    questions: list[int] = []
    for texts, numbers in _texts(conversations, frame, counts):
        with panics_as_messages():
            parts = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for prompt, response, question in zip(parts[::2], parts[1::2], numbers, strict=True):
            ids = np.array([*prompt, *response], np.int32)
            if len(ids) > capacity:
                counts["dropped: longer than a row"] += 1
                continue
            mask = np.ones(len(ids), np.uint8)
            mask[: len(prompt)] = 0
            documents.append((ids, mask))
            questions.append(question)
            counts["documents"] += 1
            counts["tokens"] += len(ids)
    return documents, questions, dict(counts)


def _texts(
    conversations: pq.ParquetFile, frame: Frame, counts: Counter[str]
) -> Iterator[tuple[list[str], list[int]]]:
    """Batches of rendered conversations, of each the prompt and the response, and the number of the question."""
    columns = [name for name in COLUMNS if name in conversations.schema_arrow.names]
    for batch in conversations.iter_batches(BATCH_ROWS, columns=columns):
        texts, numbers = [], []
        for row in batch.to_pylist():
            question, response = row["question"], row["response"]
            if row.get("history"):
                counts["dropped: several turns"] += 1
            elif any(token in question or token in response for token in frame.special):
                counts["dropped: special token in text"] += 1
            else:
                prompt = f"{frame.before}{question}{frame.after}"
                end = "" if row.get("finish_reason") == "length" else frame.end
                texts += [prompt, response_part(prompt, response, end)]
                numbers.append(question_number(question))
        yield texts, numbers
