r"""Classes of remainders, ``x \equiv 1, 3 \pmod{4}``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from phimr_nemo.verify.read.normalise import key
from phimr_nemo.verify.read.quantity import MAX_NUMBER_DIGITS

_RESIDUE = re.compile(
    r"(?:(?P<name>\\?[A-Za-z](?:_\{?\w\}?)?)(?:\\equiv|=))?(?P<remainders>[^=<>]+?)\(?\\(?:pmod|bmod|mod)\{?\(?(?P<modulus>[0-9]+)\)?\}?\)?"
)
_INTEGER = re.compile(r"[-+]?[0-9]+")


@dataclass(frozen=True)
class Residues:
    """Remainders and their modulus.

    Attributes:
        remainders: the classes, each from 0 to `modulus` - 1.
        modulus: a positive integer.
    """

    remainders: frozenset[int]
    modulus: int


def parse_residues(text: str) -> Residues | None:
    r"""What a canonical answer such as ``6 \pmod{9}`` says; None for any other answer."""
    if "mod" not in text or len(text) > MAX_NUMBER_DIGITS:
        return None
    plain = re.sub(r"\\text\{\s*,?(?:and|or)\s*\}", ",", text)
    match = _RESIDUE.fullmatch(key(re.sub(r"\\text\{\s*\(?\s*mod(?:ulo)?\s*\}", r"\\mod ", plain)))
    if match is None or int(match["modulus"]) == 0:
        return None
    parts = [part for part in match["remainders"].split(",") if part]
    if not parts or not all(_INTEGER.fullmatch(part) for part in parts):
        return None
    modulus = int(match["modulus"])
    if r"\bmod" in text and not match["name"] and not all(0 <= int(part) < modulus for part in parts):
        return None  # the operation, still to be carried out
    return Residues(frozenset(int(part) % modulus for part in parts), modulus)
