"""What JSON and Python eat of LaTeX is put back where there is no doubt; other damage is counted, never a gold."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phimr_nemo.config import SourceConfig
from phimr_nemo.data.sources.cells import answer_text, lookup
from phimr_nemo.data.sources.damage import PICTURE, is_damaged, repair_latex, repair_text
from phimr_nemo.data.sources.item import Item, UnusableRow
from phimr_nemo.data.sources.source import read_items
from phimr_nemo.errors import UserError

COMMANDS = [
    *(r"\frac{1}{2}", r"\forall x", r"\beta", r"\boxed{3}", r"\binom{n}{k}", r"\begin{cases}", r"\bar x", r"\bmod 5"),
    *(r"3\times 5", r"\theta", r"\text{cm}", r"\triangle ABC", r"\therefore", r"\tfrac12", r"\tilde x"),
    *(r"x\neq y", r"\nabla f", r"n\notin S", r"\left(1\right)", r"\vec v", r"\varphi", r"\alpha", r"\angle A"),
]
LETTERS = {"f": "\f", "b": "\b", "t": "\t", "n": "\n", "r": "\r", "v": "\v", "a": "\a"}


def eaten(text: str) -> str:
    """What a language with C's escapes makes of LaTeX in a string."""
    for letter, control in LETTERS.items():
        text = text.replace("\\" + letter, control)
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_an_eaten_command_is_put_back(command: str) -> None:
    assert eaten(command) != command
    assert repair_latex(f"What is ${eaten(command)}$ then?") == (
        f"What is ${command}$ then?",
        command.count("\\") - command.count("\\l"),
    )
    assert repair_latex(eaten(command), answer=True)[0] == command


@pytest.mark.parametrize("command", [r"\tan x", r"\tau", r"x\to 0", r"\nu", r"\not a", r"\rho", r"\rfloor"])
def test_what_may_be_a_word_is_put_back_in_answers_only(command: str) -> None:
    assert repair_latex(eaten(command)) == (eaten(command), 0)
    assert repair_latex(eaten(command), answer=True) == (command, 1)


@pytest.mark.parametrize(
    "text",
    [
        "a table\tof numbers\nequals three\r\nright angles are next",
        "Page 1\f\nPage 2",
        "the \ffive-digit number, then fi\fnd it",
        "# Define\r\neq1 = Eq(x, 1)\neq2 = 3\neq = 4",
        "1\t2\n3\t4",
    ],
)
def test_white_space_is_left_alone(text: str) -> None:
    assert repair_latex(text) == (text, 0)
    assert not is_damaged(text, "4")


def test_what_cannot_be_put_back_is_known_as_damaged() -> None:
    assert is_damaged("Find $\boogus{x}$.", "4")
    assert is_damaged("Find $\foo{x}$.", "4")
    assert is_damaged("Find it.", "\foo")
    assert not is_damaged("Find it.", "foo")


@pytest.mark.parametrize(
    ("damaged", "right"),
    [
        (r"Find $\\frac{1}{2}$ of $x$.", r"Find $\frac{1}{2}$ of $x$."),
        (r"Given \\(x\\) and \\(y\\)", r"Given \(x\) and \(y\)"),
        (r"$\\begin{cases} 1 \\\\ 2 \\end{cases}$", r"$\begin{cases} 1 \\ 2 \end{cases}$"),
        (r"Let $\nu = 1$.\nWhat is $x$?", "Let $\\nu = 1$.\nWhat is $x$?"),
        ("x &lt; 5 &amp;&amp; y &amp;gt; 3, &#39;z&#39;", "x < 5 && y > 3, 'z'"),
        ("3Ï€, 90Â°, itâ€™s âˆš2 Ã— âˆ’3", "3π, 90°, it’s √2 × −3"),
        ("ä¸­å›½", "中国"),
        (r"The area is 9\u03c0 for \u00e9cole \ud83d\ude00", "The area is 9π for école 😀"),
    ],
)
def test_escapes_entities_and_encodings_are_put_right(damaged: str, right: str) -> None:
    assert repair_text(damaged)[0] == right
    assert repair_text(damaged)[1]
    assert repair_text(right) == (right, frozenset())


@pytest.mark.parametrize(
    "text",
    [
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        r"x = 1 \\[4pt] y = 2",
        r'["\\frac{1}{2}", "0.5"]',
        r'{"gold": "a\nb"}',
        'first line\nprint("a\\n")',
        r"$\neq$ and $\nRightarrow x$",
        "```html\n&lt;b&gt;\n```",
        "MENÜ“, SÃO, «été», é»",
        "AT&T; a &x; b",
        r"half \ud83d, control \u0007, \\u03c0, \upsilon",
        '```python\nprint("\\u03c0")\n```',
    ],
)
def test_what_is_no_damage_stays(text: str) -> None:
    assert repair_text(text) == (text, frozenset())


def test_a_picture_in_a_question_is_named(tmp_path: Path) -> None:
    rows = [
        {"question": "See ![a](https://x/y.png). How long?", "answer": "1"},
        {"question": "Is 5! > 1?", "answer": "2"},
    ]
    first, second = read(tmp_path, rows)
    assert isinstance(first, Item)
    assert isinstance(second, Item)
    assert (first.lost, second.lost) == ((PICTURE,), ())


def read(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Item | UnusableRow]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [item for _, item in read_items(SourceConfig(name="s", path=str(path), **settings))]


