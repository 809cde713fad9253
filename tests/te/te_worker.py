"""What a rank does in the lane's tests of the model: the parity tests' inputs, through Transformer Engine or not."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import compare
import model_worker as worker
import te_kernels
import te_lane
import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from phimr_nemo.config import STAGES, ParallelConfig, load_config
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.model.megatron import gpt
from phimr_nemo.model.megatron.configuration import recompute_fields, transformer_config
from phimr_nemo.model.megatron.gpt import build_model
from phimr_nemo.training.distributed import start_process_group

CPU = torch.device("cpu")

Results = dict[str, Any]


def measure(
    directory: str, layout: ParallelConfig, engine: bool, dtype: torch.dtype, fault: str = "", **overrides: Any
) -> Results:
    """Log-probabilities and gradients, of padded rows and of a packed one, by Transformer Engine or without it."""
    with contextlib.nullcontext() if engine else te_lane.without_transformer_engine(), _planted(fault):
        model = worker.build(directory, layout, dtype=dtype, **overrides)
        ids, labels = worker.batch()
        row, row_labels = torch.cat(worker.documents())[None], torch.cat(worker.document_labels())[None]
        boundaries = worker.packed(worker.DOCUMENTS)
        if fault == "no attention factor":
            worker._drop_attention_factor(model)
        packed = {"input_ids": row, "labels": row_labels, "packed_seq_params": boundaries}
        with mock.patch.object(torch, "equal", side_effect=torch.equal) as compared:
            found = worker.forward(model, packed)
        results: Results = {
            "modules": {type(module).__module__.split(".")[0] for module in model.decoder.modules()},
            "nll": worker.forward(model, {"input_ids": ids, "labels": labels}),
            "packed": found,
            "compared": compared.call_count,
            "gradients": worker.gradients(model, layout),
        }
        again = worker.build(directory, layout, dtype=dtype, **overrides)
        return {**results, "packed_gradients": worker.packed_gradients(again)}


def _wrong(kernel: str, change: Callable[..., Any]) -> Any:
    right = getattr(te_kernels, kernel)
    return mock.patch.object(te_kernels, kernel, lambda *args, **kwargs: change(right, *args, **kwargs))


def _rotation_of_whole_row(right: Callable[..., Tensor], x: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return right(x, table.roll(1, 0), *rest) if rest[1].name == "NVTE_THD" else right(x, table, *rest)


def _without_mask(right: Callable[..., Any], *args: Any) -> Any:
    masks = te_kernels.NVTE_Mask_Type
    return right(*args[:8], masks.NVTE_PADDING_MASK if "PADDING" in args[8].name else masks.NVTE_NO_MASK, *args[9:])


def _first_half(right: Callable[..., Tensor], x: Tensor, boundaries: Tensor, half: int) -> Tensor:
    return right(x, boundaries, 1 - half)


FAULTS = [
    ("no attention factor", ParallelConfig()),
    ("rotation by the next position", ParallelConfig()),
    ("no causal mask", ParallelConfig()),
    ("a weight's gradient is replaced", ParallelConfig()),
    ("the other half of the keys", ParallelConfig(context=2)),
]


def _with_padding(**fields: Any) -> Any:
    """Boundaries with padding of their own, which are the same."""
    starts = {f"{name}_padded": fields[name] for name in ("cu_seqlens_q", "cu_seqlens_kv")}
    return PackedSeqParams(**fields, **starts)


def _planted(fault: str) -> Any:
    """A kernel with a fault, while the block runs."""
    if fault == "boundaries twice":
        return mock.patch.object(gpt, "PackedSeqParams", _with_padding)
    if fault == "rotation by the next position":
        return _wrong("fused_rope_forward", _rotation_of_whole_row)
    if fault == "no causal mask":
        return _wrong("fused_attn_fwd", _without_mask)
    if fault == "a weight's gradient is replaced":
        return _wrong("rmsnorm_bwd", lambda right, *args: (right(*args)[0], torch.zeros_like(args[3])))
    if fault == "the other half of the keys":
        return _wrong("thd_read_half_tensor", _first_half)
    return contextlib.nullcontext()


def measure_fused_accumulation(directory: str) -> tuple[Results, Results]:
    """Gradients with and without products that add straight to the float32 gradient, and how many did."""
    found = []
    for fused in (True, False):
        adds = [0]

        def counted(right: Callable[..., Any], *args: Any, adds: list[int] = adds, **kwargs: Any) -> Any:
            adds[0] += args[4] is not None and args[4].dtype == torch.float32
            return right(*args, **kwargs)

        layout = ParallelConfig()
        # Apex's kernel is in the image; Megatron asks for it because of the output layer, whose product is ours.
        with mock.patch.object(layers, "_grad_accum_fusion_available", True):
            model = worker.build(directory, layout, dtype=torch.bfloat16, gradient_accumulation_fusion=fused)
        with _wrong("generic_gemm", counted):
            found.append({"gradients": worker.gradients(model, layout), "adds": adds[0]})
    return found[0], found[1]


def measure_recompute(directory: str) -> dict[str, list[str]]:
    """By recomputation, the names of the gradients that are not the same to the last bit."""
    different: dict[str, list[str]] = {}
    stored = worker.packed_gradients(worker.build(directory, ParallelConfig(), dtype=torch.bfloat16))
    for recompute in ("selective", "mlp", "full"):
        model = worker.build(directory, ParallelConfig(), dtype=torch.bfloat16, **recompute_fields(recompute))
        again = worker.packed_gradients(model)
        names = [name for name, gradient in stored.items() if not torch.equal(gradient, again[name])]
        if names:
            different[recompute] = names
    return different


def build_layouts(repository: str) -> dict[str, list[str]]:
    """Every ready-made layout's first and last rank of the model, by file: what is wrong with it."""
    return {
        f"{path.parent.name}/{path.name}": _faults(
            _small(repository), load_config(STAGES[path.parent.name], path, OPEN)
        )
        for path in sorted(Path(repository).glob("conf/*/phi4mini-*.yaml"))
    }


