"""The tiny tokenizer: the same bytes every time, single digits, any text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from phimr_nemo.data.chat import END, SPECIAL_TOKENS, load_tokenizer
from phimr_nemo.data.synthetic.problems import NAMES, THINGS
from phimr_nemo.data.synthetic.tokenizer import TINY_VOCAB_SIZE, build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError

BUILD = (
    "import sys; from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus; "
    "build_tokenizer(synthetic_corpus()).save_pretrained(sys.argv[1])"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(synthetic_corpus())


def test_another_process_builds_the_same_bytes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, repository: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    tokenizer.save_pretrained(here)
    subprocess.run([sys.executable, "-c", BUILD, str(there)], check=True, cwd=repository)
    files = sorted(path.name for path in here.iterdir())
    assert "tokenizer.json" in files
    assert files == sorted(path.name for path in there.iterdir())
    for name in files:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name


def test_vocabulary_is_filled_and_starts_with_the_chat_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == TINY_VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_digits_stand_alone_and_common_words_are_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("1234567890") == list("1234567890")
    for piece in ("<think>", "</think>", " \\boxed{", " answer", *(f" {word}" for word in NAMES + THINGS)):
        assert len(tokenizer.tokenize(piece)) == 1, piece


@pytest.mark.parametrize(
    "text",
    [
        "What is 37+48-12?",
        "Janet\u2019s ducks: 16\u00d73 = \u221a2 \u2264 \U0001f986\u00e9\u4f60\u597d",
        " \t\n\n  a  b\r\n\x00\u200b",
        "\\frac{1}{2} \\boxed{x} <think></think> <|nothing|>",
    ],
)
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_real_questions_survive(tokenizer: PreTrainedTokenizerFast, shared_data: Path) -> None:
    with (shared_data / "problems" / "gsm8k_test.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["question"] for line in file][:200]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_saved_and_loaded_it_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.encode(f"7{END}") == tokenizer.encode(f"7{END}")


def test_impossible_vocabularies_are_refused() -> None:
    with pytest.raises(UserError, match="vocab_size 100"):
        build_tokenizer(["a"], vocab_size=100)
    with pytest.raises(UserError, match="fill only 261"):
        build_tokenizer(["a"], vocab_size=300)
