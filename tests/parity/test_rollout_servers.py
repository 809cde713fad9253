"""A sampler over rollout servers: equal to the built-in one, whatever fails, and never with other weights unseen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from rollout_server import RolloutServer
from torch import Tensor

from phimr_nemo.config import BaseConfig, ServerEngine, Stale, load_config
from phimr_nemo.endpoint.wire import Transient
from phimr_nemo.errors import UserError
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, Partial, Request, SamplingParams, Unfinished
from phimr_nemo.generate.serving.replies import Wanted, check_identity, read_reply
from phimr_nemo.generate.serving.served import Served, api_key
from phimr_nemo.generate.serving.servers import ServerSampler
from phimr_nemo.generate.serving.weights import (
    LOGPROBS,
    UNSYNCED,
    Arrivals,
    Identity,
    WrongWeights,
    buckets,
    tensors_of,
    tokenizer_hash,
)
from phimr_nemo.generate.serving.weightsync import label_number, version_label
from phimr_nemo.model.base import run_base
from phimr_nemo.model.files.hf import HFDirectory

MAX_LENGTH, NEW_TOKENS = 64, 12
POLICY: Final = "long_when_max_length_exceeds_original"
PARAMS = SamplingParams(0.8, 1.0, NEW_TOKENS)
# A response alone and in a batch: float32 matrix products of other shapes.
ROUNDING = 1e-5
SYNCS = 10
RUN = "run"
STOP = (0,)


def small_model(out: Path) -> Path:
    """A base's Hugging Face directory below `out`."""
    shape = (
        "hidden_size=32",
        "num_attention_heads=2",
        "intermediate_size=32",
        "num_hidden_layers=2",
        "initializer_range=0.2",
    )
    run_base(load_config(BaseConfig, Path("conf/base/tiny.yaml"), [f"run.output={out}", *shape]))
    return out / "hf"


