"""The model in the form NeMo 2.0 trains: a GPTConfig that builds our GPTModel and starts it from a Hugging Face
directory, the data and forward steps that go with our batches, and the connectors between NeMo checkpoints and
Hugging Face directories (`llm.import_ckpt`, `llm.export_ckpt`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

# NeMo imports these in the middle of a run, to build the model and in the first step.
import nemo.collections.llm.modelopt.distill.utils
import nemo.collections.llm.modelopt.model_utils  # noqa: F401
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.lightning import io
from nemo.lightning.io.pl import TrainerContext
from torch import Tensor, nn

from phimr_nemo.config import LongRopePolicy, LoRAConfig, ModelConfig, OutputFormat, ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.dtypes import config_dtype, torch_dtype
from phimr_nemo.model.files.checkpoints import (
    NEMO_CONTEXT,
    NEMO_TOKENIZER,
    NEMO_WEIGHTS,
    Checkpoint,
    open_checkpoint,
    write_hf,
)
from phimr_nemo.model.files.companions import write_model_files
from phimr_nemo.model.files.distcheckpoint import write_dist_checkpoint
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.configuration import adds_to_main_gradient, recompute_fields
from phimr_nemo.model.megatron.convert import load_tensors
from phimr_nemo.model.megatron.gpt import PhiGPTModel, build_model, transformer_fields
from phimr_nemo.model.table import NORM_RULE
from phimr_nemo.store.atomic import atomic_directory
from phimr_nemo.training.adapters.modules import add_adapters

PLANNED_FROM: Final = ("labels", "cu_seqlens", "max_seqlen")
"""Of a micro-batch: to ask a GPU for these would be to wait for it."""

NEMO_PREFIX: Final = "module."
"""Before Megatron's names in NeMo's checkpoints."""


def data_step(dataloader_iter: Iterator[Any]) -> dict[str, Tensor]:
    """The next micro-batch, moved to this rank's device but for what the model plans from on the CPU.

    The document boundaries go to every pipeline stage (attention needs them), as does everything else: token
    ids are small, and the embedding's and the output's stages both read them.
    """
    item = next(dataloader_iter)
    batch: dict[str, Tensor] = item[0] if isinstance(item, tuple) else item
    return {
        name: tensor if name in PLANNED_FROM else tensor.cuda(non_blocking=True) for name, tensor in batch.items()
    }


def packed_parameters(batch: dict[str, Tensor]) -> PackedSeqParams | None:
    """Document boundaries of a packed batch (see :func:`phimr_nemo.data.rows.batches.collate_packed`), else None."""
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
    """NeMo's GPTConfig for a model of any family.

    Attributes:
        architecture: the model.
        max_length: the run's longest sequence (tokens).
        longrope: LongRoPE policy.
        hf_directory: where the starting weights come from; None = random.
        seed: of Megatron's random states, one a place in the layout.
        output_format, logits_bytes: see :class:`phimr_nemo.config.ModelConfig`.
        lora: adapters beside the starting weights, which are not trained then.
    """

    architecture: Architecture | None = None
    max_length: int = 0
    longrope: LongRopePolicy = "long_when_max_length_exceeds_original"
    hf_directory: str | None = None
    seed: int = 0
    output_format: OutputFormat = "own"
    logits_bytes: int | None = None
    lora: LoRAConfig | None = None
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
        if vp_stage is None and self.virtual_pipeline_model_parallel_size is not None:
            # NeMo numbers the chunks after the first one.
            vp_stage = 0
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        model = build_model(
            self.architecture,
            self,
            max_length=self.max_length,
            longrope_policy=self.longrope,
            pre_process=parallel_state.is_pipeline_first_stage(**stage) if pre_process is None else pre_process,
            post_process=parallel_state.is_pipeline_last_stage(**stage) if post_process is None else post_process,
            vp_stage=vp_stage,
            output_format=self.output_format,
            logits_bytes=self.logits_bytes,
        )
        if self.hf_directory is not None:
            load_tensors([model], self.architecture, HFDirectory(Path(self.hf_directory)))
        if self.lora is not None:
            add_adapters(model, self.lora)
        return model


class Phi4MiniModel(llm.GPTModel):
    """NeMo's GPTModel over :class:`Phi4MiniConfig`, with connectors to and from Hugging Face directories."""

    def reinit(self) -> Phi4MiniModel:
        """The next virtual pipeline chunk (NeMo's hook).

        NeMo would build it from the arguments of the first one, and lose what was set since: the weights to start
        from, the layout and the number format.
        """
        return type(self)(self.config, optim=self.optim, tokenizer=self.tokenizer)


def phi4mini_config(
    base: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    max_length: int,
    seed: int,
    lora: LoRAConfig | None = None,
) -> Phi4MiniConfig:
    """NeMo's configuration of the model in a Hugging Face directory, which starts from the weights there.

    Args:
        base: the directory to start from.
        model: how the model is computed.
        parallel: how it is split over processes.
        max_length: the run's longest sequence (tokens).
        seed: of Megatron's random states.
        lora: adapters that are trained instead of these weights.

    Raises:
        UserError: no such directory, or the layout cannot hold the model.
    """
    architecture = Architecture.from_directory(base)
    config = architecture_config(architecture, model, parallel, max_length=max_length, seed=seed)
    # No arguments: NeMo saves those, a checkpoint brings weights of its own, and another machine has other products.
    config.hf_directory, config.lora = str(base), lora
    config.gradient_accumulation_fusion = adds_to_main_gradient(frozen=lora is not None)
    return config


