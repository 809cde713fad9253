"""A second domain: programs of the rewriting system A::B, from reasoning-gym's family "ab".

Four tokens, `A#`, `#A`, `B#` and `#B`; where two neighbours face each other with `#`, equal letters vanish and
others change places. The question is a program, the answer what is left of it. Problems and verifier are
reasoning-gym's; the question is put in few words, and the solutions are written here, one rewriting a line.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.content import content_id, content_seed
from phimr_nemo.store.records import Difficulty

FAMILY: Final = "ab"
LENGTHS: Final[dict[int, Difficulty]] = {5: "middle", 6: "high_school"}
"""Tokens of a program -> tier."""
HELDOUT_ONE_IN: Final = 5
MOST_DRAWS: Final = 20
"""Problems drawn for one that is kept: programs repeat, belong to the other part, or leave nothing."""
QUESTION: Final = "Reduce {program}."
PROGRAM_FROM: Final = "the following program:\n\n"
DOMAIN: Final = "rewriting"


def draw_problems(count: int, *, seed: int, heldout: bool) -> list[dict[str, str]]:
    """Distinct problems with an answer, the lengths in turn; training and held-out programs are disjoint.

    Args:
        count: how many.
        seed: of the drawing.
        heldout: which part; a hash of the program alone decides to which it belongs.

    Returns:
        Rows with question, answer, domain, difficulty and program.

    Raises:
        UserError: reasoning-gym is not installed, or there are not so many.
    """
    gym = _reasoning_gym()
    found: dict[str, dict[str, str]] = {}
    for index, (length, difficulty) in enumerate(LENGTHS.items()):
        wanted = count // len(LENGTHS) + (index < count % len(LENGTHS))
        entries = gym.create_dataset(FAMILY, seed=seed, size=max(1, wanted * MOST_DRAWS), length=length)
        kept = 0
        for entry in entries:
            program = str(entry["question"]).partition(PROGRAM_FROM)[2].partition("\n")[0].strip()
            is_heldout = int(content_id("split", program), 16) % HELDOUT_ONE_IN == 0
            if kept < wanted and program not in found and entry["answer"] and is_heldout == heldout:
                found[program] = {
                    "question": QUESTION.format(program=program),
                    "answer": str(entry["answer"]),
                    "domain": DOMAIN,
                    "difficulty": difficulty,
                    "program": program,
                }
                kept += 1
        if kept < wanted:
            raise UserError(
                f"{wanted} programs of {length} tokens were asked for, {kept} found",
                rule="programs are distinct, and one in five is held out",
                remedy="ask for fewer problems",
            )
    return list(found.values())


def solve(program: str, rng: random.Random, mistake_rate: float) -> str:
    """A solution in the form of the mathematical ones: every state of the rewriting, then the boxed result.

    Args:
        program: tokens with spaces between them.
        rng: the source of mistakes.
        mistake_rate: probability of one wrong rewriting, 0 to 1: both tokens vanish that had to change places, or
            the other way round.
    """
    tokens = program.split()
    places = len(_states(tokens)) - 1
    wrong_at = rng.randrange(places) if places and rng.random() < mistake_rate else -1
    states = _states(tokens, wrong_at)
    lines = [" ".join(state) for state in states]
    return "\n".join(["<think>", *lines, "</think>", f"The answer is \\boxed{{{lines[-1]}}}."])


def _states(tokens: Sequence[str], wrong_at: int = -1) -> list[list[str]]:
    """The program and what each rewriting of the leftmost facing pair makes of it."""
    states = [list(tokens)]
    while True:
        state = states[-1]
        place = next((i for i in range(len(state) - 1) if state[i][1] == "#" and state[i + 1][0] == "#"), None)
        if place is None:
            return states
        left, right = state[place], state[place + 1]
        vanish = (left[0] == right[1]) != (len(states) - 1 == wrong_at)
        states.append([*state[:place], *([] if vanish else [right, left]), *state[place + 2 :]])


def write_problems(path: Path, problems: Sequence[dict[str, str]]) -> None:
    """Write problems as JSON lines."""
    atomic_write_text(path, "".join(json.dumps(problem) + "\n" for problem in problems))


def write_solutions(
    path: Path, problems: Sequence[dict[str, str]], *, each: int, seed: int, mistake_rate: float
) -> None:
    """Write recorded solutions of problems as JSON lines, `each` a problem."""
    lines = []
    for problem in problems:
        for sample in range(each):
            rng = random.Random(content_seed(FAMILY, str(seed), problem["program"], str(sample)))
            lines.append(json.dumps({**problem, "response": solve(problem["program"], rng, mistake_rate)}) + "\n")
    atomic_write_text(path, "".join(lines))


def _reasoning_gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UserError(
            f"reasoning-gym cannot be imported: {error}",
            rule="problems and verifier of the second domain are reasoning-gym's",
            remedy="pip install --no-deps --target DIR -r requirements/domains.txt, and put DIR into PYTHONPATH",
        ) from error
