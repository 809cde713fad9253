"""One opener for everything that samples: precision, lengths, names, counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phimr_nemo.config import BaseConfig, EndpointConfig, EndpointEngine, GenerateConfig, LocalEngine, load_config
from phimr_nemo.data.chat import load_tokenizer, render_prompts, stop_token_ids
from phimr_nemo.generate.engines import SampledModel, TextEngine, open_engine
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Request, SamplingParams
from phimr_nemo.generate.serving.servers import COUNTED
from phimr_nemo.generate.stage import run_generate
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.shards import read_table

PARAMS = SamplingParams(1.0, 1.0, 12)
QUESTIONS = ("What is 1+1?", "What is 12345 + 1?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "base"
    shape = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=4")
    run_base(
        load_config(BaseConfig, Path("conf/base/tiny.yaml"), [f"run.output={out}", "initializer_range=0.2", *shape])
    )
    return out / "hf"


def requests(model: Path) -> list[Request]:
    prompts = render_prompts(load_tokenizer(model), list(QUESTIONS))
    return [Request(str(i), tuple(ids), i) for i, ids in enumerate(prompts)]


def tensors(model: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    source = HFDirectory(model)
    return ((name, source.read(name).to(dtype)) for name in source.names())


def by_hand(model: Path, dtype: torch.dtype) -> LocalSampler:
    longest = max(len(request.prompt_ids) for request in requests(model))
    return LocalSampler(
        HFDirectory(model).architecture,
        tensors(model, torch.float32),
        stop_token_ids=stop_token_ids(load_tokenizer(model)),
        max_batch=256,
        longrope_policy="long_when_max_length_exceeds_original",
        max_length=longest + PARAMS.max_new_tokens,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", None])
def test_the_engine_computes_in_the_precision_that_it_is_told(dtype: Any, model: Path) -> None:
    """None is what the weights are in, fp32 here."""
    source = SampledModel(directory=model, turns=QUESTIONS)
    opened = open_engine(LocalEngine(dtype=dtype), source, PARAMS)
    expected = by_hand(model, torch.bfloat16 if dtype == "bf16" else torch.float32)
    assert opened.sampler.sample(requests(model), PARAMS) == expected.sample(requests(model), PARAMS)
    other = by_hand(model, torch.float32 if dtype == "bf16" else torch.bfloat16)
    assert opened.sampler.sample(requests(model), PARAMS) != other.sample(requests(model), PARAMS)


def test_a_trainers_weights_take_the_place_of_the_directorys(model: Path) -> None:
    doubled = [(name, 2 * tensor if "mlp" in name else tensor) for name, tensor in tensors(model, torch.float32)]
    source = SampledModel(directory=model, turns=QUESTIONS, weights=doubled, dtype="fp32")
    opened = open_engine(LocalEngine(), source, PARAMS)
    expected = by_hand(model, torch.float32)
    assert opened.sampler.sample(requests(model), PARAMS) != expected.sample(requests(model), PARAMS)
    expected.update_weights(doubled, 1)
    found, wanted = (sampler.sample(requests(model), PARAMS) for sampler in (opened.sampler, expected))
    assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
    assert [c.logprobs for c in found] == [c.logprobs for c in wanted]


def test_an_engine_is_named_by_what_it_samples(model: Path) -> None:
    source = SampledModel(directory=model, turns=QUESTIONS)
    assert open_engine(LocalEngine(), source, PARAMS).name == HFDirectory(model).weights_hash()
    endpoint = EndpointConfig(
        base_urls=("http://h/v1",),
        model="a-model",
        concurrency=1,
        idle_seconds=1.0,
        total_seconds=1.0,
        attempts=1,
        backoff_seconds=1.0,
    )
    asked = open_engine(EndpointEngine(kind="endpoint", endpoint=endpoint), None, PARAMS)
    assert isinstance(asked, TextEngine)
    assert asked.name == "a-model"


def test_what_a_sampler_counts_is_a_part_of_its_protocol(model: Path) -> None:
    assert by_hand(model, torch.float32).counts == {}
    assert COUNTED == ("retries", "stale", "removed", "returned")


def rollouts(model: Path, out: Path, *changes: str) -> list[dict[str, Any]]:
    fixed = (f"run.output={out}", f"teacher.path={model}", "problems.count=4", "rollouts_per_problem=2")
    preset = Path("conf/generate/tiny-rollouts.yaml")
    run_generate(load_config(GenerateConfig, preset, [*fixed, "teacher.max_new_tokens=12", *changes]))
    return read_table(out, "rollouts").to_pylist()


def test_precision_changes_responses_and_neither_ids_nor_seeds(model: Path, tmp_path: Path) -> None:
    rows = {dtype: rollouts(model, tmp_path / dtype, f"teacher.engine.dtype={dtype}") for dtype in ("fp32", "bf16")}
    for name in ("id", "seed", "teacher", "question"):
        assert [row[name] for row in rows["fp32"]] == [row[name] for row in rows["bf16"]]
    assert rows["fp32"] != rows["bf16"]
    assert rows["fp32"] == rollouts(model, tmp_path / "own", "teacher.engine.dtype=null")


def test_the_prompt_is_asked_and_belongs_to_the_settings(model: Path, tmp_path: Path) -> None:
    plain = rollouts(model, tmp_path / "plain")
    asked = rollouts(model, tmp_path / "asked", 'teacher.prompt="Think. {question}"')
    assert [row["id"] for row in plain] == [row["id"] for row in asked]
    assert [row["response"] for row in plain] != [row["response"] for row in asked]
