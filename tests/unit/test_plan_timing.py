"""The planner's step times: published runs that it was not fitted to, schedules by simulation, the paper's run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.flops import matmul_parameters, model_flops, model_flops_per_token
from phimr_nemo.plan import timing
from phimr_nemo.plan.hardware import GPUS, MEMORY_EFFICIENCY, Gpu, MatmulDtype, group_bandwidth, matmul_rate
from phimr_nemo.plan.memory import micro_batches_in_flight
from phimr_nemo.plan.timing import StepTime, Work, step_time

CONF = Path(__file__).resolve().parents[2] / "conf"
PHI4_MINI = Architecture.from_preset(yaml.safe_load((CONF / "model" / "phi4mini.yaml").read_text("utf-8")))
LLAMA_8B = dataclasses.replace(
    PHI4_MINI,
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_attention_heads=32,
    partial_rotary_factor=1.0,
    tie_word_embeddings=False,
    short_factor=None,
    long_factor=None,
    bos_token_id=128_000,
    eos_token_id=128_001,
    pad_token_id=128_001,
)
LENGTH = 8192
H100 = GPUS["h100-80g"]
OPTIONS: dict[str, Any] = {"distributed": True, "matmul": "bf16", "output_format": "own", "logits_bytes": 3 * 2**28}
CROSS_ENTROPY_TRAFFIC = 16
"""Bytes a word and token of a fused cross-entropy: logits and gradient in bf16, each written once and read once or
twice."""


def llama_speed(name: str, parallel: ParallelConfig, matmul: MatmulDtype, micro_batches: int) -> float:
    """Tokens/s/GPU of Llama-3-8B at 8,192 tokens, predicted for another stack than ours.

    Its output layer computes the logits once and its cross-entropy is fused; its weight gradients are added up inside
    the matrix products.
    """
    gpu = GPUS[name]
    work = Work(tokens=LENGTH, attention_length=LENGTH, micro_batches=micro_batches)
    step = step_time(LLAMA_8B, parallel, gpu, "bf16", "none", work, **(OPTIONS | {"matmul": matmul}))
    tokens = LENGTH * micro_batches / parallel.context
    words = LLAMA_8B.vocab_size
    products = 3 * 2 * words * LLAMA_8B.hidden_size * tokens / matmul_rate(gpu, "bf16")
    traffic = CROSS_ENTROPY_TRAFFIC * words * tokens / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    seconds = step.total - step.output - step.accumulation + products + traffic
    return LENGTH * micro_batches * parallel.data / seconds / parallel.world_size


def test_the_run_that_the_matmul_factor_was_fitted_to() -> None:
    """461 TFLOPS in bf16 on 8 H200, attention counted causally (S. Bekman, Machine Learning Engineering)."""
    speed = llama_speed("h200-141g", ParallelConfig(data=8), "bf16", 1)
    assert speed * model_flops_per_token(LLAMA_8B, LENGTH) == pytest.approx(461e12, rel=0.05)


@pytest.mark.parametrize(
    ("name", "parallel", "micro_batches", "published"),
    [
        # NeMo on DGX H100, FP8: 13,812 tokens/s/GPU (TP1 CP2, Megatron-Core's example of NeMo's configuration).
        ("h100-80g", ParallelConfig(context=2, data=4), 32, 13_812),
        # NeMo 25.02 and 25.09 on DGX B200, FP8: 26,006 and 29,994.
        ("b200-180g", ParallelConfig(data=8), 16, 28_000),
    ],
)
def test_published_runs_that_nothing_was_fitted_to(
    name: str, parallel: ParallelConfig, micro_batches: int, published: float
) -> None:
    assert llama_speed(name, parallel, "fp8", micro_batches) == pytest.approx(published, rel=0.15)


def test_the_paper_s_speed_and_its_utilisation_are_one_number() -> None:
    """150 B tokens in 2 days on 128 H100; 19-22 % MFU, from documents half as long as a row to one a row."""
    speed = 150e9 / (128 * 2 * 24 * 3600)
    assert speed == pytest.approx(6_782, abs=1)
    peak = H100.peak["bf16"]
    assert speed * model_flops_per_token(PHI4_MINI, 16_384) / peak == pytest.approx(0.224, abs=0.001)
    assert speed * model_flops_per_token(PHI4_MINI, 8_192) / peak == pytest.approx(0.19, abs=0.005)
    # By hand: six operations a weight, and twelve a layer, dimension and visible token, which are half of the row.
    by_hand = 6 * matmul_parameters(PHI4_MINI) + 12 * 32 * 3072 * (16_384 + 1) / 2
    assert model_flops_per_token(PHI4_MINI, 16_384) == pytest.approx(by_hand)


def test_the_paper_s_layout_is_predicted_faster_than_its_run() -> None:
    """128 data-parallel H100 with full recomputation: a bar to beat, so the planner must not place it below."""
    work = Work(tokens=16_384, attention_length=6_000, micro_batches=1)
    step = step_time(PHI4_MINI, ParallelConfig(data=128), H100, "bf16", "full", work, **OPTIONS)
    speed = 16_384 / step.total
    assert 1.2 < speed / 6_782 < 2.2


def phi_step(parallel: ParallelConfig, micro_batches: int, **changes: object) -> StepTime:
    work = Work(tokens=16_384, attention_length=6_000, micro_batches=micro_batches)
    work = dataclasses.replace(work, **changes)  # type: ignore[arg-type]
    return step_time(PHI4_MINI, parallel, H100, "bf16", "none", work, **OPTIONS)


def simulated(forward: float, backward: float, stages: int, micro_batches: int) -> float:
    """Seconds of one-forward-one-backward over equal stages, event by event."""
    done: dict[tuple[str, int, int], float] = {}
    orders = []
    for stage in range(stages):
        warmup = min(micro_batches, stages - stage)
        order = [("f", i) for i in range(warmup)]
        for i in range(micro_batches):
            order.append(("b", i))
            if warmup + i < micro_batches:
                order.append(("f", warmup + i))
        orders.append(order)
    clocks, places = [0.0] * stages, [0] * stages
    while any(places[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            while places[stage] < len(orders[stage]):
                kind, i = orders[stage][places[stage]]
                if kind == "f":
                    needs = ("f", i, stage - 1) if stage else None
                else:
                    needs = ("b", i, stage + 1) if stage < stages - 1 else ("f", i, stage)
                if needs is not None and needs not in done:
                    break
                start = max(clocks[stage], done.get(needs, 0.0) if needs else 0.0)
                clocks[stage] = start + (forward if kind == "f" else backward)
                done[kind, i, stage] = clocks[stage]
                places[stage] += 1
    return max(clocks)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 4), (4, 16), (8, 3)])
def test_the_bubble_is_that_of_a_simulated_schedule(
    stages: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the output layer all stages are equal.
    monkeypatch.setattr(timing, "_output_seconds", lambda *_: 0.0)
    step = phi_step(ParallelConfig(pipeline=stages), micro_batches)
    busy = step.total - step.bubble - step.optimizer - step.data
    slot = busy / micro_batches
    assert busy + step.bubble == pytest.approx(simulated(slot / 3, 2 * slot / 3, stages, micro_batches))


def test_the_output_layer_s_stage_slows_all_the_others() -> None:
    even, uneven = phi_step(ParallelConfig(), 8), phi_step(ParallelConfig(pipeline=4), 8)
    assert uneven.output == pytest.approx(even.output / 4)
    # Each of the 8 + 3 slots is as long as the last stage takes.
    slot = (uneven.linear + uneven.attention + uneven.elementwise + uneven.accumulation + uneven.neighbours) / 8
    slot += even.output / 8
    assert uneven.total - uneven.optimizer == pytest.approx((8 + 3) * slot)


@pytest.mark.parametrize(("pipeline", "virtual", "micro_batches"), [(4, 1, 8), (4, 2, 8), (4, 4, 8), (2, 2, 2)])
def test_waiting_micro_batches_are_megatron_s_warmup(
    pipeline: int, virtual: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.pipeline_parallel import schedules

    state = schedules.parallel_state
    monkeypatch.setattr(state, "get_pipeline_model_parallel_world_size", lambda *_: pipeline)
    monkeypatch.setattr(
        state, "get_virtual_pipeline_model_parallel_world_size", lambda *_: virtual if virtual > 1 else None
    )
    layout = ParallelConfig(pipeline=pipeline, virtual=virtual)
    for stage in range(pipeline):
        monkeypatch.setattr(state, "get_pipeline_model_parallel_rank", lambda stage=stage: stage)
        _, _, warmup, _ = schedules.get_pp_rank_microbatches(micro_batches, virtual, pipeline, forward_only=False)
        # After the warm-up one more forward pass comes before the first backward pass.
        waiting = min(micro_batches * virtual, warmup + 1) / virtual
        assert micro_batches_in_flight(layout, micro_batches, stage) == waiting


def test_gradients_and_weights_travel_once_and_may_be_hidden() -> None:
    layout = ParallelConfig(data=128)
    open_ = phi_step(layout, 1, hides_gradients=False, hides_weights=False)
    hidden = phi_step(layout, 1)
    assert open_.data > phi_step(layout, 1, hides_weights=False).data > hidden.data
    # Eight adapters of 50 GB/s a node carry one ring.
    bandwidth = min(8 * 50e9 * 0.85, 450e9 * 0.8)
    expected = (4 + 2) * PHI4_MINI.num_parameters * 127 / 128 / bandwidth
    assert open_.data == pytest.approx(expected)
    assert hidden.data == 0.0
    assert group_bandwidth(H100, 1, 8) == 450e9 * 0.8
    assert group_bandwidth(H100, 8, 16) == pytest.approx(50e9 * 0.85)


def test_full_recomputation_costs_the_layers_forward_pass() -> None:
    work = Work(tokens=16_384, attention_length=6_000, micro_batches=4)
    plain, again = (
        step_time(PHI4_MINI, ParallelConfig(), H100, "bf16", kind, work, **OPTIONS) for kind in ("none", "full")
    )
    assert again.recompute == pytest.approx((plain.linear + plain.attention + plain.elementwise) / 3)
    assert again.total == pytest.approx(plain.total + again.recompute)


def test_recomputing_the_feed_forward_part_costs_its_share_of_the_products() -> None:
    work = Work(tokens=16_384, attention_length=6_000, micro_batches=4)
    plain, again = (
        step_time(PHI4_MINI, ParallelConfig(), H100, "bf16", kind, work, **OPTIONS) for kind in ("none", "mlp")
    )
    # 3 x 3072 x 8192 of these, and 3072 x (3072 + 2 x 1024) + 3072 x 3072 of attention's.
    share = 3 * 8192 / (3 * 8192 + 3072 + 2 * 1024 + 3072)
    assert again.recompute == pytest.approx(share * plain.linear / 3)
    assert again.total == pytest.approx(plain.total + again.recompute)


def test_compute_is_the_counted_operations_over_the_rates() -> None:
    """Layers' products and attention add up to the model FLOPs without the output layer, each at its own rate."""
    step = phi_step(ParallelConfig(), 1)
    linear = step.linear * matmul_rate(H100, "bf16")
    attention = step.attention * H100.attention * H100.peak["bf16"]
    output = 6 * PHI4_MINI.vocab_size * PHI4_MINI.hidden_size * 16_384
    assert linear + attention + output == pytest.approx(model_flops(PHI4_MINI, 16_384, 16_384 * 6_000 / 2))


