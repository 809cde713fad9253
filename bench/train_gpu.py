"""Training steps of the model at its real size on one GPU, with what is installed there: tokens a second and MFU.

    python bench/train.py --gpu [--fp8] [--recompute none|selective|full] [--length 16384] [--rows 4] [--profile]

A step is what mid-training does: packed rows of documents of long-tailed length, kept apart; forward and backward of
the one model definition with the chunked loss on every token; gradients clipped; AdamW on fp32 master weights. The
weights are random. It needs torch, Megatron-Core and, for its kernels and FP8, Transformer Engine, but no NeMo. MFU
counts the model's operations (no recomputation, no padding, attention within documents) against the GPU's dense bf16
peak, in FP8 against twice that. The peer is what the paper's cluster did: 150 B tokens in 2 days on 128 H100.
On a CPU (`--device cpu`) the same steps run on a small model, as a test of the program.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from common import machine, print_result, versions
from parts import scopes, shares, table

from phimr_nemo.process.memory import GIBIBYTE

if TYPE_CHECKING:
    from torch import Tensor

    from phimr_nemo.data.rows.batches import Row
    from phimr_nemo.model.architecture import Architecture

PRESET = Path(__file__).parents[1] / "conf" / "model" / "phi4mini.yaml"
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
SEED = 0
MEDIAN_SHARE = 0.2
SIGMA = 0.8
"""Lengths are lognormal: median a fifth of the row."""
WEIGHT_SIZE = 0.02
LEARNING_RATE = 1e-5
CLIP = 1.0
WARM_UP = 2
PAPER_RATE = 150e9 / (2 * 24 * 3600) / 128
"""Tokens a second and GPU of arXiv 2504.21233: model card and section 3."""
AIM = 0.45
"""MFU in bf16."""
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
LOGITS_BYTES = 4 * GIBIBYTE
"""As in `conf/midtrain/phi4mini-*.yaml`."""
ON_CPU = {"length": 256, "rows": 2, "steps": 6}
ON_GPU = {"length": 16384, "rows": 4, "steps": 10}
PACKAGES = ("torch", "megatron-core", "transformer-engine")


def rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Full rows of random documents."""
    import numpy as np

    from phimr_nemo.data.packing import pack
    from phimr_nemo.data.rows.batches import Row

    draw, tokens = random.Random(SEED), np.random.default_rng(SEED)
    lengths: list[int] = []
    while sum(lengths) < 2 * count * length:
        lengths.append(max(2, min(int(MEDIAN_SHARE * length * draw.lognormvariate(0.0, SIGMA)), length)))
    found = []
    for members in pack(lengths, length)[:count]:
        sizes = np.asarray([lengths[index] for index in members], dtype=np.int32)
        total = int(sizes.sum())
        ids = tokens.integers(1, vocabulary, total, dtype=np.int32)
        found.append(Row(ids, np.ones(total, dtype=np.uint8), sizes))
    return found


class MasterAdam:
    """AdamW on fp32 copies of the weights, as Megatron's mixed-precision optimizer does it."""

    def __init__(self, weights: list[Any]) -> None:
        import torch

        self.weights = weights
        self.masters = [weight.detach().float().clone() for weight in weights]
        fused = weights[0].is_cuda
        self.adam = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=fused)

    def step(self) -> None:
        """Clip, update, and leave no gradient."""
        import torch

        with torch.profiler.record_function("part: optimizer"), torch.no_grad():
            torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
            for weight, master in zip(self.weights, self.masters, strict=True):
                master.grad = weight.grad.float()
                weight.grad = None
            self.adam.step()
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
                master.grad = None


def build(arch: Architecture, options: argparse.Namespace) -> Any:
    """The model with random weights."""
    import torch

    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.model import build_model, transformer_config
    from phimr_nemo.model.megatron.configuration import recompute_fields
    from phimr_nemo.training.distributed import start_process_group

    start_process_group(ParallelConfig(), SEED)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    extra = {**recompute_fields(options.recompute), **(FP8 if options.fp8 else {})}
    model = build_model(
        arch,
        transformer_config(arch, ParallelConfig(), dtype=dtype, **extra),
        max_length=options.length,
        longrope_policy="long_when_max_length_exceeds_original",
        pre_process=True,
        post_process=True,
        logits_bytes=LOGITS_BYTES,
    ).to(options.device)
    generator = torch.Generator(device=options.device).manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # norms stay as they are
                weight.normal_(0.0, WEIGHT_SIZE, generator=generator)
    return model.train()


