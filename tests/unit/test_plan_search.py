"""Which layouts are found, refused and ranked; the ready-made ones; the command's output."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from phimr_nemo.config import GenerationPlanConfig, RoundsConfig, load_config
from phimr_nemo.config.engine import LocalEngine
from phimr_nemo.config.load import flat, read_preset
from phimr_nemo.errors import UserError
from phimr_nemo.model.layout import check_layout
from phimr_nemo.plan.command import run_plan
from phimr_nemo.plan.generation import plan_generation
from phimr_nemo.plan.hardware import GPUS, NODE_EFFICIENCY
from phimr_nemo.plan.request import LAYOUT_KEYS, TrainingRequest, find_model, read_request
from phimr_nemo.plan.rounds import Round
from phimr_nemo.plan.sampling import sampling_time, sync_time
from phimr_nemo.plan.search import TrainingPlan, candidates, plan_training
from phimr_nemo.plan.workload import training_workload
from phimr_nemo.process.memory import GIBIBYTE

CONF = Path(__file__).resolve().parents[2] / "conf"
STAGES = ("midtrain", "sft", "dpo", "grpo", "distill")
READY_MADE = [path for stage in STAGES for path in sorted((CONF / stage).glob("*-*x*.yaml"))]
MODELS = sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"tiny"})
SHORTER = dict.fromkeys(("grpo", "distill"), ("max_new_tokens=4096",))
OWN_LENGTHS = ("sequence_length", "max_new_tokens")
"""What a layout changes for a model whose context is shorter than the paper's sequences."""
NEAR_THE_BEST = 1.35
"""A ready-made layout's time over the fastest's: near it, and simple."""


def planned(*arguments: str, config: Path | None = None) -> tuple[TrainingRequest, TrainingPlan]:
    request = read_request(arguments, config)
    assert isinstance(request, TrainingRequest)
    return request, plan_training(request.plan, request.config, request.arch, request.pinned)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, as_json: bool = True) -> Any:
    run_plan(arguments, None, as_json=as_json)
    out = capsys.readouterr().out
    return json.loads(out) if as_json else out


def test_every_combination_is_looked_at_once() -> None:
    request = read_request(["stage=midtrain", "gpus=8", "parallel.virtual=1"], None)
    assert isinstance(request, TrainingRequest)
    found = list(candidates(request.config, 8, request.pinned))
    assert len(found) == len(set(found))
    layouts = {(c.parallel.tensor, c.parallel.pipeline, c.parallel.context, c.parallel.data) for c in found}
    brute_force = {
        sizes for sizes in itertools.product(range(1, 9), repeat=4) if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 8
    }
    assert layouts == brute_force
    # Four micro-batches, and nothing, the feed-forward part or all of a layer computed again.
    assert len(found) == len(layouts) * 4 * 3
    assert all(c.parallel.world_size == 8 and c.parallel.sequence == (c.parallel.tensor > 1) for c in found)


def test_fitting_layouts_are_possible_small_enough_and_in_order() -> None:
    request, plan = planned("stage=midtrain", "gpus=16")
    assert plan.usable == pytest.approx(0.9 * GPUS["h100-80g"].memory)
    for option in plan.fitting:
        check_layout(request.arch, option.candidate.parallel)
        assert option.memory.total <= plan.usable
        assert sum(option.memory.parts().values()) == pytest.approx(option.memory.total)
        assert 128 % (option.candidate.micro_batch * option.candidate.parallel.data) == 0
        tokens = option.tokens_a_gpu_second * 16 * option.seconds
        assert tokens == pytest.approx(128 * 16_384)
        assert 0 < option.mfu < 0.6
    times = [option.seconds for option in plan.fitting]
    assert all(later > 0.98 * earlier for earlier, later in itertools.pairwise(times))
    for refused in plan.refused:
        assert refused.memory.total - plan.usable == pytest.approx(refused.excess)
        assert refused.excess > 0


def test_fixed_keys_stay() -> None:
    request, plan = planned("stage=sft", "gpus=8", "parallel.tensor=4", "micro_batch=2", "model.recompute=full")
    assert request.pinned == {"parallel.tensor", "micro_batch", "model.recompute"}
    for option in plan.fitting:
        assert (option.candidate.parallel.tensor, option.candidate.micro_batch) == (4, 2)
        assert option.candidate.recompute == "full"


