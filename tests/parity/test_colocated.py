"""Servers on the trainer's own GPUs: never two awake, weights before keys and values, the same training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import httpx
import pytest
import torch
from align_inputs import make_case, make_inputs
from align_worker import Case, run_case
from distributed import RanksFailed, run_distributed
from rollout_server import RolloutServer
from test_align_parity import STEPS, curve, weights_differ_by
from test_rollout_rounds import DP2, SEQUENCE, over, server

from phimr_nemo.align.grpo.loop import RoundsTrainer
from phimr_nemo.align.grpo.rounds import Rounds
from phimr_nemo.align.grpo.samplers import ColocatedTurns
from phimr_nemo.align.offload import HostMemory
from phimr_nemo.config import ServerEngine
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Request, SamplingParams
from phimr_nemo.generate.serving import replies
from phimr_nemo.generate.serving.replies import Wanted, put_to_sleep
from phimr_nemo.generate.serving.servers import ServerSampler
from phimr_nemo.generate.serving.weights import ASLEEP, IDENTITY, LOGPROBS, UNSYNCED, Identity, tokenizer_hash
from phimr_nemo.model.files.hf import HFDirectory

POLICY: Final = "long_when_max_length_exceeds_original"
COLOCATED: Final = "engine.colocated=true"
ROUND: Final = r"(?:weights kv_cache (?:sampled )*sleep )"
PARAMS = SamplingParams(1.0, 1.0, 4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colocated")
    make_inputs(root)
    return root


def colocated(root: Path) -> RolloutServer:
    base = root / "base" / "hf"
    return RolloutServer(base, identity_of(base), colocated=True)


def identity_of(base: Path) -> Identity:
    return Identity(HFDirectory(base).weights_hash(), tokenizer_hash(base), UNSYNCED, SEQUENCE, POLICY, LOGPROBS)


def run_watched(case: Case, url: str, fault: bool) -> None:
    """A run of GRPO that looks at the server whenever a step trains, and at the optimizer's memory."""
    real = RoundsTrainer.run_training

    def watched(self: Any, batches: Any) -> Any:
        assert httpx.get(url + IDENTITY).json()["version"] == ASLEEP, "it is awake while a step trains"
        assert all(buffer.grad_data.untyped_storage().nbytes() for buffer in self.model.model.buffers)
        return real(self, batches)

    sleepless = mock.patch.object(ServerSampler, "sleep", lambda self: setattr(self, "_version", -1))
    with mock.patch.object(RoundsTrainer, "run_training", watched):
        if fault:
            with sleepless:
                run_case(case)
        else:
            run_case(case)


def test_training_is_the_same_as_with_servers_apart(root: Path) -> None:
    """Two processes and the KL penalty's reference; the server was left awake by a run that was killed."""
    with server(root) as apart:
        run_distributed(run_case, 2, make_case(root, "apart", "grpo", DP2, *over(apart)))
    with colocated(root) as shared:
        shared._wake("weights")
        shared._wake("kv_cache")
        case = make_case(root, "colocated", "grpo", DP2, COLOCATED, *over(shared))
        run_distributed(run_watched, 2, case, shared.url, False)
        events = " ".join(shared.events[3:]) + " "
    assert curve(root / "colocated") == curve(root / "apart")
    assert weights_differ_by(root / "colocated", root / "apart") == 0.0
    # Asleep before the trainer takes its memory, then a turn a round.
    assert re.fullmatch(rf"sleep {ROUND}{{{STEPS}}}", events), events
    assert events.count("sampled") == STEPS * 6 * 4


def test_a_server_that_stays_awake_is_seen(root: Path) -> None:
    """The planted twin: nobody sends it to sleep."""
    with colocated(root) as shared:
        case = make_case(root, "sleepless", "grpo", COLOCATED, *over(shared))
        with pytest.raises(RanksFailed, match="it is awake while a step trains"):
            run_distributed(run_watched, 1, case, shared.url, True)


@dataclass
class Shared:
    """Rounds over colocated servers, with a memory to be put away; in one process."""

    servers: list[RolloutServer]
    rounds: Rounds
    held: torch.Tensor

    @property
    def is_the_trainers(self) -> bool:
        """The servers that live sleep, and the memory is back."""
        asleep = all(one.is_dead or one.version == ASLEEP for one in self.servers)
        return asleep and torch.equal(self.held[:3], torch.arange(3.0))


