"""Kernels in plain torch in the place of Transformer Engine's compiled module (2.5): all that a dense GPT needs.

The lane (``te_lane.enter``) puts this package in ``sys.modules`` as ``transformer_engine_torch``; everything else of
Transformer Engine is its own Python. Names and argument lists are what that Python calls. An argument that a dense
GPT does not use is refused, never ignored. A kernel that is not here raises when it is called, by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention import fused_attn_bwd, fused_attn_fwd, get_fused_attn_backend
from .context import (
    thd_grad_correction,
    thd_out_correction,
    thd_read_half_tensor,
    thd_read_second_half_lse,
    thd_second_half_lse_correction,
)
from .gemm import generic_gemm
from .multi_tensor import multi_tensor_adam, multi_tensor_l2norm, multi_tensor_scale, multi_tensor_unscale_l2norm
from .names import (
    CommOverlap,
    CommOverlapHelper,
    CommOverlapP2P,
    CommOverlapType,
    DType,
    Float8BlockScaleTensorFormat,
    FP8BwdTensors,
    FP8FwdTensors,
    FP8TensorMeta,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    device_supports_multicast,
    get_cublasLt_version,
    get_cudnn_version,
    get_num_cublas_streams,
    get_stream_priority_range,
    ubuf_built_with_mpi,
)
from .norms import layernorm_bwd, layernorm_fwd, rmsnorm_bwd, rmsnorm_fwd
from .quantize import (
    bgrad_quantize,
    compute_amax,
    dequantize,
    fp8_transpose,
    fused_amax_and_scale_update_after_reduction,
    quantize,
)
from .rotary import fused_rope_backward, fused_rope_forward

__all__ = [
    "CommOverlap",
    "CommOverlapHelper",
    "CommOverlapP2P",
    "CommOverlapType",
    "DType",
    "FP8BwdTensors",
    "FP8FwdTensors",
    "FP8TensorMeta",
    "Float8BlockScaleTensorFormat",
    "NVTE_Bias_Type",
    "NVTE_Fused_Attn_Backend",
    "NVTE_Mask_Type",
    "NVTE_QKV_Format",
    "NVTE_QKV_Layout",
    "bgrad_quantize",
    "compute_amax",
    "dequantize",
    "device_supports_multicast",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "fused_attn_bwd",
    "fused_attn_fwd",
    "fused_rope_backward",
    "fused_rope_forward",
    "generic_gemm",
    "get_cublasLt_version",
    "get_cudnn_version",
    "get_fused_attn_backend",
    "get_num_cublas_streams",
    "get_stream_priority_range",
    "layernorm_bwd",
    "layernorm_fwd",
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_unscale_l2norm",
    "quantize",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
    "ubuf_built_with_mpi",
]


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"no kernel {name} here: a dense GPT was not expected to call it")

    missing.__name__ = name
    return missing
