"""The planner's memory formulas against a real step of Megatron-Core on CPU, counted tensor by tensor.

The states are the parameters, gradient buffers and optimizer tensors; what autograd keeps is seen through its hooks;
the peak of everything else by looking at every operation's result. Context parallelism is compared by its states
only: on CPU its attention gathers all keys, which Transformer Engine's does not.
"""

from __future__ import annotations

from collections.abc import Callable

import plan_worker as worker
import pytest
from architectures import small
from distributed import run_distributed

from phimr_nemo.config import OutputFormat, ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.plan.memory import MicroBatch, RankMemory, Recompute, rank_memory

TOLERANCE = 0.1
TIED = small(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    original_max_position_embeddings=2048,
)
WIDE = worker.dataclasses.replace(
    TIED,
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
DOCUMENTS = (200, 180, 66, 66)
WHOLE = MicroBatch(sequences=1, length=512, packed=False)
ONE_CHUNK = 2**30
PACKED = MicroBatch(sequences=1, length=sum(DOCUMENTS), packed=True)


def case(
    parallel: ParallelConfig | None = None,
    *,
    arch: Architecture = TIED,
    dtype: str = "bf16",
    recompute: Recompute = "none",
    batch: MicroBatch = WHOLE,
    micro_batches: int = 1,
    distributed: bool = True,
    logits_bytes: int = ONE_CHUNK,
    output_format: OutputFormat = "own",
) -> worker.Case:
    documents = DOCUMENTS if batch.packed else ()
    layout = parallel if parallel is not None else ParallelConfig()
    sizes = (batch, documents, micro_batches, distributed, logits_bytes, output_format)
    return worker.Case(arch, layout, dtype, recompute, *sizes)


CASES = {
    "bf16": case(),
    "fp32": case(dtype="fp32"),
    "untied wide": case(arch=WIDE),
    "selective": case(recompute="selective"),
    "mlp": case(recompute="mlp"),
    "full": case(recompute="full"),
    "packed": case(batch=PACKED),
    "three chunks of logits": case(arch=WIDE, dtype="fp32", logits_bytes=4 * WIDE.vocab_size * WHOLE.length // 3),
    "logits in fp32": case(arch=WIDE, output_format="fp32"),
    "packed full": case(batch=PACKED, recompute="full"),
    "three rows": case(batch=MicroBatch(sequences=3, length=256, packed=False)),
    "tp2": case(ParallelConfig(tensor=2)),
    "tp2 sp full": case(ParallelConfig(tensor=2, sequence=True), recompute="full"),
    "pp2": case(ParallelConfig(pipeline=2), micro_batches=4),
    "pp2 packed full": case(ParallelConfig(pipeline=2), batch=PACKED, recompute="full", micro_batches=3),
    "dp2, optimizer not shared": case(ParallelConfig(data=2), distributed=False),
    "tp2 sp dp2": case(ParallelConfig(tensor=2, sequence=True, data=2)),
}


def predicted(case: worker.Case, stage: int) -> RankMemory:
    return rank_memory(
        case.arch,
        case.parallel,
        case.dtype,
        "pytorch",
        case.recompute,
        case.batch,
        micro_batches=case.micro_batches,
        distributed=case.distributed,
        logits_bytes=case.logits_bytes,
        output_format=case.output_format,
        stage=stage,
    )


def ratios(found: worker.Measured, expected: RankMemory) -> dict[str, float]:
    """Predicted over measured, part by part."""
    return {
        "weights": expected.state.weights / found.weights,
        "gradients": expected.state.gradients / found.gradients,
        "optimizer": expected.state.optimizer / found.optimizer,
        "kept": expected.kept / found.kept,
        "moving": expected.moving / found.moving,
    }


def measured(case: worker.Case, measure: Callable[..., worker.Measured] = worker.measure) -> list[worker.Measured]:
    return list(run_distributed(measure, case.parallel.world_size, case))


@pytest.mark.parametrize("name", CASES)
def test_every_part_is_within_a_tenth_of_what_was_measured(name: str) -> None:
    for found in measured(CASES[name]):
        for part, ratio in ratios(found, predicted(CASES[name], found.stage)).items():
            assert ratio == pytest.approx(1.0, abs=TOLERANCE), (part, found)


def test_context_ranks_share_the_optimizer_like_data_ranks() -> None:
    layout = case(ParallelConfig(context=2))
    for found in measured(layout):
        expected = ratios(found, predicted(layout, found.stage))
        assert all(
            expected[part] == pytest.approx(1.0, abs=TOLERANCE) for part in ("weights", "gradients", "optimizer")
        )


def test_recomputation_that_does_not_happen_is_noticed() -> None:
    planted = case(recompute="full")
    (found,) = measured(planted, worker.measure_without_recompute)
    assert ratios(found, predicted(planted, 0))["kept"] < 1.0 - TOLERANCE


def test_an_optimizer_that_is_not_shared_is_noticed() -> None:
    planted = case(ParallelConfig(data=2), distributed=False)
    claimed = worker.replaced(planted, distributed=True)
    for found in measured(planted):
        assert ratios(found, predicted(claimed, 0))["optimizer"] < 1.0 - TOLERANCE
