"""`phimr chat` and `phimr sample`: a model directory in the terminal, its thinking dimmed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from rich.console import Console
from rich.text import Text

from phimr_nemo.errors import UserError
from phimr_nemo.jobs.launch import silence_import_notes
from phimr_nemo.text.printable import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from phimr_nemo.generate.chat import Piece
    from phimr_nemo.generate.local.engine import LocalSampler
    from phimr_nemo.generate.sampler import SamplingParams

Dtype = Literal["fp32", "bf16", "fp16"]
THINKING_STYLE: Final = "dim"
HELP: Final = "/help"
FORGET: Final = "/new"
LEAVE: Final = "/exit"
COMMANDS: Final = {
    HELP: "lists what can be typed instead of a question",
    FORGET: "forgets the conversation",
    LEAVE: "leaves, as Ctrl-D does; Ctrl-C ends a reply",
}


@dataclass(frozen=True)
class OpenModel:
    """A model that can be talked to.

    Attributes:
        sampler: draws its replies.
        tokenizer: its tokenizer.
        words: what it is and what it can be asked, for people.
        notes: on how it was opened, a sentence each.
        single_turn: whether each question is to stand alone, because it has never seen several.
    """

    sampler: LocalSampler
    tokenizer: PreTrainedTokenizerFast
    words: str
    notes: tuple[str, ...]
    single_turn: bool


def open_model(directory: Path, params: SamplingParams, *, max_length: int | None, dtype: Dtype) -> OpenModel:
    """Open a model directory with the LongRoPE factors that it was trained with.

    Args:
        directory: a Hugging Face directory.
        params: how tokens are drawn.
        max_length: longest conversation in tokens; None: the longest that its training covers, else its context.
        dtype: to compute in.

    Raises:
        UserError: an unreadable model or tokenizer, or a length beyond the model's context.
    """
    silence_import_notes()
    from phimr_nemo.config import LocalEngine
    from phimr_nemo.generate.engines import SampledModel, open_engine
    from phimr_nemo.model.files.hf import HFDirectory
    from phimr_nemo.model.origin import read_origin
    from phimr_nemo.model.regime import opening_as_trained

    source = HFDirectory(directory)
    architecture = source.architecture
    context = architecture.max_position_embeddings
    if max_length is not None and not 1 <= max_length <= context:
        raise UserError(
            f"--max-length {max_length}",
            rule=f"from 1 to the model's context of {context} tokens",
            remedy="leave it out to use the whole context",
        )
    origin = read_origin(directory)
    opening = opening_as_trained(architecture, origin, max_length)
    described = SampledModel(directory=directory, longrope=opening.policy, max_length=opening.max_length)
    opened = open_engine(LocalEngine(max_batch=1, dtype=dtype), described, params)
    size = f"{architecture.num_parameters:,} parameters, conversations of up to {opening.max_length:,} tokens"
    words = f"{directory} ({size})" + (f" knows {origin.knows}" if origin.knows else "")
    return OpenModel(opened.sampler, opened.tokenizer, words, opening.notes, bool(origin.single_turn))


def chat(directory: Path, params: SamplingParams, *, seed: int, max_length: int | None, dtype: Dtype) -> None:
    """Chat with a model until /exit or the end of the input; /help lists the commands.

    Raises:
        UserError: as :func:`open_model`, or a conversation without room for a reply.
    """
    model = open_model(directory, params, max_length=max_length, dtype=dtype)
    from phimr_nemo.generate.chat import Turn, reply

    console = Console(highlight=False)
    greet(console, model)
    alone = " Each one stands alone: the model was trained on single questions." if model.single_turn else ""
    console.print(f"Type a question, or {HELP}.{alone}", markup=False)
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
        if said.startswith("/") and len(said.split()) == 1:
            for command, does in COMMANDS.items():
                console.print(f"{command:<6} {does}", markup=False)
            continue
        if not said:
            continue
        asked = [*turns, Turn("user", said)]
        try:
            answer = show(console, reply(model.sampler, model.tokenizer, asked, params, seed=seed))
        except UserError as error:
            console.print(f"error: {error}", markup=False)
            continue
        turns = [] if model.single_turn else [*asked, Turn("assistant", answer)]


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
    model = open_model(directory, params, max_length=max_length, dtype=dtype)
    from phimr_nemo.generate.chat import Turn, reply

    greet(Console(highlight=False, stderr=True), model)
    console = Console(highlight=False)
    for index in range(count):
        console.rule(f"{index + 1} of {count}")
        show(console, reply(model.sampler, model.tokenizer, [Turn("user", question)], params, seed=seed + index))


def greet(console: Console, model: OpenModel) -> None:
    """Say what the model is, and what is to be known of how it was opened."""
    console.print(printable(model.words), markup=False, soft_wrap=True)
    for note in model.notes:
        console.print(f"note: {printable(note)}", markup=False, soft_wrap=True)


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
