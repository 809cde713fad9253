"""Real vLLM as GRPO's sampler: each family's exact weights after every sync, and a server killed in the middle."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import served
from smollm3 import made_like
from torch import Tensor

from phimr_nemo.config import BaseConfig, ServerEngine, load_config
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, Partial, Request, SamplingParams, Unfinished
from phimr_nemo.generate.serving import replies
from phimr_nemo.generate.serving.broadcast.trainer import Broadcaster
from phimr_nemo.generate.serving.replies import Wanted
from phimr_nemo.generate.serving.servers import ServerSampler
from phimr_nemo.generate.serving.weights import ASLEEP, BEGIN, GENERATE, IDENTITY, LOGPROBS, tokenizer_hash
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory

pytestmark = pytest.mark.slow

Syncs = list[list[dict[str, Any]]]
SYNCS, TEMPERATURE, MAX_LENGTH = 10, 0.8, 64
LONG = 600
"""Of sequences that take long enough to be interrupted in the middle."""
BOUND = 5e-5
"""Largest difference of a log-probability between vLLM and transformers, both in float32."""
LONG_BOUND = 4 * BOUND
"""The same behind hundreds of tokens."""
SHORT = 8
"""Tokens of the response whose end interrupts the others."""
INTERRUPTIONS = range(2, SYNCS, 2)
"""Versions of the weights; so often it is tried to interrupt while a response is under way."""
ANSWERS = 5
"""After so many responses the server is killed."""
POLICY = "long_when_max_length_exceeds_original"
# vLLM's attention on CPU wants heads of 32 dimensions or more.
SHAPE = ("hidden_size=128", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=4")


# Layers, biases, norms, rotary scaling and ties of every family but Phi's, which is `model`; all in small.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "smollm2": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": MAX_LENGTH}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
}
"""Name -> the beginning of transformers' classes, and what its config has besides what all have."""
TIED = ("phi3", "smollm2", "qwen2")
CASES = ("phi3", *FAMILIES)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case -> a directory with `hf`, a model, and `weights`, `SYNCS` versions of it."""
    root = tmp_path_factory.mktemp("models")
    overrides = [f"run.output={root / 'phi3'}", *SHAPE, "initializer_range=0.2"]
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), overrides))
    phi = root / "phi3" / "hf"
    arch = HFDirectory(phi).architecture
    shape = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "num_hidden_layers": arch.num_hidden_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * MAX_LENGTH,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), arch.eos_token_id),
    }
    for case, (family, changes) in FAMILIES.items():
        torch.manual_seed(0)
        made_like(family, **{**shape, **changes}).save_pretrained(root / case / "hf")
        for file in phi.glob("*token*"):
            shutil.copy(file, root / case / "hf")
    for case in CASES:
        (root / case / "weights").mkdir()
        for version in range(SYNCS):
            save_file(weights_of(root / case / "hf", version), root / case / "weights" / f"{version}.safetensors")
    return {case: root / case for case in CASES}


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["phi3"] / "hf"


def weights_of(model: Path, seed: int) -> dict[str, Tensor]:
    """A model's weights, changed as an optimizer step might; biases, which begin with 0, are drawn."""
    source, generator = HFDirectory(model), torch.Generator().manual_seed(seed)
    return {
        name: tensor + (0.5 if name.endswith(".bias") else 0.05) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in ((name, source.read(name)) for name in source.names())
    }


