"""TensorRT-LLM as GRPO's sampler: our server, and a stand-in for trtllm-serve behind it (trtllm_standin.py)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trtllm_standin
from align_inputs import make_case, make_inputs
from align_worker import run_case
from distributed import run_distributed
from processes import start
from safetensors.torch import save
from test_align_parity import CURVE_TOLERANCE, STEPS
from test_rollout_rounds import ON_POLICY, SEQUENCE
from test_rollout_rounds import difference as rounds_difference
from test_rollout_servers import (
    MAX_LENGTH,
    NEW_TOKENS,
    POLICY,
    ROUNDING,
    RUN,
    changed,
    difference,
    locally,
    requests,
    sampler_of,
    settings,
    small_model,
    weights_of,
)
from torch import Tensor

from phimr_nemo.config import GRPOConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Partial, Request, SamplingParams
from phimr_nemo.generate.serving import replies
from phimr_nemo.generate.serving.replies import Wanted, check_identity
from phimr_nemo.generate.serving.servers import ServerSampler
from phimr_nemo.generate.serving.trtllm_engine import free_port
from phimr_nemo.generate.serving.trtllm_server import RESTARTS, new_root
from phimr_nemo.generate.serving.weights import (
    BEGIN,
    BUCKET,
    FINISH,
    GENERATE,
    IDENTITY,
    INCOMPLETE,
    LOGPROBS,
    RAW_LOGPROBS,
    UNSYNCED,
    Identity,
    tokenizer_hash,
)
from phimr_nemo.generate.serving.weightsync import label_number, version_label
from phimr_nemo.model.files.hf import HFDirectory

REFITS = 4
PARAMS = SamplingParams(1.0, 1.0, NEW_TOKENS)
# Many: half of the responses end with one.
STOP = tuple(range(0, 512, 16))
KEY = "secret"
CONF = Path("conf/grpo")
START_SECONDS, STOP_SECONDS = 240.0, 60.0
END_SECONDS = 60.0
"""Within it a killed process is gone, on a busy machine too; a helper of the stand-in lives ten times as long."""
CONFLICT, UNPROCESSABLE, UNAUTHORIZED, UNAVAILABLE = 409, 422, 401, 503


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(model: Path) -> dict[str, Tensor]:
    return weights_of(model)


@pytest.fixture(scope="module")
def wanted(model: Path) -> Wanted:
    source = HFDirectory(model)
    return Wanted(
        source.weights_hash(),
        tokenizer_hash(model),
        MAX_LENGTH,
        source.architecture.original_max_position_embeddings,
        POLICY,
        source.architecture.vocab_size,
        RAW_LOGPROBS,
    )


@dataclass(frozen=True)
class Front:
    """A running `phimr serve --engine trtllm`.

    Attributes:
        url: its address.
        process: itself.
        root: a directory with what it may touch: bin/, pids/, buckets/, refits/, and the file `fault`.
    """

    url: str
    process: subprocess.Popen[bytes]
    root: Path

    def ask(self, method: str, path: str, key: str = KEY, **content: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, self.url + path, headers=headers, timeout=START_SECONDS, **content)

    def version(self) -> str:
        return str(self.ask("GET", IDENTITY).json()["version"])

    def engine(self) -> int:
        """The process id of the stand-in that is running."""
        (pid,) = (pid for pid in self.living() if is_standin(pid))
        return pid

    def living(self) -> list[int]:
        """Stand-ins, and helpers of theirs, that are there."""
        return [int(file.name) for file in (self.root / "pids").iterdir() if is_alive(int(file.name))]

    def refits(self) -> list[Path]:
        return list((self.root / "refits").iterdir())


def is_alive(pid: int) -> bool:
    """A process that has ended and that nobody has asked about yet counts as gone."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return False


def is_standin(pid: int) -> bool:
    return "trtllm_standin" in Path(f"/proc/{pid}/cmdline").read_text("utf-8")


def wait_until(condition: Any, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def prepare(root: Path) -> dict[str, str]:
    """Directories and the environment of a front."""
    for name in ("bin", "pids", "buckets", "refits"):
        (root / name).mkdir()
    program = root / "bin" / "trtllm-serve"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{trtllm_standin.__file__}" "$@"\n', "utf-8")
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PHIMR_TEST_KEY": KEY,
        trtllm_standin.PIDS: str(root / "pids"),
        trtllm_standin.FAULT: str(root / "fault"),
    }