def weights_of(model: Path) -> dict[str, Tensor]:
    source = HFDirectory(model)
    return {name: source.read(name) for name in source.names()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(model: Path) -> dict[str, Tensor]:
    return weights_of(model)


def changed(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights as another optimizer step might leave them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


@pytest.fixture(scope="module")
def identity(model: Path) -> Identity:
    return Identity(HFDirectory(model).weights_hash(), tokenizer_hash(model), UNSYNCED, MAX_LENGTH, POLICY, LOGPROBS)


@pytest.fixture(scope="module")
def wanted(model: Path, identity: Identity) -> Wanted:
    architecture = HFDirectory(model).architecture
    original = architecture.original_max_position_embeddings
    return Wanted(
        identity.weights, identity.tokenizer, MAX_LENGTH, original, POLICY, architecture.vocab_size, LOGPROBS
    )


def settings(servers: Sequence[RolloutServer | str], **changes: Any) -> ServerEngine:
    values: dict[str, Any] = {
        "kind": "vllm_server",
        "in_flight": 3,
        "request_seconds": 20.0,
        "attempts": 6,
        "probe_seconds": 0.05,
        "recovery_seconds": 0.3,
        "bucket_mb": 1,
        **changes,
    }
    urls = tuple(server if isinstance(server, str) else server.url for server in servers)
    return ServerEngine(base_urls=urls, **values)


def sampler_of(
    config: ServerEngine,
    wanted: Wanted,
    stale: Stale = "resample",
    leader: bool = True,
    stop: Sequence[int] = STOP,
) -> ServerSampler:
    return ServerSampler(config, wanted, stop_token_ids=stop, run=RUN, is_leader=leader, stale=stale)


def requests(count: int) -> list[Request]:
    return [Request(f"{i}/0", tuple(range(1, 2 + i % 5)), 7 * i) for i in range(count)]


def locally(
    model: Path,
    weights: dict[str, Tensor],
    asked: Sequence[Request],
    params: SamplingParams = PARAMS,
    stop: Sequence[int] = STOP,
) -> list[Completion]:
    """The same responses by the built-in sampler."""
    sampler = LocalSampler(
        HFDirectory(model).architecture,
        weights.items(),
        stop_token_ids=stop,
        max_batch=8,
        longrope_policy=POLICY,
        max_length=MAX_LENGTH,
    )
    return sampler.sample(asked, params)


def difference(found: Sequence[Completion], expected: Sequence[Completion]) -> float:
    """The largest difference of a log-probability; infinite where tokens differ."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.request_id == theirs.request_id
        if ours.token_ids != theirs.token_ids or ours.finish_reason != theirs.finish_reason:
            return float("inf")
        worst = max(worst, *(abs(a - b) for a, b in zip(ours.logprobs, theirs.logprobs, strict=True)))
    return worst


@contextlib.contextmanager
def serving(model: Path, identity: Identity, count: int = 2, **options: Any) -> Iterator[list[RolloutServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(RolloutServer(model, identity, **options)) for _ in range(count)]


def test_after_each_of_ten_syncs_the_servers_have_the_trainers_weights(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    asked = requests(6)
    with serving(model, identity) as servers:
        sampler = sampler_of(settings(servers), wanted)
        for version in range(SYNCS):
            weights = changed(base, version)
            sampler.update_weights(weights.items(), version)
            found = sampler.sample(asked, PARAMS)
            assert {completion.version for completion in found} == {version}
            assert difference(found, locally(model, weights, asked)) < ROUNDING
        # Least loaded first: both have worked, and no response was made twice.
        assert all(server.answered > 0 for server in servers)
        assert sum(server.answered for server in servers) == SYNCS * len(asked)
    assert not any(sampler.counts.values())


def test_a_tensor_that_keeps_its_old_values_is_seen(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    """The planted twin of the test above: a server that says it has the new weights and lacks one tensor of them."""
    asked, weights = requests(6), changed(base, 0)
    with serving(model, identity, 1) as (server,):
        server.lost = "model.layers.1.mlp.down_proj.weight"
        sampler = sampler_of(settings([server]), wanted)
        sampler.update_weights(weights.items(), 0)
        assert difference(sampler.sample(asked, PARAMS), locally(model, weights, asked)) > 100 * ROUNDING


def test_an_incomplete_update_is_refused(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    with serving(model, identity, 1) as (server,):
        sampler = sampler_of(settings([server]), wanted)
        with pytest.raises(UserError, match=r"1 tensors are missing, the first is 'model.norm.weight'"):
            sampler.update_weights([item for item in base.items() if item[0] != "model.norm.weight"], 0)
        with pytest.raises(Unfinished):
            sampler.sample(requests(1), PARAMS)
        sampler.update_weights(base.items(), 0)
        assert len(sampler.sample(requests(1), PARAMS)) == 1


def test_weights_go_through_a_shared_directory(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted, tmp_path: Path
) -> None:
    asked, weights = requests(3), changed(base, 3)
    with serving(model, identity, 2, directory=tmp_path) as servers:
        sampler = sampler_of(settings(servers, directory=tmp_path), wanted)
        sampler.update_weights(weights.items(), 0)
        assert difference(sampler.sample(asked, PARAMS), locally(model, weights, asked)) < ROUNDING
    assert list(tmp_path.iterdir()) == []


def test_a_server_killed_in_the_middle_loses_no_response(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    asked = requests(20)
    with serving(model, identity) as servers:
        sampler = sampler_of(settings(servers), wanted)
        sampler.update_weights(base.items(), 0)
        servers[0].die_after = 2
        assert difference(sampler.sample(asked, PARAMS), locally(model, base, asked)) < ROUNDING
        assert sampler.counts["removed"] >= 1
        assert servers[1].answered == len(asked) - 2
        # The next round does not even ask it, and new weights go to the one that is left.
        sampler.update_weights(base.items(), 1)
        assert {completion.version for completion in sampler.sample(asked, PARAMS)} == {1}


def test_when_all_are_gone_what_there_is_comes_back(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    """And a server that was started anew is asked when it has been sent the weights, not before."""
    asked = requests(8)
    with serving(model, identity, 1) as (server,):
        sampler = sampler_of(settings([server]), wanted)
        sampler.update_weights(base.items(), 4)
        server.die_after = 3
        with pytest.raises(Unfinished) as caught:
            sampler.sample(asked, PARAMS)
        done = caught.value.completed
        assert len(done) == 3
        with RolloutServer(model, identity, port=server.port):
            rest = [request for request in asked if request.id not in {c.request_id for c in done}]
            with pytest.raises(Unfinished):
                sampler.sample(rest, PARAMS)
            sampler.update_weights(base.items(), 4)
            done += sampler.sample(rest, PARAMS)
    by_id = {completion.request_id: completion for completion in done}
    assert difference([by_id[request.id] for request in asked], locally(model, base, asked)) < ROUNDING


def test_a_server_that_hangs_is_left_and_comes_back(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    asked = requests(10)
    with serving(model, identity) as servers:
        sampler = sampler_of(settings(servers, request_seconds=4.0, in_flight=2), wanted)
        sampler.update_weights(base.items(), 0)
        release = servers[0].hang
        original = servers[0]._generate

        def hang_at_first(body: dict[str, Any]) -> dict[str, Any]:
            release.set()
            servers[0]._generate = original
            while release.is_set():
                time.sleep(0.02)
            return original(body)

        servers[0]._generate = hang_at_first
        found = sampler.sample(asked, PARAMS)
        assert difference(found, locally(model, base, asked)) < ROUNDING
        assert sampler.counts["removed"] >= 1
        release.clear()
        before = servers[0].answered
        patient = sampler_of(settings(servers, in_flight=2), wanted, leader=False)
        patient.update_weights(base.items(), 0)
        assert difference(patient.sample(asked, PARAMS), found) < ROUNDING
        assert servers[0].answered > before


@pytest.mark.parametrize("policy", ["resample", "keep"])
def test_a_stale_response_is_counted_and_made_again_or_kept(
    policy: Stale, model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    """One server of two answers once from older weights of this run, as one that missed an update would."""
    asked = requests(8)
    with serving(model, identity) as servers:
        sampler = sampler_of(settings(servers), wanted, policy)
        sampler.update_weights(base.items(), 5)
        labels = iter([version_label(RUN, 4)])
        servers[0].label = lambda label: next(labels, label)
        found = sampler.sample(asked, PARAMS)
        assert sampler.counts["stale"] == 1
        versions = sorted(completion.version or -1 for completion in found)
        assert versions == ([5] * 8 if policy == "resample" else [4] + [5] * 7)


def test_responses_of_another_run_are_never_kept(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    with serving(model, identity, 1) as (server,):
        sampler = sampler_of(settings([server]), wanted, "keep")
        sampler.update_weights(base.items(), 5)
        server.version = version_label("other", 5)
        with pytest.raises(Unfinished):
            sampler.sample(requests(1), PARAMS)
    assert label_number(RUN, version_label(RUN, 5)) == 5
    assert [label_number(RUN, label) for label in ("run2-5", "run-x", "run", UNSYNCED)] == [None] * 4


def test_only_the_leader_sends_weights(
    model: Path, base: dict[str, Tensor], identity: Identity, wanted: Wanted
) -> None:
    with serving(model, identity, 1) as (server,):
        leader, follower = (sampler_of(settings([server]), wanted, leader=is_leader) for is_leader in (True, False))
        consumed = iter(base.items())
        follower.update_weights(consumed, 2)
        assert next(consumed, None) is None
        assert (server.version, follower.version) == (UNSYNCED, 2)
        leader.update_weights(base.items(), 2)
        assert difference(follower.sample(requests(2), PARAMS), leader.sample(requests(2), PARAMS)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "other"}, "was started with the weights other"),
        ({"tokenizer": "other"}, "has the tokenizer other"),
        ({"max_length": MAX_LENGTH - 1}, "takes sequences of 63 tokens"),
        ({"max_length": 4096}, "different sides of LongRoPE's original length 1024"),
        ({"longrope": "always_short"}, "has longrope=always_short"),
        ({"logprobs": "raw_logprobs"}, "returns raw_logprobs"),
    ],
)
def test_a_server_with_something_else_is_refused(
    change: dict[str, Any], message: str, model: Path, identity: Identity, wanted: Wanted
) -> None:
    check_identity("u", identity, wanted)
    with pytest.raises(UserError, match=message):
        check_identity("u", replace(identity, **change), wanted)


def test_the_refusal_comes_before_anything_is_sampled(model: Path, identity: Identity, wanted: Wanted) -> None:
    with (
        serving(model, replace(identity, weights="other"), 1) as (server,),
        pytest.raises(UserError, match="was started with the weights other"),
    ):
        sampler_of(settings([server]), wanted)
    with pytest.raises(UserError, match="no rollout server answers"):
        sampler_of(settings([server]), wanted)


def test_a_key_is_wanted_beyond_loopback_and_checked(
    model: Path, identity: Identity, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(model, 64, "fp32", "0.0.0.0", 1, None, 1, 1, 0.5, POLICY, None, True, None)
    with pytest.raises(UserError, match="without a key"):
        api_key(served)
    with pytest.raises(UserError, match="PHIMR_TEST_KEY is not set"):
        api_key(replace(served, api_key_env="PHIMR_TEST_KEY"))
    monkeypatch.setenv("PHIMR_TEST_KEY", "right")
    assert api_key(replace(served, api_key_env="PHIMR_TEST_KEY")) == "right"
    assert api_key(replace(served, host="127.0.0.1")) is None
    with serving(model, identity, 1, key="right") as (server,):
        sampler_of(settings([server], api_key_env="PHIMR_TEST_KEY"), wanted)
        monkeypatch.setenv("PHIMR_TEST_KEY", "wrong")
        with pytest.raises(UserError, match="refuses the key"):
            sampler_of(settings([server], api_key_env="PHIMR_TEST_KEY"), wanted)


def test_a_nucleus_is_refused(model: Path, identity: Identity, wanted: Wanted) -> None:
    with serving(model, identity, 1) as (server,), pytest.raises(UserError, match=r"top_p=0\.9"):
        sampler_of(settings([server]), wanted).sample(requests(1), SamplingParams(1.0, 0.9, 4))


def reply(**changes: Any) -> dict[str, Any]:
    choice = {
        "token_ids": [3, 4],
        "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.5}]},
        "finish_reason": "stop",
        "weight_versions": [span(f"{RUN}-7", 0, 2)],
    }
    return {"choices": [{**choice, **changes}]}


def span(version: str, start: int, end: int) -> dict[str, Any]:
    return {"version": version, "start": start, "end": end}


def test_a_reply_is_read() -> None:
    assert read_reply("r", reply(), run=RUN, vocab_size=8) == Completion("r", (3, 4), (-0.5, -1.5), "stop", (7, 7))
    mixed = reply(weight_versions=[span(f"{RUN}-8", 0, 1), span(f"{RUN}-7", 1, 2)])
    found = read_reply("r", mixed, run=RUN, vocab_size=8)
    assert isinstance(found, Completion)
    assert (found.versions, found.version) == ((8, 7), 7)
    foreign = reply(weight_versions=[span(f"{RUN}-7", 0, 1), span("x-8", 1, 2)])
    assert read_reply("r", foreign, run=RUN, vocab_size=8) == replace(found, versions=())


def test_what_there_is_of_an_aborted_response_is_read() -> None:
    aborted = reply(finish_reason="abort")
    assert read_reply("r", aborted, run=RUN, vocab_size=8) == Partial((3, 4), (-0.5, -1.5), (7, 7))
    nothing = reply(finish_reason="abort", token_ids=[], logprobs={"content": []}, weight_versions=[])
    assert read_reply("r", nothing, run=RUN, vocab_size=8) == Partial()
    foreign = reply(finish_reason="abort", weight_versions=[span("x-8", 0, 2)])
    assert read_reply("r", foreign, run=RUN, vocab_size=8) == Partial()


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"choices": []},
        {"choices": [None]},
        reply(token_ids=None),
        reply(token_ids=[3, 8]),
        reply(token_ids=[3, True]),
        reply(token_ids=[3]),
        reply(token_ids=[], logprobs={"content": []}),
        reply(logprobs=None),
        reply(logprobs={"content": [{"logprob": float("nan")}, {"logprob": -1.0}]}),
        reply(logprobs={"content": [{"logprob": 0.5}, {"logprob": -1.0}]}),
        reply(finish_reason="cancelled"),
        reply(weight_versions=[span(f"{RUN}-7", 0, 1)]),
        reply(weight_versions=[span(f"{RUN}-7", 0, 1), span(f"{RUN}-8", 0, 2)]),
        reply(weight_versions=None),
    ],
)
def test_garbage_is_asked_for_again(value: dict[str, Any]) -> None:
    with pytest.raises(Transient):
        read_reply("r", value, run=RUN, vocab_size=8)


def test_buckets_hold_what_fits() -> None:
    sizes = [4, 4, 100, 4, 8, 4]
    tensors = [(str(i), torch.full((size,), float(i))) for i, size in enumerate(sizes)]
    found = list(buckets(iter(tensors), max_bytes=4 * 12))
    assert [list(bucket) for bucket in found] == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    joined = {name: tensor for bucket in found for name, tensor in bucket.items()}
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors)


def test_what_arrives_is_checked(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    arrivals = Arrivals({"a": (2, 3), "b": (4,)})
    file = tmp_path / "bucket.safetensors"
    save_file({"a": torch.zeros(2, 3)}, file)
    assert tensors_of(file) == {"a": (2, 3)}
    arrivals.add(tensors_of(file))
    for wrong, message in (({"a": (2, 3)}, "twice"), ({"b": (5,)}, "shape"), ({"c": (1,)}, "no tensor 'c'")):
        with pytest.raises(WrongWeights, match=message):
            arrivals.add(wrong)
    with pytest.raises(WrongWeights, match="1 tensors are missing, the first is 'b'"):
        arrivals.check_complete()
    arrivals.add({"b": (4,)})
    arrivals.check_complete()
    arrivals.restart()
    with pytest.raises(WrongWeights, match="2 tensors are missing"):
        arrivals.check_complete()
    for garbage in (
        b"",
        b"\x05\0\0\0\0\0\0\0nonse",
        b"\xff" * 8,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x07\0\0\0\0\0\0\0" + b'{"a":1}',
    ):
        file.write_bytes(garbage)
        with pytest.raises(WrongWeights):
            tensors_of(file)