def test_fp8_is_faster_and_keeps_copies_of_the_weights() -> None:
    fixed = ("stage=midtrain", "gpus=8", "parallel.tensor=1", "parallel.context=2", "micro_batch=1")
    plain, fp8 = planned(*fixed)[1].fitting[0], planned(*fixed, "model.fp8=current")[1].fitting[0]
    assert fp8.step.linear < 0.6 * plain.step.linear
    layers = 3_836_021_760 - 200_064 * 3072 - 3072
    assert fp8.memory.copies == 2 * layers
    with pytest.raises(UserError, match="fp8"):
        planned(*fixed, "model.fp8=current", "gpu=a100-80g")


@pytest.mark.parametrize("path", READY_MADE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_ready_made_layout_fits_with_head_room_and_is_near_the_fastest(path: Path) -> None:
    stage, (model, _, machine) = path.parent.name, path.stem.rpartition("-")
    gpus, _, card = machine.partition("x")
    makers = {"h100": ("h100-80g", "h200-141g"), "h200": ("h200-141g",)}[card]
    asked = (f"stage={stage}", f"model={model}")
    for gpu in makers:
        request, plan = planned(*asked, f"gpu={gpu}", config=path)
        assert request.pinned == LAYOUT_KEYS
        assert request.plan.gpus == int(gpus)
        (option,) = plan.fitting
        assert option.memory.total <= 0.9 * GPUS[gpu].memory
    paper, values = read_preset(path.with_name("paper.yaml")), read_preset(path)
    lengths = [f"{key}={values[key]}" for key in OWN_LENGTHS if values.get(key) != paper.get(key)]
    arch = find_model(model)
    assert bool(lengths) == (
        paper["sequence_length"] > min(arch.max_position_embeddings, arch.sliding_window or math.inf)
    )
    _, every = planned(*asked, f"gpus={gpus}", f"gpu={makers[0]}", *lengths)
    best = every.fitting[0].seconds
    assert planned(*asked, f"gpu={makers[0]}", config=path)[1].fitting[0].seconds < NEAR_THE_BEST * best


def test_there_are_layouts_for_1_8_32_and_128_gpus_of_every_stage_and_for_8_of_every_model() -> None:
    found = [(path.parent.name, *path.stem.rpartition("-")[::2]) for path in READY_MADE]
    machines = {(stage, model, int(machine.partition("x")[0])) for stage, model, machine in found}
    expected = set(itertools.product(STAGES, ("phi4mini",), (1, 8, 32, 128)))
    assert machines == expected | set(itertools.product(STAGES, MODELS, (8,)))


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"phi4mini"}))
def test_the_layouts_of_a_model_are_a_chain_of_its_own(model: str) -> None:
    before = {"sft": "midtrain", "dpo": "sft", "grpo": "dpo", "distill": "sft"}
    for stage in STAGES:
        values = read_preset(CONF / stage / f"{model}-8xh100.yaml")
        assert values["run"]["output"] == f"runs/{model}/{stage}"
        assert values["base"] == (f"runs/{model}/{before[stage]}/hf" if stage in before else "???")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_every_layout_that_is_planned_for_it(stage: str) -> None:
    request, plan = planned(f"stage={stage}", "gpus=8", "model=phi4", "sequence_length=8192", *SHORTER.get(stage, ()))
    layouts = {option.candidate for option in plan.fitting}
    assert max(candidate.parallel.pipeline for candidate in layouts) > 1
    for candidate in layouts:
        sizes = flat({"parallel": dataclasses.asdict(candidate.parallel), "micro_batch": candidate.micro_batch})
        values = [f"{key}={'null' if value is None else value}" for key, value in sizes.items()]
        load_config(
            type(request.config),
            CONF / stage / "paper.yaml",
            ["base=planned", "sequence_length=8192", *values, *SHORTER.get(stage, ())],
        )


def test_sequences_beyond_a_model_s_context_are_not_planned() -> None:
    with pytest.raises(UserError, match="sequence_length=20480") as caught:
        planned("stage=sft", "model=smollm2-1.7b", "gpus=8")
    assert "8192" in caught.value.rule
    with pytest.raises(UserError, match="sliding window of 2047"):
        planned("stage=sft", "model=phi3-mini", "gpus=8", "sequence_length=2048")
    assert planned("stage=sft", "model=phi3-mini", "gpus=8", "sequence_length=2047")[1].fitting


def test_the_paper_s_run_is_named_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    values = printed(capsys, "stage=midtrain", "gpus=128", "gpu=h100-80g")
    ratio = values["fitting"][0]["tokens_a_gpu_second"] / (150e9 / (128 * 2 * 86_400))
    assert f"{ratio:.2f} times" in values["paper"]
    assert "6,782 tokens/s/GPU, 22.4% MFU" in values["paper"]
    assert printed(capsys, "stage=midtrain", "gpus=64")["paper"] is None


