"""What a supervised run does besides training: saving and surviving, skipping bad batches, stopping, telling."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distributed import RanksFailed, run_distributed
from supervised_inputs import LOSS_TOLERANCE, STEPS, curve, differences, make_inputs, overrides
from supervised_worker import (
    STOP_AFTER,
    train,
    train_and_die,
    train_and_listen,
    train_and_note_samples,
    train_and_stop,
    train_on_poison,
    train_with_modules,
)

from phimr_nemo.config import MidtrainConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.store.shards import iter_shards
from phimr_nemo.supervised.data import SupervisedDataModule, midtrain_data
from phimr_nemo.training.seal import checkpoints, is_sealed

STAGE = "midtrain"
DP2 = ("parallel.data=2", "optim.distributed=true")
LONG, EVERY, KILLED = 20, 10, 13
MEAN_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def reference(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, undisturbed."""
    output = tmp_path_factory.mktemp("reference") / "run"
    run_distributed(train, 1, STAGE, overrides(STAGE, inputs, output))
    return output


def module(inputs: Path, output: Path) -> SupervisedDataModule:
    """The data of these runs."""
    config = load_config(MidtrainConfig, Path("conf/midtrain/tiny.yaml"), overrides(STAGE, inputs, output))
    return midtrain_data(config)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_twenty_steps_equal_ten_and_a_kill_and_ten(dtype: str, inputs: Path, tmp_path: Path) -> None:
    """On two ranks that share the optimizer."""
    settings = [*DP2, f"model.dtype={dtype}", f"max_steps={LONG}", f"checkpoint.every={EVERY}"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_distributed(train, 2, STAGE, overrides(STAGE, inputs, straight, settings))
    with pytest.raises(RanksFailed):
        run_distributed(train_and_die, 2, STAGE, overrides(STAGE, inputs, killed, settings), KILLED)
    assert [path.name for path in checkpoints(killed / "checkpoints")] == [f"step={EVERY}"]
    run_distributed(train, 2, STAGE, overrides(STAGE, inputs, killed, settings))
    assert [row["step"] for row in read_metrics(killed)] == list(range(1, LONG + 1))
    assert differences(straight, killed) == (0.0, 0.0, 0.0)


def test_sigusr1_and_an_asynchronous_save_lose_nothing(reference: Path, inputs: Path, tmp_path: Path) -> None:
    settings = overrides(STAGE, inputs, tmp_path / "run", ["checkpoint.asynchronous=true", "checkpoint.every=2"])
    assert run_distributed(train_and_stop, 1, STAGE, settings, "SIGUSR1") == [True]
    [newest] = checkpoints(tmp_path / "run" / "checkpoints")
    assert newest.name == f"step={STOP_AFTER}"
    assert is_sealed(newest)
    run_distributed(train, 1, STAGE, settings)
    assert differences(reference, tmp_path / "run") == (0.0, 0.0, 0.0)
    [last] = checkpoints(tmp_path / "run" / "checkpoints")
    assert last.name == f"step={STEPS}"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_damaged_last_checkpoint_is_passed_over_for_the_one_before(
    reference: Path, inputs: Path, tmp_path: Path
) -> None:
    settings = ["checkpoint.every=2", "checkpoint.keep=2"]
    run_distributed(train_and_stop, 1, STAGE, overrides(STAGE, inputs, tmp_path / "run", settings))
    newest, before = checkpoints(tmp_path / "run" / "checkpoints")
    assert (newest.name, before.name) == (f"step={STOP_AFTER}", "step=2")
    largest = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    [said] = run_distributed(train_and_listen, 1, STAGE, overrides(STAGE, inputs, tmp_path / "run", settings))
    assert [message for message in said if f"{newest} is damaged" in message]
    assert differences(reference, tmp_path / "run") == (0.0, 0.0, 0.0)


def test_another_layout_continues_in_both_directions(reference: Path, inputs: Path, tmp_path: Path) -> None:
    """TP2 -> one process, and one process -> PP2 (the other test goes TP2 -> PP2)."""
    for name, first, second in (("a", ["parallel.tensor=2"], []), ("b", [], ["parallel.pipeline=2"])):
        run = tmp_path / name
        run_distributed(train_and_stop, 1 + len(first), STAGE, overrides(STAGE, inputs, run, first))
        run_distributed(train, 1 + len(second), STAGE, overrides(STAGE, inputs, run, second))
        assert len(curve(run)) == STEPS
        assert differences(reference, run)[0] < LOSS_TOLERANCE


def test_a_run_that_is_continued_twice_knows_its_place_in_the_data(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint's step says how many samples are behind it, however often the run was stopped."""
    monkeypatch.setattr("megatron.core.num_microbatches_calculator.update_num_microbatches", lambda **_: None)
    data = module(inputs, tmp_path / "run")
    # Lightning restores the data before the trainer's step.
    data.trainer = SimpleNamespace(global_step=0)
    data.load_state_dict({"consumed_samples": 6 * data.global_batch})
    data.trainer.global_step = 10
    assert data.state_dict() == {"consumed_samples": 10 * data.global_batch}


POISONED_STEP = 3


@pytest.fixture(scope="module")
def poisoned(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """A sample of the third batch, and what names its row."""
    data = module(inputs, tmp_path_factory.mktemp("unused") / "run")
    sample = (POISONED_STEP - 1) * 4 + 1
    return sample, data.train.source.describe(data.train.row_number(sample))


@pytest.mark.parametrize(
    ("factor", "rules"),
    [
        (math.nan, ["guard.on_nan=skip"]),
        (40.0, ["guard.spike_factor=3.0", "guard.spike_window=2", "guard.on_spike=skip"]),
    ],
    ids=["not a number", "spike"],
)
def test_a_harmful_batch_changes_nothing_on_any_rank(
    factor: float, rules: list[str], poisoned: tuple[int, dict[str, Any]], inputs: Path, tmp_path: Path
) -> None:
    sample, row = poisoned
    settings = overrides(STAGE, inputs, tmp_path / "run", [*DP2, *rules])
    for digests in run_distributed(train_on_poison, 2, STAGE, settings, sample, factor, True):
        assert len(digests) == STEPS
        same = [step for step in range(2, STEPS + 1) if digests[step - 1] == digests[step - 2]]
        assert same == [POISONED_STEP]
    losses = [loss for loss, _ in curve(tmp_path / "run")]
    assert all(math.isfinite(loss) for loss in losses[:2] + losses[3:])
    record = json.loads((tmp_path / "run" / "guard" / f"step-{POISONED_STEP:08d}.json").read_text())
    assert row in record["rows"]
    assert len(record["rows"]) == 4
    assert record["action"] == "skip"
    assert RunDirectory(tmp_path / "run").closing_facts()["skipped_batches"] == 1


def test_without_the_guard_the_batch_does_its_harm(
    poisoned: tuple[int, dict[str, Any]], inputs: Path, tmp_path: Path
) -> None:
    """The planted fault."""
    settings = overrides(STAGE, inputs, tmp_path / "run", ["max_steps=4"])
    # The export may refuse such weights.
    with contextlib.suppress(RanksFailed):
        run_distributed(train_on_poison, 1, STAGE, settings, poisoned[0], math.nan, False)
    losses = [loss for loss, _ in curve(tmp_path / "run")]
    assert len(losses) == 4
    assert not math.isfinite(losses[3])


def test_the_run_can_end_at_such_a_batch_instead(
    poisoned: tuple[int, dict[str, Any]], inputs: Path, tmp_path: Path
) -> None:
    settings = overrides(STAGE, inputs, tmp_path / "run", ["guard.on_nan=stop"])
    with pytest.raises(RanksFailed, match="step 3 is not trained on"):
        run_distributed(train_on_poison, 1, STAGE, settings, poisoned[0], math.nan, True)
    assert (tmp_path / "run" / "guard" / f"step-{POISONED_STEP:08d}.json").is_file()
    assert not (tmp_path / "run" / "hf").exists()


CONVERGING = (
    *("validation_rows=4", "validate_every=1", "checkpoint.best=true"),
    # Nothing but the first measurement is progress.
    *("early_stopping.patience=4", "early_stopping.min_delta=100.0"),
)


def test_training_ends_when_validation_gets_no_better_also_after_an_interruption(
    inputs: Path, tmp_path: Path
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_distributed(train, 1, STAGE, overrides(STAGE, inputs, straight, CONVERGING))
    assert run_distributed(train_and_stop, 1, STAGE, overrides(STAGE, inputs, stopped, CONVERGING)) == [True]
    run_distributed(train, 1, STAGE, overrides(STAGE, inputs, stopped, CONVERGING))
    for run in (straight, stopped):
        facts = RunDirectory(run).closing_facts()
        # The first measurement, and patience = 4 more.
        assert (facts["steps"], facts["converged"]) == (5, True)
        measured = [row["step"] for row in read_metrics(run) if "val_loss" in row]
        assert measured == [1, 2, 3, 4, 5]
        validation = {row["step"]: row["val_loss"] for row in read_metrics(run) if "val_loss" in row}
        best = min(validation, key=lambda step: validation[step])
        kept = {path.name for path in checkpoints(run / "checkpoints")}
        assert kept == {"step=5", f"step={best}"}
        assert facts["exported_step"] == best
        assert facts["measure"] == {"metric": "val_loss", "value": validation[best]}
    assert differences(straight, stopped) == (0.0, 0.0, 0.0)


EVEN_LENGTH = """
from phimr_nemo.verify import Verdict

def grade(response, answer):
    return Verdict("wrong" if len(response) % 2 else "correct", "", "")
"""


def test_pass1_while_training_is_the_model_s_own_and_disturbs_nothing(
    reference: Path, inputs: Path, tmp_path: Path
) -> None:
    """On a pipeline: the weights come from two processes. The last answers are those of the exported model, and the
    configuration's grader judges them."""
    from phimr_nemo.config import LocalEngine
    from phimr_nemo.data.chat import decode_response, load_tokenizer, render_prompts
    from phimr_nemo.data.synthetic.problems import generate_problems
    from phimr_nemo.generate.engines import SampledModel, open_engine
    from phimr_nemo.generate.sampler import Request, SamplingParams
    from phimr_nemo.store.content import content_seed

    (tmp_path / "even_length.py").write_text(EVEN_LENGTH, "utf-8")
    count, tokens = 3, 12
    evaluation = [
        *("evaluation.every=3", "evaluation.problems.kind=synthetic", f"evaluation.problems.count={count}"),
        *("evaluation.problems.split=heldout", "evaluation.samples=2", "evaluation.prompt='{question}'"),
        *("evaluation.temperature=0.6", "evaluation.top_p=0.95", f"evaluation.max_new_tokens={tokens}"),
        "evaluation.grader=even_length:grade",
    ]
    run = tmp_path / "run"
    settings = overrides(STAGE, inputs, run, ["parallel.pipeline=2", *evaluation])
    run_distributed(train_with_modules, 2, STAGE, settings, str(tmp_path))
    assert differences(reference, run)[0] < LOSS_TOLERANCE
    scores = {row["step"]: row["pass1"] for row in read_metrics(run) if "pass1" in row}
    assert list(scores) == [3, STEPS]
    written = json.loads((run / "evaluation" / f"step-{STEPS:08d}.json").read_text())
    rows = written["responses"]
    even = [len(row["response"]) % 2 == 0 for row in rows]
    assert [row["verdict"] == "correct" for row in rows] == even
    assert scores[STEPS] == pytest.approx(sum(even) / len(even))
    assert 0 < sum(even) < len(even)
    assert written["grader"].startswith("even_length:grade")
    problems = generate_problems(0, count, "heldout").to_pylist()
    questions = [problem["question"] for problem in problems]
    params = SamplingParams(0.6, 0.95, tokens)
    model = SampledModel(directory=run / "hf", turns=questions)
    sampler = open_engine(LocalEngine(max_batch=8), model, params).sampler
    tokenizer = load_tokenizer(run / "hf")
    requests = [
        Request(f"{problem['id']}:{n}", tuple(ids), content_seed("0", problem["id"], str(n)))
        for problem, ids in zip(problems, render_prompts(tokenizer, questions), strict=True)
        for n in range(2)
    ]
    completions = sampler.sample(requests, params)
    assert [row["response"] for row in rows] == [decode_response(tokenizer, c.token_ids) for c in completions]


def test_the_loss_is_the_global_mean_however_the_batch_is_cut(reference: Path, inputs: Path, tmp_path: Path) -> None:
    """Against one batch on one process, with rows whose counts of predicted tokens differ."""
    data = module(inputs, tmp_path / "unused")
    counts = [int(data.train[sample].loss_mask.sum()) for sample in range(4)]
    assert len(set(counts)) > 1
    one_batch = tmp_path / "one"
    run_distributed(train, 1, STAGE, overrides(STAGE, inputs, one_batch, ["micro_batch=4", "max_steps=1"]))
    wanted = np.array(curve(one_batch)[0])
    for name, ranks, cut in (("2", 1, ["micro_batch=2"]), ("dp", 2, [*DP2, "micro_batch=2"])):
        run_distributed(train, ranks, STAGE, overrides(STAGE, inputs, tmp_path / name, [*cut, "max_steps=1"]))
        assert np.abs(np.array(curve(tmp_path / name)[0]) / wanted - 1).max() < MEAN_TOLERANCE
    assert np.abs(np.array(curve(reference)[0]) / wanted - 1).max() < MEAN_TOLERANCE


def test_a_resumed_run_reads_nothing_again_and_each_rank_its_part_only(inputs: Path, tmp_path: Path) -> None:
    settings = overrides(STAGE, inputs, tmp_path / "run", DP2)
    run_distributed(train_and_stop, 2, STAGE, settings)
    batch = 4
    for rank, read in enumerate(run_distributed(train_and_note_samples, 2, STAGE, settings)):
        # Micro-batches of one row go to the ranks in turn.
        mine = [sample for sample in range(STOP_AFTER * batch, STEPS * batch) if sample % 2 == rank]
        assert read[: len(mine)] == mine
        assert all(sample % 2 == rank and sample >= STOP_AFTER * batch for sample in read)


def test_workers_that_prepare_batches_change_nothing(reference: Path, inputs: Path, tmp_path: Path) -> None:
    run_distributed(train, 1, STAGE, overrides(STAGE, inputs, tmp_path / "run", ["data_workers=2"]))
    assert differences(reference, tmp_path / "run") == (0.0, 0.0, 0.0)


def test_the_metrics_count_what_was_trained_on(reference: Path, inputs: Path, tmp_path: Path) -> None:
    """Rates times time and processes are the tokens of the rows, on one process and on two."""
    data = module(inputs, tmp_path / "unused")
    run_distributed(train, 2, STAGE, overrides(STAGE, inputs, tmp_path / "run", [*DP2, "run.log_every=3", *WANDB]))
    for run, processes, every in ((reference, 1, 1), (tmp_path / "run", 2, 3)):
        lines = [row for row in read_metrics(run) if "loss" in row]
        assert [row["step"] for row in lines] == list(range(every, STEPS + 1, every))
        for row in lines:
            step = row["step"]
            rows = [data.train[sample] for sample in range((step - every) * 4, step * 4)]
            share = row["step_time"] * every * processes
            expected = {
                "tokens": sum(len(item.input_ids) for item in rows),
                "slots": 4 * every * 192,
                "valid_tokens": sum(int(item.loss_mask.sum()) for item in rows),
            }
            for name, count in expected.items():
                assert row[f"{name}_per_second_per_gpu"] * share == pytest.approx(count, rel=1e-9)
            assert row["rows"] == 4 * step
            assert row["epoch"] == pytest.approx(4 * step / data.train.order.rows)
            assert row["memory_gib"] > 0
            assert row["eta_seconds"] >= 0
        assert lines[-1]["eta_seconds"] == 0
        assert (run / "training.png").stat().st_size > 0
        assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    # W&B offline: one run with the metrics, for `wandb sync`.
    [offline] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb"))


WANDB = ("tracking.wandb.project=test", "tracking.wandb.mode=offline")


def test_the_prompt_is_left_out_of_the_loss_or_not(inputs: Path) -> None:
    from phimr_nemo.data.chat import load_tokenizer, render_prompt
    from phimr_nemo.data.rows.batches import IGNORED_LABEL, next_token_labels
    from phimr_nemo.supervised.rowsource import Conversations

    tokenizer = load_tokenizer(inputs / "base" / "hf")
    [table] = iter_shards(inputs / "sft", "conversations")
    for loss_on in ("response", "all"):
        source = Conversations(inputs / "sft", tokenizer, loss_on)
        for number, item in enumerate(table.to_pylist()[:5]):
            row = source[number]
            prompt = render_prompt(tokenizer, item["question"])
            assert row.input_ids[: len(prompt)].tolist() == prompt
            predicted = np.flatnonzero(next_token_labels(row) != IGNORED_LABEL)
            first = len(prompt) - 1 if loss_on == "response" else 0
            assert predicted.tolist() == list(range(first, len(row.input_ids) - 1))
            assert source.describe(number)["id"] == item["id"]


def test_a_conversation_that_is_too_long_is_refused_before_training(inputs: Path) -> None:
    from phimr_nemo.data.chat import load_tokenizer
    from phimr_nemo.supervised.rowsource import Conversations

    source = Conversations(inputs / "sft", load_tokenizer(inputs / "base" / "hf"), "response")
    longest = max(len(source[number].input_ids) for number in range(len(source)))
    source.check(longest, 0, 1)
    with pytest.raises(UserError, match=f"{longest} tokens"):
        source.check(longest - 1, 0, 1)


def test_the_validation_loss_is_the_same_however_its_batches_are_cut(inputs: Path, tmp_path: Path) -> None:
    """Two validation batches, as one micro-batch each, as four, shared by two ranks, and each sequence shared by two.

    The step before it is computed with attention recomputed in the last case, which changes nothing either.
    """
    found = []
    settings = ["validation_rows=8", "validate_every=1", "max_steps=1"]
    context = ["parallel.context=2", "model.recompute=selective"]
    for name, ranks, cut in (("1", 1, ["micro_batch=4"]), ("4", 1, []), ("dp", 2, [*DP2]), ("cp", 2, context)):
        run_distributed(train, ranks, STAGE, overrides(STAGE, inputs, tmp_path / name, [*settings, *cut]))
        [value] = [row["val_loss"] for row in read_metrics(tmp_path / name) if "val_loss" in row]
        found.append(value)
    assert np.abs(np.array(found) / found[0] - 1).max() < MEAN_TOLERANCE
