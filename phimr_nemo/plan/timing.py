"""How long one training step takes: compute, communication that compute does not hide, the pipeline's bubble.

Every term is operations or bytes over a rate of :mod:`phimr_nemo.plan.hardware`. What a term leaves out (kernel
launches, small matrices, the host) is in the one fitted factor there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from phimr_nemo.config import OutputFormat, ParallelConfig
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.plan.hardware import (
    MEMORY_EFFICIENCY,
    NETWORK_EFFICIENCY,
    NODE_EFFICIENCY,
    Gpu,
    MatmulDtype,
    group_bandwidth,
    matmul_rate,
)
from phimr_nemo.plan.memory import Recompute, logits_chunk
from phimr_nemo.plan.weights import BYTES_PER_NUMBER, FP32_BYTES, layer_parameters, stage_parameters

OPERATIONS: Final = 2
"""A multiplication and an addition."""

BACKWARD: Final = 2
"""Backward over forward: gradients of inputs and of weights."""

OUTPUT_TRAFFIC: Final = 14
"""Bytes that go to and from memory for each word and token of the output layer, forward and backward, in bf16 logits
with the kernels of `phimr_nemo.losses.fused`: written and read forward (4); written again, read, their gradient
written and read by two products backward (10). In plain PyTorch they are 78."""

KEPT_TRAFFIC: Final = 2
"""Of these, what a chunk saves that is kept for the backward pass instead of being written again."""

WIDE_OUTPUT_TRAFFIC: Final = 22
"""The same for logits in fp32: written and read forward (8); written again, read (8), and their gradient written in
bf16 and read by two products (6) backward."""

WIDE_KEPT_TRAFFIC: Final = 4
"""Of these, what a chunk that is kept saves."""

OUTPUT_CAST_TRAFFIC: Final = 4
"""More for each word and token in 8 bits: the gradient is read for its largest value and to be cast (4), written by
rows and by columns (2), and read by two products in a byte where it was two (-2)."""

MATRIX_CAST_TRAFFIC: Final = 11
"""Bytes for each number of the output matrix and micro-batch in 8 bits: twice read for its largest value and to be
cast (8), written once forward, and backward with a transposed copy (3)."""

OUTPUT_GRADIENT_TRAFFIC: Final = 8
"""The same for each number of its weight's gradient and chunk of tokens: read and written in fp32."""

ACCUMULATION_TRAFFIC: Final = 8
"""Bytes for each weight and micro-batch: the product adds to the fp32 gradient, read and written."""

OPTIMIZER_TRAFFIC: Final = 34
"""Bytes for each number that AdamW updates: gradient read twice (norm, update), moments and master weight read and
written, weight written."""

OVERLAP: Final = 0.8
"""Share of one micro-batch's backward (forward) time in which gradients are reduced (weights gathered): our
assumption; the first buckets to come cannot start at once."""


@dataclass(frozen=True)
class Work:
    """What one step does on each data-parallel rank.

    Attributes:
        tokens: of a micro-batch, padding included, the mean over the slowest rank's micro-batches.
        attention_length: sum of squared document lengths over sum of lengths (tokens).
        micro_batches: of the step.
        forward_only: passes without a backward pass for each with one (old or reference log-probabilities).
        hides_gradients, hides_weights: they are reduced and gathered while layers are computed.
    """

    tokens: float
    attention_length: float
    micro_batches: int
    forward_only: float = 0.0
    hides_gradients: bool = True
    hides_weights: bool = True


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on.

    Attributes:
        linear: matrix products of the layers.
        attention: attention cores.
        elementwise: norms, rotations, activations, residual sums.
        output: the output layer with its log-probabilities.
        recompute: the layers' forward passes that are done again.
        forward_only: passes without gradients.
        accumulation: gradients added up.
        tensor, context, neighbours, data: communication that nothing hides, of tensor, context and pipeline
            parallelism and of data-parallel gradients and weights.
        bubble: pipeline stages waiting, also for the slowest of them.
        optimizer: the update.
    """

    linear: float
    attention: float
    elementwise: float
    output: float
    recompute: float
    forward_only: float
    accumulation: float
    tensor: float
    context: float
    neighbours: float
    data: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds in all."""
        return float(sum(getattr(self, item.name) for item in fields(self)))


@dataclass(frozen=True)
class _Forward:
    """Seconds of one layer's forward pass over a micro-batch on one rank."""

    linear: float
    attention: float
    elementwise: float
    tensor: float
    context: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.elementwise + self.tensor + self.context


