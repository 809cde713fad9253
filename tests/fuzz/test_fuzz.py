"""The short form of fuzzing: every kept input, and mutations of them that hypothesis chooses and shrinks.

The long form, guided by coverage, is `make fuzz`.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, Target, mutate, read_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phimr_nemo.config import CurateConfig, load_config
from phimr_nemo.data.chat import render_conversation
from phimr_nemo.data.sources.problems import read_problems
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture

EXAMPLES = 100
made: dict[str, Target] = {}


@pytest.fixture(autouse=True, scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The targets' temporary files go where pytest clears them away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("fuzz")))
        yield


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    name = request.param
    return made.setdefault(name, TARGETS[name]()) if name not in made else made[name]


each = pytest.mark.parametrize("target", sorted(TARGETS), indirect=True)


@each
def test_the_kept_inputs(target: Target, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["target"]
    inputs = read_corpus(name)
    assert len(inputs) >= 5
    for data in inputs:
        target(data)


@each
def test_inputs_near_the_kept_ones(target: Target, request: pytest.FixtureRequest) -> None:
    inputs = read_corpus(request.node.callspec.params["target"])
    indices = st.integers(0, len(inputs) - 1)

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(indices, indices, st.integers(0, 1 << 32))
    def run(first: int, second: int, seed: int) -> None:
        target(mutate(inputs[first], inputs[second], random.Random(seed)))

    run()


def planted(find: Callable[[bytes], bool]) -> Target:
    def target(data: bytes) -> None:
        assert not find(data)

    return target


# What fuzzing found, once each: before, these ended in a traceback.


def test_a_config_that_contains_itself(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("&a [*a]")
    with pytest.raises(UserError, match="anchors that make more than") as caught:
        load_config(CurateConfig, tmp_path / "x.yaml")
    assert len(caught.value.problem) < 1000


@pytest.mark.parametrize("size", ["1e400", '"x"', "[1]", "{}"])
def test_an_architecture_of_no_size(size: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "phi3", "vocab_size": {size}}}')
    with pytest.raises(UserError):
        Architecture.from_directory(tmp_path)


def test_half_a_surrogate_pair_in_a_problem(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "a\\ud800b", "answer": "\\udfff1", "note": "\\ud800"}')
    (row,) = read_problems(tmp_path / "x.jsonl").to_pylist()
    assert (row["question"], row["answer"], json.loads(row["metadata"])) == ("a?b", "?1", {"note": "?"})


def test_half_a_surrogate_pair_in_a_conversation() -> None:
    tokenizer = build_tokenizer(synthetic_corpus(), system_prompt="Be brief.")
    for question, response in (("\ud800", "2"), ("1+1?", "2\udfff")):
        with pytest.raises(UserError, match="surrogate"):
            render_conversation(tokenizer, question, response)
    ids, mask = render_conversation(tokenizer, "1+1?", "2")
    assert sum(mask) > 0
    assert len(ids) == len(mask)


def test_a_planted_fault_is_found() -> None:
    """A reader that falls over one cut number, as the mutations make them."""
    inputs = read_corpus("config")
    target = planted(lambda data: b"1e999" in data)
    draw = random.Random(0)
    mutants = [mutate(draw.choice(inputs), draw.choice(inputs), draw) for _ in range(EXAMPLES * 10)]
    found = [data for data in mutants if b"1e999" in data]
    assert 0 < len(found) < len(mutants)
    with pytest.raises(AssertionError):
        target(found[0])
