"""This rank's part of a model, and its passes over micro-batches by Megatron's pipeline schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from phimr_nemo.align.collectives import broadcast_from_last_stage
from phimr_nemo.align.microbatch import MicroBatch, by_sequence
from phimr_nemo.config import ModelConfig, ParallelConfig
from phimr_nemo.losses.device import sent
from phimr_nemo.model import build_model, transformer_config
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.convert import load_tensors
from phimr_nemo.model.megatron.gpt import PhiGPTModel
from phimr_nemo.training import platform


def build_part(
    base: HFDirectory, model: ModelConfig, parallel: ParallelConfig, sequence_length: int, **fields: Any
) -> PhiGPTModel:
    """This rank's part of a model with a directory's weights; Megatron's groups are up already.

    Args:
        base: the weights.
        model: how it is computed.
        parallel: the layout.
        sequence_length: the longest sequence (tokens).
        fields: more of Megatron's configuration.

    Raises:
        UserError: the layout cannot hold the model, or the directory does not fit its config.json.
    """
    if parallel.pipeline > 1:
        # Micro-batches are padded to their own longest row. Megatron refuses that together with its default way
        # of routing tokens to experts, of which there are none here.
        fields |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    config = transformer_config(
        base.architecture,
        parallel,
        dtype=torch_dtype(model.dtype),
        deterministic_mode=model.deterministic,
        **fields,
    )
    part = build_model(
        base.architecture,
        config,
        max_length=sequence_length,
        longrope_policy=model.longrope,
        output_format=model.output_format,
        logits_bytes=model.logits_bytes,
        pre_process=is_pipeline_first_stage(),
        post_process=is_pipeline_last_stage(),
    ).to(platform.device())
    load_tensors([part], base.architecture, base)
    return part


def run_micro_batches(
    model: nn.Module,
    micros: Sequence[MicroBatch],
    head: Callable[[MicroBatch, Tensor], Any],
    *,
    forward_only: bool,
    collect: bool = False,
    options: Mapping[str, Any],
) -> list[Any]:
    """Run the pipeline schedule (collective).

    Args:
        model: this rank's part.
        micros: the same on all ranks of a model replica.
        head: what becomes of a micro-batch's log-probabilities [b, s] on the last stage, or with `as_states` among
            the options of its hidden states; of the loss's three parts unless `collect`.
        forward_only: no backward pass.
        collect: the results are anything.
        options: of the model's forward pass.

    Returns:
        The heads' results on the last stage, nothing on the others.
    """

    def step(micro_batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        micro = next(micro_batches)
        taught = micro.teacher
        # What is planned from, labels and boundaries, stays on the CPU: the model asks no GPU for it.
        tokens = sent(micro.tokens, platform.device())
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output = model(
            tokens,
            positions,
            None,
            labels=micro.labels,
            packed_seq_params=packed_parameters(micro.documents) if micro.documents else None,
            teacher=None if taught is None else taught._replace(hidden=sent(taught.hidden, tokens.device)),
            **options,
        )
        return output, partial(_on_last_stage, head, micro, is_negative=not options.get("as_states", False))

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micros),
        model=model,
        num_microbatches=len(micros),
        seq_length=micros[0].tokens.shape[1],
        micro_batch_size=micros[0].tokens.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    return results


def _on_last_stage(
    head: Callable[[MicroBatch, Tensor], Any],
    micro: MicroBatch,
    output: Tensor,
    non_loss_data: bool = False,  # noqa: ARG001  Megatron's schedule passes it
    *,
    is_negative: bool,
) -> Any:
    return head(micro, -output if is_negative else output)


def row_log_probs(model: nn.Module, micros: Sequence[MicroBatch], labels: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of a batch's labels (collective; without gradient).

    Args:
        model: this rank's part.
        micros: with the numbers of their sequences in the batch as `extras["rows"]`.
        labels: int64 [n, s] of the batch.
        temperature: divides the logits.

    Returns:
        float32 [n, s] on the CPU, 0 where there is no label; the same on all ranks of the replica.
    """
    result = torch.zeros(labels.shape, dtype=torch.float32)
    outputs = run_micro_batches(
        model,
        micros,
        # Fetched when all are on their way: between two of them the GPU would have nothing to do.
        lambda _, logprobs: logprobs,
        forward_only=True,
        collect=True,
        options={"temperature": temperature},
    )
    for micro, output in zip(micros, outputs, strict=False):  # only last pipeline stages have outputs
        rows = micro.extras["rows"]
        values = by_sequence(output.cpu(), micro, len(rows))
        width = min(values.shape[1], result.shape[1])
        result[rows, :width] = values[:, :width]
    return broadcast_from_last_stage(result)


def packed_parameters(documents: Sequence[int]) -> PackedSeqParams:
    """Megatron's description of a packed row from the lengths of its documents, on the CPU (see PhiGPTModel)."""
    boundaries = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32)
    longest = max(documents)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
