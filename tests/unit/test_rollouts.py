"""The rollout step: contents, idempotence, retry, and settings that must not change under way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from architectures import small

from phimr_nemo.data.chat import opening, render_prompt, stop_token_ids
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.tokenizer import build_tokenizer, synthetic_corpus
from phimr_nemo.errors import UserError
from phimr_nemo.generate import rollouts
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.plan import Plan
from phimr_nemo.generate.rollouts import sample_rollouts
from phimr_nemo.generate.sampler import Completion, Request, SamplingParams
from phimr_nemo.model.table import tensor_shapes
from phimr_nemo.store import progress
from phimr_nemo.store.content import content_id
from phimr_nemo.store.shards import is_complete, read_manifest, read_table, rows_to_table, shard_is_complete

PARAMS = SamplingParams(1.0, 1.0, 24)
PROBLEMS = 7
SAMPLES = 3
SHARD_SIZE = 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(synthetic_corpus(), vocab_size=270)


class CountingSampler:
    """The real sampler, with a record of what it was asked; optionally killed at its n-th call."""

    def __init__(self, tokenizer: Any) -> None:
        arch = small(
            vocab_size=len(tokenizer),
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
        generator = torch.Generator().manual_seed(0)
        self.inner = LocalSampler(
            arch,
            [(name, 0.2 * torch.randn(shape, generator=generator)) for name, shape in tensor_shapes(arch).items()],
            stop_token_ids=stop_token_ids(tokenizer),
            max_batch=16,
            longrope_policy="long_when_max_length_exceeds_original",
            max_length=256,
        )
        self.requests: list[Request] = []
        self.completions: dict[str, Completion] = {}
        self.calls = 0
        self.dies_at_call = 0

    version = 0

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        self.calls += 1
        if self.calls == self.dies_at_call:
            raise KeyboardInterrupt
        self.requests.extend(requests)
        done = self.inner.sample(requests, params)
        self.completions.update({c.request_id: c for c in done})
        return done

    def update_weights(self, tensors: Any, version: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.inner.close()


@pytest.fixture
def sampler(tokenizer: Any) -> CountingSampler:
    return CountingSampler(tokenizer)


@pytest.fixture(scope="module")
def problems() -> pa.Table:
    return generate_problems(0, PROBLEMS, "heldout")


def run(problems: pa.Table, sampler: Any, tokenizer: Any, out: Path, **changes: Any) -> bool:
    planned: dict[str, Any] = {
        "rollouts_per_problem": SAMPLES,
        "teacher": "tiny",
        "shard_size": SHARD_SIZE,
        "stage_seed": 1,
    }
    planned |= {name: changes.pop(name) for name in [*planned, "prompt_template"] if name in changes}
    return sample_rollouts(Plan(problems, **planned), sampler, tokenizer, out, **{"params": PARAMS, **changes})


def test_rows_are_the_sampled_responses(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    assert run(problems, sampler, tokenizer, tmp_path / "out")
    rows = read_table(tmp_path / "out", "rollouts").to_pylist()
    wanted = [(p, i) for p in problems.to_pylist() for i in range(SAMPLES)]
    assert [(r["problem_id"], r["sample_index"]) for r in rows] == [(p["id"], i) for p, i in wanted]
    stops = stop_token_ids(tokenizer)
    for (problem, _), row, request in zip(wanted, rows, sampler.requests, strict=True):
        completion = sampler.completions[row["id"]]
        assert request.prompt_ids == tuple(render_prompt(tokenizer, problem["question"]))
        assert (request.id, request.seed) == (row["id"], row["seed"])
        body = [token for token in completion.token_ids if token not in stops]
        assert row["response"] == tokenizer.decode(body)
        assert row["tokens"] == len(completion.token_ids)
        assert row["finish_reason"] == completion.finish_reason
        assert (row["finish_reason"] == "stop") == (completion.token_ids[-1] in stops)
        for column in ("question", "answer", "domain", "difficulty", "metadata"):
            assert row[column] == problem[column]
        assert row["teacher"] == "tiny"
    assert len({row["id"] for row in rows}) == len({row["seed"] for row in rows}) == PROBLEMS * SAMPLES
    counts = read_manifest(tmp_path / "out", "rollouts").counts
    assert counts["rollouts"] == PROBLEMS * SAMPLES == counts["stop"] + counts["length"]
    assert counts["tokens"] == sum(row["tokens"] for row in rows)


def test_a_rerun_samples_nothing(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    run(problems, sampler, tokenizer, tmp_path / "out")
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    asked = len(sampler.requests)
    assert run(problems, sampler, tokenizer, tmp_path / "out")
    assert len(sampler.requests) == asked
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files


def test_a_killed_run_continues_with_its_unfinished_shards(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    run(problems, sampler, tokenizer, tmp_path / "whole")
    killed = CountingSampler(tokenizer)
    killed.dies_at_call = 2
    with pytest.raises(KeyboardInterrupt):
        run(problems, killed, tokenizer, tmp_path / "killed")
    assert shard_is_complete(tmp_path / "killed", 0)
    assert not is_complete(tmp_path / "killed", "rollouts")
    again = CountingSampler(tokenizer)
    assert run(problems, again, tokenizer, tmp_path / "killed")
    assert again.requests == sampler.requests[SHARD_SIZE * SAMPLES :]
    assert read_table(tmp_path / "killed", "rollouts") == read_table(tmp_path / "whole", "rollouts")


def test_the_log_of_a_continued_run_tells_what_was_there_and_the_rate(
    problems: pa.Table,
    sampler: CountingSampler,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    sampler.dies_at_call = 2
    with pytest.raises(KeyboardInterrupt):
        run(problems, sampler, tokenizer, tmp_path / "out")
    now, seconds = 0.0, 2.0
    sample = sampler.sample

    def slowly(requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        nonlocal now
        now += seconds
        return sample(requests, params)

    monkeypatch.setattr(sampler, "sample", slowly)
    monkeypatch.setattr(rollouts, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    capfd.readouterr()
    assert run(problems, sampler, tokenizer, tmp_path / "out")
    tokens = [row["tokens"] for row in read_table(tmp_path / "out", "rollouts").to_pylist()]
    shard = SHARD_SIZE * SAMPLES
    lines = [line.split(", ")[:2] for line in capfd.readouterr().err.splitlines() if line.startswith("sampling")]
    assert lines == [
        [f"sampling: rollout {2 * shard} of {len(tokens)}", f"tok/s {sum(tokens[shard : 2 * shard]) / seconds:,.0f}"],
        [f"sampling: rollout {len(tokens)} of {len(tokens)}", f"tok/s {sum(tokens[2 * shard :]) / seconds:,.0f}"],
    ]


def test_processes_share_the_shards(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    run(problems, sampler, tokenizer, tmp_path / "one")
    assert not run(problems, sampler, tokenizer, tmp_path / "two", shard_indices=[2, 0])
    assert run(problems, sampler, tokenizer, tmp_path / "two", shard_indices=[1])
    assert read_table(tmp_path / "two", "rollouts") == read_table(tmp_path / "one", "rollouts")


def test_the_shard_size_does_not_change_the_rollouts(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    run(problems, sampler, tokenizer, tmp_path / "small", shard_size=1)
    run(problems, sampler, tokenizer, tmp_path / "large", shard_size=100)
    assert read_table(tmp_path / "small", "rollouts") == read_table(tmp_path / "large", "rollouts")


def test_other_seeds_and_teachers_give_other_rollouts(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    ids = []
    for name, changes in (("a", {}), ("b", {"stage_seed": 2}), ("c", {"teacher": "other"})):
        run(problems, sampler, tokenizer, tmp_path / name, **changes)
        table = read_table(tmp_path / name, "rollouts")
        ids.append((set(table["id"].to_pylist()), set(table["seed"].to_pylist())))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert ids[first][0].isdisjoint(ids[second][0])
        assert ids[first][1].isdisjoint(ids[second][1])


def test_the_template_shapes_the_prompt_and_not_the_record(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    template = "Put it in \\boxed{}. {question}"
    run(problems, sampler, tokenizer, tmp_path / "out", prompt_template=template)
    rows = read_table(tmp_path / "out", "rollouts").to_pylist()
    for row, request in zip(rows, sampler.requests, strict=True):
        prompt = render_prompt(tokenizer, "Put it in \\boxed{}. " + row["question"])
        assert request.prompt_ids == tuple(prompt)
    assert rows[0]["question"] == problems["question"][0].as_py()


@pytest.mark.parametrize(
    "changes",
    [{"params": SamplingParams(0.5, 1.0, 24)}, {"stage_seed": 3}, {"rollouts_per_problem": 4}, {"shard_size": 2}],
)
def test_other_settings_in_a_begun_directory_are_refused(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run(problems, sampler, tokenizer, tmp_path / "out", shard_indices=[0])
    with pytest.raises(UserError, match=next(iter(changes))):
        run(problems, sampler, tokenizer, tmp_path / "out", **changes)


def test_a_damaged_shard_is_made_again(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    run(problems, sampler, tokenizer, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").unlink()
    shard = tmp_path / "damaged" / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    asked = len(sampler.requests)
    assert run(problems, sampler, tokenizer, tmp_path / "damaged")
    assert len(sampler.requests) - asked == SHARD_SIZE * SAMPLES
    assert read_table(tmp_path / "damaged", "rollouts") == read_table(tmp_path / "out", "rollouts")


def test_no_problems_and_repeated_problems_are_refused(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no problems"):
        run(rows_to_table([], "problems"), sampler, tokenizer, tmp_path / "out")
    with pytest.raises(UserError, match="occurs 2 times"):
        run(pa.concat_tables([problems, problems.slice(0, 1)]), sampler, tokenizer, tmp_path / "out")


def test_settings_tell_what_made_the_rollouts(
    problems: pa.Table, sampler: CountingSampler, tokenizer: Any, tmp_path: Path
) -> None:
    run(problems, sampler, tokenizer, tmp_path / "out", inputs={"problems.path": "abcdef"})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["config"]["params"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24}
    ids = problems.column("id").to_pylist()
    assert manifest["inputs"] == {"problems.path": "abcdef", "problems": content_id(*ids), "teacher": "tiny"}
    with pytest.raises(UserError, match=r"problems\.path: content abcdef there, 123456 now"):
        run(problems, sampler, tokenizer, tmp_path / "out", inputs={"problems.path": "123456"})


def test_a_think_tag_that_the_template_opens_belongs_to_the_response(
    problems: pa.Table, sampler: CountingSampler, tmp_path: Path
) -> None:
    plain, opened = (build_tokenizer(synthetic_corpus(), vocab_size=270) for _ in range(2))
    opened.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    assert opening(plain, render_prompt(plain, "1+1?")) == ""
    assert run(problems, sampler, opened, tmp_path / "out")
    for row in read_table(tmp_path / "out", "rollouts").to_pylist():
        completion = sampler.completions[row["id"]]
        body = completion.token_ids[: -1 if completion.finish_reason == "stop" else None]
        assert row["response"] == "<think>\n" + opened.decode(body)