def serve_command(model: Path, root: Path, port: int, max_length: int) -> list[str]:
    return [
        *(sys.executable, "-m", "phimr_nemo.cli", "serve", str(model), "--engine", "trtllm", "--dtype", "fp32"),
        *("--max-length", str(max_length), "--max-batch", "8", "--port", str(port)),
        *("--api-key-env", "PHIMR_TEST_KEY", "--weights-directory", str(root / "buckets")),
        *("--refit-directory", str(root / "refits")),
    ]


@contextlib.contextmanager
def serving(model: Path, root: Path, max_length: int = MAX_LENGTH) -> Iterator[Front]:
    variables, port = prepare(root), free_port()
    with (root / "log").open("wb") as log:
        command = serve_command(model, root, port, max_length)
        process = start(command, env=variables, stdout=log, stderr=log)
    front = Front(f"http://127.0.0.1:{port}", process, root)

    def answers() -> bool:
        assert process.poll() is None, (root / "log").read_text("utf-8", "replace")[-4000:]
        with contextlib.suppress(httpx.TransportError):
            return front.ask("GET", IDENTITY).status_code == httpx.codes.OK
        return False

    try:
        wait_until(answers)
        yield front
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.wait()
        for pid in front.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def front(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with serving(model, tmp_path_factory.mktemp("front")) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMR_TEST_KEY", KEY)


def sampler(front: Front, wanted: Wanted, **changes: Any) -> ServerSampler:
    kept = {"request_seconds": START_SECONDS, "recovery_seconds": START_SECONDS, "api_key_env": "PHIMR_TEST_KEY"}
    return sampler_of(settings([front.url], kind="trtllm_server", **{**kept, **changes}), wanted, stop=STOP)


def ours(model: Path, weights: dict[str, Tensor], asked: Sequence[Request]) -> list[Completion]:
    """The built-in sampler's responses."""
    return locally(model, weights, asked, PARAMS, STOP)


def test_before_the_first_weights_it_says_what_it_serves(front: Front, model: Path, wanted: Wanted) -> None:
    identity = Identity.parse(front.ask("GET", IDENTITY).json())
    assert identity == Identity(wanted.weights, wanted.tokenizer, UNSYNCED, MAX_LENGTH, POLICY, RAW_LOGPROBS)
    # Nothing to sample with: no engine was started.
    assert front.ask("POST", GENERATE, json=body()).status_code == UNAVAILABLE
    assert front.living() == []


def test_after_each_sync_trtllm_has_the_trainers_weights(
    front: Front, model: Path, base: dict[str, Tensor], wanted: Wanted
) -> None:
    """Over HTTP and through files in turn; each time a new process on a new directory, nothing left of the old."""
    asked = requests(12)
    ways = (sampler(front, wanted), sampler(front, wanted, directory=front.root / "buckets"))
    seen = []
    for version in range(REFITS):
        weights, way = changed(base, version), ways[version % len(ways)]
        way.update_weights(weights.items(), version)
        found = way.sample(asked, PARAMS)
        assert {completion.version for completion in found} == {version}
        assert difference(found, ours(model, weights, asked)) < ROUNDING
        # And one set of weights is told from another.
        assert difference(found, ours(model, changed(base, version + 1), asked)) > 100 * ROUNDING
        seen.append(front.engine())
        (directory,) = (path for root in front.refits() for path in root.iterdir() if path.is_dir())
        assert HFDirectory(directory).names() == HFDirectory(model).names()
    assert {completion.finish_reason for completion in found} == {"stop", "length"}
    assert len(set(seen)) == REFITS
    wait_until(lambda: not set(seen[:-1]) & set(front.living()), END_SECONDS)
    assert list((front.root / "buckets").iterdir()) == []


def test_an_engine_that_keeps_the_old_weights_is_seen(
    front: Front, model: Path, base: dict[str, Tensor], wanted: Wanted
) -> None:
    """The planted twin: whatever directory it is started on, it serves the base."""
    (front.root / "fault").write_text(str(model), "utf-8")
    asked, weights = requests(12), changed(base, 1)
    client = sampler(front, wanted)
    client.update_weights(weights.items(), 1)
    (front.root / "fault").unlink()
    found = client.sample(asked, PARAMS)
    assert difference(found, ours(model, weights, asked)) > 100 * ROUNDING
    assert difference(found, ours(model, base, asked)) < ROUNDING


def test_an_engine_that_is_killed_in_a_round_comes_back_and_the_round_is_whole(
    front: Front, model: Path, base: dict[str, Tensor], wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, asked = changed(base, 2), requests(30)
    client = sampler(front, wanted)
    client.update_weights(weights.items(), 2)
    killed, read = front.engine(), replies.read_reply
    answers: list[int] = []

    def killing(*arguments: Any, **named: Any) -> Completion | Partial:
        answers.append(1)
        if len(answers) == 5:
            os.kill(killed, signal.SIGKILL)
            # Nothing says meanwhile that all is well.
            assert front.ask("GET", IDENTITY).status_code == UNAVAILABLE
        return read(*arguments, **named)

    monkeypatch.setattr(replies, "read_reply", killing)
    found = client.sample(asked, PARAMS)
    assert difference(found, ours(model, weights, asked)) < ROUNDING
    assert {completion.version for completion in found} == {2}
    assert (client.counts["removed"], client.counts["returned"]) == (1, 1)
    assert front.engine() != killed
    # What the dead one had started is gone as well.
    wait_until(lambda: len(front.living()) == 2, END_SECONDS)


def test_a_sync_in_a_round_aborts_what_is_under_way(front: Front, base: dict[str, Tensor], wanted: Wanted) -> None:
    """Never an answer of weights that are on their way out, and no engine that goes on for nobody."""
    client = sampler(front, wanted)
    client.update_weights(changed(base, 3).items(), 3)
    engine = front.engine()
    os.kill(engine, signal.SIGSTOP)
    answers: list[int] = []
    asking = threading.Thread(
        target=lambda: answers.append(front.ask("POST", GENERATE, json=body()).status_code), daemon=True
    )
    asking.start()
    asking.join(0.5)
    assert asking.is_alive()
    threading.Timer(1.0, os.kill, (engine, signal.SIGCONT)).start()
    assert front.ask("POST", BEGIN).status_code == httpx.codes.OK
    asking.join(START_SECONDS)
    assert answers == [UNAVAILABLE]
    wait_until(lambda: front.living() == [], END_SECONDS)
    assert front.version() == INCOMPLETE


def test_an_engine_that_does_not_start_is_an_error_and_the_next_sync_mends_it(
    front: Front, model: Path, base: dict[str, Tensor], wanted: Wanted
) -> None:
    client, fault = sampler(front, wanted), front.root / "fault"
    fault.write_text("exit", "utf-8")
    with pytest.raises(UserError, match=r"503.*trtllm-serve does not start"):
        client.update_weights(base.items(), 4)
    assert front.version() == INCOMPLETE
    wait_until(lambda: front.living() == [], END_SECONDS)
    fault.unlink()
    client.update_weights(base.items(), 4)
    found = client.sample(requests(4), PARAMS)
    assert difference(found, ours(model, base, requests(4))) < ROUNDING
    # One that dies and does not come back is given up, which is said: the next sync would begin anew.
    fault.write_text("exit", "utf-8")
    before = len(list((front.root / "pids").iterdir()))
    os.kill(front.engine(), signal.SIGKILL)
    wait_until(lambda: front.ask("GET", IDENTITY).status_code == httpx.codes.OK)
    fault.unlink()
    assert front.version() == INCOMPLETE
    # Each start leaves two.
    assert len(list((front.root / "pids").iterdir())) - before == 2 * RESTARTS


def body(**changes: Any) -> dict[str, Any]:
    params = {"temperature": 1.0, "max_tokens": 4, "seed": 1, "stop_token_ids": [0], "ignore_eos": True}
    return {"token_ids": [1, 2], "sampling_params": {**params, "logprobs": 0, "detokenize": False, **changes}}


@pytest.mark.parametrize("change", [{"temperature": 0.8}, {"logprobs": 1}, {"top_k": 5}, {"max_tokens": 0}])
def test_what_trtllm_cannot_keep_is_refused(change: dict[str, Any], front: Front) -> None:
    assert front.ask("POST", GENERATE, json=body(**change)).status_code == UNPROCESSABLE


def test_the_rule_of_temperature_1_is_needed(model: Path, base: dict[str, Tensor]) -> None:
    """What the stand-in returns, as trtllm-serve does, is the sampling distribution's at temperature 1 alone."""
    options = ["--backend", "pytorch", "--max_seq_len", str(MAX_LENGTH), "--max_batch_size", "1"]
    served = trtllm_standin.Served(trtllm_standin.parse([str(model), *options]))
    for temperature in (1.0, 0.8):
        asked = {
            "model": "m",
            "prompt": [1, 2],
            "max_tokens": 8,
            "seed": 3,
            "stop_token_ids": [0],
            "ignore_eos": True,
        }
        wish = {"logprobs": 1, "detokenize": False, "include_stop_str_in_output": True, "temperature": temperature}
        (choice,) = served.complete({**asked, **wish})["choices"]
        (ours,) = locally(model, base, [Request("r", (1, 2), 3)], SamplingParams(temperature, 1.0, 8))
        assert tuple(choice["token_ids"]) == ours.token_ids
        gaps = [abs(a - b) for a, b in zip(choice["logprobs"]["token_logprobs"], ours.logprobs, strict=True)]
        assert (max(gaps) < ROUNDING) == (temperature == 1.0)


def test_only_whole_and_right_weights_are_taken(front: Front, base: dict[str, Tensor]) -> None:
    def send(tensors: dict[str, Tensor]) -> httpx.Response:
        return front.ask("POST", BUCKET, content=save(tensors))

    (first, value), *rest = base.items()
    label = version_label(RUN, 9)
    assert front.ask("POST", BEGIN).status_code == httpx.codes.OK
    assert front.version() == INCOMPLETE
    for wrong, said in (({first: value[:1]}, "has shape"), ({"no.such": value}, "no tensor 'no.such'")):
        refused = send({name: tensor.contiguous() for name, tensor in wrong.items()})
        assert (refused.status_code, said in refused.text) == (CONFLICT, True)
    assert send({first: value}).status_code == httpx.codes.OK
    assert "came twice" in send({first: value}).text
    for elsewhere in ("../fault", "/etc/passwd", "absent.safetensors"):
        assert front.ask("POST", BUCKET, json={"file": elsewhere}).status_code == CONFLICT
    early = front.ask("POST", FINISH, json={"version": label})
    assert (early.status_code, f"{len(rest)} tensors are missing" in early.text) == (CONFLICT, True)
    # A file that ends too early has the right header.
    assert front.ask("POST", BUCKET, content=save(dict(rest))[:-1]).status_code == httpx.codes.OK
    cut = front.ask("POST", FINISH, json={"version": label})
    assert (cut.status_code, "cannot be read as safetensors" in cut.text) == (CONFLICT, True)
    assert front.version() == INCOMPLETE
    assert front.living() == []


@pytest.mark.parametrize("path", [BEGIN, BUCKET, FINISH, GENERATE, IDENTITY, "/docs", "/openapi.json", "/nothing"])
def test_nobody_gets_in_without_the_key(path: str, front: Front) -> None:
    before = front.version()
    for given in ("", "wrong", KEY[:-1]):
        assert front.ask("GET" if path == IDENTITY else "POST", path, key=given).status_code == UNAUTHORIZED
    assert front.version() == before


def test_its_identity_is_for_runs_of_its_kind_alone(model: Path, wanted: Wanted) -> None:
    identity = Identity(wanted.weights, wanted.tokenizer, UNSYNCED, MAX_LENGTH, POLICY, RAW_LOGPROBS)
    check_identity("u", identity, wanted)
    with pytest.raises(UserError, match="returns raw_logprobs, not processed_logprobs"):
        check_identity("u", identity, replace(wanted, logprobs=LOGPROBS))
    with pytest.raises(UserError, match="returns processed_logprobs, not raw_logprobs"):
        check_identity("u", replace(identity, logprobs=LOGPROBS), wanted)


def test_training_over_trtllm_is_that_of_the_built_in_sampler(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    settings = (*ON_POLICY, "temperature.start=1.0", "temperature.end=1.0")
    run_distributed(run_case, 1, make_case(tmp_path, "local", "grpo", *settings))
    (tmp_path / "front").mkdir()
    with serving(tmp_path / "base" / "hf", tmp_path / "front", SEQUENCE) as front:
        over = (
            *("engine.kind=trtllm_server", f"engine.base_urls=[{front.url}]", "engine.bucket_mb=1"),
            *("engine.api_key_env=PHIMR_TEST_KEY", "engine.in_flight=4", "engine.attempts=4"),
            *(f"engine.request_seconds={START_SECONDS}", f"engine.recovery_seconds={START_SECONDS}"),
            *("engine.probe_seconds=0.2", f"engine.directory={front.root / 'buckets'}"),
        )
        run_distributed(run_case, 1, make_case(tmp_path, "trtllm", "grpo", *settings, *over))
        assert label_number(front.version().rpartition("-")[0], front.version()) == STEPS - 1
    assert rounds_difference(tmp_path / "trtllm", tmp_path / "local") < CURVE_TOLERANCE


def test_training_at_another_temperature_is_refused_before_anything_is_sampled() -> None:
    for first, last in ((1.0, 0.6), (0.9, 1.0)):
        given = [f"temperature.start={first}", f"temperature.end={last}"]
        with pytest.raises(UserError, match=rf"temperature\.start={first} temperature\.end={last}"):
            load_config(GRPOConfig, CONF / "trtllm.yaml", given)
    load_config(GRPOConfig, CONF / "trtllm.yaml")
    # vLLM's servers give the log-probabilities of any temperature.
    paper = load_config(GRPOConfig, CONF / "paper.yaml")
    assert paper.temperature.end != 1.0


# --- the end of a server ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGTERM, "ready"), (signal.SIGTERM, "hang"), (signal.SIGKILL, "ready")]
)
def test_when_the_server_ends_so_does_trtllm(
    number: signal.Signals, how: str, model: Path, base: dict[str, Tensor], tmp_path: Path
) -> None:
    with serving(model, tmp_path) as front:
        if how == "hang":
            (tmp_path / "fault").write_text("hang", "utf-8")
        assert front.ask("POST", BEGIN).status_code == httpx.codes.OK
        assert front.ask("POST", BUCKET, content=save(base)).status_code == httpx.codes.OK
        finishing = threading.Thread(target=finish_quietly, args=(front,))
        finishing.start()
        if how == "ready":
            finishing.join()
            assert front.version() == "v"
        wait_until(lambda: len(front.living()) == 2)
        engine = front.engine()
        front.process.send_signal(number)
        front.process.wait(STOP_SECONDS)
        finishing.join()
        wait_until(lambda: not is_alive(engine), STOP_SECONDS)
        if number == signal.SIGTERM:
            wait_until(lambda: front.living() == [], END_SECONDS)
            assert front.refits() == []
        else:
            # The next server of this account clears it away, and not what one that lives has.
            (left,) = front.refits()
            (root, lock), (other, other_lock) = (new_root(tmp_path / "refits") for _ in range(2))
            with lock, other_lock:
                assert sorted(front.refits()) == sorted([root, other])
                assert left not in (root, other)


def finish_quietly(front: Front) -> None:
    with contextlib.suppress(httpx.TransportError):
        front.ask("POST", FINISH, json={"version": "v"})


def test_the_server_needs_nothing_of_the_trainers() -> None:
    """It runs in TensorRT-LLM's environment."""
    absent = ("transformers", "pyarrow", "nemo", "megatron", "nemo_aligner", "lightning", "vllm", "datasets")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); "
        "import phimr_nemo.cli.main, phimr_nemo.jobs.server_node, phimr_nemo.generate.serving.trtllm_server"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_serve(arguments: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phimr_nemo.cli", "serve", "x", "--max-length", "64", *arguments]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "trtllm"), "there is no command trtllm-serve"),
        (("--engine", "trtllm", "--eager"), "--engine trtllm with --eager"),
        (("--refit-directory", "."), "--engine vllm with --refit-directory"),
        (("--engine", "trtllm", "--host", "::"), "without a key"),
    ],
)
def test_what_cannot_work_is_said_at_once(arguments: Sequence[str], said: str, tmp_path: Path) -> None:
    done = run_serve(arguments, PATH=str(tmp_path))
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
