"""Real vLLM as GRPO's sampler: exact weights after every sync, and a server that is killed in the middle."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from serving import served
from torch import Tensor

from phimr_nemo.config import BaseConfig, ServerEngine, load_config
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams, Unfinished
from phimr_nemo.generate.serving import servers
from phimr_nemo.generate.serving.replies import Wanted
from phimr_nemo.generate.serving.servers import ServerSampler
from phimr_nemo.generate.serving.weights import IDENTITY, LOGPROBS, tokenizer_hash
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory

SYNCS, TEMPERATURE, MAX_LENGTH = 10, 0.8, 64
BOUND = 5e-5
"""Largest difference of a log-probability between vLLM and transformers, both in float32."""
ANSWERS = 5
"""After so many responses the server is killed."""
POLICY = "long_when_max_length_exceeds_original"
# vLLM's attention on CPU wants heads of 32 dimensions or more.
SHAPE = ("hidden_size=128", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    overrides = [f"run.output={out}", *SHAPE, "initializer_range=0.2"]
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), overrides))
    return out / "hf"


def weights_of(model: Path, seed: int) -> dict[str, Tensor]:
    """The base's weights, changed as an optimizer step might; tied, so there is no head."""
    source, generator = HFDirectory(model), torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in ((name, source.read(name)) for name in source.names())
    }


@pytest.fixture(scope="module")
def versions(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights")
    for version in range(SYNCS):
        save_file(weights_of(model, version), directory / f"{version}.safetensors")
    return directory


def after_syncs(
    python: Path, variables: dict[str, str], model: Path, versions: Path, out: Path, *extension: str
) -> list[list[dict[str, Any]]]:
    here = Path(__file__).parent
    command = [str(python), str(here / "vllm_sync_worker.py"), str(model), str(versions), str(out), *extension]
    variables = {**variables, "PYTHONPATH": str(here)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[list[dict[str, Any]]] = json.loads(out.read_text("utf-8"))
    return found


def against_transformers(
    model: Path, versions: list[dict[str, Tensor]], syncs: list[list[dict[str, Any]]]
) -> list[float]:
    """Per sync, the largest difference of a sampled log-probability; infinite where a greedy token differs."""
    from transformers import Phi3ForCausalLM

    reference = Phi3ForCausalLM.from_pretrained(model, torch_dtype=torch.float32, attn_implementation="eager")
    worst = []
    for weights, responses in zip(versions, syncs, strict=True):
        missing = reference.load_state_dict(weights, strict=False)
        assert missing.missing_keys in ([], ["lm_head.weight"])
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


def test_after_each_of_ten_syncs_vllm_has_the_trainers_weights(
    model: Path, versions: Path, tmp_path: Path, vllm_python: Path, vllm_variables: dict[str, str]
) -> None:
    syncs = after_syncs(vllm_python, vllm_variables, model, versions, tmp_path / "out.json")
    assert [[response["version"] for response in sync] for sync in syncs] == [[v] * 4 for v in range(SYNCS)]
    expected = [weights_of(model, version) for version in range(SYNCS)]
    assert max(against_transformers(model, expected, syncs)) < BOUND
    # And one set of weights is told from another.
    assert min(against_transformers(model, expected[1:] + expected[:1], syncs)) > 100 * BOUND


def test_a_tied_head_that_keeps_its_packing_is_seen(
    model: Path, versions: Path, tmp_path: Path, vllm_python: Path, vllm_variables: dict[str, str]
) -> None:
    """The planted twin: what stock vLLM does on a CPU."""
    fault = "vllm_stale_head.Extension"
    syncs = after_syncs(vllm_python, vllm_variables, model, versions, tmp_path / "out.json", fault)
    expected = [weights_of(model, version) for version in range(SYNCS)]
    assert min(against_transformers(model, expected, syncs)) > 100 * BOUND


def test_a_served_model_is_synced_and_killed_in_the_middle(
    model: Path, tmp_path: Path, vllm_python: Path, vllm_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP with a key: greedy responses of two versions, then SIGKILL while responses are under way."""
    monkeypatch.setenv("PHIMR_TEST_KEY", "secret")
    architecture = HFDirectory(model).architecture
    wanted = Wanted(
        HFDirectory(model).weights_hash(),
        tokenizer_hash(model),
        MAX_LENGTH,
        architecture.original_max_position_embeddings,
        POLICY,
        architecture.vocab_size,
        LOGPROBS,
    )
    asked = [Request(f"{number}/0", tuple(range(1, 3 + number)), number) for number in range(12)]
    variables = {**vllm_variables, "PHIMR_TEST_KEY": "secret"}
    options = ["--max-length", str(MAX_LENGTH), "--eager", "--dtype", "fp32", "--max-batch", "4"]
    options += ["--api-key-env", "PHIMR_TEST_KEY"]
    with served(vllm_python, variables, model, tmp_path / "server.log", *options) as (url, group):
        for path in (IDENTITY, "/invocations", "/metrics", "/ping", "/collective_rpc"):
            assert httpx.get(url + path).status_code == httpx.codes.UNAUTHORIZED
        assert httpx.get(url + "/health").status_code == httpx.codes.OK
        # What would let anyone run anything is not there.
        told = {"Authorization": "Bearer secret"}
        answer = httpx.post(url + "/collective_rpc", json={"method": "x"}, headers=told)
        assert answer.status_code == httpx.codes.NOT_FOUND
        config = ServerEngine(
            kind="vllm_server",
            base_urls=(url,),
            api_key_env="PHIMR_TEST_KEY",
            in_flight=4,
            request_seconds=120.0,
            attempts=2,
            probe_seconds=0.2,
            recovery_seconds=1.0,
            bucket_mb=1,
        )
        sampler = ServerSampler(config, wanted, stop_token_ids=[0], run="a", is_leader=True, stale="resample")
        for version in range(2):
            weights = weights_of(model, version)
            sampler.update_weights(weights.items(), version)
            local = LocalSampler(
                architecture,
                weights.items(),
                stop_token_ids=[0],
                max_batch=4,
                longrope_policy="long_when_max_length_exceeds_original",
                max_length=MAX_LENGTH,
            )
            greedy = SamplingParams(0.0, 1.0, 16)
            found, expected = sampler.sample(asked, greedy), local.sample(asked, greedy)
            assert [(c.token_ids, c.finish_reason) for c in found] == [
                (c.token_ids, c.finish_reason) for c in expected
            ]
            assert {completion.version for completion in found} == {version}
        read, answers = servers.read_completion, itertools.count(1)

        def killing(*arguments: Any, **named: Any) -> Completion:
            if next(answers) == ANSWERS:
                os.killpg(group, signal.SIGKILL)
            return read(*arguments, **named)

        monkeypatch.setattr(servers, "read_completion", killing)
        many = [Request(f"{number}/1", (1, 2, 3), number) for number in range(100)]
        with pytest.raises(Unfinished) as caught:
            sampler.sample(many, SamplingParams(1.0, 1.0, 60))
    done = {completion.request_id for completion in caught.value.completed}
    assert len(done) >= ANSWERS
    assert done < {request.id for request in many}
    assert sampler.counts["removed"] == 1
