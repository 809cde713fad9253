"""One model computed by transformers and by ours on the same device, and how far rounding alone may set them apart.

The reference is transformers in float32. Every rounding to p significant bits is a relative error of at most 2^-p,
about 0.6 of that in the mean square; independent ones add as a square root.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from phimr_nemo.config import ParallelConfig
from phimr_nemo.model import Architecture, build_model, transformer_config
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.convert import export_tensors, load_tensors
from phimr_nemo.model.megatron.gpt import PhiGPTModel

RMS_SHARE: Final = 0.6
BFLOAT16_BITS: Final = 9
"""Eight bits are stored; rounding to nearest halves the step."""
FP8_BITS: Final = 4
"""Of E4M3, three stored bits. The gradients' E5M2 has one less."""
LAYER_ROUNDINGS: Final = 12
"""Roundings in a layer that reach the residual stream."""
FP8_PRODUCTS: Final = 4
"""Matrix products in a layer, each with two rounded factors. Their error does not add up over the layers: every layer
adds its own share of the residual stream, with the same relative error."""

ROWS, LENGTH = 2, 256
DOCUMENTS = (64, 192, 16, 240)  # of one packed row; multiples of 16, as FP8 wants its tokens in all
SMALL = Architecture(
    vocab_size=1024,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    partial_rotary_factor=0.75,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    original_max_position_embeddings=128,
    short_factor=(1.0,) * 48,
    long_factor=tuple(1.0 + 0.15 * i for i in range(48)),
    sliding_window=None,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1023,
    initializer_range=0.025,
)
"""Phi-4-mini's heads of 128 dimensions, fewer of everything else. Weights of 0.025 x sqrt(768) = 0.7 keep every
layer's outputs smaller than its inputs: larger ones let attention amplify rounding, in transformers just as much."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a side computes: logits [b, s, v], negative log-probabilities [b, s], gradients by transformers' names."""

    logits: Tensor
    nll: Tensor
    gradients: dict[str, Tensor]


def expected_bfloat16(layers: int) -> float:
    """Relative error (root mean square) of bfloat16 logits after so many layers."""
    return RMS_SHARE * 2.0**-BFLOAT16_BITS * math.sqrt(LAYER_ROUNDINGS * layers)


def expected_fp8() -> float:
    """The same for FP8 matrix products."""
    return RMS_SHARE * 2.0**-FP8_BITS * math.sqrt(2 * FP8_PRODUCTS)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of the wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def gradient_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The same over all gradients as one vector."""
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return math.sqrt(difference / sum(float(wanted[name].double().square().sum()) for name in wanted))


def batch(arch: Architecture, device: torch.device, rows: int = ROWS, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """ids and labels [rows, length]; some labels are left out."""
    generator = torch.Generator().manual_seed(3)
    # Below the padding token, whose embedding transformers gives no gradient.
    words = arch.pad_token_id or arch.vocab_size
    ids, labels = (torch.randint(words, (rows, length), generator=generator) for _ in range(2))
    labels[0, : length // 4] = -100
    return ids.to(device), labels.to(device)


def make_checkpoint(directory: Path, arch: Architecture) -> None:
    """Random weights, written by transformers."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**arch.to_hf_config()))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones by default, which would hide a lost or misplaced norm
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)


def run_transformers(
    directory: Path, dtype: torch.dtype, device: torch.device, ids: Tensor, labels: Tensor
) -> Outcome:
    """transformers' logits, log-probabilities and gradients of the mean loss."""
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(directory, torch_dtype=dtype, attn_implementation="sdpa").to(device)
    logits = model(ids).logits
    nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    (nll.sum() / (labels >= 0).sum()).backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(logits.detach(), nll.detach(), gradients)


def build(
    directory: Path, dtype: torch.dtype, device: torch.device, layout: ParallelConfig | None = None, **overrides: Any
) -> PhiGPTModel:
    """Our model with the checkpoint's weights; the layout has no tensor or pipeline ranks."""
    source = HFDirectory(directory)
    arch = source.architecture
    model = build_model(
        arch,
        transformer_config(arch, layout or ParallelConfig(), dtype=dtype, **overrides),
        max_length=arch.max_position_embeddings,
        longrope_policy="per_sequence",
        pre_process=True,
        post_process=True,
    ).to(device)
    load_tensors([model], arch, source)
    return model


def run_ours(model: PhiGPTModel, ids: Tensor, labels: Tensor, documents: PackedSeqParams | None = None) -> Outcome:
    """Our logits, log-probabilities and gradients of the mean loss, averaged over the context ranks."""
    with torch.no_grad():
        logits = model(ids, packed_seq_params=documents)
    nll = model(ids, labels=labels, packed_seq_params=documents)
    (nll.sum() / (labels >= 0).sum()).backward()
    group = parallel_state.get_context_parallel_group()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            torch.distributed.all_reduce(parameter.grad, group=group)
            parameter.copy_(parameter.grad / group.size())
    by_name = {name: tensor.float().cpu() for name, tensor in export_tensors([model], model.architecture)}
    return Outcome(logits, nll.detach(), by_name)


def packed_row(
    arch: Architecture, device: torch.device, changed: int | None = None
) -> tuple[Tensor, PackedSeqParams]:
    """A packed row of ``DOCUMENTS`` and its boundaries; one document may have other tokens."""
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(arch.pad_token_id, (n,), generator=generator) for n in DOCUMENTS]
    if changed is not None:
        texts[changed] = (texts[changed] + 1) % arch.pad_token_id
    boundaries = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    documents = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(DOCUMENTS),
        max_seqlen_kv=max(DOCUMENTS),
    )
    return torch.cat(texts)[None].to(device), documents


@torch.no_grad()
def packed_logits(model: PhiGPTModel, changed: int | None = None) -> Sequence[Tensor]:
    """Of each document [n, vocabulary], computed in one packed row."""
    device = next(model.parameters()).device
    row, documents = packed_row(model.architecture, device, changed)
    return model(row, packed_seq_params=documents)[0].split(DOCUMENTS)


@torch.no_grad()
def single_logits(model: PhiGPTModel) -> Sequence[Tensor]:
    """The same, one document at a time."""
    row, _ = packed_row(model.architecture, next(model.parameters()).device)
    return [model(text)[0] for text in row.split(DOCUMENTS, dim=1)]