def step_time(
    arch: Architecture,
    parallel: ParallelConfig,
    gpu: Gpu,
    dtype: str,
    recompute: Recompute,
    work: Work,
    *,
    distributed: bool,
    matmul: MatmulDtype,
    output_format: OutputFormat,
    logits_bytes: float,
) -> StepTime:
    """Seconds of one optimizer step.

    Args:
        arch: the model.
        parallel: the layout.
        gpu: of every rank.
        dtype: of weights and activations.
        recompute: `full` computes every layer's forward pass again; `selective` repeats attention's, `mlp` the
            feed-forward part's.
        work: of the step.
        distributed: the optimizer's state is shared by data- and context-parallel ranks.
        matmul: number format of the layers' matrix products.
        output_format: of the output layer's.
        logits_bytes: that a chunk of logits may take.
    """
    tokens = work.tokens / parallel.context
    layers = arch.num_hidden_layers / parallel.pipeline
    one = _layer_forward(arch, parallel, gpu, dtype, tokens, work.attention_length, matmul)
    passes = 1 + BACKWARD
    again = {
        "none": 0.0,
        "selective": one.attention,
        "mlp": _feed_forward_share(arch) * one.linear,
        "full": one.linear + one.attention + one.elementwise,
    }[recompute]
    # Half of a layer's exchanges are those of the feed-forward part.
    repeats_communication = {"full": 1.0, "mlp": 0.5}.get(recompute, 0.0)
    # With sequence parallelism the inputs of the linear layers are gathered once more for the weights' gradients.
    tensor = (2 + repeats_communication + (0.5 if parallel.sequence else 0.0)) * one.tensor
    context = _exposed_context(one, recompute == "full")
    chunk = logits_chunk(arch, parallel, dtype, tokens, "transformer_engine", logits_bytes, output_format)
    output = _output_seconds(arch, parallel, gpu, dtype, output_format, tokens, chunk)
    memory = gpu.memory_bandwidth * MEMORY_EFFICIENCY
    parameters = max(stage_parameters(arch, parallel, stage) for stage in range(parallel.pipeline))
    accumulation = parameters * ACCUMULATION_TRAFFIC / memory
    neighbours = _neighbour_seconds(arch, parallel, gpu, dtype, tokens)

    count = work.micro_batches
    layer_work = passes * (one.linear + one.attention + one.elementwise) + again + tensor + context
    # All stages do the layers' work, the last one also the output's; a slot is as long as the slowest takes.
    slot = layers * layer_work + output + accumulation + neighbours
    mean_output = output / parallel.pipeline
    # Virtual stages fill and drain the pipeline in smaller parts (arXiv 2104.04473, section 2.2).
    bubble = (parallel.pipeline - 1) / parallel.virtual * slot + count * (output - mean_output)
    forward_slot = layers * (one.total + one.tensor) + output / (passes + 1 - chunk / tokens)
    forward = work.forward_only * (count + (parallel.pipeline - 1 if work.forward_only else 0)) * forward_slot
    spread = parallel.data * parallel.context if distributed else 1
    return StepTime(
        linear=count * layers * passes * one.linear,
        attention=count * layers * passes * one.attention,
        elementwise=count * layers * passes * one.elementwise,
        output=count * mean_output,
        recompute=count * layers * again,
        forward_only=forward,
        accumulation=count * accumulation,
        tensor=count * layers * tensor,
        context=count * layers * context,
        neighbours=count * neighbours,
        data=_data_seconds(parallel, gpu, dtype, parameters, layers * one.total, work, distributed=distributed),
        bubble=bubble,
        optimizer=parameters / spread * OPTIMIZER_TRAFFIC / memory,
    )


def _layer_forward(
    arch: Architecture,
    parallel: ParallelConfig,
    gpu: Gpu,
    dtype: str,
    tokens: float,
    attention_length: float,
    matmul: MatmulDtype,
) -> _Forward:
    size, tensor = BYTES_PER_NUMBER[dtype], parallel.tensor
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    hidden, inner = arch.hidden_size, arch.intermediate_size
    linear = OPERATIONS * (layer_parameters(arch, tensor) - 2 * hidden) * tokens
    # Scores and their product with the values, each over half of the pairs.
    attention = OPERATIONS * queries * attention_length * tokens / tensor
    attention_rate = gpu.attention * gpu.peak["bf16"] if dtype != "fp32" else matmul_rate(gpu, "fp32")
    # Two norms and two residual sums; rotation of queries and keys; the gated activation.
    whole = 10 * hidden / (tensor if parallel.sequence else 1)
    shared = (2 * (queries + keys) + 3 * inner) / tensor
    traffic = size * tokens * (whole + shared)
    if arch.attention_factor != 1.0:
        # LongRoPE's factor, a product of its own: read and written once.
        traffic += tokens * (queries + keys) / tensor * 2 * size
    communication = 0.0
    if tensor > 1:
        # Two all-reduces, or as many bytes as gathers and scatters under sequence parallelism.
        moved = 2 * 2 * (tensor - 1) / tensor * size * tokens * hidden
        communication = moved / group_bandwidth(gpu, 1, tensor)
    ring = 0.0
    if parallel.context > 1:
        moved = (parallel.context - 1) * size * tokens * 2 * keys / tensor
        ring = moved / group_bandwidth(gpu, tensor, parallel.context)
    return _Forward(
        linear=linear / matmul_rate(gpu, matmul),
        attention=attention / attention_rate,
        elementwise=traffic / (gpu.memory_bandwidth * MEMORY_EFFICIENCY),
        tensor=communication,
        context=ring,
    )


