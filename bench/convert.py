"""Hugging Face -> Megatron -> Hugging Face: seconds and peak memory against copying files and against transformers.

    python bench/convert.py [--quick] [--layers N] [--tp 2] [--pp 2] [--repeats 3] [--scratch DIR]
                            [--model phi4mini] [--source DIR]

The model has the real architecture of a preset of conf/model with random bfloat16 weights (Phi-4-mini: 3,836,021,760
parameters, 7.7 GB; three times that of free disk is needed); `--source` takes a model directory of yours instead.
Measured, in turn:
- a plain copy of the weight files,
- `phimr convert` into a Megatron checkpoint of the layout, and back into a Hugging Face directory,
- transformers: load the directory, save it again, as a conversion script does at best.

Each runs in a child process of its own. Its time is that of the work, from files that were dropped from the page
cache to files that are flushed to the disk, and without the imports; its memory is the peak resident set of the
whole process (VmHWM), imports included. Times are medians of the repeats. The result is compared with the source
tensor by tensor, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from common import machine, print_result, versions

if TYPE_CHECKING:
    from torch import Tensor

    from phimr_nemo.model.architecture import Architecture

PRESETS = Path(__file__).parents[1] / "conf" / "model"
PHI4MINI = "phi4mini"
SEED = 0
WEIGHT_SIZE = 0.02
MIB = 2**20
TIME_TARGET = 1.2
"""Of the time of a copy."""
MEMORY_TARGET_MIB = 3_000
DISK_COPIES = 3
METHODS = ("copy", "to_megatron", "to_hf", "transformers")
QUICK = {"layers": 2, "repeats": 1}
# Heads of the real size, fewer of everything.
QUICK_ARCHITECTURE = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}


def architecture(model: str, layers: int | None, quick: bool) -> Architecture:
    from phimr_nemo.model.architecture import Architecture

    values = yaml.safe_load((PRESETS / f"{model}.yaml").read_text("utf-8"))
    filled = {} if layers is None else {"num_hidden_layers": layers}
    return Architecture.from_preset(values, **filled, **(QUICK_ARCHITECTURE if quick else {}))


def make_source(directory: Path, model: str, layers: int | None, quick: bool) -> None:
    """Write the model, one tensor at a time."""
    import torch

    from phimr_nemo.model.files.hf import write_hf_directory
    from phimr_nemo.model.table import tensor_shapes

    arch = architecture(model, layers, quick)
    generator = torch.Generator().manual_seed(SEED)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in tensor_shapes(arch).items():
            drawn = torch.empty(shape, dtype=torch.bfloat16)
            yield name, drawn.normal_(0.0, WEIGHT_SIZE, generator=generator)

    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": []}
        (Path(scratch) / "tokenizer.json").write_text(json.dumps(tokenizer))
        write_hf_directory(directory, arch, tensors(), tokenizer_from=Path(scratch))


def flush(directory: Path) -> None:
    """Wait until the files are on the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def drop_from_cache(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(method: str, source: Path, target: Path, tp: int, pp: int) -> dict[str, float]:
    """Run one method once in this process."""
    # Imported before the clock starts, and only what the method needs.
    if method == "transformers":
        from transformers import AutoModelForCausalLM
    elif method != "copy":
        from phimr_nemo.config import ParallelConfig
        from phimr_nemo.supervised.conversion import convert
    drop_from_cache(source)
    # What the run before left to be written or freed is not this one's.
    os.sync()
    started = time.perf_counter()
    if method == "copy":
        shutil.copytree(source, target)
        flush(target)
    elif method == "transformers":
        AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto").save_pretrained(target)
        flush(target)
    else:
        kind = "megatron" if method == "to_megatron" else "hf"
        convert(source, target, kind=kind, layout=ParallelConfig(tensor=tp, pipeline=pp), hf=None)
    seconds = time.perf_counter() - started
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return {"seconds": seconds, "peak_mib": int(peak.split()[1]) / 1024}


def in_child(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def child(arguments: list[str]) -> None:
    """What a child process does: make the source, run a method, or compare two directories."""
    task, *rest = arguments
    if task == "make":
        make_source(Path(rest[0]), rest[1], json.loads(rest[2]), json.loads(rest[3]))
        answer: dict[str, float] = {}
    elif task == "compare":
        from phimr_nemo.model.files.hf import HFDirectory

        answer = {"identical": HFDirectory(Path(rest[0])).weights_hash() == HFDirectory(Path(rest[1])).weights_hash()}
    else:
        answer = measure(task, Path(rest[0]), Path(rest[1]), int(rest[2]), int(rest[3]))
    print(json.dumps(answer))


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Print the table and return the figures for the RESULT line."""
    from phimr_nemo.model.architecture import Architecture

    own: Path | None = options.source
    arch = Architecture.from_directory(own) if own else architecture(options.model, options.layers, options.quick)
    size = sum(file.stat().st_size for file in own.glob("*.safetensors")) if own else arch.num_parameters * 2
    free = shutil.disk_usage(scratch).free
    if free < DISK_COPIES * size:
        raise SystemExit(f"{scratch} has {free / 1e9:.1f} GB free, {DISK_COPIES * size / 1e9:.1f} GB are needed")
    print(f"{arch.num_parameters:,} parameters, {size / 1e9:.2f} GB, tensor {options.tp} x pipeline {options.pp}")
    source, megatron, output = (scratch / name for name in ("source", "megatron", "output"))
    if own:
        source = own
    else:
        in_child("make", source, options.model, json.dumps(options.layers), json.dumps(options.quick))
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for repeat in range(options.repeats):
        for method in METHODS:
            paths = {"to_megatron": (source, megatron), "to_hf": (megatron, output)}.get(method, (source, output))
            runs[method].append(in_child(method, *paths, options.tp, options.pp))
            if method == "to_hf" and repeat == 0 and not in_child("compare", source, output)["identical"]:
                raise RuntimeError("the way there and back changed a tensor")
            if method != "to_megatron":
                shutil.rmtree(output)
        shutil.rmtree(megatron)
    seconds = {method: statistics.median(run["seconds"] for run in found) for method, found in runs.items()}
    peaks = {method: max(run["peak_mib"] for run in found) for method, found in runs.items()}
    print("| method       |  seconds |  MB/s | of a copy | peak MiB |\n|---|---|---|---|---|")
    for method in METHODS:
        rate, share = size / seconds[method] / 1e6, seconds[method] / seconds["copy"]
        print(f"| {method:12} | {seconds[method]:8.2f} | {rate:5.0f} | {share:9.2f} | {peaks[method]:8,.0f} |")
    slower = max(seconds["to_megatron"], seconds["to_hf"])
    peak = max(peaks["to_megatron"], peaks["to_hf"])
    print(f"slower direction: {slower / seconds['copy']:.2f} of a copy (target <= {TIME_TARGET})")
    print(f"peak memory: {peak:,.0f} MiB (target < {MEMORY_TARGET_MIB:,}); tensors came back byte for byte")
    return {
        "bench": "convert",
        "model": str(own) if own else options.model,
        "parameters": arch.num_parameters,
        "bytes": size,
        "layout": {"tensor": options.tp, "pipeline": options.pp},
        "repeats": options.repeats,
        "every_seconds": {name: [round(run["seconds"], 1) for run in found] for name, found in runs.items()},
        "ours_seconds": {name: round(seconds[name], 3) for name in ("to_megatron", "to_hf")},
        "peer": "file copy; transformers load + save",
        "peer_seconds": {name: round(seconds[name], 3) for name in ("copy", "transformers")},
        "ratio": round(slower / seconds["copy"], 3),
        "target": TIME_TARGET,
        "ours_peak_mib": round(peak, 1),
        "target_peak_mib": MEMORY_TARGET_MIB,
        "peer_peak_mib": round(peaks["transformers"], 1),
        "ratio_to_transformers": round(slower / seconds["transformers"], 3),
        "identical": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a small model: seconds instead of minutes")
    parser.add_argument("--model", default=PHI4MINI, help="a preset of conf/model")
    parser.add_argument("--layers", type=int, help="fewer than the preset's")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the files go; default the system's temporary directory")
    parser.add_argument("--source", type=Path, help="a model directory; default random weights of the preset")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = compare(options, Path(scratch))
    result["versions"] = versions("torch", "transformers", "safetensors")
    result["machine"] = machine()
    print_result(result)


if __name__ == "__main__":
    main()
