"""The tiny preset's tokenizer: byte-level BPE on the project's own synthetic text, with a turn format's tokens.

Digits are single tokens, words of the synthetic problems one or two, and every other text is spelt in
bytes. The same arguments give the same bytes in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from phimr_nemo.data.chat import REASONING_SYSTEM_PROMPT
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.data.turns import PHI, TurnFormat
from phimr_nemo.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TINY_VOCAB_SIZE: Final = 512
TINY_SYSTEM_PROMPT: Final = "Phi"
BYTE_ALPHABET_SIZE: Final = 256
CORPUS_PROBLEMS: Final = 3000
CORPUS_ROLLOUTS: Final = 1
CORPUS_MISTAKE_RATE: Final = 0.2
MAX_LENGTH: Final = 131_072

# One digit a piece; think tags and the box opener whole, so that they become single tokens; words with
# their leading space; every other character by itself.
PIECES: Final = r"</?think>| ?\\boxed\{|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"
# The instruction of Microsoft's published evaluation scripts.
INSTRUCTION: Final = "Please reason step by step, and put your final answer within \\boxed{}."


def build_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = TINY_VOCAB_SIZE,
    system_prompt: str = TINY_SYSTEM_PROMPT,
    turns: TurnFormat = PHI,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a format's chat tokens and the reasoning template.

    Args:
        texts: what to learn merges from.
        vocab_size: tokens in all: special ones (Phi's are 5), 256 bytes, merges.
        system_prompt: the system text in its chat template.
        turns: how turns are marked.

    Returns:
        The tokenizer; the first ids are the special tokens in the format's order.

    Raises:
        UserError: `vocab_size` is below the 261 that bytes and special tokens need, or the texts are
            too few to fill it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = BYTE_ALPHABET_SIZE + len(turns.tokens)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size}",
            rule=f"a byte-level vocabulary with the chat tokens has at least {smallest} entries",
            remedy=f"use {smallest} or more",
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(turns.tokens),
        # The library returns the alphabet in a random order, which would number the bytes differently each time.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"the texts fill only {tokenizer.get_vocab_size()} of {vocab_size} vocabulary entries",
            rule="every entry must be learnt from the texts",
            remedy="give more text or a smaller vocab_size",
        )
    return chat_tokenizer(tokenizer, turns, system_prompt, max_length=MAX_LENGTH)


def chat_tokenizer(
    backend: Tokenizer, turns: TurnFormat, system_prompt: str, *, max_length: int
) -> PreTrainedTokenizerFast:
    """A tokenizer that holds a format's chat tokens as added ones, with the reasoning template and its settings.

    Args:
        backend: the tokenizer itself.
        turns: how turns are marked.
        system_prompt: the system text in the chat template.
        max_length: the model's longest sequence, in tokens.

    Raises:
        UserError: a system prompt that Jinja would read.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=turns.end_of_text,
        eos_token=turns.end_of_text,
        pad_token=turns.end_of_text,
        additional_special_tokens=list(turns.tokens[1:]),
        chat_template=turns.template(system_prompt),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def synthetic_corpus(seed: int = 0) -> Iterator[str]:
    """Questions and solutions of generated training problems, and the prompts in use, to learn merges from."""
    yield f"{REASONING_SYSTEM_PROMPT} {INSTRUCTION}"
    problems = generate_problems(seed, CORPUS_PROBLEMS, "train")
    for row in teacher_rollouts(problems, CORPUS_ROLLOUTS, seed, CORPUS_MISTAKE_RATE).to_pylist():
        yield row["question"]
        yield row["response"]