def test_a_format_without_units_is_refused() -> None:
    with pytest.raises(UserError, match="fp8"):
        matmul_rate(GPUS["a100-80g"], "fp8")


@pytest.mark.parametrize("name", GPUS)
def test_no_gpu_reaches_its_peak(name: str) -> None:
    gpu: Gpu = GPUS[name]
    assert all(0.3 * gpu.peak[dtype] < matmul_rate(gpu, dtype) < gpu.peak[dtype] for dtype in gpu.peak)


def test_an_output_layer_in_8_bits_by_hand() -> None:
    """Its products at FP8's rate; the casts of the matrix once a micro-batch, of the gradient once a token."""
    tokens, words, width = 4096, 200_064, 3072
    work = Work(tokens=tokens, attention_length=1024, micro_batches=1)
    arguments: tuple[Any, ...] = (PHI4_MINI, ParallelConfig(), H100, "bf16", "none", work)
    options: dict[str, Any] = OPTIONS | {"matmul": "fp8", "logits_bytes": 2 * words * tokens}
    plain, eight = (step_time(*arguments, **options | {"output_format": name}) for name in ("own", "fp8"))
    products = 2 * 3 * words * width * tokens
    saved = products / matmul_rate(H100, "bf16") - products / matmul_rate(H100, "fp8")
    casts = (4 * words * tokens + 11 * words * width) / (3.35e12 * 0.8)
    assert plain.output - eight.output == pytest.approx(saved - casts)
    assert saved > 3 * casts
    assert eight.linear == plain.linear