def architecture_config(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, *, max_length: int, seed: int
) -> Phi4MiniConfig:
    """NeMo's configuration of a model whose weights are random or come from a NeMo checkpoint.

    Args:
        architecture: the model.
        model, parallel, max_length, seed: as for :func:`phi4mini_config`.

    Raises:
        UserError: the layout cannot hold the model.
    """
    fields: dict[str, Any] = transformer_fields(architecture, parallel, dtype=torch_dtype(model.dtype))
    return Phi4MiniConfig(
        **(fields | recompute_fields(model.recompute)),
        deterministic_mode=model.deterministic,
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
        seed=seed,
        output_format=model.output_format,
        logits_bytes=model.logits_bytes,
    )


def write_nemo(target: Path, checkpoint: Checkpoint, layout: ParallelConfig) -> None:
    """Write a NeMo 2.0 checkpoint of a layout, whole or not at all, in bounded memory.

    Args:
        target: where to; must not exist or be empty.
        checkpoint: weights and tokenizer.
        layout: `tensor` and `pipeline` of the ranks whose files are written.

    Raises:
        UserError: the target is in the way, the disk is full, the layout cannot hold the model, or the weights are
            damaged or none of float32, bfloat16 and float16.
    """
    with atomic_directory(target) as directory:
        _write_context(directory / NEMO_CONTEXT, checkpoint)
        (directory / NEMO_WEIGHTS).mkdir()
        write_dist_checkpoint(directory / NEMO_WEIGHTS, checkpoint.source, layout, prefix=NEMO_PREFIX)


def _write_context(directory: Path, checkpoint: Checkpoint) -> None:
    """What NeMo rebuilds model, tokenizer and trainer from."""
    arch = checkpoint.source.architecture
    dtype = checkpoint.source.dtype(NORM_RULE.hf)
    config = architecture_config(
        arch,
        ModelConfig(dtype=config_dtype(dtype)),
        ParallelConfig(),
        max_length=min(arch.max_position_embeddings, arch.sliding_window or arch.max_position_embeddings),
        seed=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        # NeMo copies the tokenizer's whole directory, and would take the weights along.
        files = Path(scratch) / NEMO_TOKENIZER
        files.mkdir()
        write_model_files(files, arch, checkpoint.tokenizer, dtype)
        model = Phi4MiniModel(config, tokenizer=_tokenizer(files))
        trainer = nl.Trainer(accelerator="cpu", devices=1, strategy=nl.MegatronStrategy(), logger=False)
        TrainerContext(model=model, trainer=trainer, extra={}).io_dump(directory, yaml_attrs=["model"])


def _tokenizer(files: Path) -> AutoTokenizer:
    try:
        return AutoTokenizer(str(files))
    except ValueError as error:
        raise UserError(
            f"NeMo cannot load the tokenizer: {error}",
            rule="a NeMo checkpoint carries a tokenizer that transformers.AutoTokenizer loads",
            remedy="complete tokenizer.json and tokenizer_config.json of the source",
        ) from error


@io.model_importer(Phi4MiniModel, "hf")
class HFPhi4MiniImporter(io.ModelConnector["Phi3ForCausalLM", Phi4MiniModel]):  # type: ignore[name-defined]
    """`llm.import_ckpt(model, source="hf://DIRECTORY")`: a local Hugging Face directory -> a NeMo checkpoint.

    The checkpoint's model is the directory's, for sequences of every length that it supports; fine-tune it with a
    configuration of your own (:func:`phi4mini_config`), whose `max_length` decides the LongRoPE regime.
    """

    def __call__(self, output_path: Path | None = None, overwrite: bool = False, **options: Any) -> Path:
        """Convert unless it was done before; where the NeMo checkpoint is."""
        self._imported: Path = super().__call__(output_path, overwrite, **options)
        return self._imported

    def apply(self, output_path: Path) -> Path:
        """Convert.

        Raises:
            UserError: as :func:`write_nemo`, or no Hugging Face directory of this family.
        """
        checkpoint = open_checkpoint(Path(str(self)))
        write_nemo(Path(output_path), checkpoint, ParallelConfig())
        return output_path

    @property
    def tokenizer(self) -> AutoTokenizer:
        """The tokenizer that was imported; NeMo gives it to the model that it was called with."""
        return _tokenizer(self._imported / NEMO_CONTEXT / NEMO_TOKENIZER)


@io.model_exporter(Phi4MiniModel, "hf")
class HFPhi4MiniExporter(io.ModelConnector[Phi4MiniModel, "Phi3ForCausalLM"]):  # type: ignore[name-defined]
    """`llm.export_ckpt(path, target="hf")`: a NeMo checkpoint -> a Hugging Face directory."""

    def apply(self, output_path: Path) -> Path:
        """Convert.

        Raises:
            UserError: the target is in the way, the disk is full, or the checkpoint is damaged.
        """
        write_hf(Path(output_path), open_checkpoint(Path(str(self))))
        return output_path