def test_damage_in_a_source_is_repaired_and_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "Half of $\frac{2}{2}$?", "answer": "\frac{1}{2}", "response": ["So \boxed{\frac{1}{2}}"]},
        {"question": "Q?", "answer": "2\tau", "response": []},
    ]
    first, second = read(tmp_path, rows, response="response")
    assert isinstance(first, Item)
    assert isinstance(second, Item)
    assert (first.question, first.answer) == (r"Half of $\frac{2}{2}$?", r"\frac{1}{2}")
    assert first.trajectories[0].response == r"So \boxed{\frac{1}{2}}"
    assert second.answer == r"2\tau"
    assert first.lost == second.lost == ("repaired: LaTeX without its backslash",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), ""),
        (float("inf"), ""),
        ("nan", ""),
        ("None", ""),
        ("null", ""),
        (None, ""),
        ([None, 3], "3"),
        ([], ""),
        ([[1, 2], [3]], ""),
        ({"value": 5}, ""),
        ('{"ground_truth": "36"}', ""),
        ('["36"]', "36"),
        (r'["\\frac{1}{2}", "0.5"]', r'["\\frac{1}{2}", "0.5"]'),
        ('["\\frac{1}{2}"]', r"\frac{1}{2}"),
        ('["nan", "3"]', "3"),
        ('["x=1", null]', "x=1"),
        ("[null]", ""),
        ("[]", ""),
        ("['1/2', '0.5']", '["1/2", "0.5"]'),
        (r"['\\frac{1}{2}', None]", r"\frac{1}{2}"),
        (r"['\sqrt{2}']", r"\sqrt{2}"),
        ("['1/2' '0.5']", "['1/2' '0.5']"),
        ("[f'(x), g'(x)]", "[f'(x), g'(x)]"),
        (Decimal("1.50"), "1.5"),
        (Decimal(1200), "1200"),
        (Decimal("NaN"), ""),
        ("[1, 2]", "[1, 2]"),
        ("none", "none"),
    ],
)
def test_an_answer_that_is_missing_is_no_text(value: object, text: str) -> None:
    assert answer_text(value) == text


def test_names_with_dots_reach_through_json_text_and_messages() -> None:
    row = {
        "info": json.dumps({"deep": {"gold": "7"}}),
        "a.b": "own",
        "messages": [{"role": "user", "info": {"gold": "5"}}, {"role": "assistant", "info": {"gold": None}}],
    }
    assert lookup(row, "info.deep.gold") == "7"
    assert lookup(row, "a.b") == "own"
    assert lookup(row, "messages.info.gold") == "5"
    assert lookup(row, "info.other.gold") is None
    assert lookup({"info": "no { json"}, "info.gold") is None


def test_nulls_in_the_first_row_and_in_lists_cost_nothing_else(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "first q?", "answer": None, "tries": None},
        {"question": "a q?", "answer": "1", "tries": [r"x \boxed{1}", None, ""]},
        {"question": "b q?", "answer": "2", "tries": None},
    ]
    first, second, third = read(tmp_path, rows, response="tries")
    assert isinstance(first, UnusableRow)
    assert first.reason == "no answer"
    assert isinstance(second, Item)
    assert isinstance(third, Item)
    assert [one.response for one in second.trajectories] == [r"x \boxed{1}"]
    assert second.lost == ("response that is null or empty",) * 2
    assert (third.answer, third.trajectories) == ("2", ())
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    again = [
        item for _, item in read_items(SourceConfig(name="s", path=str(tmp_path / "rows.parquet"), response="tries"))
    ]
    assert again[1:] == [second, third]


def test_responses_that_were_not_asked_for_are_named(tmp_path: Path) -> None:
    rows = [{"problem": "Q?", "expected_answer": "1", "generation_model": "m", "generated_solution": "So 1."}]
    (item,) = read(tmp_path, rows)
    assert isinstance(item, Item)
    assert item.lost == ("responses in a column that was not asked for (response: generated_solution)",)
    (asked,) = read(tmp_path, rows, response="generated_solution")
    assert isinstance(asked, Item)
    assert [(one.teacher, one.response) for one in asked.trajectories] == [("m", "So 1.")]
    assert not asked.lost
    (thought,) = read(tmp_path, [{"problem": "Q?", "answer": "1", "r1_solution_1": "<think>\nOne.\n</think>\n1"}])
    assert isinstance(thought, Item)
    assert thought.lost == ("responses in a column that was not asked for (response: r1_solution_1)",)


def test_a_chat_without_an_answer_is_read_with_its_response(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": r"So \boxed{1}"}]
    (item,) = read(tmp_path, [{"messages": turns}])
    assert isinstance(item, Item)
    assert (item.question, item.answer) == ("Q?", "")
    assert [one.response for one in item.trajectories] == [r"So \boxed{1}"]
    with pytest.raises(UserError, match="lacks an answer column"):
        read(tmp_path, [{"question": "Q?", "other": "x"}])


def test_empty_generations_of_a_preset_are_counted(tmp_path: Path) -> None:
    row = {"problem": "Q?", "answer": "1", "solution": "", "generations": ["a", None, " "], "finish_reasons": None}
    (item,) = read(tmp_path, [row | {"correctness_math_verify": [True, None, None]}], preset="openr1_math")
    assert isinstance(item, Item)
    assert [one.response for one in item.trajectories] == ["a"]
    assert item.lost == ("response that is null or empty",) * 2


def test_a_number_of_more_digits_than_python_reads_is_a_row_not_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Q?", "answer": "2"}\n{"question": "P?", "answer": 1' + "0" * 5000 + "}\n", "utf-8")
    items = [item for _, item in read_items(SourceConfig(name="s", path=str(path)))]
    assert [len(item.answer) for item in items if isinstance(item, Item)] == [1, 5001]
