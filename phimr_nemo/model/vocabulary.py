"""Whether two models speak of the same words. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from phimr_nemo.data.tokenizer import TOKENIZER_FILE, words_hash
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture


def check_same_tokenizer(student: Path, teacher: Path) -> None:
    """Refuse a teacher that gives the same text other ids than its student.

    Args:
        student, teacher: directories with the tokenizers.

    Raises:
        UserError: they differ; both directories are named.
    """
    hashes = {directory: words_hash(directory) for directory in (student, teacher)}
    if len(set(hashes.values())) > 1:
        raise UserError(
            "two tokenizers: " + ", ".join(f"{directory} has {found}" for directory, found in hashes.items()),
            rule="a teacher scores the student's tokens, so both have the same tokenizer (by the content of "
            f"{TOKENIZER_FILE})",
            remedy="choose a teacher of the student's family, or train on the teacher's text with phimr sft",
        )


def check_same_words(student: Path, teacher: Path) -> None:
    """Refuse a teacher of another tokenizer, or with another number of words.

    Args:
        student, teacher: Hugging Face directories.

    Raises:
        UserError: their tokenizers or vocabularies differ; both directories are named.
    """
    check_same_tokenizer(student, teacher)
    sizes = {directory: Architecture.from_directory(directory).vocab_size for directory in (student, teacher)}
    if len(set(sizes.values())) > 1:
        raise UserError(
            " and ".join(f"{directory} with {size} words" for directory, size in sizes.items()),
            rule="teacher and student give a probability to the same words",
            remedy="choose a teacher whose config.json has the student's vocab_size",
        )
