"""`phimr chat` and `phimr sample`: a model directory in the terminal, its thinking dimmed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from rich.console import Console
from rich.text import Text

from phimr_nemo.errors import UserError
from phimr_nemo.jobs.launch import silence_import_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from phimr_nemo.generate.chat import Piece
    from phimr_nemo.generate.local.engine import LocalSampler
    from phimr_nemo.generate.sampler import SamplingParams

Dtype = Literal["fp32", "bf16"]
THINKING_STYLE: Final = "dim"
FORGET: Final = "/new"
LEAVE: Final = "/exit"


def open_model(
    directory: Path, params: SamplingParams, *, max_length: int | None, dtype: Dtype
) -> tuple[LocalSampler, PreTrainedTokenizerFast]:
    """A model directory's sampler and tokenizer.

    Args:
        directory: a Hugging Face directory.
        params: how tokens are drawn.
        max_length: longest conversation in tokens, which decides LongRoPE's factors; None: the model's context.
        dtype: to compute in.

    Raises:
        UserError: an unreadable model or tokenizer, or a length beyond the model's context.
    """
    silence_import_notes()
    from phimr_nemo.config import LocalEngine
    from phimr_nemo.generate.engines import SampledModel, open_engine
    from phimr_nemo.model.files.hf import HFDirectory

    source = HFDirectory(directory)
    context = source.architecture.max_position_embeddings
    if max_length is not None and not 1 <= max_length <= context:
        raise UserError(
            f"--max-length {max_length}",
            rule=f"from 1 to the model's context of {context} tokens",
            remedy="leave it out to use the whole context",
        )
    model = SampledModel(directory=directory, max_length=max_length or context)
    opened = open_engine(LocalEngine(max_batch=1, dtype=dtype), model, params)
    return opened.sampler, opened.tokenizer


def chat(directory: Path, params: SamplingParams, *, seed: int, max_length: int | None, dtype: Dtype) -> None:
    """Talk to a model until /exit or the end of the input; /new forgets the conversation.

    Raises:
        UserError: as :func:`open_model`, or a conversation without room for a reply.
    """
    sampler, tokenizer = open_model(directory, params, max_length=max_length, dtype=dtype)
    from phimr_nemo.generate.chat import Turn, reply

    console = Console(highlight=False)
    console.print(f"{directory}. {FORGET} forgets the conversation, {LEAVE} or Ctrl-D leaves.", markup=False)
    turns: list[Turn] = []
    while True:
        try:
            said = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return
        if said == LEAVE:
            return
        if said == FORGET:
            turns = []
            continue
        if not said:
            continue
        asked = [*turns, Turn("user", said)]
        try:
            answer = show(console, reply(sampler, tokenizer, asked, params, seed=seed))
        except UserError as error:
            console.print(f"error: {error}", markup=False)
            continue
        turns = [*asked, Turn("assistant", answer)]


def sample(
    directory: Path,
    question: str,
    params: SamplingParams,
    *,
    count: int,
    seed: int,
    max_length: int | None,
    dtype: Dtype,
) -> None:
    """Print `count` replies to one question; reply i has seed `seed` + i.

    Raises:
        UserError: as :func:`open_model`, or a question that spells a special token or leaves no room.
    """
    sampler, tokenizer = open_model(directory, params, max_length=max_length, dtype=dtype)
    from phimr_nemo.generate.chat import Turn, reply

    console = Console(highlight=False)
    for index in range(count):
        console.rule(f"{index + 1} of {count}")
        show(console, reply(sampler, tokenizer, [Turn("user", question)], params, seed=seed + index))


def show(console: Console, pieces: Iterable[Piece]) -> str:
    """Print a reply as it comes; Ctrl-C ends it. Returns its text.

    What a model writes is data: control characters and markup are shown, never obeyed.
    """
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece.text)
            console.print(
                Text(printable(piece.text), THINKING_STYLE if piece.thinking else ""), end="", soft_wrap=True
            )
    except KeyboardInterrupt:
        console.print(" [interrupted]", markup=False, end="")
    console.print()
    return "".join(said)


def printable(text: str) -> str:
    """The text with every control character but line break and tab as its escape: a terminal obeys none."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
