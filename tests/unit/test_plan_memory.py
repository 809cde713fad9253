"""The planner's memory formulas: whole numbers that other code states too, and what splitting must do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from phimr_nemo.config import ParallelConfig
from phimr_nemo.losses import logprobs
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.plan import memory
from phimr_nemo.plan.memory import MicroBatch, largest_rank, rank_memory
from phimr_nemo.plan.weights import stage_parameters, state_memory

CONF = Path(__file__).resolve().parents[2] / "conf"
PHI4_MINI = Architecture.from_preset(yaml.safe_load((CONF / "model" / "phi4mini.yaml").read_text("utf-8")))
ROW = MicroBatch(sequences=1, length=16_384, packed=True)
LOGITS = 3 * 2**28
"""Bytes that a chunk of logits may take."""


@pytest.mark.parametrize("room", [1, 4 * 200_064, LOGITS])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_chunk_is_the_loss_s(dtype: str, room: int) -> None:
    words = PHI4_MINI.vocab_size
    weight = torch.empty(words, 8, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], device="meta")
    planned = memory.logits_chunk(PHI4_MINI, ParallelConfig(), dtype, 1e9, "pytorch", room, "own")
    assert planned == logprobs.chunk_within(room, weight, "own") == max(1, room // (4 * words))


def test_a_chunk_on_a_gpu_is_in_two_bytes() -> None:
    chunk = memory.logits_chunk(PHI4_MINI, ParallelConfig(tensor=2), "bf16", 1e9, "transformer_engine", LOGITS, "own")
    assert chunk == LOGITS // (2 * 100_032)


def test_logits_in_fp32_are_in_four_bytes_with_a_gradient_in_two() -> None:
    layout, tokens = ParallelConfig(tensor=2), 1e5
    chunk = memory.logits_chunk(PHI4_MINI, layout, "bf16", tokens, "transformer_engine", LOGITS, "fp32")
    assert chunk == LOGITS // (4 * 100_032)
    held = memory.output_bytes(
        PHI4_MINI, layout, "bf16", tokens, "transformer_engine", logits_bytes=LOGITS, output_format="fp32"
    )
    assert held == (4 + 2) * chunk * 100_032 + 2 * 2 * tokens * PHI4_MINI.hidden_size


def test_one_rank_holds_every_parameter_once() -> None:
    assert stage_parameters(PHI4_MINI, ParallelConfig(), 0) == PHI4_MINI.num_parameters == 3_836_021_760


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 4), (4, 1), (8, 8)])
def test_stages_add_up_to_the_model_with_its_copies(tensor: int, pipeline: int) -> None:
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline)
    total = tensor * sum(stage_parameters(PHI4_MINI, layout, stage) for stage in range(pipeline))
    norms = (2 * PHI4_MINI.num_hidden_layers + 1) * PHI4_MINI.hidden_size
    second_embedding = PHI4_MINI.vocab_size * PHI4_MINI.hidden_size if pipeline > 1 else 0
    assert total == PHI4_MINI.num_parameters + (tensor - 1) * norms + second_embedding


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bf16", 2 + 4 + 12), ("fp32", 4 + 4 + 8)])
def test_bytes_a_parameter_of_mixed_precision_adam(dtype: str, bytes_each: int) -> None:
    assert state_memory(1000, ParallelConfig(), dtype, distributed=True).total == 1000 * bytes_each


def test_the_optimizer_is_shared_over_data_and_context() -> None:
    layout = ParallelConfig(data=4, context=2)
    shared = state_memory(1000, layout, "bf16", distributed=True)
    whole = state_memory(1000, layout, "bf16", distributed=False)
    assert shared.optimizer * 8 == whole.optimizer
    assert (shared.weights, shared.gradients) == (whole.weights, whole.gradients)


def test_early_stages_hold_more_micro_batches() -> None:
    layout = ParallelConfig(pipeline=4)
    ranks = [
        rank_memory(
            PHI4_MINI,
            layout,
            "bf16",
            "transformer_engine",
            "none",
            ROW,
            micro_batches=8,
            distributed=True,
            logits_bytes=LOGITS,
            output_format="own",
            stage=stage,
        )
        for stage in range(4)
    ]
    assert [rank.in_flight for rank in ranks] == [4, 3, 2, 1]
    assert [rank.output > 0 for rank in ranks] == [False, False, False, True]


def kept(layout: ParallelConfig, recompute: memory.Recompute) -> float:
    batch: dict[str, Any] = {"micro_batches": 1, "distributed": True, "logits_bytes": LOGITS, "output_format": "own"}
    return largest_rank(PHI4_MINI, layout, "bf16", "transformer_engine", recompute, ROW, **batch).activations


def test_full_recomputation_keeps_one_input_a_layer() -> None:
    hidden_states = PHI4_MINI.num_hidden_layers + 2  # each layer's input; the final norm's input and output
    numbers = 4 + 8 + 24  # its statistic, the word's id, and what the label's log-probability keeps
    assert kept(ParallelConfig(), "full") == ROW.length * (2 * PHI4_MINI.hidden_size * hidden_states + numbers)
    # Fused attention keeps no scores, so computing its core again frees one number a head and token.
    freed = kept(ParallelConfig(), "none") - kept(ParallelConfig(), "selective")
    assert freed == 4 * PHI4_MINI.num_attention_heads * PHI4_MINI.num_hidden_layers * ROW.length


def test_recomputing_the_feed_forward_part_keeps_its_input() -> None:
    # Gate, value and their product, and of the fused norm its result and statistic.
    freed = 2 * 3 * PHI4_MINI.intermediate_size + 2 * PHI4_MINI.hidden_size + 4
    layers = PHI4_MINI.num_hidden_layers * ROW.length
    assert kept(ParallelConfig(), "none") - kept(ParallelConfig(), "mlp") == freed * layers


def test_sequence_and_context_parallelism_divide_the_activations() -> None:
    one = kept(ParallelConfig(), "none")
    assert kept(ParallelConfig(context=4), "none") == pytest.approx(one / 4)
    assert kept(ParallelConfig(tensor=4, sequence=True), "none") == pytest.approx(one / 4, rel=1e-3)
    assert kept(ParallelConfig(tensor=4), "none") > 1.3 * one / 4


def test_the_output_layer_never_holds_all_logits() -> None:
    all_logits = 4 * PHI4_MINI.vocab_size * ROW.length
    held = {
        kernels: memory.output_bytes(
            PHI4_MINI, ParallelConfig(), "bf16", ROW.length, kernels, logits_bytes=LOGITS, output_format="own"
        )
        for kernels in ("pytorch", "transformer_engine")
    }
    assert held["pytorch"] < 0.35 * all_logits
    # A chunk's logits in bf16, and hidden states of all tokens with their gradients.
    chunk = LOGITS // (2 * PHI4_MINI.vocab_size)
    states = 4 * ROW.length * PHI4_MINI.hidden_size
    assert held["transformer_engine"] == 2 * chunk * PHI4_MINI.vocab_size + states
