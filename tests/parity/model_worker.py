"""What each rank does in the model's parity tests: build, load, run Megatron's own schedule, hand back results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from architectures import small
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.longrope import LongRopePolicy
from phimr_nemo.model.megatron import attention, context_parallel
from phimr_nemo.model.megatron import gpt as megatron
from phimr_nemo.model.megatron.attention import RotaryScale
from phimr_nemo.model.megatron.configuration import transformer_config
from phimr_nemo.model.megatron.convert import export_tensors, load_tensors
from phimr_nemo.model.megatron.gpt import PhiGPTModel, build_model

Results = dict[str, Any]
DEFAULT_POLICY: LongRopePolicy = "long_when_max_length_exceeds_original"

# Every feature of Phi-4-mini in small; 4 key/value heads and 4 layers, so that TP4 and PP4 exist.
ARCHITECTURE = small(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    original_max_position_embeddings=18,
    short_factor=(1.0, 1.0, 1.0),
    long_factor=(1.0, 2.5, 7.0),
    pad_token_id=95,
    initializer_range=0.1,
)
UNTIED = dataclasses.replace(ARCHITECTURE, tie_word_embeddings=False)
# Longer than the original 18: the long regime. No multiple of 4, so that context parallelism has to pad.
ROWS, LENGTH = 4, 22
# Of one packed row, on both sides of the original length; padded for context parallelism, 17 is on the other side.
DOCUMENTS = (5, 24, 1, 17, 9, 40)
CHANGED_DOCUMENT = 1
TEMPERATURE = 0.7
WORDS = 95
"""Tokens are drawn below the padding token, whose embedding transformers gives no gradient (padding_idx)."""


def batch() -> tuple[Tensor, Tensor]:
    """ids and labels [ROWS, LENGTH], some labels ignored, unevenly over the rows."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    for row in range(ROWS):
        labels[row, : 2 * row] = -100
    return ids, labels


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(WORDS, (n,), generator=generator) for n in DOCUMENTS]


def document_labels() -> list[Tensor]:
    """One label a token, those of each document's first token left out."""
    generator = torch.Generator().manual_seed(6)
    labels = [torch.randint(WORDS, (n,), generator=generator) for n in DOCUMENTS]
    for part in labels:
        part[0] = -100
    return labels


