"""Tokenising for packing equals the chat module's rendering, whatever the text, also with the real tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phimr_nemo.data.chat import forbidden_tokens, load_tokenizer, render_conversation
from phimr_nemo.data.rows.tokenize import fast_tokenizer, prompt_frame, tokenize
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.store.content import question_number
from phimr_nemo.store.shards import rows_to_table

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
HOSTILE = st.sampled_from(
    ["<|end|>", "a <|user|> b", "<|endoftext|", " \n", "\x00", "é́ 𝔸\u200d", "1 + 1 = 2", "x" * 300]
)


@pytest.fixture(scope="module", params=["tiny", "phi4-mini"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "phi4-mini":
        shared: Path = request.getfixturevalue("shared_data")
        return shared / "phi4-mini"
    made = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(synthetic_corpus()).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def both(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    tokenizer = load_tokenizer(directory)
    path = tmp_path_factory.mktemp("fast") / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")
    return tokenizer, path


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS | HOSTILE, TEXTS | HOSTILE), max_size=70), st.integers(20, 120))
def test_equal_to_the_chat_module(
    both: tuple[Any, Path], tmp_path: Path, conversations: list[tuple[str, str]], capacity: int
) -> None:
    tokenizer, path = both
    rows = [{"id": f"{i}", "problem_id": "p", "question": q, "response": r} for i, (q, r) in enumerate(conversations)]
    pq.write_table(rows_to_table(rows, "conversations"), tmp_path / "c.parquet")
    with pq.ParquetFile(tmp_path / "c.parquet") as file:
        found, questions, counts = tokenize(fast_tokenizer(path), prompt_frame(tokenizer), file, capacity)
    forbidden = forbidden_tokens(tokenizer)
    clean = [pair for pair in conversations if not any(token in text for text in pair for token in forbidden)]
    expected = [render_conversation(tokenizer, *pair) for pair in clean]
    fitting = [(ids, mask) for ids, mask in expected if len(ids) <= capacity]
    assert [(list(ids), list(mask)) for ids, mask in found] == fitting
    asked = [question for (question, _), (ids, _) in zip(clean, expected, strict=True) if len(ids) <= capacity]
    assert questions == [question_number(question) for question in asked]
    assert counts.get("documents", 0) == len(fitting)
    assert counts.get("tokens", 0) == sum(len(ids) for ids, _ in fitting)
    assert counts.get("dropped: longer than a row", 0) == len(expected) - len(fitting)
    assert counts.get("dropped: special token in text", 0) == len(conversations) - len(clean)


@pytest.mark.parametrize("filter_", ["trim", "upper", "e", "title"])
def test_a_template_that_changes_questions_is_refused(filter_: str) -> None:
    tokenizer = build_tokenizer(synthetic_corpus())
    content = "message['content']"
    assert content in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(content, f"({content} | {filter_})")
    with pytest.raises(UserError, match="changes the question"):
        prompt_frame(tokenizer)
