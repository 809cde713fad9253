"""The documents as a site: pages have a place, links lead somewhere, made pages say what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import figures
import messages
import numpy as np
import paper
import pytest
import references
import yaml
from links import DOCS, OUTSIDE, place, rewritten
from typer.main import get_command

from phimr_nemo.cli.main import app
from phimr_nemo.config import STAGES, load_config, to_dict
from phimr_nemo.data.packing import pack
from phimr_nemo.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted((REPOSITORY / DOCS).glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADS = ["Run it", "In and out", "Keys", "When it fails"]
FEWEST_MESSAGES = 250


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return references.pages()


def nav() -> list[str]:
    """Every page of the index."""

    def leaves(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, list):
            for item in node:
                yield from leaves(item)
        elif isinstance(node, dict):
            for item in node.values():
                yield from leaves(item)

    return list(leaves(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text("utf-8"))["nav"]))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as Python-Markdown makes them."""
    found = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def broken(path: Path) -> list[str]:
    """Links of a document that lead nowhere."""
    found = []
    for link in LINK.findall(FENCED.sub("", path.read_text("utf-8"))):
        target, _, anchor = link.partition("#")
        if re.match("[a-z]+:", link):
            continue
        there = path.parent / target if target else path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text("utf-8"))):
            found.append(link)
    return found


def test_the_index_has_three_parts_and_every_page_once(made: dict[str, str]) -> None:
    tree = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text("utf-8"))["nav"]
    assert [next(iter(part)) for part in tree] == ["Manual", "Results", "Design"]
    pages = nav()
    assert len(set(pages)) == len(pages)
    own = {page for page in pages if not page.startswith(f"{OUTSIDE}/")}
    assert own == {path.name for path in PAGES} | set(made)
    outside = [page.removeprefix(f"{OUTSIDE}/") for page in pages if page.startswith(f"{OUTSIDE}/")]
    assert [page for page in outside if not (REPOSITORY / page).is_file()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_anchors_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A head\n\n[a](#a-head) [b](#another) [c](absent.md) [d](page.md#no)\n", "utf-8")
    assert broken(page) == ["#another", "absent.md", "page.md#no"]


def test_links_out_of_the_documents_lead_into_the_site() -> None:
    assert place("docs/grpo.md") == "grpo.md"
    assert place("SECURITY.md") == f"{OUTSIDE}/SECURITY.md"
    text = "[a](../SECURITY.md#data-files) [b](grpo.md) [c](../conf) ![d](accuracy.png) [e](https://x.y)"
    assert (
        rewritten(text, "docs/README.md")
        == f"[a]({OUTSIDE}/SECURITY.md#data-files) [b](grpo.md) c ![d](accuracy.png) [e](https://x.y)"
    )
    assert rewritten("[a](docs/grpo.md)", "README.md") == "[a](../grpo.md)"
    block = "```bash gpu\nphimr grpo  # [a](../SECURITY.md)\n```\n"
    assert rewritten(block, "docs/grpo.md") == block.replace("bash gpu", "bash")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_page_with_the_same_heads_and_all_its_keys(stage: str, made: dict[str, str]) -> None:
    page = made[f"stages/{stage}.md"]
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == HEADS
    needed = {name: "x" for name in ("base", "data", "model") if f"| `{name}` |" in page}
    try:
        resolved = to_dict(
            load_config(
                STAGES[stage], Path("conf") / stage / "tiny.yaml", [f"{name}={text}" for name, text in needed.items()]
            )
        )
    except UserError:
        pytest.skip("the tiny preset alone is no whole configuration of this stage")
    assert [key for key in resolved if f"| `{key}` |" not in page and f"| `{key}." not in page] == []


def test_every_command_is_described(made: dict[str, str]) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    heads = set(re.findall(r"^## phimr (.*)$", made["reference/commands.md"], re.MULTILINE))
    assert set(commands) <= heads
    assert {f"data {name}" for name in commands["data"].commands} <= heads


def test_the_page_of_messages_has_what_a_command_says() -> None:
    found = messages.messages()
    assert len(found) > FEWEST_MESSAGES
    with pytest.raises(UserError) as raised:
        pack([3, 0], capacity=10)
    said = [
        message
        for message in found
        if message.module == "phimr_nemo/data/packing.py" and matches(message, raised.value)
    ]
    assert len(said) == 1
    assert "longer rows" in said[0].remedy


def matches(message: messages.Message, error: UserError) -> bool:
    return all(
        re.fullmatch(".*".join(map(re.escape, re.split(r"\{[^}]*\}", template))), text)
        for template, text in ((message.problem, error.problem), (message.rule, error.rule))
    )


def test_the_page_of_the_paper_is_the_one_that_its_command_makes() -> None:
    assert paper.PAGE.read_text("utf-8") == paper.page(), "python docs/site/paper.py writes docs/paper.md again"


@pytest.mark.parametrize(
    ("mean", "error", "sign", "expected"),
    [
        (1.0, 0.4, 1, paper.HOLDS),
        (-1.0, 0.4, -1, paper.HOLDS),
        (1.0, 0.4, -1, paper.FAILS),
        (0.8, 0.4, 1, paper.UNSEEN),
        (1.0, float("nan"), 1, paper.UNSEEN),
    ],
)
def test_a_verdict_is_the_sign_beyond_two_errors(mean: float, error: float, sign: paper.Sign, expected: str) -> None:
    assert paper.verdict(figures.Figure(mean, error, ""), sign) == expected


def test_a_figure_is_read_with_its_larger_error() -> None:
    figure = figures.look_up(figures.Cell("generality.md", "SFT", "all", table=1))
    assert figure.text in (REPOSITORY / "docs" / "generality.md").read_text("utf-8")
    assert figure.error == max(map(float, re.findall(r"± ([\d.]+) \(([\d.]+)\)", figure.text)[0]))
    two = figures.difference([figures.Figure(2.0, 3.0, "2"), figures.Figure(7.0, 4.0, "7")])
    assert (two.mean, two.error) == (5.0, pytest.approx(np.hypot(3, 4)))


def test_a_figure_that_no_table_has_is_an_error() -> None:
    with pytest.raises(LookupError, match="no table"):
        figures.look_up(figures.Cell("results.md", "pass@1", "a stage that nobody ran"))
