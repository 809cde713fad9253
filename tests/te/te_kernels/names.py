"""The names and constants of Transformer Engine's compiled module, and what it says of the machine."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Any, Final

import torch


class DType(IntEnum):
    """Number formats."""

    kByte = 0
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8


TORCH_DTYPES: Final = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kInt64: torch.int64,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}

FP8FwdTensors = IntEnum(  # type: ignore[misc]
    "FP8FwdTensors",
    [f"GEMM{number}_{part}" for number in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = IntEnum(  # type: ignore[misc]
    "FP8BwdTensors", [f"GRAD_{part}{number}" for number in (1, 2, 3) for part in ("OUTPUT", "INPUT")], start=0
)


class NVTE_QKV_Format(Enum):
    """Order of a tensor's dimensions: sequence, batch, token, head, dimension."""

    NVTE_SBHD = 0
    NVTE_BSHD = 1
    NVTE_THD = 2
    NVTE_BSHD_2SBHD = 3
    NVTE_SBHD_2BSHD = 4
    NVTE_THD_2BSHD = 5
    NVTE_THD_2SBHD = 6


_LAYOUTS = [
    layout
    for one in ("SB", "BS", "T")
    for layout in (
        f"{one}3HD",
        f"{one}H3D",
        f"{one}HD_{one}2HD",
        f"{one}HD_{one}H2D",
        f"{one}HD_{one}HD_{one}HD",
    )
]
_MIXED = ["SBHD_BSHD_BSHD", "BSHD_SBHD_SBHD", "THD_BSHD_BSHD", "THD_SBHD_SBHD"]
_PAGED = [f"Paged_KV_{query}_{keys}_{keys}" for query in ("BSHD", "SBHD", "THD") for keys in ("BSHD", "SBHD")]
NVTE_QKV_Layout = Enum(  # type: ignore[misc]
    "NVTE_QKV_Layout", [f"NVTE_{name}" for name in (*_LAYOUTS, *_MIXED, *_PAGED)]
)

NVTE_Bias_Type = Enum("NVTE_Bias_Type", ["NVTE_NO_BIAS", "NVTE_PRE_SCALE_BIAS", "NVTE_POST_SCALE_BIAS", "NVTE_ALIBI"])
NVTE_Mask_Type = Enum(
    "NVTE_Mask_Type",
    [
        "NVTE_NO_MASK",
        "NVTE_PADDING_MASK",
        "NVTE_CAUSAL_MASK",
        "NVTE_PADDING_CAUSAL_MASK",
        "NVTE_CAUSAL_BOTTOM_RIGHT_MASK",
        "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
    ],
)
CommOverlapType = Enum("CommOverlapType", ["RS", "AG"])
Float8BlockScaleTensorFormat = Enum("Float8BlockScaleTensorFormat", ["GEMM_READY", "COMPACT"])


class NVTE_Fused_Attn_Backend(IntEnum):
    """cuDNN's attention kernels."""

    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Userbuffers:
    """Products that overlap with communication write into buffers that GPUs share: there are none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("overlap of products and communication (userbuffers) needs GPUs")


class CommOverlap(_Userbuffers):
    """See the base class."""


class CommOverlapP2P(_Userbuffers):
    """See the base class."""


class CommOverlapHelper(_Userbuffers):
    """See the base class."""


class FP8TensorMeta:
    """Scales and largest values of a module's tensors; Transformer Engine fills in the attributes."""


def get_num_cublas_streams() -> int:
    """Streams of the grouped products."""
    return 4


def get_cublasLt_version() -> int:
    """12.9.1's, of NeMo 2.4's image."""
    return 120901


def get_cudnn_version() -> int:
    """9.11's, of the same image."""
    return 91100


def get_stream_priority_range() -> tuple[int, int]:
    """(lowest, highest)."""
    return 0, -5


def device_supports_multicast() -> bool:
    """Of NVLink switches."""
    return False


def ubuf_built_with_mpi() -> bool:
    """Whether userbuffers start over MPI."""
    return False
