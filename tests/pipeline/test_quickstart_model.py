"""The page's own example: its question is in a form of the training set, and the quickstart's model answers it.

The model is that of a finished `make quickstart`, in the place that the page names.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from phimr_nemo.config import ExportConfig, load_config
from phimr_nemo.data.synthetic.problems import ASKS, TEMPLATES, generate_problems
from phimr_nemo.verify import grade

REPOSITORY = Path(__file__).resolve().parents[2]
NUMBER, NAME = r"\d+", r"\w+"
EXAMPLE = re.compile(r'^echo "(?P<question>.*)" \| phimr chat (?P<model>\S+)$', re.MULTILINE)
SAYS = re.compile(r"^It says `(?P<answer>.*?)`", re.MULTILINE)


def page() -> str:
    return (REPOSITORY / "README.md").read_text("utf-8")


def example() -> tuple[str, str]:
    """The question and the model of the page's one chat."""
    (found,) = EXAMPLE.finditer(page())
    return found["question"], found["model"]


def forms() -> list[re.Pattern[str]]:
    """Every form that a generated question has, as an expression of its numbers and names."""
    found = []
    for template in TEMPLATES:
        for ask in ("{}",) if template.family == "word" else ASKS:
            text = re.escape(ask).replace(r"\{\}", re.escape(template.text))
            found.append(re.compile(re.sub(r"\\\{([a-z])\\\}", lambda m: NAME if m[1] in "nmpo" else NUMBER, text)))
    return found


def in_a_form(question: str) -> bool:
    return any(form.fullmatch(question) for form in forms())


def test_the_pages_question_is_in_a_form_of_the_training_set() -> None:
    drawn = generate_problems(0, 200, "train")["question"].to_pylist()
    assert all(map(in_a_form, drawn))
    assert in_a_form(example()[0])
    # The page's former example, which no model of the quickstart had ever seen the like of.
    assert not in_a_form("Compute 2*(3+4)")


def test_the_release_names_questions_in_such_forms() -> None:
    knows = load_config(ExportConfig, Path("conf/export/tiny.yaml")).knows
    assert knows is not None
    _, *examples = re.split(r"\s*(?:For example|Or):\s*", knows.strip())
    assert len(examples) == 2
    assert all(map(in_a_form, examples))
    assert examples[0] == example()[0]


def test_what_the_page_says_the_model_says_is_right() -> None:
    question, _ = example()
    sum_times = re.fullmatch(r"Compute \((\d+)\+(\d+)\)\*(\d+)\.", question)
    (says,) = SAYS.finditer(page())
    assert sum_times is not None
    a, b, c = map(int, sum_times.groups())
    assert grade(says["answer"], str((a + b) * c)).verdict == "correct"


def test_the_quickstarts_model_says_what_the_page_says() -> None:
    question, model = example()
    if not (REPOSITORY / model).is_dir():
        pytest.skip(f"{model} is not there: run make quickstart first")
    asked = [sys.executable, "-m", "phimr_nemo.cli", "chat", str(REPOSITORY / model)]
    done = subprocess.run(asked, input=f"{question}\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (says,) = SAYS.finditer(page())
    assert says["answer"] in done.stdout
