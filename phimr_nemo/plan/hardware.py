"""GPUs and clusters: what NVIDIA states, and which part of it real programs reach. Every number has its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from phimr_nemo.errors import UserError
from phimr_nemo.model.flops import PEAK_BF16_FLOPS
from phimr_nemo.process.memory import GIBIBYTE, MEBIBYTE

MatmulDtype = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class Gpu:
    """One GPU in its node and cluster.

    Attributes:
        memory: bytes the driver reports.
        memory_bandwidth: bytes per second (HBM).
        peak: dense operations per second by number format of the matrix products.
        reachable_matmul: the best share of that peak which large matrix products reach, by format.
        attention: share of the bf16 peak that fused attention, forward and backward, reaches in a training step,
            counted in model FLOPs (causal, without what the backward pass recomputes).
        node_bandwidth: bytes per second that a GPU sends to its node (NVLink, one direction).
        network_bandwidth: bytes per second that a GPU sends out of its node (its share of the adapters).
        host_bandwidth: bytes per second between a GPU and its host's memory (PCIe, one direction).
        node_size: GPUs in a node.
        guesses: efficiency figures that nobody published for this GPU, taken from another one.
    """

    memory: int
    memory_bandwidth: float
    peak: Mapping[MatmulDtype, float]
    reachable_matmul: Mapping[MatmulDtype, float]
    attention: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    node_size: int
    guesses: tuple[str, ...] = ()


# Share of the peak reached by the best of many large matrix products: S. Bekman, "Machine Learning Engineering"
# (github.com/stas00/ml-engineering), compute/accelerator, table of maximum achievable matmul FLOPS:
# A100 267.9 of 312, H100 794.5 of 989, B200 1745 of 2250 (bf16); H200 1453.4 of 1979, B200 3432.5 of 4500 (fp8).
HOPPER_BF16: Final = 794.5 / 989
HOPPER_FP8: Final = 1453.4 / 1979
BLACKWELL_BF16: Final = 1745.0 / 2250
BLACKWELL_FP8: Final = 3432.5 / 4500
AMPERE_BF16: Final = 267.9 / 312
# fp32 products without TF32 run on the vector units, close to their peak: our assumption.
VECTOR_FP32: Final = 0.9

# Fused attention inside a training step of Llama-3.1-8B at 8,192 tokens, same book, its page on GPU upgrades:
# 447 TFLOPS on an H200 (FlashAttention-3), 834 on a B200 (FlashAttention-4), forward and backward.
HOPPER_ATTENTION: Final = 447 / 989
BLACKWELL_ATTENTION: Final = 834 / 2250

_ATTENTION_GUESS = "attention efficiency: no in-step figure for this GPU, the H200's share of the peak is used"

# Data sheets: nvidia.com/en-us/data-center/{h100,h200,a100,dgx-b200}. Memory as nvidia-smi reports it (MiB).
# NVLink is stated for both directions together: 900, 600 and 1,800 GB/s. Network: DGX H100, H200 and B200 have eight
# 400 Gb/s adapters for eight GPUs, DGX A100 eight of 200 Gb/s (DGX user guides). PCIe of 16 lanes: 128 GB/s for both
# directions together in the fifth generation, 64 GB/s in the fourth (A100).
GPUS: Final[Mapping[str, Gpu]] = {
    "h100-80g": Gpu(
        memory=81_559 * MEBIBYTE,
        memory_bandwidth=3.35e12,
        peak={"fp32": 66.9e12, "bf16": PEAK_BF16_FLOPS["H100"], "fp8": 1979e12},
        reachable_matmul={"fp32": VECTOR_FP32, "bf16": HOPPER_BF16, "fp8": HOPPER_FP8},
        attention=HOPPER_ATTENTION,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        node_size=8,
    ),
    "h200-141g": Gpu(
        memory=143_771 * MEBIBYTE,
        memory_bandwidth=4.8e12,
        peak={"fp32": 66.9e12, "bf16": PEAK_BF16_FLOPS["H200"], "fp8": 1979e12},
        reachable_matmul={"fp32": VECTOR_FP32, "bf16": HOPPER_BF16, "fp8": HOPPER_FP8},
        attention=HOPPER_ATTENTION,
        node_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        node_size=8,
    ),
    "a100-80g": Gpu(
        memory=81_920 * MEBIBYTE,
        memory_bandwidth=2.039e12,
        peak={"fp32": 19.5e12, "bf16": PEAK_BF16_FLOPS["A100"]},
        reachable_matmul={"fp32": VECTOR_FP32, "bf16": AMPERE_BF16},
        attention=HOPPER_ATTENTION,
        node_bandwidth=300e9,
        network_bandwidth=25e9,
        host_bandwidth=32e9,
        node_size=8,
        guesses=(_ATTENTION_GUESS,),
    ),
    "b200-180g": Gpu(
        memory=183_359 * MEBIBYTE,
        memory_bandwidth=8e12,
        peak={"fp32": 80e12, "bf16": PEAK_BF16_FLOPS["B200"], "fp8": 4500e12},
        reachable_matmul={"fp32": VECTOR_FP32, "bf16": BLACKWELL_BF16, "fp8": BLACKWELL_FP8},
        attention=BLACKWELL_ATTENTION,
        node_bandwidth=900e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        node_size=8,
    ),
}

SUSTAINED_MATMUL: Final = 0.64
"""Products of a whole step, over the best single product. Fitted once, to Llama-3.1-8B in bf16 at 461 TFLOPS on 8
H200 (the page on GPU upgrades named above); `tests/unit/test_plan_timing.py` holds it against runs that it was not
fitted to."""

MEMORY_EFFICIENCY: Final = 0.8
"""Share of the HBM bandwidth that element-wise kernels reach: our assumption (plain copies reach about 0.9)."""

NODE_EFFICIENCY: Final = 0.8
"""NCCL's bus bandwidth in a node over NVLink's: 230-250 GB/s of the A100's 300 (reference figures for nccl-tests).
On NVSwitch generations that reduce in the switch all-reduce is faster (460-480 GB/s on 8 H100), which is not used."""

NETWORK_EFFICIENCY: Final = 0.85
"""NCCL's bus bandwidth between nodes over the adapters': our assumption."""

DECODE_EFFICIENCY: Final = 0.7
"""Share of the HBM bandwidth that token-by-token sampling reaches with a tuned engine: our assumption. With 256
sequences of 2,048 tokens it gives 11.9 K tokens/s for Llama-3.1-8B on an H100; figures published for vLLM are about
12.5 K, at lengths that are not stated."""

HOST_EFFICIENCY: Final = 0.8
"""Share of PCIe's bandwidth that copies from and to pinned memory reach: our assumption."""