FP8: dict[str, dict[str, Any]] = {
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 4,
        "fp8_amax_compute_algo": "max",
    },
}


def measure_fp8(directory: str) -> dict[str, tuple[float, float]]:
    """Errors of logits and gradients against plain PyTorch in float32: plain in bfloat16, and each FP8 scaling.

    Packed documents of multiples of 16 tokens, as FP8 products take them.
    """
    factors = {name: getattr(compare.SMALL, name)[:24] for name in ("short_factor", "long_factor")}
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.04}
    regime = {"original_max_position_embeddings": 8, "pad_token_id": 511}
    arch = dataclasses.replace(compare.SMALL, **sizes, **heads, **regime, **factors)
    start_process_group(ParallelConfig(), seed=0)
    compare.make_checkpoint(Path(directory), arch)
    row, documents = compare.packed_row(arch, CPU)

    def run(dtype: torch.dtype, **settings: Any) -> compare.Outcome:
        model = compare.build(Path(directory), dtype, CPU, **settings).train()
        return compare.run_ours(model, row, row.roll(-1, dims=1), documents)

    with te_lane.without_transformer_engine():
        wanted, plain = run(torch.float32), run(torch.bfloat16)
    found = {"plain": plain, **{name: run(torch.bfloat16, **settings) for name, settings in FP8.items()}}
    return {
        name: (
            compare.relative_error(outcome.logits, wanted.logits),
            compare.gradient_error(outcome.gradients, wanted.gradients),
        )
        for name, outcome in found.items()
    }


OPEN = ("base=none",)
"""What a ready-made layout may leave to the user."""


def _small(repository: str) -> Architecture:
    """Phi-4-mini with its heads, fewer and narrower layers."""
    values = yaml.safe_load((Path(repository) / "conf/model/phi4mini.yaml").read_text("utf-8"))
    narrow = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1024}
    words = {"pad_token_id": 1023, "bos_token_id": 0, "eos_token_id": 0}
    factors = {name: values[name][:3] for name in ("short_factor", "long_factor")}
    return Architecture.from_preset(values, **narrow, **words, **factors)


def _faults(arch: Architecture, config: Any) -> list[str]:
    parallel, model = config.parallel, config.model
    found: list[str] = []
    for rank in {0, parallel.world_size - 1}:
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        # Groups of as many ranks as the layout has, of which this process is the only one.
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual if parallel.virtual > 1 else None,
            context_parallel_size=parallel.context,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        built = build_model(
            arch,
            transformer_config(arch, parallel, dtype=torch_dtype(model.dtype), **recompute_fields(model.recompute)),
            max_length=config.sequence_length,
            longrope_policy=model.longrope,
            pre_process=rank == 0,
            post_process=rank != 0 or parallel.pipeline == 1,
            vp_stage=0 if parallel.virtual > 1 else None,
        )
        layer = built.decoder.layers[0]
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        heads = (arch.num_attention_heads + 2 * arch.num_key_value_heads) * arch.head_dim
        wanted = {
            "self_attention.linear_qkv.weight": (heads // parallel.tensor, arch.hidden_size),
            "mlp.linear_fc1.weight": (2 * arch.intermediate_size // parallel.tensor, arch.hidden_size),
            "mlp.linear_fc2.weight": (arch.hidden_size, arch.intermediate_size // parallel.tensor),
        }
        found += [
            f"rank {rank}: {name} {shapes.get(name)}" for name, shape in wanted.items() if shapes.get(name) != shape
        ]
        if not type(layer.self_attention.core_attention).__name__.startswith("TE"):
            found.append(f"rank {rank}: attention is not Transformer Engine's")
        if any(parameter.dtype != torch_dtype(model.dtype) for parameter in layer.parameters()):
            found.append(f"rank {rank}: a parameter's format")
    return found
