"""The model in the form NeMo 2.0 trains: a GPTConfig that builds our GPTModel and starts it from a Hugging Face
directory, and the data and forward steps that go with our batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo.collections import llm
from torch import Tensor, nn

from phimr_nemo.config import LongRopePolicy, ModelConfig, ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.convert import load_tensors
from phimr_nemo.model.hf import HFDirectory
from phimr_nemo.model.megatron import PhiGPTModel, build_model, transformer_fields

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, Tensor]:
    """The next micro-batch, moved to this rank's device.

    The document boundaries go to every pipeline stage (attention needs them), as does everything else: token
    ids are small, and the embedding's and the output's stages both read them.
    """
    item = next(dataloader_iter)
    batch: dict[str, Tensor] = item[0] if isinstance(item, tuple) else item
    return {name: tensor.cuda(non_blocking=True) for name, tensor in batch.items()}


def packed_parameters(batch: dict[str, Tensor]) -> PackedSeqParams | None:
    """Document boundaries of a packed batch (see :func:`phimr_nemo.data.batches.collate_packed`), else None."""
    if "cu_seqlens" not in batch:
        return None
    longest = int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch["cu_seqlens"],
        cu_seqlens_kv=batch["cu_seqlens"],
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def forward_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Negative log-probabilities of the labels (nats), float32 [b, s], on the last stage."""
    output: Tensor = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        packed_seq_params=packed_parameters(batch),
    )
    return output


@dataclass
class Phi4MiniConfig(llm.GPTConfig):
    """NeMo's GPTConfig for a Phi3-family model.

    Attributes:
        architecture: the model.
        max_length: the run's longest sequence (tokens).
        longrope: LongRoPE policy.
        hf_directory: where the starting weights come from; None = random.
        seed: of Megatron's random states, one a place in the layout.
    """

    architecture: Architecture | None = None
    max_length: int = 0
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original"
    hf_directory: str | None = None
    seed: int = 0
    forward_step_fn: Any = field(default=forward_step)
    data_step_fn: Any = field(default=data_step)

    def configure_model(
        self,
        tokenizer: Any,  # noqa: ARG002  NeMo's signature; the vocabulary is the architecture's
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> PhiGPTModel:
        """Build this rank's part of the model and read its starting weights."""
        if self.architecture is None:
            raise ValueError("Phi4MiniConfig needs an architecture")
        # The embedding draws from them under sequence parallelism, and NeMo seeds them with CUDA only.
        model_parallel_cuda_manual_seed(self.seed)
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        model = build_model(
            self.architecture,
            self,
            max_length=self.max_length,
            longrope_policy=self.longrope,
            pre_process=parallel_state.is_pipeline_first_stage(**stage) if pre_process is None else pre_process,
            post_process=parallel_state.is_pipeline_last_stage(**stage) if post_process is None else post_process,
            vp_stage=vp_stage,
        )
        if self.hf_directory is not None:
            load_tensors([model], self.architecture, HFDirectory(Path(self.hf_directory)))
        return model


class Phi4MiniModel(llm.GPTModel):
    """NeMo's GPTModel over :class:`Phi4MiniConfig`."""


def phi4mini_config(
    base: Path, model: ModelConfig, parallel: ParallelConfig, *, max_length: int, seed: int
) -> Phi4MiniConfig:
    """NeMo's configuration of the model in a Hugging Face directory.

    Args:
        base: the directory to start from.
        model: how the model is computed.
        parallel: how it is split over processes.
        max_length: the run's longest sequence (tokens).
        seed: of Megatron's random states.

    Raises:
        UserError: no such directory, or the layout cannot hold the model.
    """
    architecture = Architecture.from_directory(base)
    fields: dict[str, Any] = transformer_fields(architecture, parallel, dtype=DTYPES[model.dtype])
    if model.recompute:
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return Phi4MiniConfig(
        **fields,
        # The global mean over valid tokens, whatever the micro-batching: sums here, one division at the end.
        calculate_per_token_loss=True,
        # Micro-batches are padded to their own longest row.
        variable_seq_lengths=parallel.pipeline > 1,
        cross_entropy_loss_fusion=False,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        vocab_size=architecture.vocab_size,
        seq_length=max_length,
        architecture=architecture,
        max_length=max_length,
        longrope=model.longrope,
        hf_directory=str(base),
        seed=seed,
    )