def packed(lengths: tuple[int, ...]) -> PackedSeqParams:
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def hugging_face(directory: str, arch: Architecture) -> Results:
    """Make a checkpoint with transformers and compute the reference with it, in one process."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    return reference(directory, Phi3ForCausalLM(Phi3Config(**arch.to_hf_config())))


def reference(directory: str, model: Any) -> Results:
    """Save a model of transformers whose norms are drawn anew, and compute with it what ours is compared with."""
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones by default, which would hide a lost or misplaced norm
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    ids, labels = batch()
    logits = model(ids).logits
    per_token = cross_entropy(logits, labels)
    (per_token.sum() / (labels >= 0).sum()).backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    singles = [model(document[None]).logits for document in documents()]
    parts = [cross_entropy(one, part[None]) for one, part in zip(singles, document_labels(), strict=True)]
    (torch.cat(parts, dim=1).sum() / (torch.cat(document_labels()) >= 0).sum()).backward()
    return {
        "logits": logits.detach(),
        "nll": per_token.detach(),
        "nll_warm": cross_entropy(logits.detach() / TEMPERATURE, labels),
        "gradients": whole,
        "documents": [one[0].detach() for one in singles],
        "packed_gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "weights": {name: p.detach() for name, p in model.named_parameters()},
    }


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def build(
    directory: str,
    layout: ParallelConfig,
    *,
    arch: Architecture | None = None,
    policy: LongRopePolicy = DEFAULT_POLICY,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PhiGPTModel:
    """This rank's part of the model with the checkpoint's weights in it."""
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, context_parallel_size=layout.context)
        model_parallel_cuda_manual_seed(1)
    source = HFDirectory(Path(directory))
    chosen = source.architecture if arch is None else arch
    model = build_model(
        chosen,
        transformer_config(
            chosen,
            layout,
            dtype=dtype,
            calculate_per_token_loss=True,
            variable_seq_lengths=layout.pipeline > 1,
            **overrides,
        ),
        max_length=chosen.max_position_embeddings,
        longrope_policy=policy,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    # The weights' own architecture: a planted fault in `arch` shall not stop them from loading.
    load_tensors([model], source.architecture, source)
    return model


def forward(model: PhiGPTModel, inputs: dict[str, Any]) -> Tensor | None:
    """One micro-batch through the pipeline, no gradients: logits (vocabulary gathered) or nll on the last stage."""
    with torch.no_grad():
        out = run(model, [inputs], _collect, forward_only=True)
    if not out:
        return None
    return out[0] if "labels" in inputs else gather_from_tensor_model_parallel_region(out[0])


def _collect(inputs: dict[str, Any], output: Tensor, **_: Any) -> Tensor:
    return output


def run(model: Any, inputs: list[dict[str, Any]], head: Callable[..., Any], *, forward_only: bool) -> list[Any]:
    def step(data: Iterator[dict[str, Any]], stage: Any) -> tuple[Tensor, Callable[..., Any]]:
        micro = next(data)
        return stage(**micro), functools.partial(head, micro)

    shape = inputs[0]["input_ids"].shape
    return list(
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(inputs),
            model=[model],
            num_microbatches=len(inputs),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    )


def gradients(model: PhiGPTModel, layout: ParallelConfig) -> dict[str, Tensor]:
    """Gradients of the mean loss over the batch's valid tokens, by Hugging Face name.

    Each data-parallel rank has its share of the rows, in micro-batches of one row.
    """
    ids, labels = batch()
    mine = range(parallel_state.get_data_parallel_rank(), ROWS, layout.data)
    return backward(model, [{"input_ids": ids[row, None], "labels": labels[row, None]} for row in mine])


def packed_gradients(model: PhiGPTModel) -> dict[str, Tensor]:
    """The same of the packed row, for one data-parallel rank."""
    row, labels = torch.cat(documents())[None], torch.cat(document_labels())[None]
    return backward(model, [{"input_ids": row, "labels": labels, "packed_seq_params": packed(DOCUMENTS)}])


def backward(model: PhiGPTModel, micro: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients of the mean loss over all valid tokens; the model's weights are lost."""
    arch = model.architecture
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped.train()
    wrapped.zero_grad_buffer()

    def head(inputs: dict[str, Any], output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        # As in every stage: sums here, and Megatron divides by the global count.
        return output.sum(), (inputs["labels"] >= 0).sum().to(torch.int), {}

    run(wrapped, micro, head, forward_only=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)
    return dict(export_tensors([wrapped], arch))


def measure(directory: str, layout: ParallelConfig) -> Results:
    """Everything that a layout is compared by."""
    model = build(directory, layout)
    exported = dict(export_tensors([model], model.architecture))
    ids, labels = batch()
    texts = documents()
    changed = [t if i != CHANGED_DOCUMENT else (t + 1) % WORDS for i, t in enumerate(texts)]
    row, changed_row = torch.cat(texts)[None], torch.cat(changed)[None]
    per_sequence = build(directory, layout, policy="per_sequence")
    return {
        "weights": exported,
        "logits": forward(model, {"input_ids": ids}),
        "nll": forward(model, {"input_ids": ids, "labels": labels}),
        "nll_warm": forward(model, {"input_ids": ids, "labels": labels, "temperature": TEMPERATURE}),
        "packed": forward(model, {"input_ids": row, "packed_seq_params": packed(DOCUMENTS)}),
        "packed_changed": forward(model, {"input_ids": changed_row, "packed_seq_params": packed(DOCUMENTS)}),
        "packed_as_one": forward(model, {"input_ids": row, "packed_seq_params": packed((sum(DOCUMENTS),))}),
        "packed_per_sequence": forward(per_sequence, {"input_ids": row, "packed_seq_params": packed(DOCUMENTS)}),
        "gradients": gradients(model, layout),
        "packed_gradients": packed_gradients(per_sequence) if layout.data == 1 else {},
    }


def measure_faults(directory: str) -> Results:
    """Logits of models with one planted fault each, in one process."""
    one = ParallelConfig()
    arch = Architecture.from_directory(Path(directory))
    assert arch.short_factor is not None
    assert arch.long_factor is not None
    half = dataclasses.replace(
        arch, partial_rotary_factor=0.5, short_factor=arch.short_factor[:2], long_factor=arch.long_factor[:2]
    )
    untied = dataclasses.replace(arch, tie_word_embeddings=False)
    models = {
        "swapped_kv": _swap_keys_and_values(build(directory, one)),
        "no_attention_factor": _drop_attention_factor(build(directory, one)),
        "wrong_rotary_share": build(directory, one, arch=half),
        "short_regime": build(directory, one, policy="always_short"),
        "untied_head": _untied(directory, one, untied),
    }
    ids, _ = batch()
    return {name: forward(model, {"input_ids": ids}) for name, model in models.items()}


@torch.no_grad()
def _swap_keys_and_values(model: PhiGPTModel) -> PhiGPTModel:
    arch = model.architecture
    for layer in model.decoder.layers:
        weight = layer.self_attention.linear_qkv.weight
        groups = weight.view(arch.num_key_value_heads, -1, arch.hidden_size)
        head = arch.head_dim
        queries, keys, values = groups[:, : -2 * head], groups[:, -2 * head : -head], groups[:, -head:]
        groups.copy_(torch.cat((queries, values, keys), dim=1))
    return model


def _drop_attention_factor(model: PhiGPTModel) -> PhiGPTModel:
    model.attention_factor = 1.0
    for module in model.modules():
        if isinstance(module, RotaryScale):
            module.scale.fill_(1.0)
    return model


@torch.no_grad()
def _untied(directory: str, layout: ParallelConfig, arch: Architecture) -> PhiGPTModel:
    """An output layer of its own (random), the rest from the checkpoint."""
    model = build_model(
        arch,
        transformer_config(arch, layout, dtype=torch.float32),
        max_length=arch.max_position_embeddings,
        longrope_policy=DEFAULT_POLICY,
        pre_process=True,
        post_process=True,
    )
    tied = build(directory, layout)
    own = dict(model.named_parameters())
    for name, parameter in tied.named_parameters():
        own[name].copy_(parameter)
    return model


def measure_unreduced_norms(directory: str, layout: ParallelConfig) -> dict[str, Tensor]:
    """Gradients under sequence parallelism when the norms' are not summed over the group."""
    model = build(directory, layout)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.sequence_parallel = False
    return gradients(model, layout)


def measure_stale_head(directory: str, layout: ParallelConfig) -> Tensor | None:
    """Logits when the last stage's copy of a tied embedding missed an update."""
    model = build(directory, layout)
    if parallel_state.is_pipeline_last_stage():
        with torch.no_grad():
            model.output_layer.weight.mul_(1.01)
    return forward(model, {"input_ids": batch()[0]})


def measure_context_faults(directory: str, layout: ParallelConfig) -> Results:
    """Results of models with one planted fault each in how the context group shares the tokens."""
    model = build(directory, layout)
    per_sequence = build(directory, layout, policy="per_sequence")
    ids, _ = batch()
    row = {"input_ids": torch.cat(documents())[None], "packed_seq_params": packed(DOCUMENTS)}
    plan, plan_buckets = context_parallel.plan_context, attention.plan_context_documents
    right_packed = PhiGPTModel._packed

    def in_order(*args: Any) -> context_parallel.ContextPlan:
        zigzag = plan(*args)
        everywhere = torch.arange(len(zigzag.in_order))
        parts = {
            name: getattr(zigzag, name).reshape(-1)[zigzag.in_order].view_as(zigzag.tokens)
            for name in ("tokens", "positions", "documents")
        }
        is_token = parts["tokens"].reshape(-1) != context_parallel.NO_TOKEN
        return dataclasses.replace(zigzag, **parts, in_order=everywhere, places=everywhere[is_token])

    def rank_order(zigzag: context_parallel.ContextPlan, rank: int) -> attention.ContextBuckets:
        return plan_buckets(dataclasses.replace(zigzag, in_order=torch.arange(len(zigzag.in_order))), rank)

    def own_part(local: Tensor, places: Tensor, group: Any) -> Tensor:
        gathered = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=False, group=group)
        return gathered.index_select(0, places)

    results: Results = {}
    with mock.patch.object(megatron, "plan_context", in_order):
        results["chunks_in_order"] = forward(model, {"input_ids": ids})
    with mock.patch.object(
        PhiGPTModel, "_angles", lambda self, ids, _: self.rotary_pos_emb.for_length(12, ids.device)
    ):
        results["positions_of_the_part"] = forward(model, {"input_ids": ids})
    with mock.patch.object(megatron, "plan_context_documents", rank_order):
        results["packed_keys_in_rank_order"] = forward(model, row)
    with mock.patch.object(
        PhiGPTModel, "_packed", lambda self, _, plan, device: right_packed(self, plan.lengths, plan, device)
    ):
        results["regime_of_the_padding"] = forward(per_sequence, row)
    with mock.patch.object(megatron, "gather_tokens", own_part):
        results["gradient_of_the_own_part"] = gradients(model, layout)
    return results