def _feed_forward_share(arch: Architecture) -> float:
    """Of the operations of a layer's matrix products."""
    inner = 3 * arch.intermediate_size
    return inner / (inner + 2 * (arch.num_attention_heads + arch.num_key_value_heads) * arch.head_dim)


def _exposed_context(one: _Forward, repeated: bool) -> float:
    """Seconds a layer waits for other ranks' keys and values, which travel while attention works on earlier ones.

    Backward they travel again, and their gradients with them.
    """
    forward = max(0.0, one.context - one.attention)
    backward = max(0.0, 2 * one.context - BACKWARD * one.attention)
    return (1 + repeated) * forward + backward


def _output_seconds(
    arch: Architecture,
    parallel: ParallelConfig,
    gpu: Gpu,
    dtype: str,
    output_format: OutputFormat,
    tokens: float,
    chunk: float,
) -> float:
    """Seconds of the output layer over a micro-batch: all logits but a chunk's are computed twice."""
    words = arch.vocab_size / parallel.tensor
    kept = chunk / tokens
    products = (2 - kept + BACKWARD) * OPERATIONS * words * arch.hidden_size * tokens
    is_wide = output_format == "fp32" and dtype != "fp32"
    of_own: MatmulDtype = "fp32" if dtype == "fp32" else "bf16"
    rate = matmul_rate(gpu, "fp8" if output_format == "fp8" else of_own)
    a_logit = WIDE_OUTPUT_TRAFFIC - WIDE_KEPT_TRAFFIC * kept if is_wide else OUTPUT_TRAFFIC - KEPT_TRAFFIC * kept
    traffic = a_logit * words * tokens
    traffic += OUTPUT_GRADIENT_TRAFFIC * words * arch.hidden_size * tokens / chunk
    if output_format == "fp8":
        traffic += OUTPUT_CAST_TRAFFIC * words * tokens + MATRIX_CAST_TRAFFIC * words * arch.hidden_size
    return products / rate + traffic / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)


def _neighbour_seconds(arch: Architecture, parallel: ParallelConfig, gpu: Gpu, dtype: str, tokens: float) -> float:
    """Seconds a micro-batch takes between pipeline stages, there and back, once for each virtual stage."""
    if parallel.pipeline == 1:
        return 0.0
    numbers = tokens * arch.hidden_size / (parallel.tensor if parallel.sequence else 1)
    stride = parallel.world_size // parallel.pipeline
    if stride < gpu.node_size:
        bandwidth = gpu.node_bandwidth * NODE_EFFICIENCY
    else:
        bandwidth = gpu.network_bandwidth * NETWORK_EFFICIENCY
    return 2 * parallel.virtual * BYTES_PER_NUMBER[dtype] * numbers / bandwidth


def _data_seconds(
    parallel: ParallelConfig,
    gpu: Gpu,
    dtype: str,
    parameters: float,
    forward: float,
    work: Work,
    *,
    distributed: bool,
) -> float:
    """Seconds of the gradients' reduction and the weights' gathering that the last and first micro-batch do not hide.

    Args:
        parallel, gpu, dtype: of the run.
        parameters: on a rank.
        forward: seconds of the forward pass of one micro-batch.
        work: what is hidden.
        distributed: gradients are scattered and weights gathered; otherwise gradients are all-reduced.
    """
    size = parallel.data * parallel.context
    if size == 1:
        return 0.0
    bandwidth = group_bandwidth(gpu, parallel.tensor, size)
    one_way = parameters * (size - 1) / size / bandwidth
    if not distributed:
        reduction, gathering = 2 * FP32_BYTES * one_way, 0.0
    else:
        reduction, gathering = FP32_BYTES * one_way, BYTES_PER_NUMBER[dtype] * one_way
    if work.hides_gradients:
        reduction = max(0.0, reduction - OVERLAP * BACKWARD * forward)
    if work.hides_weights:
        gathering = max(0.0, gathering - OVERLAP * forward)
    return reduction + gathering