def test_what_is_not_measured_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    values = printed(capsys, "stage=grpo", "gpus=32", "gpu=a100-80g", "gpus=64")
    assert values["is_extrapolated"] is True
    text = " ".join(values["notes"])
    for word in ("not measured", "assumption", "sampling: extrapolated", "attention efficiency"):
        assert word in text
    option = values["fitting"][0]
    rounds = option["rollouts"]["sampling"]["seconds"] + option["rollouts"]["sync"]
    assert option["training_seconds"] == pytest.approx(sum(option["step_seconds"].values()))
    assert option["seconds"] == pytest.approx(rounds + option["training_seconds"])
    table = printed(capsys, "stage=sft", "gpus=8", as_json=False)
    for word in ("recompute", "gradients (fp32)", "extrapolated", "do not fit", "largest part", "waiting"):
        assert word in table


def best_round(*arguments: str) -> Round:
    rollouts = planned(*arguments)[1].fitting[0].rollouts
    assert rollouts is not None
    return rollouts


def test_servers_on_gpus_of_their_own_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """They hold nothing of the trainer's GPUs, share the rollouts among themselves, and are counted in the price."""
    layout = ("stage=grpo", "gpus=8", "parallel.tensor=2", "micro_batch=1", "model.recompute=full", "gpu=h200-141g")
    few, many = (planned(*layout, f"server_gpus={count}", "ahead=0")[1].fitting[0] for count in (4, 16))
    assert few.memory.sampler == 0
    (request, plan), gpu = planned(*layout), GPUS["h200-141g"]
    config = request.config
    assert isinstance(config, RoundsConfig)
    for option, count in ((few, 4), (many, 16)):
        assert option.rollouts is not None
        assert option.rollouts.servers == count
        lengths = training_workload(request.plan, config).lengths
        free = 0.9 * gpu.memory - 2 * 3_836_021_760
        sequences = config.prompts_per_step * config.group_size // count
        by_hand = sampling_time(request.arch, gpu, "bf16", sequences=sequences, lengths=lengths, free_bytes=free)
        assert option.rollouts.sampling == by_hand
        assert by_hand is not None
        assert option.seconds == pytest.approx(option.training + by_hand.seconds + option.rollouts.sync)
        assert option.tokens_a_gpu_second * (8 + count) * option.seconds == pytest.approx(plan.workload.tokens)
    # Ahead, the slower of both is waited for.
    ahead = planned(*layout, "server_gpus=4", "ahead=1", "correction={kind: truncated, cap: 2.0}")[1].fitting[0]
    assert ahead.rollouts is not None
    assert few.rollouts is not None
    assert few.rollouts.sampling is not None
    longer = max(few.training, few.rollouts.sampling.seconds)
    assert ahead.seconds == pytest.approx(longer + ahead.rollouts.sync)
    assert "8 x h200-141g and 4 of servers" in printed(capsys, *layout, "server_gpus=4", as_json=False)


def test_weights_go_once_to_each_node_of_rollout_servers() -> None:
    size, layout = 2 * 3_836_021_760, ("stage=grpo", "gpus=16", "parallel.tensor=2")
    assert best_round(*layout, "sync_bytes_a_second=1e9").sync == pytest.approx(2 * size / 1e9)
    assert best_round(*layout, "sync_bytes_a_second=1e9", "server_gpus=24").sync == pytest.approx(3 * size / 1e9)
    # An engine of the trainer's own gathers them over the node's links.
    # A directory is written once and read by all.
    shared = best_round(*layout, "sync_bytes_a_second=1e9", "engine.directory=/shared").sync
    assert shared == pytest.approx(size / 1e9)
    arch, gpu = planned(*layout)[0].arch, GPUS["h100-80g"]
    own = sync_time(arch, gpu, "bf16", engine=LocalEngine(), gpus=16, bytes_a_second=None)
    assert own == pytest.approx(size / (gpu.node_bandwidth * NODE_EFFICIENCY))
    with pytest.raises(UserError, match="sync_bytes_a_second") as caught:
        planned(*layout, "sync_bytes_a_second=null")
    remedy = caught.value.remedy.split(",")[0]
    assert planned(*layout, remedy)[1].fitting


