"""Megatron-Core's configuration of the model: what follows from the architecture, the layout and the machine."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from phimr_nemo.errors import UserError
from phimr_nemo.model.layout import check_layout

if TYPE_CHECKING:
    from phimr_nemo.config import ParallelConfig, Recompute
    from phimr_nemo.model.architecture import Architecture

APEX_PRODUCTS: Final = "fused_weight_gradient_mlp_cuda"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's modules can be used: it is installed and there is a GPU to run them."""
    return importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()


def has_cpu_layers(config: TransformerConfig) -> bool:
    """Whether attention and feed-forward are computed by `cpu_layers`: on a CPU, without context parallelism."""
    on_gpu = has_transformer_engine() or torch.cuda.is_available()
    return not on_gpu and config.context_parallel_size == 1 and config.attention_dropout == 0.0


def adds_to_main_gradient(*, frozen: bool) -> bool:
    """Whether a trainer's products add weights' gradients straight to Megatron's float32 buffers.

    Transformer Engine's do; Megatron asks for Apex's beside them, which its images have. On a CPU
    :func:`phimr_nemo.training.platform.prepare` gives it the like. Adapters, beside frozen weights, have products of
    their own.
    """
    has_apex = importlib.util.find_spec(APEX_PRODUCTS) is not None
    on_cpu = not has_transformer_engine() and not torch.cuda.is_available()
    return (on_cpu or (has_transformer_engine() and has_apex)) and not frozen


def transformer_fields(arch: Architecture, layout: ParallelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """Values of Megatron's ``TransformerConfig`` for this model, layout and number format.

    For callers with a subclass of ``TransformerConfig`` (NeMo's ``GPTConfig``).

    Raises:
        UserError: the layout cannot hold the model, or a number format that is not trained in.
    """
    check_layout(arch, layout)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"model dtype {dtype}",
            rule="float32, bfloat16 or float16",
            remedy="set the precision to fp32, bf16 or fp16",
        )
    on_gpu = torch.cuda.is_available()
    fused = has_transformer_engine()
    return {
        **_model_fields(arch),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": arch.initializer_range,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        # Batched, the messages of both directions between the same two ranks would be taken for each other: the
        # interleaved schedule sends both ways at once, and two stages are each other's next and previous one.
        "overlap_p2p_comm": layout.virtual > 1,
        "batch_p2p_comm": layout.virtual == 1,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.sequence,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu_initialization": not on_gpu,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": fused,
        "persist_layer_norm": fused,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        # The interleaved schedule frees an output while it is being sent. On a GPU the stream keeps its memory;
        # without one the message would now and then be read from freed memory.
        "deallocate_pipeline_outputs": on_gpu or layout.virtual == 1,
        # There are no experts; but with the default Megatron refuses micro-batches of varying length.
        "moe_token_dispatcher_type": "alltoall",
    }


def _model_fields(arch: Architecture) -> dict[str, Any]:
    """What makes it this model, in Megatron's names."""
    rotated = arch.rotated_layers
    return {
        "num_layers": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.traits.has_qkv_bias,
        "qk_layernorm": arch.traits.has_qk_norm,
        # Of all layers of the model, whichever pipeline stage has them.
        "no_rope_freq": None if all(rotated) else [int(not is_rotated) for is_rotated in rotated],
    }


def recompute_fields(recompute: Recompute) -> dict[str, Any]:
    """Values of Megatron's ``TransformerConfig`` for activations that are computed again instead of kept."""
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = {"selective": "core_attn", "mlp": "mlp"}
    if recompute not in modules:
        return {}
    return {"recompute_granularity": "selective", "recompute_modules": [modules[recompute]]}


def transformer_config(
    arch: Architecture, layout: ParallelConfig, *, dtype: torch.dtype, **overrides: Any
) -> TransformerConfig:
    """Megatron's configuration of this model.

    Args:
        arch: the model.
        layout: how it is split over processes.
        dtype: of parameters and activations, torch.float32, torch.bfloat16 or torch.float16.
        overrides: further ``TransformerConfig`` fields, taking precedence (recompute, fp8, ...).

    Raises:
        UserError: as ``transformer_fields``, or an override that is no field.
    """
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise UserError(
            f"unknown Megatron settings {unknown}",
            rule="overrides are fields of megatron.core's TransformerConfig",
            remedy="correct the spelling, or check the installed megatron-core version",
        )
    return TransformerConfig(**{**transformer_fields(arch, layout, dtype=dtype), **overrides})


def check_config(arch: Architecture, config: TransformerConfig) -> None:
    """Refuse a config that was made for another model.

    Raises:
        UserError: a field that disagrees with the architecture.
    """
    expected = {
        **_model_fields(arch),
        "layernorm_zero_centered_gamma": False,
        "rotary_interleaved": False,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise UserError(
                f"Megatron config has {name}={getattr(config, name)!r}",
                rule=f"the architecture says {name}={value!r}",
                remedy="make the config with transformer_config or transformer_fields",
            )