SLEEPING_BYTES: Final = 2 * GIBIBYTE
"""What a sleeping vLLM server keeps of a GPU: CUDA context, CUDA graphs and workspaces: our assumption."""

FRAMEWORK_BYTES: Final = 3 * GIBIBYTE
"""CUDA context, NCCL's buffers, cuBLAS's and cuDNN's workspaces: our assumption, not measured yet."""

FRAGMENTATION: Final = 0.05
"""Share of everything that comes and goes in a step which the allocator cannot use: our assumption."""


def find_gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        UserError: it is not there.
    """
    if name not in GPUS:
        raise UserError(
            f"gpu={name}",
            rule=f"one of {', '.join(GPUS)}",
            remedy="name the nearest one; a new one is a row in phimr_nemo/plan/hardware.py",
        )
    return GPUS[name]


def matmul_rate(gpu: Gpu, dtype: MatmulDtype) -> float:
    """Operations per second of the matrix products of a whole training step.

    Raises:
        UserError: the GPU does not compute in that format.
    """
    if dtype not in gpu.peak:
        raise UserError(
            f"matrix products in {dtype} on a GPU with {', '.join(gpu.peak)}",
            rule="the GPU has units for the format",
            remedy="choose another precision or GPU",
        )
    return gpu.peak[dtype] * gpu.reachable_matmul[dtype] * SUSTAINED_MATMUL


def group_bandwidth(gpu: Gpu, stride: int, size: int) -> float:
    """Bytes per second of a ring over a process group (NCCL's bus bandwidth).

    Args:
        gpu: of every member.
        stride: distance of neighbours in the ranks' order, which fills node after node.
        size: members, at least 2.

    Returns:
        NVLink's when the group stays in a node. Otherwise the members in one node send through their adapters
        together, and NVLink remains the limit of each.
    """
    if stride * size <= gpu.node_size:
        return gpu.node_bandwidth * NODE_EFFICIENCY
    together = max(1, gpu.node_size // stride)
    return min(gpu.network_bandwidth * NETWORK_EFFICIENCY * together, gpu.node_bandwidth * NODE_EFFICIENCY)