def test_a_colocated_server_s_turn_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """80 GB, 2 data-parallel GPUs: what is held while a step trains, what is free while it samples, what moves."""
    numbers = 3_836_021_760
    layout = ("stage=grpo", "gpus=8", "parallel.tensor=2", "parallel.pipeline=1", "parallel.context=1", "kl=0.1")
    settings = ("micro_batch=1", "model.recompute=full", "sequence_length=8192", "max_new_tokens=7168")
    apart = planned(*layout, *settings)[1].fitting[0]
    option = planned(*layout, *settings, "engine.colocated=true")[1].fitting[0]
    assert apart.rollouts is not None
    assert apart.rollouts.sampling is not None
    rollouts = option.rollouts
    assert rollouts is not None
    assert rollouts.sampling is not None
    # Asleep it keeps 2 GiB; on GPUs of its own it would keep nothing of these.
    assert option.memory.sampler == 2 * GIBIBYTE
    assert option.memory.total == pytest.approx(apart.memory.total + 2 * GIBIBYTE)
    gpu, state = GPUS["h100-80g"], option.memory.rank.state
    moved = state.optimizer + option.memory.reference
    assert rollouts.offload == pytest.approx(2 * moved / (0.8 * 64e9))
    assert option.seconds - rollouts.offload == pytest.approx(
        rollouts.sync + rollouts.sampling.seconds + sum(dataclasses.asdict(option.step).values())
    )
    # Half of the GPU, less weights and what is kept; the trainer's weights leave more than that.
    assert 0.9 * gpu.memory - state.weights - 3 * GIBIBYTE > 0.5 * gpu.memory
    free = 0.5 * gpu.memory - 2 * numbers - 2 * GIBIBYTE
    longest = rollouts.sampling.cache_bytes / rollouts.sampling.at_once
    at_once = min(free // longest, rollouts.sampling.at_once)
    assert rollouts.sampling.at_once == at_once <= apart.rollouts.sampling.at_once
    # A share that leaves no room for the longest response is refused, and the notes say what is assumed.
    assert not planned(*layout, *settings, "engine.colocated=true", "engine.memory_share=0.12")[1].fitting
    values = printed(capsys, *layout, *settings, "engine.colocated=true")
    assert "colocated servers" in " ".join(values["notes"])
    assert values["fitting"][0]["rollouts"]["offload"] == rollouts.offload


def test_generation_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(GenerationPlanConfig, Path("conf/plan/generate.yaml"), ["problems=1000", "rollouts=4"])
    plan = plan_generation(config)
    tokens = 4000 * config.mean_tokens
    assert plan.gpu_hours * 3600 * config.tokens_a_gpu_second == pytest.approx(tokens)
    assert plan.core_hours * 3600 * config.answers_a_core_second == pytest.approx(4000)
    assert plan.stored_bytes * config.compression == pytest.approx(tokens * config.bytes_a_token)
    assert plan.gpu_days * 24 * config.gpus == pytest.approx(plan.gpu_hours)
    # 1,200 questions of 195 + 2 tokens to the judge, at 0.15 and 0.60 dollars a million.
    assert (plan.judge_requests, plan.judge_tokens) == (1200, 1200 * 197)
    assert plan.judge_dollars == pytest.approx(1200 * (195 * 0.15 + 2 * 0.60) / 1e6)
    values = printed(capsys, "stage=generate", "problems=1000", "rollouts=4")
    assert values["rollouts"] == 4000
    assert values["is_extrapolated"] is True
    table = printed(capsys, "stage=generate", as_json=False)
    assert "12,800,000" in table
    assert "answers/s/core, measured" in table


def test_nothing_fits_is_an_error_that_names_the_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"needs \d+\.\d of 71\.7 GiB; largest part: optimizer") as caught:
        run_plan(["stage=sft", "gpus=1"], None, as_json=False)
    assert caught.value.remedy
    assert "too much" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "no stage"),
        (["stage=curate"], "stage=curate"),
        (["stage=midtrain", "gpu=abacus"], "abacus"),
        (["stage=midtrain", "model=phi9"], "phi9"),
        (["stage=midtrain", "model=tiny"], "vocab_size"),
        (["stage=midtrain", "gpus=0"], "gpus"),
        (["stage=midtrain", "no_such=1"], "no_such"),
        (["stage=generate", "no_such=1"], "no_such"),
        (["stage=midtrain", "gpus=8", "parallel.tensor=3"], "none of"),
        (["stage=midtrain", "gpus"], "gpus"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run_plan(arguments, None, as_json=True)
