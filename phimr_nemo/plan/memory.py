"""What one rank of a training run holds, part by part: closed forms of the model as Megatron-Core runs it.

Beside the weights' side (:mod:`phimr_nemo.plan.weights`) it lists the tensors that autograd keeps (Korthikanti et al.
2022, arXiv 2205.05198, section 4, did so for another layer), for the two sets of kernels that the model runs on.
`pytorch` (CPU) is held against measurement by `tests/parity/test_plan_parity.py`; `transformer_engine` (GPU) follows
from the modules' sources and is not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from phimr_nemo.config import OutputFormat, ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.plan.weights import BYTES_PER_NUMBER, FP32_BYTES, StateMemory, stage_parameters, state_memory

Kernels = Literal["pytorch", "transformer_engine"]
Recompute = Literal["none", "selective", "mlp", "full"]

INT64_BYTES: Final = 8


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a run.

    Attributes:
        sequences: rows; packed rows are joined into one.
        length: tokens of a row.
        packed: several documents a row.
    """

    sequences: int
    length: int
    packed: bool

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.sequences * self.length


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the worst moment of a step.

    Attributes:
        stage: pipeline stage, from 0.
        in_flight: micro-batches whose activations it holds at once; a part of one counts as its share.
        state: weights, gradients, optimizer.
        activations: kept for the backward passes of the micro-batches in flight.
        head: the part of them that final norm and labels keep, gone before the layers' backward passes.
        recomputed: activations of the one layer whose forward pass was done again.
        on_the_way: gradients in a layer's backward pass, and one that waits for the tied embedding's.
        output: of the output layer's backward pass: a chunk of logits and, in plain PyTorch, the weight's gradient.
        embedding: gradients of the embedding at the end of a backward pass.
        pipeline: what neighbouring stages send.
    """

    stage: int
    in_flight: float
    state: StateMemory
    activations: float
    head: float
    recomputed: float
    on_the_way: float
    output: float
    embedding: float
    pipeline: float

    @property
    def kept(self) -> float:
        """Most bytes that autograd keeps at one time."""
        return self.activations + max(0.0, self.recomputed - self.head)

    @property
    def backward(self) -> float:
        """Bytes beside the activations in the widest phase of the backward pass: output layer, layers, embedding.

        What an earlier phase no longer needs is taken off: `head` for the layers, one micro-batch for the embedding.
        """
        layers = self.recomputed + self.on_the_way - self.head
        return max(self.output, layers, self.embedding - self.activations / self.in_flight)

    @property
    def moving(self) -> float:
        """Bytes that come and go in a step."""
        return self.activations + self.pipeline + self.backward

    @property
    def total(self) -> float:
        """Bytes in all, without the framework's own."""
        return self.state.total + self.moving


def norm_bytes(arch: Architecture, parallel: ParallelConfig, dtype: str) -> float:
    """Bytes per token that a norm and the linear layer behind it keep: input and output, and one fp32 number."""
    kept = 2 * BYTES_PER_NUMBER[dtype] * arch.hidden_size + FP32_BYTES
    return kept / (parallel.tensor if parallel.sequence else 1)


def has_cpu_layers(parallel: ParallelConfig, kernels: Kernels) -> bool:
    """Whether layers are those of :mod:`phimr_nemo.model.megatron.cpu_layers`."""
    return kernels == "pytorch" and parallel.context == 1


def layer_bytes(
    arch: Architecture, parallel: ParallelConfig, dtype: str, kernels: Kernels, recompute: Recompute, packed: bool
) -> float:
    """Bytes a token that one layer keeps for its backward pass.

    Attention keeps queries and keys after their rotation, the projection's output (as long as the values are a view
    of it; the CPU's layers copy them beside the keys) and its own result; the softmax is a number a head (Dao 2023,
    arXiv 2307.08691). Recomputing the attention
    core (`selective`) therefore frees that number only. `mlp` keeps the input of the feed-forward part, before its
    norm where that is fused with the first matrix; `full` keeps the layer's input.
    """
    size = BYTES_PER_NUMBER[dtype]
    layer_input = size * arch.hidden_size / (parallel.tensor if parallel.sequence else 1)
    if recompute == "full":
        return layer_input
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    on_cpu = has_cpu_layers(parallel, kernels)
    if on_cpu:
        attention = 2 * queries + 2 * keys
    elif kernels == "pytorch" and packed:
        # Copied into buckets of documents and back, values too; then the projection's own output is free.
        attention = 3 * queries + 2 * keys
    else:
        attention = 3 * queries + 3 * keys
    statistics = 0 if recompute == "selective" else FP32_BYTES * arch.num_attention_heads
    # Gate and value; PyTorch also keeps the activated gate. Both keep their product, the second matrix's input.
    feed_forward = 0 if recompute == "mlp" else (4 if kernels == "pytorch" else 3) * arch.intermediate_size
    norm = norm_bytes(arch, parallel, dtype)
    second_norm = layer_input if recompute == "mlp" and kernels == "transformer_engine" else norm
    rotary = 4 * size * arch.rotary_dim if kernels == "pytorch" and not on_cpu else 0
    shared = size * (attention + feed_forward) + statistics
    return norm + second_norm + shared / parallel.tensor + rotary