def settings(urls: list[str], **changes: Any) -> ServerEngine:
    values: dict[str, Any] = {
        "kind": "vllm_server",
        "colocated": True,
        "in_flight": 2,
        "request_seconds": 60.0,
        "attempts": 4,
        "probe_seconds": 0.05,
        "recovery_seconds": 0.3,
        "bucket_mb": 1,
        **changes,
    }
    return ServerEngine(base_urls=tuple(urls), **values)


def shared(base: Path, count: int, directory: Path) -> Iterator[Shared]:
    source = HFDirectory(base)
    made = [RolloutServer(base, identity_of(base), colocated=True).__enter__() for _ in range(count)]
    wanted = Wanted(
        *(source.weights_hash(), tokenizer_hash(base), SEQUENCE, None, POLICY),
        *(source.architecture.vocab_size, LOGPROBS),
    )
    config = settings([one.url for one in made])
    sampler = ServerSampler(config, wanted, stop_token_ids=[0], run="run", is_leader=True, stale="resample")
    held = torch.arange(3.0)
    turns = ColocatedTurns(sampler, HostMemory(lambda: [held], list))

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        # Nothing of the trainer's is in the way by now.
        assert held.untyped_storage().nbytes() == 0
        for name in source.names():
            yield name, source.read(name)

    yield Shared(made, Rounds(sampler, weights, directory, turns), held)
    for one in made:
        one.die()


def requests(step: int) -> list[Request]:
    return [Request(f"{slot}/{sample}", (1, 2, 3), 8 * step + sample) for slot in range(2) for sample in range(2)]


def failing_rounds(base: Path, directory: Path) -> list[str]:
    """Rounds that are answered, refused, survived and lost, one after the other: what became of each."""
    said = []
    for one in shared(base, 2, directory):
        first, second = one.servers
        assert one.is_the_trainers
        found = one.rounds.sample(0, requests(0), PARAMS)
        assert (len(found), one.is_the_trainers) == (4, True)
        # Measured between steps: the same weights are sent again, which sleep has cost.
        assert len(one.rounds.ask(0, requests(1), PARAMS)) == 4
        assert one.is_the_trainers
        with pytest.raises(UserError) as refused:
            one.rounds.sample(1, requests(1), SamplingParams(1.0, 0.5, 4))
        said.append(refused.value.problem)
        assert one.is_the_trainers
        # One dies asleep: the other samples all.
        first.die()
        assert len(one.rounds.sample(2, requests(2), PARAMS)) == 4
        assert one.is_the_trainers
        second.die()
        with pytest.raises(UserError) as gone:
            one.rounds.sample(3, requests(3), PARAMS)
        said.append(gone.value.problem)
        assert one.is_the_trainers
        allowed = r"sleep (?:(?:weights kv_cache )(?:sampled )*sleep )+"
        assert all(re.fullmatch(allowed, " ".join(server.events) + " ") for server in one.servers)
    return said


def test_however_a_round_ends_the_gpus_are_the_trainers(root: Path, tmp_path: Path) -> None:
    ((refused, gone),) = run_distributed(failing_rounds, 1, root / "base" / "hf", tmp_path)
    assert refused == "top_p=0.5 with rollout servers"
    assert gone.startswith("no rollout server answers at ")


def test_a_server_that_sleeps_is_not_asked_and_says_so(root: Path) -> None:
    with colocated(root) as one:
        answer = httpx.post(one.url + "/inference/v1/generate", json={"token_ids": [1], "sampling_params": {}})
        assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert httpx.get(one.url + IDENTITY).json()["version"] == ASLEEP


def test_a_server_that_does_not_sleep_ends_the_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(root) as apart, pytest.raises(UserError, match="was not started as one that goes to sleep"):
        put_to_sleep(settings([apart.url]))
    monkeypatch.setattr(replies, "STEP_SECONDS", 0.2)
    with colocated(root) as slow:
        slow.hang.set()
        with pytest.raises(UserError, match=r"did not go to sleep within 0\.2 s"):
            put_to_sleep(settings([slow.url]))
    # One that is not there holds nothing.
    put_to_sleep(settings([slow.url]), patience=0.1)
