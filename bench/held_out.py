"""Made-up documents, the loss on those kept out of training, and how long training took to a loss."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENS_A_LINE = 14.0
"""About what a line of the made-up solutions takes."""
MEDIAN_SHARE = 0.25
SIGMA = 0.8
"""Lengths are lognormal: median a quarter of the longest, spread as of recorded right chains of thought."""
FILL = 0.9
"""Of the longest, at most: the prompt needs room."""
Document = tuple[list[int], list[int]]
"""Token ids, and the same with -100 where no loss is."""


def made_up(count: int, longest: int, seed: int) -> list[dict[str, str]]:
    """Questions, and calculations of random length as their responses."""
    draw = random.Random(seed)

    def line() -> str:
        a, b = draw.randint(10, 99), draw.randint(10, 99)
        return f"{a} + {b} = {a + b}."

    def response() -> str:
        tokens = min(draw.lognormvariate(math.log(MEDIAN_SHARE * longest), SIGMA), FILL * longest)
        return "\n".join(line() for _ in range(max(1, int(tokens / TOKENS_A_LINE))))

    return [{"question": f"Compute {draw.randint(100, 999)} + 1.", "response": response()} for _ in range(count)]


def documents_of(base: Path, questions: Sequence[str], responses: Sequence[str]) -> list[Document]:
    """Conversations as documents, tokenised as `phimr pack` does it."""
    from phimr_nemo.data.chat import load_tokenizer, render_conversations

    rendered = render_conversations(load_tokenizer(base), questions, responses)
    return [(ids, [i if m else -100 for i, m in zip(ids, mask, strict=True)]) for ids, mask in rendered]


def megatron_loss(model: Any, document: Document) -> float:
    """Mean loss of our model on a document's response."""
    import torch

    ids, wanted = (torch.tensor([values]) for values in document)
    labels = torch.cat((wanted[:, 1:], torch.full_like(wanted[:, :1], -100)), dim=1)
    model.eval()
    with torch.no_grad():
        losses = model(ids.to(model.output_weight().device), labels=labels.to(model.output_weight().device))
    model.train()
    return float(losses.sum()) / int((labels != -100).sum())


def transformers_loss(model: Any, document: Document) -> float:
    """The same of transformers' model."""
    import torch

    ids, labels = (torch.tensor([values], device=model.device) for values in document)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=labels).loss)
    model.train(was_training)
    return loss


def held_out_loss(directory: Path, documents: Sequence[Document], device: str) -> float:
    """Mean over documents of the mean loss of their responses' tokens, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).to(device)
    return statistics.fmean(transformers_loss(model, document) for document in documents)


def seconds_to(loss: float, curve: list[list[float]]) -> float | None:
    """When the loss was first reached, between two measurements on the line through them; None: it was not."""
    before: list[float] | None = None
    for seconds, value in curve:
        if value <= loss:
            if before is None:
                return seconds
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (seconds - before[0])
        before = [seconds, value]
    return None


def median_or_none(values: Sequence[float | None]) -> float | None:
    """Of all values; None where one is missing."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if len(there) == len(values) else None