def head_bytes(arch: Architecture, parallel: ParallelConfig, dtype: str) -> float:
    """Bytes a token that the final norm keeps and, of its label, place, word, largest logit, log-sum-exp."""
    return norm_bytes(arch, parallel, dtype) + 2 * INT64_BYTES + 2 * FP32_BYTES


def kept_bytes(
    arch: Architecture,
    parallel: ParallelConfig,
    dtype: str,
    kernels: Kernels,
    recompute: Recompute,
    *,
    packed: bool,
    stage: int,
) -> float:
    """Bytes a token that a pipeline stage keeps for the backward pass of one micro-batch."""
    layers = arch.num_hidden_layers / parallel.pipeline
    kept = layers * layer_bytes(arch, parallel, dtype, kernels, recompute, packed)
    if stage == 0:
        kept += INT64_BYTES
    if stage == parallel.pipeline - 1:
        kept += head_bytes(arch, parallel, dtype)
    if has_cpu_layers(parallel, kernels):
        # Cosines and sines, made once for all layers.
        kept += 2 * BYTES_PER_NUMBER[dtype] * arch.head_dim
    return kept


def adds_in_place(dtype: str, kernels: Kernels) -> bool:
    """Whether a chunk's logits stay as they are, and products add to the weights' fp32 gradients in place."""
    return dtype != "fp32" and kernels == "transformer_engine"


