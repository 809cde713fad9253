"""The Megatron-Core model of every stage: one GPTModel definition, on Transformer Engine where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from phimr_nemo.config import OutputFormat
from phimr_nemo.errors import UserError
from phimr_nemo.losses.device import sent
from phimr_nemo.losses.distill import TeacherStates, token_reverse_kl
from phimr_nemo.losses.logprobs import IGNORED_LABEL, chunk_within, token_logprobs, token_logprobs_and_entropy
from phimr_nemo.model.layout import check_length
from phimr_nemo.model.longrope import LongRopePolicy, LongRotaryEmbedding, uses_long_factors
from phimr_nemo.model.megatron.attention import (
    PackedDocuments,
    RMSNorm,
    RotaryScale,
    SdpaAttention,
    plan_context_documents,
    plan_documents,
)
from phimr_nemo.model.megatron.configuration import (
    check_config,
    check_layout,
    has_cpu_layers,
    has_transformer_engine,
    transformer_config,
    transformer_fields,
)
from phimr_nemo.model.megatron.context_parallel import ContextPlan, gather_tokens, plan_context, take_tokens
from phimr_nemo.model.megatron.cpu_layers import CpuMLP, CpuSelfAttention, plan_spans
from phimr_nemo.model.megatron.elementwise import rotary_tables

if TYPE_CHECKING:
    from phimr_nemo.model.architecture import Architecture

PADDING_TOKEN: Final = 0
"""Any word: nothing sees it, and its own output is thrown away."""

FP8_TOKENS: Final = 16
"""Matrix products in FP8 take tokens in multiples of this."""

__all__ = ["PhiGPTModel", "build_model", "check_layout", "transformer_config", "transformer_fields"]


def build_model(
    arch: Architecture,
    config: TransformerConfig,
    *,
    max_length: int,
    longrope_policy: LongRopePolicy,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    output_format: OutputFormat = "own",
    logits_bytes: int | None = None,
) -> PhiGPTModel:
    """Build this rank's part of the model; torch.distributed and Megatron's parallel_state come first.

    Args:
        arch: the model.
        config: a ``TransformerConfig`` or a subclass, agreeing with ``arch``.
        max_length: the run's longest sequence (tokens); it decides the LongRoPE regime.
        longrope_policy: see ``phimr_nemo.model.longrope``.
        pre_process: whether this pipeline stage holds the embedding.
        post_process: whether it holds the final norm and the output layer.
        vp_stage: virtual pipeline stage, if any.
        output_format: of the products that log-probabilities and their gradients come from.
        logits_bytes: that the logits of a chunk may take where log-probabilities are asked for; see ``chunk_within``.

    Raises:
        UserError: config and architecture or process groups disagree, or sequences longer than the model supports.
    """
    check_config(arch, config)
    _check_context(config)
    check_length(arch, max_length)
    return PhiGPTModel(
        arch,
        config,
        max_length=max_length,
        longrope_policy=longrope_policy,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        output_format=output_format,
        logits_bytes=logits_bytes,
    )


def _check_context(config: TransformerConfig) -> None:
    started = parallel_state.get_context_parallel_world_size()
    if config.context_parallel_size != started:
        raise UserError(
            f"context_parallel_size={config.context_parallel_size} with context groups of {started}",
            rule="Megatron's groups were started for the model's layout",
            remedy="call initialize_model_parallel with the same context_parallel_size",
        )


def _layer_specs(arch: Architecture, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Transformer Engine's layers on a GPU; elsewhere Megatron's with our norm, and on a CPU our arithmetic."""
    scale = ModuleSpec(module=RotaryScale, params={"rotary_dim": arch.rotary_dim, "factor": arch.attention_factor})
    fused = has_transformer_engine()
    if fused:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.traits.has_qk_norm)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = SdpaAttention
        if arch.traits.has_qk_norm:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    on_cpu = has_cpu_layers(config)
    if on_cpu:
        layer.submodules.self_attention.module = CpuSelfAttention
        layer.submodules.self_attention.params["rotary_dim"] = arch.rotary_dim
        layer.submodules.mlp = CpuMLP
    if arch.attention_factor != 1.0 and not on_cpu:
        layer.submodules.self_attention.submodules.q_layernorm = scale
        layer.submodules.self_attention.submodules.k_layernorm = scale
    if fused:
        return layer
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


