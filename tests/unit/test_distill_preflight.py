"""What is checked of a teacher before a process starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from architectures import small

from phimr_nemo.config import DistillConfig, load_config
from phimr_nemo.data.tokenizer import words_hash
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.preflight import derived_numbers, file_inputs, preflight
from phimr_nemo.jobs.server_node import serve_arguments
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.vocabulary import check_same_words
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

KIND: Kind = "prompts"
PROMPT = {
    "id": "p",
    "problem_id": "p",
    "question": "1 + 1?",
    "answer": "2",
    "pass_rate": 0.5,
    "mean_length": 9.0,
    "length_spread": 0.1,
    "hard": False,
}
WORDS: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": [], "truncation": None}


def architecture(heads: int, words: int = 64) -> Architecture:
    return small(
        vocab_size=words,
        hidden_size=8 * heads,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        short_factor=(1.0, 1.0, 1.0),
        long_factor=(1.0, 2.0, 3.0),
    )


def model(path: Path, heads: int = 4, words: int = 64, tokenizer: object = WORDS) -> Path:
    """A directory as far as a check without torch can see."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(architecture(heads, words).to_hf_config()), "utf-8")
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return path


def config(root: Path, *overrides: str, teacher: str = "teacher") -> DistillConfig:
    if not (root / "prompts").exists():
        write_shard(root / "prompts", 0, rows_to_table([PROMPT], KIND), kind=KIND)
        finish(root / "prompts", kind=KIND, config={})
    places = {"base": root / "base", "teacher.path": root / teacher, "prompts": root / "prompts"}
    given = [f"{key}={place}" for key, place in places.items()]
    return load_config(
        DistillConfig, Path("conf/distill/tiny.yaml"), [*given, f"run.output={root / 'out'}", *overrides]
    )


def test_a_larger_teacher_of_the_same_words_is_taken(tmp_path: Path) -> None:
    model(tmp_path / "base")
    model(tmp_path / "teacher", heads=12)
    asked = config(tmp_path)
    preflight("distill", asked)
    assert file_inputs(asked) == [tmp_path / "base", tmp_path / "teacher"]
    assert derived_numbers("distill", asked)["responses per step"] == str(64 * 4)


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    model(tmp_path / "base")
    with pytest.raises(UserError, match="teacher does not exist"):
        preflight("distill", config(tmp_path))


def test_another_tokenizer_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model(tmp_path / "base")
    model(tmp_path / "teacher", tokenizer={"model": {"vocab": {"b": 0, "a": 1}, "merges": []}, "added_tokens": []})
    with pytest.raises(UserError) as refused:
        preflight("distill", config(tmp_path))
    assert str(tmp_path / "base") in refused.value.problem
    assert str(tmp_path / "teacher") in refused.value.problem
    assert not (tmp_path / "out").exists()


def test_another_number_of_words_is_refused(tmp_path: Path) -> None:
    student, teacher = model(tmp_path / "base"), model(tmp_path / "teacher", words=96)
    with pytest.raises(UserError, match=r"64 words and .* 96 words"):
        check_same_words(student, teacher)


def test_a_layout_that_only_the_student_can_have_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "base", heads=4)
    model(tmp_path / "teacher", heads=6)
    preflight("distill", config(tmp_path, "parallel.tensor=2"))
    with pytest.raises(UserError, match="tensor"):
        preflight("distill", config(tmp_path, "parallel.tensor=4"))


def test_how_a_tokenizer_was_called_last_is_no_part_of_it(tmp_path: Path) -> None:
    called = {**WORDS, "padding": {"length": 9}, "truncation": {"max_length": 4}}
    one, other = model(tmp_path / "one"), model(tmp_path / "other", tokenizer=called)
    assert words_hash(one) == words_hash(other)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    directory = model(tmp_path / "one")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=str(directory)):
        words_hash(directory)


def test_a_jobs_servers_serve_the_student(tmp_path: Path) -> None:
    settings = [f"base={tmp_path / 'base'}", "teacher.path=large", "engine.api_key_env=PHIMR_KEY"]
    words = serve_arguments(load_config(DistillConfig, Path("conf/distill/paper.yaml"), settings), 1)
    assert words[0] == str(tmp_path / "base")
