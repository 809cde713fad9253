"""The Megatron model equals transformers' Phi3ForCausalLM in fp32: logits, loss, every gradient, in every layout.

Each comparison has a twin with a planted fault that must break it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_worker as worker
import pytest
import torch
from distributed import run_distributed
from torch import Tensor

from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture

LOGITS = 1e-5
"""Largest difference of logits of size ~5 in fp32 after 4 layers; a fault moves them by more than 1e-2."""
GRADIENT = 1e-4
"""Largest |difference| over |gradient| of a tensor (2-norms)."""
FAULT = 1e-2

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence=True),
    "tp4": ParallelConfig(tensor=4),
    "pp2": ParallelConfig(pipeline=2),
    "pp4": ParallelConfig(pipeline=4),
    "dp2": ParallelConfig(data=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "cp2": ParallelConfig(context=2),
    "cp4": ParallelConfig(context=4),
    "cp2_dp2": ParallelConfig(context=2, data=2),
    "cp2_tp2": ParallelConfig(context=2, tensor=2),
    "cp2_tp2_sp": ParallelConfig(context=2, tensor=2, sequence=True),
    "cp2_pp2": ParallelConfig(context=2, pipeline=2),
}
PACKED = ["one", "tp2", "tp2_sp", "pp2", "cp2", "cp4", "cp2_tp2_sp", "cp2_pp2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> worker.Results:
    return run_distributed(worker.hugging_face, 1, checkpoint, worker.ARCHITECTURE)[0]


@pytest.fixture(scope="module")
def measured(checkpoint: str, reference: worker.Results) -> Callable[[str], worker.Results]:
    """Every layout once, for all tests."""
    cache: dict[str, worker.Results] = {}

    def get(name: str) -> worker.Results:
        if name not in cache:
            layout = LAYOUTS[name]
            cache[name] = last_stage(run_distributed(worker.measure, layout.world_size, checkpoint, layout))
        return cache[name]

    return get


def last_stage(results: list[worker.Results]) -> worker.Results:
    return next(result for result in results if result["logits"] is not None)


def first_tensor(results: list[Any]) -> Tensor:
    return next(result for result in results if result is not None)


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max())


def worst_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == wanted.keys()
    return max((float((found[name] - wanted[name]).norm() / wanted[name].norm()), name) for name in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_log_probabilities_equal_transformers(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    result = measured(layout)
    for name in ("logits", "nll", "nll_warm"):
        assert gap(result[name], reference[name]) <= LOGITS, name
    assert bool((result["nll"][worker.batch()[1] < 0] == 0).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_equals_transformers(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    worst, name = worst_gradient(measured(layout)["gradients"], reference["gradients"])
    assert worst <= GRADIENT, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_returns_the_weights_bit_for_bit(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    weights = measured(layout)["weights"]
    assert weights.keys() == reference["weights"].keys()
    assert all(torch.equal(weights[name], reference["weights"][name]) for name in weights)


@pytest.mark.parametrize("layout", PACKED)
def test_packed_equals_each_document_alone_in_transformers(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    # transformers picks the regime by each document's length, so the policy is per_sequence.
    row = measured(layout)["packed_per_sequence"][0]
    for part, alone in zip(row.split(worker.DOCUMENTS), reference["documents"], strict=True):
        assert gap(part, alone) <= LOGITS


@pytest.mark.parametrize("layout", PACKED)
def test_every_gradient_of_a_packed_row_equals_each_document_alone(
    layout: str, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    wanted = reference["packed_gradients"]
    worst, name = worst_gradient(measured(layout)["packed_gradients"], wanted)
    assert worst <= GRADIENT, name
    # The twin: the gradients of other sequences are far away.
    assert worst_gradient(reference["gradients"], wanted)[0] > FAULT


@pytest.mark.parametrize("layout", PACKED)
def test_no_document_sees_another_bit_for_bit(layout: str, measured: Callable[[str], worker.Results]) -> None:
    result = measured(layout)
    before = result["packed"][0].split(worker.DOCUMENTS)
    after = result["packed_changed"][0].split(worker.DOCUMENTS)
    equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert equal == [index != worker.CHANGED_DOCUMENT for index in range(len(worker.DOCUMENTS))]


def test_planted_fault_one_document_for_all_leaks(measured: Callable[[str], worker.Results]) -> None:
    result = measured("one")
    last = worker.DOCUMENTS[-1]
    assert gap(result["packed_as_one"][0, -last:], result["packed"][0, -last:]) > FAULT


@pytest.fixture(scope="module")
def faults(checkpoint: str, reference: worker.Results) -> worker.Results:
    return run_distributed(worker.measure_faults, 1, checkpoint)[0]


@pytest.mark.parametrize(
    "fault", ["swapped_kv", "no_attention_factor", "wrong_rotary_share", "short_regime", "untied_head"]
)
def test_planted_fault_breaks_the_logits(fault: str, faults: worker.Results, reference: worker.Results) -> None:
    assert gap(faults[fault], reference["logits"]) > FAULT


def test_planted_fault_stale_head_on_the_last_stage(checkpoint: str, reference: worker.Results) -> None:
    layout = LAYOUTS["pp2"]
    logits = first_tensor(run_distributed(worker.measure_stale_head, 2, checkpoint, layout))
    assert gap(logits, reference["logits"]) > FAULT


def test_planted_fault_norm_gradients_not_summed_under_sequence_parallelism(
    checkpoint: str, reference: worker.Results
) -> None:
    found = run_distributed(worker.measure_unreduced_norms, 2, checkpoint, LAYOUTS["tp2_sp"])[0]
    worst, name = worst_gradient(found, reference["gradients"])
    assert worst > FAULT
    assert "norm" in name


@pytest.fixture(scope="module")
def context_faults(checkpoint: str, reference: worker.Results) -> worker.Results:
    return run_distributed(worker.measure_context_faults, 2, checkpoint, LAYOUTS["cp2"])[0]


@pytest.mark.parametrize("fault", ["chunks_in_order", "positions_of_the_part"])
def test_planted_fault_in_the_share_of_a_context_rank(
    fault: str, context_faults: worker.Results, reference: worker.Results
) -> None:
    assert gap(context_faults[fault], reference["logits"]) > FAULT


def test_planted_fault_in_packed_rows_of_a_context_group(
    context_faults: worker.Results, measured: Callable[[str], worker.Results], reference: worker.Results
) -> None:
    assert gap(context_faults["packed_keys_in_rank_order"], measured("one")["packed"]) > FAULT
    parts = context_faults["regime_of_the_padding"][0].split(worker.DOCUMENTS)
    wrong = [gap(part, alone) > LOGITS for part, alone in zip(parts, reference["documents"], strict=True)]
    # Of 17 tokens, padded to 20; the original length is 18.
    assert wrong == [length == 17 for length in worker.DOCUMENTS]


def test_planted_fault_gradient_of_the_own_part_alone(
    context_faults: worker.Results, reference: worker.Results
) -> None:
    worst, _ = worst_gradient(context_faults["gradient_of_the_own_part"], reference["gradients"])
    assert worst == pytest.approx(0.5, abs=GRADIENT)  # half of it, with two ranks


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "pp2", "cp2"])
def test_recompute_changes_no_bit_of_a_gradient(layout: str, checkpoint: str, reference: worker.Results) -> None:
    chosen = LAYOUTS[layout]
    assert run_distributed(worker.measure_recompute, chosen.world_size, checkpoint, chosen)[0] == []


@pytest.mark.parametrize("layout", ["one", "tp2", "cp2"])
def test_bfloat16_stays_in_its_rounding(layout: str, checkpoint: str, reference: worker.Results) -> None:
    # Every rounding to 8 significant bits is a relative error of at most 2^-9, about 0.6 of that in the mean
    # square. Per layer some 12 roundings reach the residual stream; independent, they add as a square root.
    roundings = 12 * worker.ARCHITECTURE.num_hidden_layers
    expected = math.sqrt(roundings) * 2**-9 * 0.6
    chosen = LAYOUTS[layout]
    result = run_distributed(worker.measure_bfloat16, chosen.world_size, checkpoint, chosen)[0]
    assert expected / 10 < relative_error(result["logits"], reference["logits"]) < 3 * expected
    assert relative_error(result["no_attention_factor"], reference["logits"]) > 10 * expected


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of the wanted."""
    return float((found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("layout", ["one", "tp2_pp2", "cp2"])
def test_untied_head_equals_transformers(layout: str, tmp_path: Path) -> None:
    directory, chosen = str(tmp_path / "hf"), LAYOUTS[layout]
    wanted = run_distributed(worker.hugging_face, 1, directory, worker.UNTIED)[0]
    found = last_stage(run_distributed(worker.measure, chosen.world_size, directory, chosen))
    assert gap(found["logits"], wanted["logits"]) <= LOGITS
    worst, name = worst_gradient(found["gradients"], wanted["gradients"])
    assert worst <= GRADIENT, name
    # One matrix for both ends would have the sum of two gradients.
    ends = ("lm_head.weight", "model.embed_tokens.weight")
    assert not torch.equal(*(found["gradients"][name] for name in ends))


@pytest.mark.parametrize("layout", ["one", "tp2_sp", "cp2"])
def test_both_regimes_around_the_original_length(layout: str, checkpoint: str, reference: worker.Results) -> None:
    original, chosen = worker.ARCHITECTURE.original_max_position_embeddings, LAYOUTS[layout]
    # Two apart: sequence parallelism without context parallelism wants even lengths.
    lengths = (original, original + 2)
    errors = run_distributed(worker.compare_lengths, chosen.world_size, checkpoint, lengths, chosen)[0]
    assert errors[original][0] <= LOGITS
    assert errors[original + 2][0] <= LOGITS
    # The twin: short factors are right up to the boundary and wrong beyond it.
    assert errors[original][1] <= LOGITS
    assert errors[original + 2][1] > FAULT


def test_key_value_heads_that_the_tensor_ranks_cannot_share_are_refused() -> None:
    """Megatron 0.13 has no replication of key/value heads: it refuses as well, with a bare ValueError."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from phimr_nemo.model.megatron.configuration import transformer_config, transformer_fields

    arch, eight = worker.ARCHITECTURE, ParallelConfig(tensor=8)  # 8 heads in 4 groups, on 8 ranks
    with pytest.raises(UserError, match="4 key/value heads"):
        transformer_config(arch, eight, dtype=torch.float32)
    fields = transformer_fields(arch, ParallelConfig(), dtype=torch.float32)
    with pytest.raises(ValueError, match="num_query_groups"):
        TransformerConfig(**{**fields, "tensor_model_parallel_size": 8})


@pytest.mark.parametrize("layout", ["one", "cp2"])
def test_both_regimes_at_the_real_factors_around_4096(layout: str, tmp_path: Path, repository: Path) -> None:
    yaml = pytest.importorskip("yaml")
    values = yaml.safe_load((repository / "conf/model/phi4mini.yaml").read_text())
    small = Architecture.from_preset(
        values,
        vocab_size=worker.ARCHITECTURE.vocab_size,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.06,
    )
    assert small.head_dim == 128  # as in Phi-4-mini, so the 48 factors are the real ones
    directory = str(tmp_path / "hf")
    run_distributed(worker.hugging_face, 1, directory, small)
    chosen = LAYOUTS[layout]
    errors = run_distributed(worker.compare_lengths, chosen.world_size, directory, (4096, 4097), chosen)[0]
    assert errors[4096][0] <= LOGITS
    assert errors[4097][0] <= LOGITS
    # The twin: short factors are right up to the boundary and wrong beyond it.
    assert errors[4096][1] <= LOGITS
    assert errors[4097][1] > FAULT
