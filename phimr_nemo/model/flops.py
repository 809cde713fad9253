"""What a training step costs in floating-point operations, and what a GPU can do. Needs no torch.

Model FLOPs count what the model asks for: recomputed activations and padding are not work. Attention is counted as
causal, so a token attends to itself and the tokens before it (Chowdhery et al. 2022, arXiv 2204.02311, appendix B,
counts all pairs; its utilisation is therefore higher for long sequences).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from phimr_nemo.model.architecture import Architecture

OPERATIONS_PER_MULTIPLY_ADD: Final = 2
PASSES: Final = 3
"""Forward once, backward twice: gradients of the inputs and of the weights."""

ATTENTION_PRODUCTS: Final = 2
"""Query with key, and probability with value."""

PEAK_BF16_FLOPS: Final[Mapping[str, float]] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
}
"""Dense bf16 operations a second (NVIDIA's data sheets), by what stands in the device's name."""


def matmul_parameters(arch: Architecture) -> int:
    """Weights that every token is multiplied with: linear layers and the output layer, no look-up and no norms."""
    attention = arch.hidden_size * arch.head_dim * (2 * arch.num_attention_heads + 2 * arch.num_key_value_heads)
    feed_forward = 3 * arch.hidden_size * arch.intermediate_size
    return arch.num_hidden_layers * (attention + feed_forward) + arch.hidden_size * arch.vocab_size


def causal_pairs(length: int) -> int:
    """(query, key) pairs of one document of `length` tokens."""
    return length * (length + 1) // 2


def model_flops(arch: Architecture, tokens: float, pairs: float) -> float:
    """Operations of forward and backward over some tokens.

    Args:
        arch: the model.
        tokens: how many, padding not counted.
        pairs: (query, key) pairs, :func:`causal_pairs` summed over the documents.
    """
    weights = PASSES * OPERATIONS_PER_MULTIPLY_ADD * matmul_parameters(arch) * tokens
    width = arch.num_attention_heads * arch.head_dim
    attention = PASSES * OPERATIONS_PER_MULTIPLY_ADD * ATTENTION_PRODUCTS * arch.num_hidden_layers * width * pairs
    return weights + attention


def model_flops_per_token(arch: Architecture, length: int) -> float:
    """Operations of forward and backward per token of a document of `length` tokens."""
    return model_flops(arch, length, causal_pairs(length)) / length


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a GPU; None for one that is not in the table.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it.
    """
    matching = [name for name in PEAK_BF16_FLOPS if all(word in device_name for word in name.split())]
    return PEAK_BF16_FLOPS[max(matching, key=len)] if matching else None
