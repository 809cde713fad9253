"""GSM8K as published -> the training file of docs/small-models.md.

python -m recipes.gsm8k train.jsonl runs/smollm2/gsm8k-train.jsonl

A published solution writes every calculation twice, the second time as `<<48/2=24>>`, for a calculator that the model
of the paper could call (Cobbe et al. 2021, arXiv:2110.14168). Here is none, so that is left out: a quarter of the
solutions' tokens. A problem with a long solution is marked as harder than one with a short one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.records import Difficulty

CALCULATOR: Final = re.compile(r"<<[^<>]*>>")
FINAL: Final = "####"
HARDER_FROM: Final = 4
"""Lines of a solution, the final answer's aside: 45 % of the training set have as many."""


def plain_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Question, worked answer without the calculator's notes, and difficulty, of each line of the published file.

    Raises:
        UserError: a line is not one of GSM8K's.
    """
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            question, answer = str(row["question"]), str(row["answer"])
        except (ValueError, KeyError, TypeError):
            question = answer = ""
        worked, final, _ = answer.partition(FINAL)
        if not (question and final):
            raise UserError(
                f"line {number} is {line[:60]!r}",
                rule=f"a line of GSM8K is an object with a question and a worked answer that ends in {FINAL} n",
                remedy="give train.jsonl or test.jsonl of openai/grade-school-math, as published",
            )
        steps = sum(1 for step in worked.splitlines() if step.strip())
        difficulty: Difficulty = "middle" if steps >= HARDER_FROM else "elementary"
        yield {"question": question, "answer": CALCULATOR.sub("", answer), "difficulty": difficulty}


def main(arguments: list[str]) -> int:
    """Read the first argument's file, write the second's; the exit code."""
    try:
        if len(arguments) != 2:
            raise UserError(
                f"{len(arguments)} arguments",
                rule="there are two: GSM8K's file and the file to write",
                remedy="python -m recipes.gsm8k train.jsonl runs/smollm2/gsm8k-train.jsonl",
            )
        source, target = map(Path, arguments)
        if not source.is_file():
            raise UserError(
                f"there is no file {source}",
                rule="the first argument is GSM8K's file",
                remedy="download train.jsonl of openai/grade-school-math",
            )
        rows = list(plain_rows(source.read_text("utf-8").splitlines()))
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    harder = sum(row["difficulty"] == "middle" for row in rows)
    print(f"{target}: {len(rows):,} problems, {harder:,} of them harder")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