def test_logits_in_fp32_by_hand() -> None:
    """The products stay those of 16 bits; a logit is written and read in four bytes, its gradient in two."""
    tokens, words = 4096, 200_064
    work = Work(tokens=tokens, attention_length=1024, micro_batches=1)
    arguments: tuple[Any, ...] = (PHI4_MINI, ParallelConfig(), H100, "bf16", "none", work)
    # One chunk: forward written and read, backward read; the gradient written and read twice.
    options: dict[str, Any] = OPTIONS | {"logits_bytes": 4 * words * tokens}
    plain, wide = (step_time(*arguments, **options | {"output_format": name}) for name in ("own", "fp32"))
    more = (3 * 4 + 3 * 2) - (3 * 2 + 3 * 2)
    assert wide.output - plain.output == pytest.approx(more * words * tokens / (3.35e12 * 0.8))
    # A product of float32 matrices, which a GPU has no tensor cores for, would take many times the whole layer.
    products = 2 * 3 * words * 3072 * tokens / matmul_rate(H100, "fp32")
    assert products > 5 * wide.output


def test_logits_of_a_chunk_are_computed_once_by_hand() -> None:
    """A chunk saves a product and its writing; the weight's gradient is read and written once a chunk."""
    tokens, words, width = 8192, 200_064, 3072
    work = Work(tokens=tokens, attention_length=1024, micro_batches=1)
    arguments: tuple[Any, ...] = (PHI4_MINI, ParallelConfig(), H100, "bf16", "none", work)
    rooms = {chunks: OPTIONS | {"logits_bytes": 2 * words * tokens / chunks} for chunks in (1, 4)}
    outputs = {chunks: step_time(*arguments, **options).output for chunks, options in rooms.items()}
    again = 2 * words * width * tokens * 3 / 4 / matmul_rate(H100, "bf16")
    traffic = 2 * words * tokens * 3 / 4 + 8 * words * width * 3
    assert outputs[4] - outputs[1] == pytest.approx(again + traffic / (3.35e12 * 0.8))
