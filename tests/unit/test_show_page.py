"""The page of `phimr show`: what is in it, what its logic computes (in Node), and what a browser makes of it."""

from __future__ import annotations

import base64
import difflib
import gzip
import hashlib
import http.client
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, browser
from processes import start
from shown import HOSTILE, runs

from phimr_nemo.errors import UserError
from phimr_nemo.show.items import VERDICTS, Cells, Change, Item, Response, View, Wanted, index_of, select
from phimr_nemo.show.page import HERE, index_json, item_json, write_page
from phimr_nemo.show.serve import MOST_ITEMS, ViewServer
from phimr_nemo.show.views import find_views
from phimr_nemo.text.printable import printable

MANY = 100_000
MOST_ELEMENTS = 3_000
"""Of the document, however many items there are."""


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> list[View]:
    return find_views(runs(tmp_path_factory.mktemp("paged") / "runs"))


@pytest.fixture(scope="module")
def page(views: list[View], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(views, tmp_path_factory.mktemp("page") / "page.html", title="runs</title><script>x</script>")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def unpacked(page: Path, block: str) -> Any:
    match = re.search(rf'<script type="text/plain" id="{block}">([A-Za-z0-9+/=]*)</script>', page.read_text("utf-8"))
    assert match is not None, block
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


def made_view(count: int, *, seed: int = 0) -> View:
    """A view of random verdicts in three panes, whose item n asks for n."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    cells = Cells(
        item=np.repeat(np.arange(count), 3),
        pane=np.tile(np.arange(3), count),
        verdict=generator.integers(0, 3, 3 * count),
        reasons=[[f"reason {n}" for n in generator.integers(0, 4, 3 * count)]],
        tokens=generator.integers(0, 1000, 3 * count),
    )
    verdicts = [[VERDICTS[code] for code in row] for row in cells.verdict.reshape(count, 3)]

    def item(number: int) -> Item:
        panes = tuple((Response("", f"said {number * 7}", verdict=verdict),) for verdict in verdicts[number])
        return Item(f"id{number}", f"How much is {number}?", str(number), (), panes)

    def search(text: str) -> Any:
        return np.array(
            [text.lower() in f"how much is {number}? said {number * 7} id{number}" for number in range(count)]
        )

    index = index_of(count, 3, cells, generator.integers(0, 3, count))
    return View("made", "questions", ("a", "b", "c"), index, lambda numbers: [item(n) for n in numbers], search)


# ---- the file


def test_the_page_is_one_file_that_asks_nobody_for_anything(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.search(r"\b(?:src|href)\s*=|url\(|@import|https?:(?!//www\.w3\.org/1998/Math/MathML\")", text)
    [policy] = re.findall(r'Content-Security-Policy"\s+content="([^"]*)"', text)
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy
    assert "<title>runs&lt;/title&gt;&lt;script&gt;x&lt;/script&gt;</title>" in text


def test_everything_that_is_shown_is_in_the_page(page: Path, views: list[View]) -> None:
    facts = unpacked(page, "meta")["views"]
    for number, (view, fact) in enumerate(zip(views, facts, strict=True)):
        packed = [item for place in range(len(fact["chunks"])) for item in unpacked(page, f"chunk-{number}-{place}")]
        assert packed == [item_json(item) for item in view.fetch(range(len(view.index)))]
        assert (fact["items"], fact["panes"], fact["note"]) == (len(view.index), list(view.panes), "")
        index = unpacked(page, f"index-{number}")
        right = np.frombuffer(base64.b64decode(index["right"]), "<u2").reshape(view.index.right.shape)
        assert right.tolist() == view.index.right.tolist()


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    view = made_view(20_000)
    page = write_page([view, view], tmp_path / "page.html", title="x", most=200_000)
    for number, fact in enumerate(unpacked(page, "meta")["views"]):
        assert 0 < fact["items"] < 20_000
        assert fact["note"].startswith(f"The first {fact['items']:,} of 20,000 items")
        assert "--serve" in fact["note"]
        assert len(base64.b64decode(unpacked(page, f"index-{number}")["tokens"])) == 4 * fact["items"]
    assert page.stat().st_size < 600_000


# ---- its logic, in Node


def node(program: str, given: Any) -> Any:
    """What a program makes of `given`, with the page's `logic`."""
    path = shutil.which("node")
    if path is None:
        pytest.skip("no Node to run the page's logic in")
    code = f"const logic = require({json.dumps(str(HERE / 'logic.js'))}); const given = JSON.parse(require('fs')" + (
        f".readFileSync(0, 'utf8')); console.log(JSON.stringify((() => {{ {program} }})()));"
    )
    done = subprocess.run([path, "-e", code], input=json.dumps(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


ARRAYS = "const b = (name, kind) => new kind(Uint8Array.from(Buffer.from(given.index[name], 'base64')).buffer);" + (
    "const index = {right: b('right', Uint16Array), total: b('total', Uint16Array),"
    "verdicts: b('verdicts', Uint8Array), reasons: b('reasons', Uint32Array),"
    "tokens: b('tokens', Uint32Array), steps: b('steps', Uint32Array)};"
)


def test_the_page_filters_as_the_terminal_does() -> None:
    view = made_view(500)
    wishes: list[tuple[Wanted, dict[str, str]]] = []
    changes: tuple[Change | None, ...] = (None, "gained", "lost")
    for verdict, pane, reason, change, step in itertools.product(
        (None, 1), (None, 0, 2), (None, 2), changes, (None, 1)
    ):
        wanted = Wanted(
            verdict=None if verdict is None else VERDICTS[verdict],
            pane=pane,
            reason="" if reason is None else view.index.names[reason],
            change=change,
            step=step,
        )
        state = {"verdict": verdict, "pane": pane, "reason": reason, "change": change, "step": step}
        wishes.append((wanted, {name: "" if value is None else str(value) for name, value in state.items()}))
    program = ARRAYS + (
        "return given.states.map((one) => "
        "Array.from(logic.select({panes: [0, 1, 2]}, index, {...logic.EMPTY, ...one}, null)));"
    )
    found = node(program, {"index": index_json(view.index, 500), "states": [state for _, state in wishes]})
    expected = [select(view, wanted).tolist() for wanted, _ in wishes]
    assert found == expected
    assert len({len(one) for one in expected}) > 10


def test_items_are_sorted_by_length_and_by_share() -> None:
    view = made_view(200)
    program = ARRAYS + (
        "return ['longest', 'shortest', 'hardest', 'easiest'].map((sort) => "
        "Array.from(logic.select({panes: [0, 1, 2]}, index, {...logic.EMPTY, sort}, null)));"
    )
    longest, shortest, hardest, easiest = node(program, {"index": index_json(view.index, 200)})
    tokens, right = view.index.tokens.astype(int), view.index.right.sum(axis=1).astype(int)
    everything = range(200)
    assert longest == sorted(everything, key=lambda n: (-tokens[n], n))
    assert shortest == sorted(everything, key=lambda n: (tokens[n], n))
    assert hardest == sorted(everything, key=lambda n: (right[n], n))
    assert easiest == sorted(everything, key=lambda n: (-right[n], n))


PAIRS = [
    ("a b c d", "a x c d e"), ("", "new"), ("the same", "the same"), ("3*9=27\n40+27=67", "3*9=28\n40+28=68"),
    ("gone", ""), ("x" * 5000, "y" * 5000), ("über ﬁ 数", "uber ﬁ 數"),
    (" ".join(map(str, range(3000))), " ".join(map(str, range(1, 3000, 2)))),
    ("\n".join(f"line {n} {'w ' * 9}" for n in range(900)), "\n".join(f"line {n} {'v ' * 9}" for n in range(900))),
]  # fmt: skip


def test_a_difference_holds_both_texts_and_is_as_small_as_can_be() -> None:
    for (first, second), found in zip(
        PAIRS, node("return given.map(([a, b]) => logic.diff(a, b));", PAIRS), strict=True
    ):
        parts = found["parts"]
        assert "".join(text for side, text in parts if side <= 0) == first
        assert "".join(text for side, text in parts if side >= 0) == second
        assert all(one[0] != other[0] for one, other in itertools.pairwise(parts))
        if not found["coarse"]:
            ours, theirs = (re.findall(r"\s+|\w+|[^\s\w]", text) for text in (first, second))
            common = sum(len(re.findall(r"\s+|\w+|[^\s\w]", text)) for side, text in parts if side == 0)
            matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
            # The longest common subsequence is at least what difflib finds.
            assert common >= sum(block.size for block in matcher.get_matching_blocks())
    long = node("return given.map(([a, b]) => logic.diff(a, b).coarse);", PAIRS)
    assert long == [False] * 7 + [True, True]


FORMULAS = {
    r"\frac{1}{2}": ["mfrac", {}, [["mn", {}, ["1"]], ["mn", {}, ["2"]]]],
    r"\frac12": ["mfrac", {}, [["mn", {}, ["1"]], ["mn", {}, ["2"]]]],
    r"x_i^2": ["msubsup", {}, [["mi", {}, ["x"]], ["mi", {}, ["i"]], ["mn", {}, ["2"]]]],
    r"\boxed{52}": ["mrow", {"class": "boxed"}, [["mn", {}, ["52"]]]],
    r"\sqrt[3]{8}": ["mroot", {}, [["mn", {}, ["8"]], ["mn", {}, ["3"]]]],
    r"\mathbb{R}": ["mi", {}, ["ℝ"]],
    r"\text{if } a": ["mrow", {}, [["mtext", {}, ["if "]], ["mi", {}, ["a"]]]],
    r"\sum_{i}^n": ["munderover", {}, [["mo", {}, ["∑"]], ["mi", {}, ["i"]], ["mi", {}, ["n"]]]],
    r"1{,}000": ["mrow", {}, [["mn", {}, ["1"]], ["mo", {}, [","]], ["mn", {}, ["000"]]]],
}
UNKNOWN = [
    r"\unknown{3}", r"\frac", r"\left(", "a}", "{", r"\begin{cases} 1", r"\constructor", r"\toString",
    r"\begin{constructor}\end{constructor}", "x_", "a & b", r"\text{", "{" * 100 + "}" * 100, r"\sqrt[2", r"x_1_2",
]  # fmt: skip


def test_formulas_become_trees_and_unknown_ones_stay_text() -> None:
    given = [*FORMULAS, *UNKNOWN]
    found = node("return given.map((tex) => logic.mathml(tex));", given)
    assert dict(zip(given, found, strict=True)) == {**FORMULAS, **dict.fromkeys(UNKNOWN)}


def test_mathematics_is_told_from_money() -> None:
    texts = {
        "It costs $5 and $6.": [{"text": "It costs $5 and $6."}],
        "so $x+1$.": [{"text": "so "}, {"tex": "x+1", "block": False, "source": "$x+1$"}, {"text": "."}],
        r"\[y\]": [{"tex": "y", "block": True, "source": r"\[y\]"}],
        r"is \boxed{1\frac{1}{2}}": [
            {"text": "is "},
            {"tex": r"\boxed{1\frac{1}{2}}", "block": False, "source": r"\boxed{1\frac{1}{2}}"},
        ],
        r"\boxed{never": [{"text": r"\boxed{never"}],
    }
    found = node("return given.map(logic.segments);", list(texts))
    assert found == list(texts.values())


def test_nothing_of_a_text_is_lost_in_segments() -> None:
    generator = np.random.Generator(np.random.Philox(key=1))
    pieces = ["$", "$$", "\\(", "\\)", "\\[", "\\]", "\\boxed", "{", "}", "x", "1", " ", "\n", "\\", "<b>"]
    texts = ["".join(pieces[n] for n in generator.integers(0, len(pieces), 30)) for _ in range(300)]
    program = "return given.map((t) => logic.segments(t).map((p) => p.text ?? p.source).join(''));"
    assert node(program, texts) == texts


def test_the_address_keeps_what_is_chosen() -> None:
    state = {"view": 2, "text": "a&b=#%é", "verdict": "1", "item": 7, "diff": "0-1"}
    program = "const a = logic.formatState({...logic.EMPTY, ...given}); return [a, logic.parseState(a)];"
    address, found = node(program, state)
    assert {name: found[name] for name in state} == state
    assert address.startswith("#view=2&")
    hostile = node("return logic.parseState(given);", "#__proto__=1&view=abc&item=1e9&toString=2&page=-1")
    assert (hostile["view"], hostile["item"], hostile["page"]) == (0, -1, -1)
    assert "toString" not in hostile


# ---- in a browser


def test_a_browser_searches_filters_folds_and_compares(tab: Page, page: Path) -> None:
    tab.said.clear()
    tab.open(page.as_uri())
    asked = "[...document.querySelectorAll('#list .asked')].map((e) => e.textContent)"
    assert tab.value(asked) == [f"What is $1 \\cdot {n}$?" for n in range(6)]
    # The first item with its stages beside each other, mathematics as mathematics.
    heads = "[...document.querySelectorAll('.pane h3')].map((e) => e.textContent)"
    assert tab.value(heads) == ["base", "SFT", "another"]
    assert tab.value("document.querySelectorAll('.question math mo').length") == 1
    assert tab.value("document.querySelector('.pane .boxed').textContent") == "1"
    # Search by keyboard.
    tab.press("/")
    for key in "p3":
        tab.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        tab.call("Input.dispatchKeyEvent", type="keyUp", key=key)
    tab.wait("document.querySelectorAll('#list li').length === 1 && document.body.dataset.state === 'ready'")
    assert tab.value(asked) == ["What is $1 \\cdot 3$?"]
    tab.press("Escape")
    tab.press("Escape")
    assert len(tab.value(asked)) == 6
    # A filter.
    tab.value("(() => { const s = document.getElementById('choose-change'); s.value = 'gained'; "
              "s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    tab.wait("document.querySelectorAll('#list li').length === 5 && document.body.dataset.state === 'ready'")
    # Thinking is folded until it is asked for.
    opened = "[...document.querySelectorAll('.pane details')].map((e) => e.open)"
    assert tab.value(opened) == [False] * 3
    tab.press("t")
    assert tab.value(opened) == [True] * 3
    # The next item, its second sample, and the difference of two stages.
    tab.press("j")
    assert tab.value("document.querySelector('#list [aria-selected=true]').dataset.item") == "1"
    tab.press("]")
    assert tab.value("document.querySelectorAll('.samples [aria-pressed=true]')[0].textContent") == "2"
    tab.press("d")
    assert tab.value("[document.querySelector('del').textContent, document.querySelector('ins').textContent]") == [
        "2",
        "1",
    ]
    tab.press("3")
    assert tab.value(heads) == ["chosen", "rejected"]
    assert tab.said == []


def test_a_browser_shows_a_hostile_response_as_text(tab: Page, page: Path) -> None:
    tab.said.clear()
    tab.open(f"{page.as_uri()}#text=owned&open=1")
    assert tab.value("document.title") == "runs</title><script>x</script>"
    assert tab.value("document.querySelectorAll('main script, main img, iframe').length") == 0
    thinking, answer = (
        tab.value(f"document.querySelector('.pane {where}').textContent") for where in ("details .text", "> .text")
    )
    # Formulas are no longer their source.
    assert printable(HOSTILE).startswith(thinking)
    assert answer.startswith(
        "--> ]]> <!-- \\x1b[2J\\x1b]0;owned\\x07 \\u202egnp.exe\\u202c \\u2066x\\u2069 \\u200b{{ title }}"
    )
    assert tab.said == []


def test_a_browser_shows_what_prepare_dropped_beside_what_it_is_like(tab: Page, tmp_path: Path) -> None:
    drops = [
        {"source": "a", "place": "line 1", "reason": "incomplete", "question": HOSTILE},
        {"source": "b", "place": "line 2", "reason": "exact duplicate", "question": "How many?", "answer": "3",
         "overlap": 1.0, "kept_source": "a", "match": "How many, then?", "match_answer": "3"},
    ]  # fmt: skip
    (tmp_path / "drops.jsonl").write_text("".join(json.dumps(drop) + "\n" for drop in drops), "utf-8")
    made = write_page(find_views(tmp_path), tmp_path / "page.html", title="drops")
    tab.open(f"{made.as_uri()}#item=1")
    text = tab.value("document.body.innerText")
    assert all(part in text for part in ("exact duplicate", "How many, then?", "kept, of a", "overlap 1"))
    assert "not graded" not in text
    tab.open(f"{made.as_uri()}#item=0")
    assert tab.value("document.title") == "drops"
    assert tab.value("document.querySelectorAll('.pane').length") == 1
    assert tab.value("document.querySelectorAll('#choose-reason option').length") == 3


def test_a_script_that_got_into_the_page_would_not_run(tab: Page, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        page.read_text("utf-8").replace("<main>", "<main><script>document.title='owned'</script>"), "utf-8"
    )
    tab.open(broken.as_uri())
    assert tab.value("document.title") != "owned"
    assert any("Content Security Policy" in said for said in tab.said)
    tab.said.clear()


def test_the_page_fits_every_width(tab: Page, page: Path) -> None:
    for width in (400, 800, 1600):
        tab.resize(width, 900)
        for view in range(4):
            tab.open(f"{page.as_uri()}#view={view}&item=0&diff=0-1&open=1")
            assert tab.value("document.documentElement.scrollWidth") <= width
    tab.resize(1400, 900)


def test_a_hundred_thousand_items_make_a_small_document(tab: Page, tmp_path: Path) -> None:
    view = made_view(MANY)
    large = write_page([view], tmp_path / "large.html", title="large")
    tab.open(large.as_uri())
    elements = "document.querySelectorAll('*').length"
    for address, wanted in (
        ("#", Wanted()),
        ("#verdict=1&pane=2&change=lost", Wanted(verdict="wrong", pane=2, change="lost")),
        (f"#text=said+{7 * 77_777}", Wanted(text=f"said {7 * 77_777}")),
    ):
        tab.open(f"{large.as_uri()}{address}")
        found = select(view, wanted)
        assert tab.value("document.getElementById('status').textContent").startswith(f"{len(found):,} ")
        first = tab.value("[...document.querySelectorAll('#list li')].map((e) => Number(e.dataset.item))")
        assert first == found[:40].tolist()
        # The work of drawing does not grow with the items.
        assert tab.value(elements) < MOST_ELEMENTS
    tab.press("n")


# ---- beside a server


@pytest.fixture(scope="module")
def server(views: list[View]) -> Iterator[ViewServer]:
    with ViewServer(views, title="runs") as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def get(address: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
        return gzip.decompress(answer.read()).decode()


def test_the_server_sends_what_the_page_would_hold(server: ViewServer, views: list[View]) -> None:
    for number, view in enumerate(views):
        assert json.loads(get(f"{server.address}index/{number}")) == index_json(view.index, len(view.index))
    items = json.loads(get(f"{server.address}items/0?n=4,0"))
    assert items == [item_json(item) for item in views[0].fetch([4, 0])]
    assert json.loads(get(f"{server.address}search/0?q=p3")) == [3]


@pytest.mark.parametrize(
    "path",
    [
        "items/9?n=0", "items/0?n=99", "items/0?n=-1", "items/0?n=", "items/0", "items/0?n=1.5", "items/0/1?n=1",
        f"items/0?n={','.join('0' * (MOST_ITEMS + 1))}", "search/0?q=", f"search/0?q={'x' * 1001}", "nothing/0",
        "../etc/passwd", "items/0%00?n=1",
    ],
)  # fmt: skip
def test_the_server_has_nothing_else(server: ViewServer, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{server.address}{path}")
    assert caught.value.code == 404


def status(server: ViewServer, path: str, host: str, method: str = "GET") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers={"Host": host})
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_server_answers_only_who_knows_the_address(server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    ours, secret = server.host, server.secret
    assert status(server, f"/{secret}/", ours) == 200
    assert status(server, f"/{secret}/", f"localhost:{server.server_port}") == 200
    for path in ("/", "", "/wrong/", f"/{secret[:-1]}/", "/wrong/items/0?n=0", f"x/{secret}/"):
        assert status(server, path or "/", ours) == 403
    # A name that leads to this machine is no way in.
    assert status(server, f"/{secret}/", "elsewhere.example") == 403
    assert status(server, f"/{secret}/", ours, "POST") == 501


def test_a_port_that_is_taken_is_said(server: ViewServer, views: Sequence[View]) -> None:
    with pytest.raises(UserError, match=rf"port {server.server_port} cannot be listened to"):
        ViewServer(views, title="x", port=server.server_port)


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    root = runs(tmp_path / "runs")
    program = [sys.executable, "-m", "phimr_nemo.cli", "show", str(root), "--serve"]
    with start(program, ctrl_c=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split(" ")[0]
        try:
            assert json.loads(get(f"{address}search/0?q=p3")) == [3]
        finally:
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")


def test_a_browser_reads_from_the_server(tab: Page, server: ViewServer) -> None:
    tab.said.clear()
    tab.open(f"{server.address}#text=P3")
    assert tab.value("[...document.querySelectorAll('#list .asked')].map((e) => e.textContent)") == [
        "What is $1 \\cdot 3$?"
    ]
    assert tab.value("[...document.querySelectorAll('.pane h3')].map((e) => e.textContent)") == [
        "base",
        "SFT",
        "another",
    ]
    # The browser asks for an icon by itself, and gets none.
    assert [said for said in tab.said if "favicon" not in said] == []