def logits_chunk(
    arch: Architecture,
    parallel: ParallelConfig,
    dtype: str,
    tokens: float,
    kernels: Kernels,
    logits_bytes: float,
    output_format: OutputFormat,
) -> float:
    """Tokens of a micro-batch whose logits are there at a time (`phimr_nemo.losses.logprobs.chunk_within`).

    Args:
        arch, parallel, dtype, kernels, output_format: of the run.
        tokens: of the micro-batch on a rank.
        logits_bytes: that they may take.
    """
    stays = adds_in_place(dtype, kernels) and output_format != "fp32"
    number = BYTES_PER_NUMBER[dtype] if stays else FP32_BYTES
    return min(tokens, max(1.0, logits_bytes // (number * arch.vocab_size / parallel.tensor)))


def output_bytes(
    arch: Architecture,
    parallel: ParallelConfig,
    dtype: str,
    tokens: float,
    kernels: Kernels,
    *,
    logits_bytes: float,
    output_format: OutputFormat,
) -> float:
    """Bytes of the output layer's backward pass in chunks (see :mod:`phimr_nemo.losses.logprobs`).

    A chunk's logits in fp32 and, for bf16, once more in bf16; the weight's gradient in fp32 and, for bf16, a chunk's
    part of it in bf16. Of both Transformer Engine's path keeps the chunk's logits in bf16 alone. Logits in fp32 of a
    matrix in bf16 come with a gradient in bf16, and without Transformer Engine with a copy of the matrix. Hidden
    states and their gradients for all tokens.
    """
    size = BYTES_PER_NUMBER[dtype]
    chunk = logits_chunk(arch, parallel, dtype, tokens, kernels, logits_bytes, output_format)
    hidden = arch.hidden_size
    if adds_in_place(dtype, kernels):
        a_word = float(chunk * (size + FP32_BYTES * (output_format == "fp32")))
    elif dtype == "fp32":
        a_word = FP32_BYTES * (chunk + hidden)
    else:
        logits = chunk * (FP32_BYTES + size) + FP32_BYTES * hidden
        gradients = chunk * size + hidden * (FP32_BYTES + size)
        a_word = max(logits, gradients) + FP32_BYTES * hidden * (output_format == "fp32")
    return arch.vocab_size / parallel.tensor * a_word + 2 * size * tokens * hidden


def micro_batches_in_flight(parallel: ParallelConfig, micro_batches: int, stage: int) -> float:
    """Micro-batches that wait for their backward pass when a stage alternates forward and backward passes.

    With virtual stages each waiting pass holds a part of the layers (Narayanan et al. 2021, arXiv 2104.04473,
    section 2.2; warm-up of Megatron's interleaved schedule).

    Args:
        parallel: the layout.
        micro_batches: of a step.
        stage: pipeline stage, from 0.
    """
    if parallel.virtual == 1:
        return min(micro_batches, parallel.pipeline - stage)
    passes = 2 * (parallel.pipeline - stage - 1) + (parallel.virtual - 1) * parallel.pipeline + 1
    return min(micro_batches * parallel.virtual, passes) / parallel.virtual


def rank_memory(
    arch: Architecture,
    parallel: ParallelConfig,
    dtype: str,
    kernels: Kernels,
    recompute: Recompute,
    batch: MicroBatch,
    *,
    micro_batches: int,
    distributed: bool,
    logits_bytes: float,
    output_format: OutputFormat,
    stage: int,
) -> RankMemory:
    """Bytes on a rank of one pipeline stage at the worst moment of a step.

    Args:
        arch: the model.
        parallel: the layout.
        dtype: of weights and activations.
        kernels: what computes the layers.
        recompute: which activations are computed again in the backward pass.
        batch: the largest micro-batch.
        micro_batches: of a step, on each data-parallel rank.
        distributed: see :func:`state_memory`.
        logits_bytes: that a chunk of logits may take.
        output_format: of the output layer.
        stage: pipeline stage, from 0.
    """
    size = BYTES_PER_NUMBER[dtype]
    tokens = batch.tokens / parallel.context
    in_flight = micro_batches_in_flight(parallel, micro_batches, stage)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    kept = kept_bytes(arch, parallel, dtype, kernels, recompute, packed=batch.packed, stage=stage)
    again = 0.0
    if recompute in ("mlp", "full"):
        # What was kept, such as the layer's input, is not made again.
        again = layer_bytes(arch, parallel, dtype, kernels, "none", batch.packed)
        again -= layer_bytes(arch, parallel, dtype, kernels, recompute, batch.packed)
    # The feed-forward part is the widest: gradients of gate and value, and of the layer's input and output.
    gradients = size * (2 * arch.intermediate_size / parallel.tensor + 2 * arch.hidden_size)
    vocabulary = size * arch.vocab_size * arch.hidden_size / parallel.tensor
    # With tied weights on one stage, autograd holds the output layer's gradient until the embedding's is there.
    tied = vocabulary if is_first and is_last and arch.tie_word_embeddings else 0.0
    waiting = 0.0 if adds_in_place(dtype, kernels) else tied
    sent = size * tokens * arch.hidden_size / (parallel.tensor if parallel.sequence else 1)
    output = 0.0
    if is_last:
        output = output_bytes(
            arch, parallel, dtype, tokens, kernels, logits_bytes=logits_bytes, output_format=output_format
        )
    return RankMemory(
        stage=stage,
        in_flight=in_flight,
        state=state_memory(stage_parameters(arch, parallel, stage), parallel, dtype, distributed=distributed),
        activations=in_flight * tokens * kept,
        head=tokens * head_bytes(arch, parallel, dtype) if is_last else 0.0,
        recomputed=tokens * again,
        on_the_way=tokens * gradients + waiting,
        output=output,
        embedding=vocabulary + tied + waiting if is_first else 0.0,
        # The inputs of the micro-batches in flight, and a gradient each way.
        pipeline=sent * (in_flight * (not is_first) + 2) if parallel.pipeline > 1 else 0.0,
    )


def largest_rank(
    arch: Architecture,
    parallel: ParallelConfig,
    dtype: str,
    kernels: Kernels,
    recompute: Recompute,
    batch: MicroBatch,
    *,
    micro_batches: int,
    distributed: bool,
    logits_bytes: float,
    output_format: OutputFormat,
) -> RankMemory:
    """:func:`rank_memory` of the pipeline stage that needs most."""
    stages = (
        rank_memory(
            arch,
            parallel,
            dtype,
            kernels,
            recompute,
            batch,
            micro_batches=micro_batches,
            distributed=distributed,
            logits_bytes=logits_bytes,
            output_format=output_format,
            stage=stage,
        )
        for stage in range(parallel.pipeline)
    )
    return max(stages, key=lambda rank: rank.total)