def measure_recompute(directory: str, layout: ParallelConfig) -> list[str]:
    """Names of the gradients that are not the same to the last bit when attention or everything is recomputed."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    stored = packed_gradients(build(directory, layout))
    different = []
    for recompute in ({"recompute_granularity": "selective"}, full):
        recomputed = packed_gradients(build(directory, layout, **recompute))
        different += [name for name, gradient in stored.items() if not torch.equal(gradient, recomputed[name])]
    return different


def measure_bfloat16(directory: str, layout: ParallelConfig) -> Results:
    """Logits of the model in bfloat16, and of one with a planted fault."""
    inputs = {"input_ids": batch()[0]}
    model = build(directory, layout, dtype=torch.bfloat16).bfloat16()
    result = {"logits": forward(model, inputs)}
    return {**result, "no_attention_factor": forward(_drop_attention_factor(model), inputs)}


def compare_lengths(
    directory: str, lengths: tuple[int, ...], layout: ParallelConfig
) -> dict[int, tuple[float, float]]:
    """Per length, max |difference| to transformers under ``per_sequence`` and under ``always_short``."""
    from transformers import Phi3ForCausalLM

    reference = Phi3ForCausalLM.from_pretrained(directory, torch_dtype=torch.float32)
    found: dict[int, tuple[float, float]] = {}
    for length in lengths:
        ids = torch.randint(reference.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            wanted = reference(ids).logits
        errors = [
            float((forward(build(directory, layout, policy=policy), {"input_ids": ids}) - wanted).abs().max())
            for policy in ("per_sequence", "always_short")
        ]
        found[length] = (errors[0], errors[1])
    return found