class PhiGPTModel(GPTModel):
    """Megatron's GPTModel with LongRoPE and log-probabilities that never hold all logits at once.

    Context parallelism stays inside: every rank of a context group is given the same whole rows, computes its part of
    their tokens, and returns the whole result. Gradients come out as if the ranks of the group were data-parallel
    replicas with the same data: right where Megatron divides by the number of tokens or of ranks of the data- and
    context-parallel group (losses of three parts); a loss of two parts it multiplies by the group's size on top.
    """

    def __init__(
        self,
        arch: Architecture,
        config: TransformerConfig,
        *,
        max_length: int,
        longrope_policy: LongRopePolicy,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        output_format: OutputFormat,
        logits_bytes: int | None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=_layer_specs(arch, config, vp_stage),
            vocab_size=arch.vocab_size,
            max_sequence_length=max_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_percent=arch.partial_rotary_factor,
            rotary_base=arch.rope_theta,
            parallel_output=True,
            vp_stage=vp_stage,
        )
        # NeMo's GPTConfig carries its own (learned) default in a field that GPTModel prefers to the argument.
        self.position_embedding_type = "rope"
        self.rotary_pos_emb = LongRotaryEmbedding(arch, max_length, longrope_policy)
        self.architecture = arch
        self.output_format: OutputFormat = output_format
        self.logits_bytes = logits_bytes
        self.attention_factor, self.has_cpu_layers = arch.attention_factor, has_cpu_layers(config)
        self.adapter_scale = 1.0
        self.longrope_policy: LongRopePolicy = longrope_policy

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        temperature: float = 1.0,
        runtime_gather_output: bool | None = None,
        with_entropy: bool = False,
        teacher: TeacherStates | None = None,
        as_states: bool = False,
        **_: Any,
    ) -> Tensor:
        """Run this pipeline stage.

        Args:
            input_ids: int [b, s]; packed rows [1, t].
            position_ids: int [b, s]; unused, positions count from 0 in every row or document.
            attention_mask: must be None: attention is causal, padding goes to the right with label -100.
            labels: int [b, s], the wanted token at each place; -100 leaves a place out.
            packed_seq_params: ``thd`` document boundaries, covering every token of the row. Boundaries and labels
                may lie on the CPU beside a model on a GPU: then no forward pass waits for the GPU.
            temperature: divides the logits of the log-probabilities.
            runtime_gather_output: gather logits over the tensor-parallel group (without labels).
            with_entropy: also the entropies of the distributions that the labels are of.
            teacher: of the same tokens, as a model in the same layout gives them with `as_states`; then also the
                reverse KL divergences from it, and the log-probabilities have no gradient.
            as_states: the final hidden states as this rank computes the labels' log-probabilities from them.

        Returns:
            On the last stage, with labels: negative log-probabilities (nats), float32 [b, s], 0 where
            ignored; with entropies or a teacher, and negative ones of those, [b, s, 2]; without labels: logits
            [b, s, vocabulary / tp]; of the states, this rank's part of [s, b, h]. On the others: hidden states
            [s, b, h].

        Raises:
            UserError: an attention mask, or packed boundaries that do not fit the row.
        """
        if attention_mask is not None:
            raise UserError(
                f"an attention mask of shape {tuple(attention_mask.shape)}",
                rule="attention is causal over every row, or over every document of a packed row",
                remedy="pass attention_mask=None; pad on the right, mark documents with packed_seq_params",
            )
        lengths = None if packed_seq_params is None else _document_lengths(input_ids, packed_seq_params)
        plan = self._plan(input_ids, lengths)
        if lengths is None:
            angles = self._angles(input_ids, plan)
        else:
            packed_seq_params, angles = self._packed(lengths, plan, input_ids.device)
        if self.has_cpu_layers:
            heads = {"head_dim": self.config.kv_channels, "dtype": self.config.params_dtype}
            angles = rotary_tables(angles, factor=self.attention_factor, **heads)
        if plan is not None:
            mine = plan.tokens[parallel_state.get_context_parallel_rank()]
            input_ids = take_tokens(input_ids, sent(mine, input_ids.device), PADDING_TOKEN)
            labels = None if labels is None else take_tokens(labels, sent(mine, labels.device), IGNORED_LABEL)
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=packed_seq_params,
        )
        if not self.post_process or as_states:
            return hidden
        if labels is None:
            output = self._logits(hidden, runtime_gather_output)
        else:
            output = self._labels(hidden, labels.transpose(0, 1), temperature, with_entropy, teacher)
        if plan is not None:
            places = sent(plan.places, output.device)
            output = gather_tokens(output, places, parallel_state.get_context_parallel_group())
        return output.transpose(0, 1).contiguous()

    def output_weight(self) -> Tensor:
        """The matrix that logits are made with, on the last stage: this rank's rows [vocabulary / tp, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _logits(self, hidden: Tensor, runtime_gather_output: bool | None) -> Tensor:
        """Logits [s, b, vocabulary / tp]."""
        weight = self.output_weight()
        logits, _bias = self.output_layer(hidden, weight=weight, runtime_gather_output=runtime_gather_output)
        return logits

    def _labels(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool, teacher: TeacherStates | None
    ) -> Tensor:
        """Negative log-probabilities of the labels [s, b]; with negative entropies or divergences [s, b, 2]."""
        weight = self.output_weight()
        options: dict[str, Any] = {
            "temperature": temperature,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "sequence_parallel": self.config.sequence_parallel,
            "output_format": self.output_format,
        }
        if teacher is not None:
            return -torch.stack(token_reverse_kl(hidden, weight, labels, teacher, **options), dim=-1)
        options["accumulate"] = self.config.gradient_accumulation_fusion
        options["chunk_size"] = chunk_within(self.logits_bytes, weight, self.output_format)
        if with_entropy:
            return -torch.stack(token_logprobs_and_entropy(hidden, weight, labels, **options), dim=-1)
        return -token_logprobs(hidden, weight, labels, **options)

    def _plan(self, input_ids: Tensor, lengths: Tensor | None) -> ContextPlan | None:
        """How the context group shares the row (or every row of the batch alike); None without such a group."""
        config = self.config
        if config.context_parallel_size == 1:
            return None
        if lengths is None:
            lengths = torch.tensor([input_ids.shape[1]])
        multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        if config.fp8:
            multiple *= FP8_TOKENS
        return plan_context(lengths, config.context_parallel_size, multiple)

    def _angles(self, input_ids: Tensor, plan: ContextPlan | None) -> Tensor:
        """Rotary angles of this rank's tokens, the same in every row of the batch."""
        length = input_ids.shape[1]
        if plan is None:
            return self.rotary_pos_emb.for_length(length, input_ids.device)
        mine = plan.positions[parallel_state.get_context_parallel_rank()]
        return self.rotary_pos_emb.for_positions(sent(mine, input_ids.device), length)

    def _packed(
        self, lengths: Tensor, plan: ContextPlan | None, device: torch.device
    ) -> tuple[PackedSeqParams, Tensor]:
        """The documents of a packed row as this model's attention wants them, and the rotary angles.

        Planned on the CPU, where the lengths are: to ask the device for a number would be to wait for it.
        """
        if has_transformer_engine():
            return self._fused_packed(lengths, plan, device)
        if self.has_cpu_layers:
            return plan_spans(lengths), self.rotary_pos_emb.for_documents(lengths, device)[:, None]
        if plan is None:
            documents = PackedDocuments(qkv_format="thd", buckets=plan_documents(lengths).on(device))
            return documents, self.rotary_pos_emb.for_documents(lengths, device)
        rank = parallel_state.get_context_parallel_rank()
        documents = PackedDocuments(qkv_format="thd", buckets=plan_context_documents(plan, rank).on(device))
        of_tokens = plan.positions[rank], lengths[plan.documents[rank]]
        return documents, self.rotary_pos_emb.for_tokens(*(sent(numbers, device) for numbers in of_tokens))

    def _fused_packed(
        self, lengths: Tensor, plan: ContextPlan | None, device: torch.device
    ) -> tuple[PackedSeqParams, Tensor]:
        """Boundaries of the whole row (not of this rank's part), and one table of angles for all documents.

        Raises:
            UserError: documents of both LongRoPE regimes in one row.
        """
        longest, shortest = int(lengths.max()), int(lengths.min())
        arch, policy = self.architecture, self.longrope_policy
        regimes = {uses_long_factors(arch, self.max_sequence_length, policy, n) for n in (longest, shortest)}
        if len(regimes) > 1:
            raise UserError(
                f"documents of {shortest} and {longest} tokens in one packed row under 'per_sequence'",
                rule="on a GPU one packed row has one set of rotary frequencies",
                remedy="use the policy 'long_when_max_length_exceeds_original'",
            )
        padded = lengths if plan is None else plan.lengths
        boundaries = sent(torch.cat((padded.new_zeros(1), padded.cumsum(0))).to(torch.int32), device)
        table = int(padded.max())
        # Padding counts as part of its document: it stands at the end, where causal attention lets nothing see it.
        # Boundaries "with padding" of their own would make Transformer Engine compare them in every layer, and wait.
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=table,
            max_seqlen_kv=table,
        )
        return documents, self.rotary_pos_emb.for_length(table, device, longest)


def _document_lengths(input_ids: Tensor, packed: PackedSeqParams) -> Tensor:
    """Int64 [documents] on the CPU, the lengths of a packed row's documents (tokens).

    Raises:
        UserError: boundaries that do not fit the row.
    """
    boundaries = packed.cu_seqlens_q.to("cpu", torch.int64)
    lengths = boundaries[1:] - boundaries[:-1]
    tokens = input_ids.shape[1]
    if (
        input_ids.shape[0] != 1
        or packed.qkv_format != "thd"
        or lengths.numel() == 0
        or int(boundaries[0]) != 0
        or int(boundaries[-1]) != tokens
        or int(lengths.min()) < 1
    ):
        raise UserError(
            f"packed boundaries {boundaries.tolist()} ({packed.qkv_format}) for ids {tuple(input_ids.shape)}",
            rule="one row [1, t] in 'thd' form whose boundaries rise from 0 to t",
            remedy="make padding at the end of a row a document of its own; join several rows into one",
        )
    return lengths