def train_step(model: Any, optimizer: MasterAdam, batches: list[dict[str, Tensor]]) -> float:
    """One optimizer step over micro-batches of one row; the mean loss of its tokens."""
    from megatron.core.packed_seq_params import PackedSeqParams

    valid = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        boundaries, longest = batch["cu_seqlens"], int(batch["max_seqlen"])
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        loss = model(
            batch["tokens"], batch["position_ids"], labels=batch["labels"], packed_seq_params=documents
        ).sum()
        (loss / valid).backward()
        total += float(loss.detach())
    optimizer.step()
    return total / valid


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and the RESULT line."""
    import torch

    from phimr_nemo.data.rows.batches import collate_packed
    from phimr_nemo.model.architecture import Architecture
    from phimr_nemo.model.flops import causal_pairs, model_flops, peak_flops

    on_gpu = options.device == "cuda"
    for name, value in (ON_GPU if on_gpu else ON_CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    arch = Architecture.from_preset(yaml.safe_load(PRESET.read_text("utf-8")), **({} if on_gpu else SMALL))
    model = build(arch, options)
    optimizer = MasterAdam(list(model.parameters()))
    packed = rows(options.rows, options.length, arch.vocab_size)
    batches = [
        {name: tensor.to(options.device) for name, tensor in batch.items()}
        for batch in (collate_packed([row], pad_id=0, capacity=options.length) for row in packed)
    ]
    tokens = sum(len(row.input_ids) for row in packed)
    pairs = sum(causal_pairs(int(length)) for row in packed for length in row.document_lengths)

    def timed(steps: int) -> tuple[list[float], list[float]]:
        seconds, losses = [], []
        for _ in range(steps):
            started = time.perf_counter()
            losses.append(train_step(model, optimizer, batches))
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds, losses

    _, first = timed(WARM_UP)
    seconds, losses = timed(options.steps)
    rate = tokens / statistics.median(seconds)
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    used = model_flops(arch, tokens, pairs) / statistics.median(seconds)
    mfu = None if peak is None else used / (2 * peak if options.fp8 else peak)
    memory = torch.cuda.max_memory_allocated() / GIBIBYTE if on_gpu else None
    if not losses[-1] < first[0]:
        raise RuntimeError(f"the loss went from {first[0]} to {losses[-1]} on the same rows: this is no training")
    print(f"{arch.num_parameters:,} parameters, {options.rows} rows of {options.length}, {tokens:,} tokens a step")
    print("| tokens/s | MFU | TFLOP/s | GiB | loss, first and last step |\n|---:|---:|---:|---:|---:|")
    shown = ("-" if mfu is None else f"{mfu:.1%}", f"{used / 1e12:.1f}", "-" if memory is None else f"{memory:.0f}")
    print(f"| {rate:,.0f} | {' | '.join(shown)} | {first[0]:.3f}, {losses[-1]:.3f} |", flush=True)
    parts = profiled(lambda: timed(1), on_gpu) if options.profile else None
    print_result(
        {
            "bench": "train --gpu",
            "unit": "tokens/s",
            "ours": round(rate, 1),
            "peer": round(PAPER_RATE, 1),
            "ratio": round(rate / PAPER_RATE, 3) if on_gpu else None,
            "mfu": None if mfu is None else round(mfu, 4),
            "target": AIM,
            "parameters": arch.num_parameters,
            "fp8": options.fp8,
            "recompute": options.recompute,
            "peak_gib": memory,
            "parts": parts,
            "versions": versions(*PACKAGES),
            "machine": machine(device=torch.cuda.get_device_name() if on_gpu else "cpu"),
        }
    )


def profiled(step: Any, on_gpu: bool) -> dict[str, float]:
    """Print where the time of a step goes."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with scopes(), profile(activities=kinds) as profiler:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
    found = shares(profiler.events(), seconds, on_gpu=on_gpu)
    print(table({"ours": found}))
    return {name: round(share, 4) for name, share in found.items()}
