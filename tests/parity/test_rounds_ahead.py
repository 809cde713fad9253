"""Rounds that are sampled ahead by the real built-in engine: how old their tokens may be, and what a stop keeps.

The trainer is a loop here; its weights are others with every step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import pyarrow.parquet as pq
import pytest
from distributed import run_distributed
from test_rollout_servers import POLICY, changed, small_model, weights_of
from torch import Tensor

from phimr_nemo.align.grpo.rounds import FILE, Rounds
from phimr_nemo.align.grpo.samplers import NoTurns
from phimr_nemo.generate.ahead import Lead, Round, read_rows
from phimr_nemo.generate.local.decoder import Decoder
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.model.files.hf import HFDirectory

MAX_LENGTH, STEPS, PROMPTS, GROUP, AT_MOST = 64, 7, 3, 4, 5
PARAMS: Final = SamplingParams(1.0, 1.0, 24)
STOPS: Final = tuple(range(12))
"""Enough tokens end a response that lengths differ."""
PATIENCE = 120.0

Played = dict[int, list[Completion]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


def round_of(step: int, prompt_of: dict[int, int] | None = None) -> Round:
    slots = prompt_of or {PROMPTS * step + place: place for place in range(PROMPTS)}
    requests = [
        Request(f"{slot}/{sample}", tuple(range(20, 22 + prompt)), 1000 * slot + sample)
        for slot, prompt in slots.items()
        for sample in range(GROUP)
    ]
    return Round(slots, requests, PARAMS)


class Counting:
    """Counts the tokens that are drawn, of all sequences at once, and how many sequences are under way."""

    def __init__(self) -> None:
        self.widest, self._count, self._changed = 0, 0, threading.Condition()

    def step(self, decoder: Decoder, cache: Any, tokens: Tensor, *others: Any) -> Tensor:
        with self._changed:
            self.widest, self._count = max(self.widest, len(tokens)), self._count + 1
            self._changed.notify_all()
        return STEP(decoder, cache, tokens, *others)

    def wait_for_more(self, tokens: int, under_way: Sequence[Round]) -> None:
        """Let the thread draw some tokens, as it does while a step trains, unless there are none to draw."""
        with self._changed:
            wanted = self._count + tokens
            for _ in range(int(PATIENCE / 0.05)):
                if self._count >= wanted or all(begun.is_whole for begun in under_way):
                    return
                self._changed.wait(0.05)
        raise AssertionError("the thread samples nothing")


STEP: Final = Decoder.step


def play(
    model: Path, directory: Path, lead: Lead, first: int = 0, stop: int = STEPS, tokens: int = 6
) -> tuple[Played, int]:
    """What each step from `first` to `stop` trains on, and the most sequences that were under way ahead of it."""
    base, now, counting = weights_of(model), first, Counting()
    sampler = LocalSampler(
        HFDirectory(model).architecture,
        base.items(),
        stop_token_ids=STOPS,
        max_batch=16,
        longrope_policy=POLICY,
        max_length=MAX_LENGTH,
    )

    def weights() -> Iterator[tuple[str, Tensor]]:
        yield from changed(base, now).items()

    played: Played = {}
    with mock.patch.object(Decoder, "step", lambda *of: counting.step(*of)):
        rounds = Rounds(sampler, weights, directory, NoTurns(), lead)
        rounds.restore(first, lambda prompt_of, step: round_of(step, dict(prompt_of)))
        for now in range(first, stop):
            played[now] = rounds.sample(now, round_of(now).requests, PARAMS)
            if now == first:
                # The first round is sampled by itself, as many together as the engine takes.
                counting.widest = 0
            rounds.begin(now, STEPS, round_of)
            if lead.at_most is not None:
                counting.wait_for_more(tokens, list(rounds._ahead.rounds.values()))
        now = stop
        rounds.save(stop)
        rounds.close()
    return played, counting.widest


def ages(played: Played) -> dict[int, list[int]]:
    """Of every token that a step trains on."""
    return {
        step: [step - version for completion in found for version in completion.versions]
        for step, found in played.items()
    }


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_whole_rounds_are_as_old_as_the_steps_since_they_were_begun(ahead: int, model: Path, tmp_path: Path) -> None:
    """In blocks of n: the weights of step 0 sample rounds 1..n, those of step n the next n."""
    ((played, _),) = run_distributed(play, 1, model, tmp_path, Lead(ahead))
    begun = {step: ahead * ((step - 1) // ahead) for step in range(1, STEPS)}
    assert {step: set(of_step) for step, of_step in ages(played).items()} == {
        0: {0},
        **{step: {step - since} for step, since in begun.items()},
    }
    assert all(len(found) == PROMPTS * GROUP for found in played.values())


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_whole_rounds_of_a_stopped_run_are_the_uninterrupted_ones(stop: int, model: Path, tmp_path: Path) -> None:
    lead = Lead(3)
    ((whole, _),) = run_distributed(play, 1, model, tmp_path / "whole", lead)
    run_distributed(play, 1, model, tmp_path / "stopped", lead, 0, stop)
    ((rest, _),) = run_distributed(play, 1, model, tmp_path / "stopped", lead, stop)
    assert rest == {step: whole[step] for step in range(stop, STEPS)}


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_no_token_of_a_continued_response_is_older_than_it_may_be(ahead: int, model: Path, tmp_path: Path) -> None:
    ((played, widest),) = run_distributed(play, 1, model, tmp_path, Lead(ahead, AT_MOST))
    assert max(max(of_step) for of_step in ages(played).values()) <= ahead
    assert [len(found) for found in played.values()] == [PROMPTS * GROUP] * STEPS
    completions = [completion for found in played.values() for completion in found]
    assert all(list(completion.versions) == sorted(completion.versions) for completion in completions)
    partial = [completion for completion in completions if len(set(completion.versions)) > 1]
    # Of one round ahead nothing is under way any more when new weights come.
    assert (len(partial) > 0) == (ahead > 1)
    assert widest == AT_MOST


def test_a_round_begun_with_older_weights_than_may_be_is_seen(model: Path, tmp_path: Path) -> None:
    """The planted twin of the bound: with what begins one round more than may be, there are older tokens."""
    ((played, _),) = run_distributed(play_too_far, 1, model, tmp_path, Lead(2, AT_MOST))
    assert max(max(of_step) for of_step in ages(played).values()) == 3


def play_too_far(model: Path, directory: Path, lead: Lead) -> tuple[Played, int]:
    real = Rounds.begin

    def begin(self: Rounds, *arguments: Any) -> None:
        self._lead = Lead(lead.steps + 1, lead.at_most, "keep")
        real(self, *arguments)

    with mock.patch.object(Rounds, "begin", begin):
        return play(model, directory, lead)


def test_a_stop_keeps_what_there_is_of_a_response(model: Path, tmp_path: Path) -> None:
    """The resumed run continues it: its responses begin with the tokens, log-probabilities and versions saved."""
    lead, stop = Lead(3, AT_MOST), 3
    run_distributed(play, 1, model, tmp_path, lead, 0, stop, 3)
    rows = read_rows(tmp_path / FILE.format(step=stop))
    assert {row["step"] for row in rows} == {3, 4, 5}
    begun = [row for row in rows if row["finish_reason"] is None and row["token_ids"]]
    assert begun
    assert all(version < stop for row in rows for version in row["versions"])
    ((rest, _),) = run_distributed(play, 1, model, tmp_path, lead, stop)
    found = {completion.request_id: completion for of_step in rest.values() for completion in of_step}
    for row in rows:
        count, completion = len(row["token_ids"]), found[row["request_id"]]
        for name in ("token_ids", "logprobs", "versions"):
            assert list(getattr(completion, name)[:count]) == row[name]
        if row["finish_reason"] is None:
            assert set(completion.versions[count:]) <= set(range(stop, STEPS))
        else:
            assert count == len(completion.token_ids)
    assert max(max(of_step) for of_step in ages(rest).values()) <= 3


@pytest.mark.parametrize("stale", ["resample", "keep"])
def test_a_response_that_is_too_old_is_made_again_or_kept(stale: Any, model: Path, tmp_path: Path) -> None:
    """As when a run goes on with fewer rounds ahead than it had."""
    run_distributed(play, 1, model, tmp_path, Lead(3), 0, 3)
    ((rest, _),) = run_distributed(play, 1, model, tmp_path, Lead(1, None, stale), 3, 4)
    # Round 3 was sampled by the weights of step 0.
    assert set(ages(rest)[3]) == ({0} if stale == "resample" else {3})


def test_a_file_of_another_version_is_sampled_again(model: Path, tmp_path: Path) -> None:
    lead = Lead(2)
    run_distributed(play, 1, model, tmp_path, lead, 0, 2)
    file = tmp_path / FILE.format(step=2)
    pq.write_table(pq.read_table(file).drop_columns(["step"]), file)
    ((rest, _),) = run_distributed(play, 1, model, tmp_path, lead, 2, 3)
    assert set(ages(rest)[2]) == {0}


def test_two_processes_take_over_what_one_had_begun(model: Path, tmp_path: Path) -> None:
    """Slots are dealt anew; together the processes have what one alone would have had."""
    lead = Lead(2)
    run_distributed(play, 1, model, tmp_path, lead, 0, 1)
    file = tmp_path / FILE.format(step=1)
    saved = {row["request_id"]: row["token_ids"] for row in read_rows(file)}
    parts = run_distributed(taken_over, 2, model, tmp_path, lead)
    assert {name: list(tokens) for part in parts for name, tokens in part.items()} == saved
    assert [len(part) for part in parts] == [2 * 2 * GROUP, 2 * GROUP]


def taken_over(model: Path, directory: Path, lead: Lead) -> dict[str, tuple[int, ...]]:
    del model
    sampler: Any = mock.Mock(version=1)
    rounds = Rounds(sampler, dict[str, Tensor]().items, directory, NoTurns(), lead)
    rounds.restore(1, lambda prompt_of, step: round_of(step, dict(prompt_of)))
    steps = rounds.steps_ahead
    found = [c for step in steps for c in rounds._ahead.take(step).responses()]
    rounds.close()
    return {completion.request_id: completion.token_ids for completion in found}