@pytest.fixture(scope="module")
def sampled(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    repository: Path,
    vllm_python: Path,
    vllm_variables: dict[str, str],
) -> dict[str, Syncs]:
    """What one process with vLLM sampled, of each case after each sync, and under "case: stale" with the fault."""
    here, out = Path(__file__).parent, tmp_path_factory.mktemp("sampled") / "out.json"
    whole, faulty = ([str(models[case]) for case in cases] for cases in (CASES, TIED))
    command = [str(vllm_python), str(here / "vllm_sync_worker.py"), str(out), *whole, "--stale", *faulty]
    variables = {**vllm_variables, "PYTHONPATH": f"{here}{os.pathsep}{repository}"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    names = [*CASES, *(f"{case}: stale" for case in TIED)]
    return dict(zip(names, json.loads(out.read_text("utf-8")), strict=True))


def against_transformers(model: Path, versions: list[int], syncs: Syncs) -> list[float]:
    """Per sync, the largest difference of a sampled log-probability; infinite where a greedy token differs."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        model / "hf", torch_dtype=torch.float32, attn_implementation="eager"
    )
    worst = []
    for version, responses in zip(versions, syncs, strict=True):
        missing = reference.load_state_dict(load_file(model / "weights" / f"{version}.safetensors"), strict=False)
        assert missing.missing_keys in ([], ["lm_head.weight"])
        assert missing.unexpected_keys == []
        differences = [0.0]
        for response in responses:
            prompt, tokens, greedy = response["prompt"], response["tokens"], response["greedy"]
            scores = logits_after(reference, prompt, tokens).div(TEMPERATURE).log_softmax(-1)
            own = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            differences.append(float((own - torch.tensor(response["logprobs"])).abs().max()))
            if logits_after(reference, prompt, greedy).argmax(-1).tolist() != greedy:
                differences.append(float("inf"))
        worst.append(max(differences))
    return worst


@torch.no_grad()
def logits_after(reference: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """The logits [tokens, vocab] that each token was drawn from."""
    whole = torch.tensor([[*prompt, *tokens]])
    logits: Tensor = reference(whole).logits[0, len(prompt) - 1 : -1].float()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_after_each_of_ten_syncs_vllm_has_the_trainers_weights(
    case: str, models: dict[str, Path], sampled: dict[str, Syncs]
) -> None:
    syncs, versions = sampled[case], list(range(SYNCS))
    assert [[response["version"] for response in sync] for sync in syncs] == [[v] * 4 for v in versions]
    assert max(against_transformers(models[case], versions, syncs)) < BOUND
    # And one set of weights is told from another.
    assert min(against_transformers(models[case], versions[1:] + versions[:1], syncs)) > 100 * BOUND


@pytest.mark.parametrize("case", TIED)
def test_a_tied_head_that_keeps_its_packing_is_seen(
    case: str, models: dict[str, Path], sampled: dict[str, Syncs]
) -> None:
    """The planted twin: what stock vLLM does on a CPU."""
    syncs = sampled[f"{case}: stale"]
    differences = against_transformers(models[case], list(range(len(syncs))), syncs)
    assert min(differences) > 100 * BOUND


def interrupted_and_continued(sampler: ServerSampler, model: Path) -> None:
    """vLLM gives what there is of aborted responses, each token of which is of the weights that it says."""
    asked = [Request(f"{number}/3", (1, 2, 3 + number), number) for number in range(12)]
    short, long = (SamplingParams(1.0, 1.0, tokens) for tokens in (SHORT, LONG - 20))
    params = {request.id: long if number else short for number, request in enumerate(asked)}
    for first in INTERRUPTIONS:
        found: dict[str, Completion] = {}
        interrupted = threading.Event()

        def done(completion: Completion, found: Any = found, interrupted: Any = interrupted) -> None:
            found[completion.request_id] = completion
            interrupted.set()

        sampler.update_weights(weights_of(model, first).items(), first)
        left = sampler.sample_until(interrupted, [(request, params[request.id]) for request in asked], done, 4)
        sampler.update_weights(weights_of(model, first + 1).items(), first + 1)
        assert (
            sampler.sample_until(threading.Event(), [(request, params[request.id]) for request in left], done, 4)
            == []
        )
        begun = {request.id: len(request.begun.token_ids) for request in left if request.begun.token_ids}
        if begun:
            break
    assert begun, "nothing was ever under way when the interruption came"
    assert sampler.counts["removed"] == 0
    for request in asked:
        completion, count = found[request.id], begun.get(request.id, 0)
        if count:
            assert completion.versions == (first,) * count + (first + 1,) * (len(completion.token_ids) - count)
            by_old, by_new = (forced(model, version, request, completion) for version in (first, first + 1))
            assert completion.logprobs == pytest.approx([*by_old[:count], *by_new[count:]], abs=LONG_BOUND)


def forced(model: Path, version: int, request: Request, completion: Completion) -> list[float]:
    """Log-probabilities of a response's tokens by the weights of a version, by transformers."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32, attn_implementation="eager")
    reference.load_state_dict(weights_of(model, version), strict=False)
    tokens = list(completion.token_ids)
    scores = logits_after(reference, list(request.prompt_ids), tokens).log_softmax(-1)
    own: list[float] = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    return own


def engine(url: str, **more: Any) -> ServerEngine:
    """One vLLM server that is asked again soon."""
    return ServerEngine(
        kind="vllm_server",
        base_urls=(url,),
        in_flight=4,
        request_seconds=120.0,
        attempts=2,
        probe_seconds=0.2,
        recovery_seconds=1.0,
        bucket_mb=1,
        **more,
    )


def built_in(architecture: Architecture, weights: Mapping[str, Tensor]) -> LocalSampler:
    """The built-in engine with these weights."""
    return LocalSampler(
        architecture,
        weights.items(),
        stop_token_ids=[0],
        max_batch=4,
        longrope_policy="long_when_max_length_exceeds_original",
        max_length=MAX_LENGTH,
    )


def wanted_of(model: Path, longest: int) -> Wanted:
    """What its servers must serve."""
    source = HFDirectory(model)
    return Wanted(
        source.weights_hash(),
        tokenizer_hash(model),
        longest,
        source.architecture.original_max_position_embeddings,
        POLICY,
        source.architecture.vocab_size,
        LOGPROBS,
    )


def through_a_group(url: str, model: Path, wanted: Wanted, asked: list[Request]) -> None:
    """Two versions by a process group with vLLM's worker, over gloo; neither is the one before."""
    architecture, config = HFDirectory(model).architecture, engine(url, api_key_env="PHIMR_TEST_KEY", transfer="nccl")
    sender = Broadcaster(config, "gloo")
    sampler = ServerSampler(
        config, wanted, stop_token_ids=[0], run="b", is_leader=True, stale="resample", broadcaster=sender
    )
    greedy = SamplingParams(0.0, 1.0, 16)
    for version in range(2, 4):
        weights = weights_of(model, version)
        sampler.update_weights(weights.items(), version)
        assert sender.is_ready, "all of it came through the group"
        found, expected = sampler.sample(asked, greedy), built_in(architecture, weights).sample(asked, greedy)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert [c.token_ids for c in found] != [
            c.token_ids for c in built_in(architecture, weights_of(model, version - 1)).sample(asked, greedy)
        ]
    sampler.close()


def test_a_served_model_is_synced_and_killed_in_the_middle(
    model: Path, tmp_path: Path, vllm_python: Path, vllm_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP with a key: greedy responses of two versions, then SIGKILL while responses are under way."""
    monkeypatch.setenv("PHIMR_TEST_KEY", "secret")
    architecture = HFDirectory(model).architecture
    wanted = wanted_of(model, LONG)
    asked = [Request(f"{number}/0", tuple(range(1, 3 + number)), number) for number in range(12)]
    variables = {**vllm_variables, "PHIMR_TEST_KEY": "secret"}
    options = ["--max-length", str(LONG), "--eager", "--dtype", "fp32", "--max-batch", "4"]
    options += ["--api-key-env", "PHIMR_TEST_KEY"]
    with served(vllm_python, variables, model, tmp_path / "server.log", *options) as (url, group):
        for path in (IDENTITY, "/invocations", "/metrics", "/ping", "/collective_rpc"):
            assert httpx.get(url + path).status_code == httpx.codes.UNAUTHORIZED
        assert httpx.get(url + "/health").status_code == httpx.codes.OK
        # What would let anyone run anything is not there.
        told = {"Authorization": "Bearer secret"}
        answer = httpx.post(url + "/collective_rpc", json={"method": "x"}, headers=told)
        assert answer.status_code == httpx.codes.NOT_FOUND
        through_a_group(url, model, wanted, asked)
        config = engine(url, api_key_env="PHIMR_TEST_KEY")
        sampler = ServerSampler(config, wanted, stop_token_ids=[0], run="a", is_leader=True, stale="resample")
        for version in range(2):
            weights = weights_of(model, version)
            sampler.update_weights(weights.items(), version)
            local = built_in(architecture, weights)
            greedy = SamplingParams(0.0, 1.0, 16)
            found, expected = sampler.sample(asked, greedy), local.sample(asked, greedy)
            assert [(c.token_ids, c.finish_reason) for c in found] == [
                (c.token_ids, c.finish_reason) for c in expected
            ]
            assert {completion.version for completion in found} == {version}
        # Without a token that ends a response the long ones have hundreds, and are under way for as long.
        endless = ServerSampler(config, wanted, stop_token_ids=[], run="a", is_leader=True, stale="resample")
        interrupted_and_continued(endless, model)
        sampler.update_weights(weights.items(), version)
        read, answers = replies.read_reply, itertools.count(1)

        def killing(*arguments: Any, **named: Any) -> Completion | Partial:
            if next(answers) == ANSWERS:
                os.killpg(group, signal.SIGKILL)
            return read(*arguments, **named)

        monkeypatch.setattr(replies, "read_reply", killing)
        many = [Request(f"{number}/1", (1, 2, 3), number) for number in range(100)]
        with pytest.raises(Unfinished) as caught:
            sampler.sample(many, SamplingParams(1.0, 1.0, 60))
    done = {completion.request_id for completion in caught.value.completed}
    assert len(done) >= ANSWERS
    assert done < {request.id for request in many}
    assert sampler.counts["removed"] == 1


def test_a_colocated_server_sleeps_and_wakes_in_vllms_order(
    model: Path, tmp_path: Path, vllm_python: Path, vllm_variables: dict[str, str]
) -> None:
    """vLLM's engine on a CPU: it pauses, sleeps and wakes as on a GPU, and only the memory stays where it is."""
    architecture = HFDirectory(model).architecture
    wanted = wanted_of(model, MAX_LENGTH)
    asked = [Request(f"{number}/0", tuple(range(1, 3 + number)), number) for number in range(3)]
    options = ["--max-length", str(MAX_LENGTH), "--eager", "--dtype", "fp32", "--max-batch", "4", "--colocated"]
    log = tmp_path / "server.log"
    with served(vllm_python, vllm_variables, model, log, *options) as (url, _):
        assert httpx.get(url + IDENTITY).json()["version"] == ASLEEP
        # vLLM's own would let it wait for ever.
        body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}}
        answer = httpx.post(url + GENERATE, json=body)
        assert (answer.status_code, "asleep" in answer.text) == (httpx.codes.SERVICE_UNAVAILABLE, True)
        assert httpx.get(url + "/health").status_code == httpx.codes.OK
        config = engine(url, colocated=True)
        sampler = ServerSampler(config, wanted, stop_token_ids=[0], run="a", is_leader=True, stale="resample")
        for version in range(2):
            weights = weights_of(model, version)
            sampler.update_weights(weights.items(), version)
            local = built_in(architecture, weights)
            greedy = SamplingParams(0.0, 1.0, 8)
            found, expected = sampler.sample(asked, greedy), local.sample(asked, greedy)
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]
            sampler.sleep()
            assert httpx.get(url + IDENTITY).json()["version"] == ASLEEP
        # Told again, and an update that breaks off: nothing of it stays.
        sampler.sleep()
        assert httpx.post(url + BEGIN).status_code == httpx.codes.OK
        assert httpx.post(url + GENERATE, json=body).status_code == httpx.codes.SERVICE_UNAVAILABLE
        sampler.sleep()
        sampler.update_weights(weights.items(), 2)
        assert [c.token_ids for c in sampler.sample(asked, greedy)] == [c.token_ids for c in expected]
        sampler.sleep()
    said = re.findall(r"seconds to (fall asleep|wake up tags \[.*?\])", log.read_text("utf-8", errors="replace"))
    weights_first = ["wake up tags ['weights']", "wake up tags ['kv_cache']", "fall asleep"]
    broken_off = ["wake up tags ['weights']", "fall asleep"]
    assert said == ["fall asleep", *2 * weights_first, *broken_off, *weights_first]
