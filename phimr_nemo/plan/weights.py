"""What training holds of a model's weights on a rank, by Megatron's mixed precision.

Weights in the model's format, gradients added up in fp32, AdamW's two moments and, beside weights of 16 bits, master
weights in fp32, the latter three shared by the data- and context-parallel ranks under the distributed optimizer
(ZeRO-1, Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.architecture import Architecture

BYTES_PER_NUMBER: Final = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32_BYTES: Final = 4
ADAM_MOMENTS: Final = 2


@dataclass(frozen=True)
class StateMemory:
    """Bytes a rank holds all the time."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.gradients + self.optimizer


def layer_parameters(arch: Architecture, tensor: int) -> float:
    """Numbers of one layer on one tensor-parallel rank: linear layers are shared, norms are not."""
    linear = arch.hidden_size * arch.head_dim * (arch.stacked_heads + arch.num_attention_heads)
    linear += 3 * arch.hidden_size * arch.intermediate_size
    return linear / tensor + arch.layer_vectors(arch.stacked_heads * arch.head_dim // tensor)


def stage_parameters(arch: Architecture, parallel: ParallelConfig, stage: int) -> float:
    """Numbers on one rank of a pipeline stage.

    Tied embeddings stand on the first and on the last stage (Megatron keeps them equal); on one stage they are one.
    """
    vocabulary = arch.vocab_size * arch.hidden_size / parallel.tensor
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    numbers = arch.num_hidden_layers / parallel.pipeline * layer_parameters(arch, parallel.tensor)
    if is_first:
        numbers += vocabulary
    if is_last:
        numbers += arch.hidden_size
        if not (is_first and arch.tie_word_embeddings):
            numbers += vocabulary
    return numbers


def state_memory(parameters: float, parallel: ParallelConfig, dtype: str, *, distributed: bool) -> StateMemory:
    """Bytes of a rank's weights, gradients and optimizer state.

    Args:
        parameters: numbers on the rank.
        parallel: the layout.
        dtype: of the weights.
        distributed: the optimizer's state is shared by the data- and context-parallel ranks.
    """
    numbers = ADAM_MOMENTS + (0 if dtype == "fp32" else 1)
    spread = parallel.data * parallel.context if distributed else 1
    return StateMemory(
        weights=parameters * BYTES_PER_NUMBER[dtype],
        gradients=parameters * FP32_BYTES,
        optimizer=parameters * numbers * FP32_BYTES / spread,
    )


def largest_state(arch: Architecture, parallel: ParallelConfig, dtype: str, *, distributed: bool) -> StateMemory:
    """:func:`state_memory` of the pipeline stage that holds most."""
    parameters = max(stage_parameters(arch, parallel, stage) for stage in range(parallel.pipeline))
    return state_memory(parameters, parallel, dtype, distributed=distributed)
