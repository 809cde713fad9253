"""Multiple choice: answers that are a letter, or a value behind one."""

from __future__ import annotations

import re

from phimr_nemo.verify.read.normalise import key
from phimr_nemo.verify.read.quantity import parse_number

_CHOICE = re.compile(
    r"^(?:\\text\{)?\s*(?:(?:option|choice|answer)\s*:?\s*)?(?:\\text\{)?\s*\(?\s*(?:\\text\{)?\s*([A-Ja-j])\s*\}?\s*\)?\s*\}?\s*\.?\s*\}?$",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"^(?:\\text\{)?\s*(?:\(\s*(?:\\text\{)?\s*([A-J])\s*\}?\s*\)|([A-J])\s*[.):](?=\s|\}|[0-9$\\]))\s*\}?\s*(.+)$"
)


def _choice_letter(text: str) -> str:
    match = _CHOICE.match(text)
    return match.group(1).upper() if match else ""


def is_choice(text: str) -> bool:
    """Whether an answer is one or several letters of a multiple choice, or has one before it."""
    return bool(_choice_letter(text) or _LABELLED.match(text) or _LETTERS.fullmatch(text))


def _numbers_differ(gold: str, predicted: str) -> bool:
    """Whether the values behind two labels are numbers, and different ones."""
    first, second = (parse_number(key(text.rstrip("}"))) for text in (gold, predicted))
    return bool(first and second and first.value != second.value)


def same_choice(gold: str, predicted: str) -> bool | None:
    """Compare by letter where the gold answer is one; None where it is not."""
    letter = _choice_letter(gold)
    labelled_gold = _LABELLED.match(gold)
    if labelled_gold and not letter:
        predicted_letter = _choice_letter(predicted)
        labelled = _LABELLED.match(predicted)
        if labelled and _numbers_differ(labelled_gold.group(3), labelled.group(3)):
            return False
        if predicted_letter or labelled:
            return (labelled_gold.group(1) or labelled_gold.group(2)) == (
                predicted_letter or (labelled.group(1) or labelled.group(2) if labelled else "")
            )
        return None
    if not letter or (gold.islower() and len(gold) == 1):
        return None
    predicted_letter = _choice_letter(predicted)
    if predicted_letter:
        return letter == predicted_letter
    labelled = _LABELLED.match(predicted)
    if labelled:
        return letter == (labelled.group(1) or labelled.group(2))
    return None


def without_choice_label(text: str, other: str) -> str:
    r"""``\textbf{(B)} 12`` as 12 where the other answer has no such label."""
    labelled = _LABELLED.match(text)
    if not labelled or _LABELLED.match(other):
        return text
    rest = labelled.group(3).strip()
    return rest.removesuffix("}") if rest.count("}") > rest.count("{") else rest


_LETTERS = re.compile(r"[A-J](?:[,;]?[A-J])+")


def same_letters(gold: str, predicted: str) -> bool:
    r"""Whether two answers are the same several letters, however they are joined: ``AC``, ``A, C``, ``(A) and (C)``.

    Letters without anything between them must be in alphabetical order, for others may be a name.
    """
    found, joined = [], 0
    for text in (gold, predicted):
        plain = re.sub(r"\\text\{\s*([^{}]*)\}", r" \1 ", text)
        plain = re.sub(r"[(){}\s]", "", re.sub(r"\band\b", ",", plain))
        if not _LETTERS.fullmatch(plain):
            return False
        letters = re.sub(r"[,;]", "", plain)
        if letters == plain:
            joined += 1
            if letters != "".join(sorted(letters)):
                return False
        found.append(sorted(letters))
    return joined < len(found) and found[0] == found[1] and len(set(found[0])) == len(found[0])
