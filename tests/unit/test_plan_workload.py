"""Assumed lengths against numbers drawn at random, and what stages make of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from phimr_nemo.config import STAGES, TrainingPlanConfig, load_config
from phimr_nemo.plan.hardware import GPUS
from phimr_nemo.plan.request import find_model
from phimr_nemo.plan.sampling import cache_bytes_a_token, sampling_time
from phimr_nemo.plan.workload import Lengths, Workload, lengths_with_mean, training_workload

DRAWS = 400_000


def workload(stage: str, *overrides: str) -> Workload:
    plan = load_config(TrainingPlanConfig, Path("conf/plan") / f"{stage}.yaml")
    config = load_config(STAGES[stage], Path("conf") / stage / "paper.yaml", ["base=planned", *overrides])
    return training_workload(plan, config)


@pytest.mark.parametrize(("mean", "limit"), [(3000, 16_384), (3000, 4000), (12_000, 25_600), (500, 20_480)])
def test_mean_and_squares_of_cut_lengths(mean: int, limit: int) -> None:
    lengths = lengths_with_mean(mean, limit)
    drawn = np.random.default_rng(0).exponential(lengths.scale, DRAWS).clip(max=limit)
    assert lengths.mean == pytest.approx(mean, rel=1e-9)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert lengths.weighted == pytest.approx((drawn**2).sum() / drawn.sum(), rel=0.01)


def test_a_mean_beyond_the_limit_is_the_limit() -> None:
    lengths = lengths_with_mean(5000, 4096)
    assert (lengths.mean, lengths.weighted) == (4096, 4096)
    assert set(lengths.draw(np.random.default_rng(0), (3,)).tolist()) == {4096.0}


def test_packed_rows_are_full_and_even() -> None:
    rows = workload("midtrain")
    assert rows.tokens == 128 * 16_384
    assert rows.slowest_rank(1, 64) == (2, 16_384.0)
    assert rows.slowest_rank(4, 8) == (4, 4 * 16_384.0)
    # 30 B tokens, five times.
    assert rows.steps * rows.tokens == pytest.approx(150e9)


def test_one_sequence_a_rank_waits_for_the_longest_of_all() -> None:
    """The mean of the largest of n exponentially distributed numbers is their mean times 1 + 1/2 + ... + 1/n."""
    ranks = 16
    sft = dataclasses.replace(workload("sft"), samples=ranks, lengths=Lengths(1000.0, 10**9), length=10**9)
    count, tokens = sft.slowest_rank(1, ranks)
    assert count == 1
    assert tokens == pytest.approx(1000 * sum(1 / i for i in range(1, ranks + 1)), rel=0.1)


def test_one_rank_waits_for_nobody() -> None:
    sft = workload("sft")
    count, tokens = sft.slowest_rank(1, 1)
    assert count == 128
    assert count * tokens == pytest.approx(sft.tokens, rel=0.02)


def test_padding_a_micro_batch_costs_tokens() -> None:
    sft = workload("sft")
    totals = [math.prod(sft.slowest_rank(size, 1)) for size in (1, 2, 4, 8)]
    assert totals == sorted(totals)
    assert totals[1] == pytest.approx(1.5 * totals[0], rel=0.05)  # 1 + 1/2


def test_pairs_end_to_end_fill_rows() -> None:
    packed, padded = workload("dpo"), workload("dpo", "packed=false")
    count, tokens = packed.slowest_rank(1, 1)
    assert count == math.ceil(packed.tokens / (2 * 16_384))
    assert count * tokens == pytest.approx(packed.tokens, rel=0.02)
    assert padded.slowest_rank(1, 1)[0] == 256
    assert padded.largest(1).tokens == packed.largest(1).tokens == 2 * 16_384


@pytest.mark.parametrize(
    ("stage", "overrides", "passes", "reference"),
    [
        ("dpo", [], 1.0, False),
        ("dpo", ["epochs=4"], 0.25, False),
        ("dpo", ["reference.kind=online"], 1.0, True),
        ("grpo", [], 0.0, False),
        ("grpo", ["inner_batches=2"], 1.0, False),
        ("grpo", ["passes=2", "kl=0.1"], 2.0, True),
        ("grpo", ["kl=0.1"], 1.0, True),
        ("distill", [], 1.0, True),
        ("distill", ["inner_batches=2"], 2.0, True),
        ("sft", [], 0.0, False),
    ],
)
def test_passes_without_gradients(stage: str, overrides: list[str], passes: float, reference: bool) -> None:
    found = workload(stage, *overrides)
    assert (found.forward_only, found.reference) == (passes, reference)


def test_rebalancing_leaves_its_share_to_train_on() -> None:
    assert workload("grpo").samples == 64 * 16 // 2


def test_sampling_reads_weights_and_what_was_said_so_far() -> None:
    """A few equal sequences, decoding step by step."""
    arch, gpu, dtype = find_model("phi4mini"), GPUS["h100-80g"], "bf16"
    length, sequences = 512, 4
    found = sampling_time(
        arch, gpu, dtype, sequences=sequences, lengths=Lengths(math.inf, length), free_bytes=2.0**36
    )
    assert found is not None
    read = 0
    for step in range(length):
        read += 2 * arch.num_parameters + sequences * step * 2 * 32 * 8 * 128 * 2
    assert cache_bytes_a_token(arch, dtype) == 2 * 32 * 8 * 128 * 2
    assert found.seconds == pytest.approx(read / (gpu.memory_bandwidth * 0.7), rel=0.01)
    assert found.at_once == sequences


def test_without_room_sequences_take_turns_or_do_not_fit() -> None:
    arch, gpu = find_model("phi4mini"), GPUS["h100-80g"]
    lengths = lengths_with_mean(1000, 4000)
    a_token = cache_bytes_a_token(arch, "bf16")
    found = sampling_time(arch, gpu, "bf16", sequences=64, lengths=lengths, free_bytes=8_000.5 * a_token)
    assert found is not None
    assert found.at_once == 8
    assert sampling_time(arch, gpu, "bf16", sequences=64, lengths=lengths, free_bytes=3_999.0 * a_token) is None


def test_the_decoding_speed_that_the_efficiency_is_explained_by() -> None:
    """Llama-3.1-8B, 256 sequences of 2,048 tokens on an H100: weights once a step, half of the tokens on average."""
    arch = dataclasses.replace(
        find_model("phi4mini"),
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_attention_heads=32,
        tie_word_embeddings=False,
        bos_token_id=128_000,
        eos_token_id=128_001,
        pad_token_id=128_001,
    )
    found = sampling_time(
        arch, GPUS["h100-80g"], "bf16", sequences=256, lengths=Lengths(math.inf, 2048), free_bytes=2.0**37
    )
    assert found is not None
    assert found.tokens_a_second == pytest.approx(11_900, rel=0.01)
