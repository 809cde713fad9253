"""One training step's forward and backward: tokens a second and peak memory of our model and of transformers.

    python bench/forward.py [--quick] [--device cuda] [--dtype bfloat16] [--length 4096] [--batch 1] [--fp8]

Both get the same weights (random, of Phi-4-mini's architecture; on CUDA at its real size of 3,836,021,760 parameters,
on the CPU with fewer and narrower layers), the same tokens, and compute the mean loss of every next token and its
gradients. They must agree on the loss. Without recomputation, without an optimizer, in one process a side.

- ours: the Megatron-Core model that every stage trains. With Transformer Engine its layers, without it our own.
- peer: transformers' Phi3ForCausalLM with `scaled_dot_product_attention`.

The sides take turns, twice. Times are medians of the repeats after a warm-up; on the CPU they are CPU seconds of all
threads, which other work on the machine disturbs less. Memory is the highest that was allocated on the GPU, or on the
CPU the growth of the peak resident set (VmHWM) from the loaded model on: activations, gradients and logits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from common import MIB, in_child, machine, print_result, status_bytes, versions

if TYPE_CHECKING:
    from torch import Tensor

    from phimr_nemo.model.architecture import Architecture

PRESET = Path(__file__).parents[1] / "conf" / "model" / "phi4mini.yaml"
SEED = 0
TURNS = 2
WEIGHT_SIZE = 0.02
PACKAGES = ("torch", "transformers", "megatron-core", "transformer-engine")
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""In nats, of a loss of about ln(vocabulary): rounding of one side against the other's."""
FP8_LOSS_TOLERANCE = 0.1
# Heads of the real size, fewer of everything.
SMALL = {
    "vocab_size": 32064,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
ON_CPU = {"device": "cpu", "dtype": "float32", "length": 1024, "batch": 1, "repeats": 3}
ON_CUDA = {"device": "cuda", "dtype": "bfloat16", "length": 4096, "batch": 1, "repeats": 10}
QUICK = {"length": 256, "repeats": 2}


def architecture(device: str) -> Architecture:
    from phimr_nemo.model.architecture import Architecture

    values = yaml.safe_load(PRESET.read_text("utf-8"))
    return Architecture.from_preset(values, **({} if device == "cuda" else SMALL))


def make_model(directory: Path, arch: Architecture, dtype: str) -> None:
    """Write the weights that both sides read."""
    import torch

    from phimr_nemo.model.files.hf import write_hf_directory
    from phimr_nemo.model.table import tensor_shapes

    generator = torch.Generator().manual_seed(SEED)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in tensor_shapes(arch).items():
            drawn = torch.empty(shape, dtype=getattr(torch, dtype))
            # Norms multiply: around 1, as in a trained model.
            yield name, drawn.normal_(1.0 if "norm" in name else 0.0, WEIGHT_SIZE, generator=generator)

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": []}
        (Path(scratch) / "tokenizer.json").write_text(json.dumps(tokenizer))
        write_hf_directory(directory, arch, tensors(), tokenizer_from=Path(scratch))


def build_ours(directory: Path, options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """Tokens [b, s] -> mean loss of every next token."""
    import torch

    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.losses import IGNORED_LABEL
    from phimr_nemo.model import build_model, transformer_config
    from phimr_nemo.model.files.hf import HFDirectory
    from phimr_nemo.model.megatron.convert import load_tensors
    from phimr_nemo.training.distributed import start_process_group

    start_process_group(ParallelConfig(), SEED)
    source = HFDirectory(directory)
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if options.fp8 else {}
    config = transformer_config(source.architecture, ParallelConfig(), dtype=getattr(torch, options.dtype), **fp8)
    model = build_model(
        source.architecture,
        config,
        max_length=options.length,
        longrope_policy="long_when_max_length_exceeds_original",
        pre_process=True,
        post_process=True,
    ).to(options.device)
    load_tensors([model], source.architecture, source)
    model.train()

    def loss(ids: Tensor) -> Tensor:
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[:, :-1] = ids[:, 1:]
        total: Tensor = model(ids, labels=labels).sum()
        return total / labels[:, :-1].numel()

    return loss


def build_transformers(directory: Path, options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """The same with transformers, which shifts the labels itself."""
    import torch
    from transformers import Phi3ForCausalLM

    model = Phi3ForCausalLM.from_pretrained(
        directory, torch_dtype=getattr(torch, options.dtype), attn_implementation="sdpa", use_cache=False
    )
    model.to(options.device).train()

    def loss(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, labels=ids).loss
        return found

    return loss


ENGINES = {"ours": build_ours, "transformers": build_transformers}


def measure(engine: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in this process."""
    import torch

    on_gpu = options.device == "cuda"
    loss_of = ENGINES[engine](directory, options)
    ids = torch.randint(
        1, architecture(options.device).vocab_size, (options.batch, options.length), generator=generator(torch)
    ).to(options.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = 0 if on_gpu else status_bytes("VmHWM")
    clock = time.perf_counter if on_gpu else time.process_time
    loss, seconds = 0.0, []
    for _ in range(1 + options.repeats):
        wait(options.device)
        started = clock()
        value = loss_of(ids)
        value.backward()
        wait(options.device)
        seconds.append(clock() - started)
        loss = float(value.detach())
        del value
    peak = torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM") - before
    return {"seconds": seconds[1:], "loss": loss, "peak_mib": peak / MIB}


def generator(torch: Any) -> Any:
    return torch.Generator().manual_seed(SEED + 1)


def wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def one_side(engine: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a fresh process."""
    settings = json.dumps({name: getattr(options, name) for name in (*ON_CPU, "fp8")})
    return in_child(__file__, ["--child", engine, str(directory), settings], environment={})


def merged(turns: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **turns[0],
        "median": statistics.median(seconds for turn in turns for seconds in turn["seconds"]),
        "peak_mib": max(turn["peak_mib"] for turn in turns),
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print the table and return the figures for the RESULT line."""
    arch = architecture(options.device)
    tokens = options.batch * options.length
    numbers = options.dtype + (" with FP8" if options.fp8 else "")
    shape = f"{options.batch} x {options.length} tokens"
    print(f"{arch.num_parameters:,} parameters, {numbers} on {options.device}, {shape}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        directory = Path(scratch) / "hf"
        make_model(directory, arch, options.dtype)
        turns = [{engine: one_side(engine, directory, options) for engine in ENGINES} for _ in range(TURNS)]
    runs = {engine: merged([turn[engine] for turn in turns]) for engine in ENGINES}
    print("| engine | seconds a step | tokens/s | peak MiB | loss |\n|---|---:|---:|---:|---:|")
    for engine, run in runs.items():
        print(
            f"| {engine} | {run['median']:.3f} | {tokens / run['median']:,.0f} | {run['peak_mib']:,.0f} "
            f"| {run['loss']:.5f} |"
        )
    ours, peer = runs["ours"], runs["transformers"]
    tolerance = FP8_LOSS_TOLERANCE if options.fp8 else LOSS_TOLERANCE[options.dtype]
    if not abs(ours["loss"] - peer["loss"]) < tolerance:
        raise RuntimeError(f"losses {ours['loss']} and {peer['loss']} differ: not the same model")
    return {
        "bench": "forward",
        "unit": "tokens/s" if options.device == "cuda" else "tokens/CPU-second",
        "parameters": arch.num_parameters,
        "tokens": tokens,
        "fp8": options.fp8,
        "ours": round(tokens / ours["median"], 1),
        "peer": round(tokens / peer["median"], 1),
        "ratio": round(peer["median"] / ours["median"], 3),
        "ours_peak_mib": round(ours["peak_mib"], 1),
        "peer_peak_mib": round(peer["peak_mib"], 1),
        "ratio_peak": round(ours["peak_mib"] / peer["peak_mib"], 3),
        "versions": versions(*PACKAGES),
        "machine": machine(
            device=device_name(options.device),
            dtype=options.dtype,
            threads=os.environ.get("OMP_NUM_THREADS", "default"),
        ),
    }


def device_name(device: str) -> str:
    if device != "cuda":
        return device
    import torch

    return str(torch.cuda.get_device_name())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short sequences, two repeats")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--fp8", action="store_true", help="our matrix products in FP8 (Transformer Engine)")
    parser.add_argument("--scratch", type=Path, help="where the weights go; default the temporary directory")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        engine, directory, settings = options.child
        print(json.dumps(measure(engine, Path(directory), argparse.Namespace(**json.loads(settings)))))
        return
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    for settings in (QUICK if options.quick else {}, ON_CUDA if options.device == "cuda" else ON_CPU):
        for name, value in settings.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
    print_result(compare(options))


if __name__ == "__main__":
    main()
