"""What the ranks of the bridge's tests run, in the bridge's environment. Each function gives plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import phi3_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, ConcatenatedQKVMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Phi3ForCausalLM

import phimr_nemo.bridges.phi3  # noqa: F401  (registers the bridge)

Settings = dict[str, Any]

ROWS = 2
IGNORED = -100
# What Megatron-Core would compute with kernels of a GPU.
FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "cross_entropy_loss_fusion",
)


def start(tensor: int, pipeline: int) -> None:
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(0)


def provider_of(bridge: AutoBridge, settings: Settings) -> GPTModelProvider:
    """The provider as a CPU can run it: Megatron-Core's own layers, nothing fused."""
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    provider.pipeline_model_parallel_size = parallel_state.get_pipeline_model_parallel_world_size()
    provider.pipeline_dtype = torch.float32
    provider.use_cpu_initialization = True
    provider.transformer_layer_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    provider.params_dtype, provider.bf16, provider.fp16 = torch.float32, False, False
    for name in FUSIONS:
        setattr(provider, name, False)
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return provider


def load(source: Path, settings: Settings) -> tuple[AutoBridge, GPTModel]:
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provider_of(bridge, settings).provide()
    bridge.load_hf_weights([model])
    return bridge, model


def rows(length: int) -> tuple[Tensor, Tensor]:
    """Ids and labels, int64 [ROWS, length]; no padding token, whose embedding transformers gives no gradient."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(phi3_models.PADDING + 1, phi3_models.VOCABULARY, (ROWS, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, : length // 3] = IGNORED
    return tokens[:, :-1], labels


def forward_backward(model: GPTModel, ids: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor]:
    """Logits [rows, length, vocabulary] (last stage) and the mean loss (everywhere), gradients left in the model."""
    count, length = ids.shape
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    seen: list[Tensor] = []

    def step(batches: Iterator[tuple[Tensor, Tensor]], part: GPTModel) -> tuple[Tensor, Callable[[Tensor], Any]]:
        words, wanted = next(batches)
        valid = wanted != IGNORED
        output = part(words, torch.arange(length).expand(count, -1), mask)

        def loss(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            parts = [torch.empty_like(logits) for _ in range(tensor_group.size())]
            dist.all_gather(parts, logits.detach().contiguous(), group=tensor_group)
            seen.append(torch.cat(parts, dim=-1))
            each = vocab_parallel_cross_entropy(
                logits.transpose(0, 1).contiguous(), wanted.clamp(min=0).transpose(0, 1).contiguous()
            )
            mean = each.transpose(0, 1)[valid].mean()
            return mean, {"loss": mean.detach()}

        return output, loss

    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([(ids, labels)]),
        model=[model],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=count,
        forward_only=False,
    )
    value = reports[0]["loss"] if reports else torch.zeros(())
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(value, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return (seen[0] if seen else None), value


def tie_gradients(model: GPTModel) -> None:
    """Megatron sums the tied embedding's gradient over the stages that hold it, once all microbatches are done."""
    if model.share_embeddings_and_output_weights and parallel_state.get_pipeline_model_parallel_world_size() > 1:
        weight = model.shared_embedding_or_output_weight()
        dist.all_reduce(weight.grad, group=parallel_state.get_embedding_group())


def as_hf(bridge: AutoBridge, model: GPTModel) -> dict[str, Tensor]:
    return dict(bridge.export_hf_weights([model], cpu=True, show_progress=False))


@torch.no_grad()
def gradients(bridge: AutoBridge, model: GPTModel) -> dict[str, Tensor]:
    """Every gradient under its Hugging Face name, by the way that the weights go; the weights stay what they are."""
    weights = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.copy_(parameter.grad)
    exported = {name: tensor.clone() for name, tensor in as_hf(bridge, model).items()}
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)
    model.zero_grad()
    return exported


def reference(source: Path, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, mean loss and gradients of transformers."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").train()
    logits = model(ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def compare(source: str, tensor: int, pipeline: int, lengths: list[int], naive: bool = False) -> list[dict[str, Any]]:
    """Per length, the largest differences from transformers: of logits (on the last stage), loss and gradients."""
    start(tensor, pipeline)
    if naive:
        register_naive_bridge()
    bridge, model = load(Path(source), {})
    found = []
    for length in lengths:
        ids, labels = rows(length)
        logits, loss = forward_backward(model, ids, labels)
        tie_gradients(model)
        wanted_logits, wanted_loss, wanted = reference(Path(source), ids, labels)
        ours = gradients(bridge, model)
        found.append(
            {
                "logits": None if logits is None else largest(logits - wanted_logits),
                "loss": largest(loss - wanted_loss),
                "gradients": max(largest(ours[name] - gradient) for name, gradient in wanted.items()),
            }
        )
    return found


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def round_trip(source: str, target: str, tensor: int, pipeline: int, naive: bool = False) -> None:
    """Hugging Face -> Megatron-Bridge -> Hugging Face."""
    start(tensor, pipeline)
    if naive:
        register_naive_bridge()
    bridge, model = load(Path(source), {})
    bridge.save_hf_pretrained([model], target, show_progress=False)


def step(source: str, target: str, batch: str, tensor: int, pipeline: int) -> float:
    """One optimizer step on a batch, as a run whose longest sequence is the model's; the loss before it."""
    start(tensor, pipeline)
    bridge, model = load(Path(source), {"longrope_policy": "long_when_max_length_exceeds_original"})
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(params_dtype=torch.float32, **phi3_models.ADAM), [wrapped])
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    tensors = load_file(batch)
    _, loss = forward_backward(wrapped, tensors["ids"], tensors["labels"])
    optimizer.step()
    bridge.save_hf_pretrained([model], target, show_progress=False)
    return loss.item()


