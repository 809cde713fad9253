"""GRPO with rollout servers that die, and with rounds sampled ahead: the same training, and exact resumes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from align_inputs import make_case, make_inputs
from align_worker import run_case
from distributed import RanksFailed, run_distributed
from rollout_server import RolloutServer
from test_align_parity import (
    CURVE_TOLERANCE,
    ROUNDING,
    STEPS,
    STOP,
    curve,
    weights_differ_by,
)

from phimr_nemo.generate.serving.weights import LOGPROBS, UNSYNCED, Identity, tokenizer_hash
from phimr_nemo.model.files.hf import HFDirectory

AHEAD = ("ahead=1", "correction.kind=truncated", "correction.cap=2", "inner_batches=1", "kl=0")
ON_POLICY = ("inner_batches=1", "kl=0", "correction.kind=truncated", "correction.cap=2")
SEQUENCE = 256
DP2 = "parallel.data=2"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rounds")
    make_inputs(root)
    run_distributed(run_case, 1, make_case(root, "grpo", "grpo", *ON_POLICY))
    return root


def server(root: Path, port: int = 0) -> RolloutServer:
    base = root / "base" / "hf"
    identity = Identity(
        HFDirectory(base).weights_hash(),
        tokenizer_hash(base),
        UNSYNCED,
        SEQUENCE,
        "long_when_max_length_exceeds_original",
        LOGPROBS,
    )
    return RolloutServer(base, identity, port=port)


def over(*servers: RolloutServer, recovery: int = 60) -> tuple[str, ...]:
    """Overrides for a run that samples on these servers."""
    return (
        *("engine.kind=vllm_server", f"engine.base_urls=[{','.join(server.url for server in servers)}]"),
        *("engine.in_flight=4", "engine.request_seconds=60", "engine.attempts=8", "engine.probe_seconds=0.2"),
        *(f"engine.recovery_seconds={recovery}", "engine.bucket_mb=1"),
    )


def difference(first: Path, second: Path) -> float:
    """The largest difference of a metric that both runs have, relative where it is above 1."""
    return max(
        abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name]))
        for ours, theirs in zip(curve(first), curve(second), strict=True)
        for name in (ours.keys() & theirs.keys()) - ROUNDING
    )


def test_training_over_servers_is_the_same_and_outlives_one_of_them(root: Path) -> None:
    """Two processes, two servers; one dies in the second round, and the run is that of the built-in sampler."""
    with server(root) as first, server(root) as second:
        first.die_after = 20
        run_distributed(run_case, 2, make_case(root, "grpo-servers", "grpo", DP2, *ON_POLICY, *over(first, second)))
        assert (first.answered, first.answered + second.answered) == (20, STEPS * 6 * 4)
    assert difference(root / "grpo-servers", root / "grpo") < CURVE_TOLERANCE
    rows = curve(root / "grpo-servers")
    assert rows[-1]["sampler_removed"] >= 1
    assert [row["lost_groups"] for row in rows] == [0.0] * STEPS


def test_when_the_only_server_is_started_anew_the_round_goes_on(root: Path) -> None:
    """Its weights are the base's then: it is sent the trainer's before it is asked for what is missing."""
    with server(root) as first:
        first.die_after, port = 30, first.port
        again: list[RolloutServer] = []

        def restart() -> None:
            while not first.is_dead:
                threading.Event().wait(0.05)
            again.append(server(root, port).__enter__())

        helper = threading.Thread(target=restart)
        helper.start()
        run_distributed(run_case, 1, make_case(root, "grpo-again", "grpo", *ON_POLICY, *over(first, recovery=10)))
        helper.join()
    assert first.answered + again[0].answered == STEPS * 6 * 4
    again[0].die()
    assert difference(root / "grpo-again", root / "grpo") < CURVE_TOLERANCE


def test_a_round_ahead_is_one_step_old_and_survives_a_stop(root: Path) -> None:
    run_distributed(run_case, 1, make_case(root, "grpo-ahead", "grpo", *AHEAD))
    run_distributed(run_case, 1, make_case(root, "grpo-ahead-resumed", "grpo", *AHEAD, stop=STOP))
    assert [file.name for file in (root / "grpo-ahead-resumed" / "pending").iterdir()] == ["round-00000002.parquet"]
    run_distributed(run_case, 1, make_case(root, "grpo-ahead-resumed", "grpo", *AHEAD))
    rows = curve(root / "grpo-ahead")
    assert [row["staleness"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
    assert [row["staleness"] for row in curve(root / "grpo")] == [0.0] * STEPS
    # What the sampler's weights give and what the trained weights give differ from the second step on.
    assert rows[0]["logprob_gap"] < 1e-5 < min(row["logprob_gap"] for row in rows[1:])
    assert curve(root / "grpo-ahead-resumed") == rows
    assert weights_differ_by(root / "grpo-ahead-resumed", root / "grpo-ahead") == 0.0


def test_a_resume_without_the_round_ahead_is_seen(root: Path) -> None:
    """The planted twin: without its file the round is sampled again, by newer weights."""
    run_distributed(run_case, 1, make_case(root, "grpo-forgot", "grpo", *AHEAD, stop=STOP))
    (root / "grpo-forgot" / "pending" / "round-00000002.parquet").unlink()
    run_distributed(run_case, 1, make_case(root, "grpo-forgot", "grpo", *AHEAD))
    assert [row["staleness"] for row in curve(root / "grpo-forgot")] == [0.0, 1.0, 0.0, 1.0]
    assert weights_differ_by(root / "grpo-forgot", root / "grpo-ahead") > 0.0


def test_two_rounds_ahead_are_sampled_in_blocks_and_survive_a_stop(root: Path) -> None:
    """Stopped after the second step: one round of a block is trained on, and the other one saved."""
    two = ("ahead=2", *AHEAD[1:], "rebalance.refill_rounds=1", "rebalance.drop_above=0.6")
    run_distributed(run_case, 1, make_case(root, "grpo-two", "grpo", *two))
    run_distributed(run_case, 1, make_case(root, "grpo-two-resumed", "grpo", *two, stop=STOP))
    run_distributed(run_case, 1, make_case(root, "grpo-two-resumed", "grpo", *two))
    rows = curve(root / "grpo-two")
    assert [row["staleness_max"] for row in rows] == [0.0, 1.0, 2.0, 1.0]
    # What takes the place of dropped prompts is sampled by the weights of the step itself.
    assert [row["stale_tokens"] == 1.0 for row in rows[1:]] == [row["refills"] == 0 for row in rows[1:]]
    assert any(row["refills"] for row in rows[1:])
    assert [row["partial_rollouts"] for row in rows] == [0.0] * STEPS
    assert curve(root / "grpo-two-resumed") == rows
    assert weights_differ_by(root / "grpo-two-resumed", root / "grpo-two") == 0.0


def test_responses_on_servers_are_interrupted_and_continued_while_two_processes_train(root: Path) -> None:
    continued = ("ahead=2", *AHEAD[1:], "partial_rollouts=continue", "max_concurrent_rollouts=6")
    with server(root) as first:
        run_distributed(run_case, 2, make_case(root, "grpo-cut", "grpo", DP2, *continued, *over(first)))
        assert first.aborts > 0
    rows = curve(root / "grpo-cut")
    assert all(row["staleness_max"] <= 2 and row["lost_groups"] == 0 for row in rows)
    assert rows[0]["staleness"] == rows[0]["partial_rollouts"] == 0.0
    assert all(row["staleness"] > 0.0 for row in rows[1:])
    assert rows[-1]["sampler_removed"] == 0.0


@pytest.mark.parametrize("change", ["ahead=1", "stale=keep"])
def test_older_weights_want_a_correction(change: str, root: Path) -> None:
    with pytest.raises(RanksFailed, match=f"{change} with correction.kind=none"):
        run_distributed(run_case, 1, make_case(root, "grpo-refused", "grpo", change, "correction.kind=none"))
