"""What the openai client gets from `phimr serve`, call by call."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import served

from phimr_nemo.config import BaseConfig, load_config
from phimr_nemo.data.chat import load_tokenizer, stop_token_ids
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory

pytestmark = pytest.mark.slow

NAME = "team/my-model"
FEWEST = 38
PARALLEL = 100
SECONDS = 600
CALLS = Path(__file__).with_name("openai_calls.py")
# vLLM's attention on CPU wants heads of 32 dimensions or more.
SHAPE = ("hidden_size=128", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=4")
REFUSED = {
    "another model": (404, "does not exist"),
    "a model's card that is not there": (404, "does not exist"),
    "temperature -1": (400, "temperature"),
    "none at once": (400, "n must be at least 1"),
    "no messages": (400, "message"),
    "an image": (400, "multimodal"),
    "tools": (400, "tool"),
    "a tool is required": (400, "tool"),
    "json schema that is none": (400, "nonsense"),
    "a broken expression": (400, "regex"),
    "a prompt that is too long": (400, "maximum context length"),
    "max_tokens beyond the length": (400, "max_tokens"),
    "fifty log-probabilities": (400, "logprobs"),
    "a token beyond the vocabulary": (400, "vocabulary"),
    "a token below 0": (400, "greater than or equal to 0"),
    "embeddings": (404, ""),
    "a bias that is no number": (400, "logit_bias.5 = NaN"),
    "a bias as a text": (400, "logit_bias"),
    "a temperature as a text": (400, "temperature"),
    "a role that is none": (400, "robot"),
    "a role that is none, to be counted": (400, "robot"),
    "no content": (400, "without content"),
    "a schema that is itself": (400, "leads back to itself"),
    "a schema that is a part of itself": (400, "no text that the model could write"),
    "a schema elsewhere": (400, "http://x/y"),
    "an empty grammar": (400, "empty"),
    "an empty rule": (400, "no text that the model could write"),
    "a rule without an end": (400, "no text that the model could write"),
}
ENDED = ["stop", "", 1, NAME]
GIVEN: dict[str, Any] = {
    "one model's card": NAME,
    "stops at the end of turn": ENDED,
    "stops at the end of text": ENDED,
    "no max_tokens": ENDED,
    "temperature 0 twice": True,
    "a seed twice": True,
    "three at once": 3,
    "five log-probabilities": 5,
    "completion": 4,
    "completion of tokens": 3,
    "completions": 3,
    "echo with log-probabilities": [True, False, False, False],
    "responses": 5,
    "cancelled streams": 0,
    "many at once": [8] * PARALLEL,
}
TALKS = ("chat", "parts of text", "a tool's answer", "a special token in the text")
FREE = (
    "json object",
    "a stop text",
    "a stream with usage",
    "json schema",
    "a choice",
    "a regular expression",
    "models",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    overrides = [f"run.output={out}", *SHAPE, "initializer_range=0.2"]
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), overrides))
    return out / "hf"


@pytest.fixture(scope="module")
def answers(
    model: Path, vllm_python: Path, vllm_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, Any]]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    ends = [str(token) for token in stop_token_ids(load_tokenizer(model))]
    options = ("--max-length", "1024", "--dtype", "fp32", "--eager", "--name", NAME)
    with served(vllm_python, vllm_variables, model, log, *options) as (url, _):
        command = [str(vllm_python), str(CALLS), url, NAME, *ends]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
    found: dict[str, tuple[int, Any]] = json.loads(line.removeprefix("ANSWER "))
    return found


def test_every_call_is_answered_or_refused_with_a_reason(answers: dict[str, tuple[int, Any]]) -> None:
    assert len(answers) >= FEWEST
    assert answers.keys() == {*REFUSED, *GIVEN, *TALKS, *FREE}
    for name, (status, reason) in REFUSED.items():
        assert answers[name][0] == status, (name, answers[name])
        assert reason in answers[name][1], (name, answers[name])
    accepted = {name: value for name, (status, value) in answers.items() if status == 200}
    assert accepted.keys() == answers.keys() - REFUSED.keys(), answers
    assert {name: accepted[name] for name in GIVEN} == GIVEN
    for name in TALKS:
        reason, _, tokens, shown = accepted[name]
        assert (reason, shown) == ("length", NAME) if tokens == 5 else reason == "stop", name


def test_the_users_name_and_the_digest_are_names_of_the_model(
    answers: dict[str, tuple[int, Any]], model: Path
) -> None:
    assert answers["models"][1] == [NAME, HFDirectory(model).weights_hash()]


def test_structured_output_keeps_to_its_form(answers: dict[str, tuple[int, Any]]) -> None:
    assert answers["a choice"][1][1] in ("yes", "no")
    assert answers["a regular expression"][1][1].isdigit()
    reason, text, *_ = answers["json schema"][1]
    assert text.lstrip().startswith("{")
    if reason == "stop":
        assert isinstance(json.loads(text)["a"], int)