def on_meta(source: str) -> dict[str, Any]:
    """The model of a config.json without its numbers: parameters, and tensors under their Hugging Face names."""
    start(1, 1)
    bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(source))
    provider = provider_of(bridge, {"init_model_with_meta_device": True})
    model = provider.provide()
    registry = bridge._model_bridge.mapping_registry()
    tensors = {}
    for name, parameter in model.named_parameters():
        mapping = registry.megatron_to_hf_lookup(name)
        tensors[mapping.hf_param] = list(parameter.shape)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": tensors,
        "factor": model.decoder.layers[-1].self_attention.k_layernorm.scale.tolist(),
        "config": type(bridge._model_bridge).megatron_to_hf_config(provider),
    }


def angles(source: str, policy: str, max_length: int, lengths: list[int]) -> list[list[float]]:
    """The last position's angles of sequences of some lengths."""
    start(1, 1)
    bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(source))
    model = provider_of(bridge, {"longrope_policy": policy, "seq_length": max_length}).provide()
    return [model.rotary_pos_emb(length)[-1, 0, 0].tolist() for length in lengths]


def pack(source: str, policy: str, lengths: list[int]) -> str:
    """What the model says to a packed row of sequences of these lengths; empty if it takes them."""
    start(1, 1)
    bridge = AutoBridge.from_hf_config(AutoConfig.from_pretrained(source))
    model = provider_of(bridge, {"longrope_policy": policy}).provide()
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    try:
        model.rotary_pos_emb.get_rotary_seq_len(None, model.decoder, torch.empty(0), model.config, packed)
    except ValueError as error:
        return str(error)
    return ""


def configure(source: str, changes: Settings) -> str:
    """What the provider says to changed fields; empty if it takes them."""
    start(1, 1)
    try:
        provider_of(AutoBridge.from_hf_config(AutoConfig.from_pretrained(source)), changes).provide()
    except ValueError as error:
        return str(error)
    return ""


def register_naive_bridge() -> None:
    """The bridge that one writes first: every tensor has its mapping, and every weight comes back equal."""

    @MegatronModelBridge.register_bridge(source=Phi3ForCausalLM, target=GPTModel, model_type="phi3")
    class NaiveBridge(MegatronModelBridge):
        def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
            provider = super().provider_bridge(hf_pretrained)
            provider.normalization, provider.gated_linear_unit = "RMSNorm", True
            provider.add_bias_linear = provider.add_qkv_bias = False
            provider.hidden_dropout = 0.0
            return provider

        def mapping_registry(self) -> MegatronMappingRegistry:
            layer, theirs = "decoder.layers.*", "model.layers.*"
            names = {
                "embedding.word_embeddings.weight": "model.embed_tokens.weight",
                "output_layer.weight": "lm_head.weight",
                "decoder.final_layernorm.weight": "model.norm.weight",
                f"{layer}.input_layernorm.weight": f"{theirs}.input_layernorm.weight",
                f"{layer}.pre_mlp_layernorm.weight": f"{theirs}.post_attention_layernorm.weight",
                f"{layer}.self_attention.linear_proj.weight": f"{theirs}.self_attn.o_proj.weight",
                f"{layer}.mlp.linear_fc1.weight": f"{theirs}.mlp.gate_up_proj.weight",
                f"{layer}.mlp.linear_fc2.weight": f"{theirs}.mlp.down_proj.weight",
            }
            qkv = ConcatenatedQKVMapping(
                f"{layer}.self_attention.linear_qkv.weight", f"{theirs}.self_attn.qkv_proj.weight"
            )
            return MegatronMappingRegistry(*(AutoMapping(ours, hf) for ours, hf in names.items()), qkv)


def make(directory: str, variant: str, layout: str) -> None:
    phi3_models.save(Path(directory), variant, layout)


def save_distributed(source: str, target: str, tensor: int, pipeline: int, metadata: dict[str, Any] | None) -> None:
    """A distributed checkpoint of the installed Megatron-Core, as its trainers save the model."""
    start(tensor, pipeline)
    _, model = load(Path(source), {})
    if dist.get_rank() == 0:
        Path(target).mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata)}, target)
