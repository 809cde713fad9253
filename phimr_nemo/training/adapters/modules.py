"""LoRA with NeMo's adapters: low-rank updates beside the frozen matrices of every layer, in all four stages.

A linear layer's output becomes W x + (alpha / rank) B A x with A [rank, in] and B [out, rank], B zero at the start
(Hu et al. 2021, arXiv 2106.09685). The modules are NeMo's `ParallelLinearAdapter` and `LoRALinear`, which split A and
B over the tensor-parallel group as the matrix itself is split; Megatron trains what has a gradient and no more.
"""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from phimr_nemo.config import LoRAConfig
from phimr_nemo.imports import lean_imports
from phimr_nemo.model.megatron.configuration import has_transformer_engine
from phimr_nemo.model.megatron.convert import phi_model

TARGETS: Final = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Every matrix of a layer, in Megatron's names."""


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze a model and put adapters beside the matrices of its layers, in place.

    Before Megatron's DistributedDataParallel and the optimizer are made, and after the weights are loaded.

    Args:
        model: this rank's part, bare.
        config: rank, alpha and dropout.
    """
    with lean_imports():
        from nemo.collections.llm.peft.lora import LoRALinear
        from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, parent in list(model.named_modules()):
        for name, matrix in list(parent.named_children()):
            if name not in TARGETS:
                continue
            is_row_parallel, inputs, outputs, no_sequence_exchange, is_parallel = _shape(matrix)
            adapter = ParallelLinearAdapter(
                inputs,
                outputs,
                config.rank,
                base_linear_name=f"{path}.{name}",
                activation="identity",
                column_init_method="kaiming",
                row_init_method="zero",
                input_is_parallel=is_row_parallel,
                dropout=config.dropout,
                dropout_position="pre",
                model_parallel_config=matrix.config,
                alpha=config.alpha,
                disable_sequence_parallel_comm=no_sequence_exchange,
                base_linear_is_parallel=is_parallel,
            ).to(device=matrix.weight.device, dtype=matrix.weight.dtype)
            wrapped = LoRALinear(matrix, adapter)
            wrapped.register_load_state_dict_pre_hook(_to_wrapped)
            setattr(parent, name, wrapped)
    phi_model(model).adapter_scale = config.alpha / config.rank


def _shape(matrix: Any) -> tuple[bool, int, int, bool, bool]:
    """What NeMo asks of a parallel linear layer; its own look at it needs Transformer Engine."""
    if has_transformer_engine():
        from nemo.collections.llm.peft.utils import get_adapter_attributes_from_linear

        found: tuple[bool, int, int, bool, bool] = get_adapter_attributes_from_linear(matrix)
        return found
    takes_parts = bool(getattr(matrix, "input_is_parallel", False))
    return takes_parts, matrix.input_size, matrix.output_size, not matrix.config.sequence_parallel, True


def _to_wrapped(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:  # noqa: ARG001
    """NeMo's wrapper saves its matrix under the matrix's own names; that is where it is loaded from."""
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(f"{prefix}adapter.")]:
        state[f"{prefix}to_wrap.{key.removeprefix(prefix)}"] = state.pop(key)
