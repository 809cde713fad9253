"""The parts of the GPU lane (gpu_lane.py), each in a process of its own.

    python bench/gpu_parts.py PART [--rehearse]

A part prints a RESULT line for each thing that it knows, as soon as it knows it, and raises where what it found is
not right: parity outside of what rounding explains, a loss that does not fall, two ways that differ.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest import mock

from common import print_result

if TYPE_CHECKING:
    import torch

REPOSITORY: Final = Path(__file__).resolve().parents[1]
GPU_TESTS: Final = REPOSITORY / "tests" / "gpu"
MARGIN: Final = 3.0
"""As in tests/gpu: what the roundings predict may be exceeded by so much."""
TRAINING_STEPS: Final = 5
ROOM_BYTES: Final = 110 * 10**9
"""Of a GPU that trains 3.8 B parameters without computing anything again: weights, gradients, master weights and
moments take 16 bytes a parameter, 61 GB; a row's activations 44 GB, 84 KB for each of 16,384 tokens and 32 layers."""
REPEATS: Final = 5
LOGPROB_SIZES: Final = {"tokens": 8192, "hidden": 3072, "vocabulary": 200_064}
LOGPROB_SIZES_REHEARSED: Final = {"tokens": 64, "hidden": 32, "vocabulary": 512}
LOGPROB_ERROR: Final = 2e-2
"""Nats: logits of about unit size, rounded to bfloat16 on either way, of which the label's counts in full."""
WIDE_LOGPROB_ERROR: Final = 1e-4
"""Nats: sums of 3,072 products and of 200 thousand exponentials in float32, in another order."""
SAMPLER_SEQUENCES, SAMPLER_PROMPT, SAMPLER_TOKENS = 64, 128, 256
SAMPLER_REHEARSED: Final = (4, 8, 8)
SMOLLM2: Final = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
RECIPE: Final = {"documents": 400, "longest": 1024, "dtype": "bf16"}
RECIPE_REHEARSED: Final = {"documents": 60, "longest": 128, "dtype": "fp32"}


def device(rehearse: bool) -> torch.device:
    """The GPU; the CPU in a rehearsal."""
    import torch

    return torch.device("cpu") if rehearse else torch.device("cuda", torch.cuda.current_device())


def synchronize(rehearse: bool) -> None:
    """Wait for the GPU."""
    if not rehearse:
        import torch

        torch.cuda.synchronize()


def parity(rehearse: bool, *, engine: bool) -> None:
    """Our model in bfloat16 against transformers in float32; with a fault of our making it must be outside."""
    import torch

    sys.path.insert(0, str(GPU_TESTS))
    import compare

    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.model.megatron import configuration, gpt
    from phimr_nemo.model.megatron.attention import RotaryScale
    from phimr_nemo.training.distributed import start_process_group

    if not engine:
        for module in (configuration, gpt):
            vars(module)["has_transformer_engine"] = lambda: False
    start_process_group(ParallelConfig(), seed=0)
    where = device(rehearse)
    inputs = compare.batch(compare.SMALL, where)
    expected = compare.expected_bfloat16(compare.SMALL.num_hidden_layers)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "hf"
        compare.make_checkpoint(directory, compare.SMALL)
        wanted = compare.run_transformers(directory, torch.float32, where, *inputs)
        model = compare.build(directory, torch.bfloat16, where)
        modules = sorted({type(module).__module__.split(".")[0] for module in model.decoder.modules()})
        found = compare.run_ours(model, *inputs)
        faulty = compare.build(directory, torch.bfloat16, where)
        for module in faulty.modules():
            if isinstance(module, RotaryScale):
                module.scale.fill_(1.0)
            if isinstance(module, gpt.PhiGPTModel):
                module.attention_factor = 1.0  # of a CPU's layers
        with torch.no_grad():
            planted = compare.relative_error(faulty(inputs[0]), wanted.logits)
    logits = compare.relative_error(found.logits, wanted.logits)
    gradients = compare.gradient_error(found.gradients, wanted.gradients)
    print_result(
        {
            "layers_of": modules,
            "relative_error_logits": logits,
            "relative_error_gradients": gradients,
            "expected_of_rounding": expected,
            "relative_error_logits_with_a_planted_fault": planted,
        }
    )
    if engine and "transformer_engine" not in modules:
        raise RuntimeError(f"Transformer Engine is installed, but the layers are of {modules}")
    if not logits < MARGIN * expected or not gradients < 2 * MARGIN * expected:
        raise RuntimeError(f"errors {logits:.2e} and {gradients:.2e} are not rounding's, {expected:.2e}")
    if not planted > 2 * MARGIN * expected:
        raise RuntimeError(f"without LongRoPE's factor the error is {planted:.2e}: the comparison sees nothing")


def memory_bytes() -> int:
    """Of the GPU."""
    import torch

    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def recomputed_on(memory: int) -> str:
    """What a GPU of so many bytes computes again to train the model: 80 GB do not hold all activations."""
    return "none" if memory >= ROOM_BYTES else "full"


def training(rehearse: bool, *, fp8: bool) -> None:
    """Steps of the model at its real size: tokens a second and MFU."""
    import train_gpu

    sizes = {"length": None, "rows": None, "steps": None if rehearse else TRAINING_STEPS}
    options = {"device": "cpu" if rehearse else "cuda", "fp8": fp8, "profile": not fp8}
    options["recompute"] = "none" if rehearse else recomputed_on(memory_bytes())
    train_gpu.run(argparse.Namespace(**sizes, **options))


def logprobs(rehearse: bool) -> None:
    """The output layer with its loss, forward and backward: in chunks and in one, against all logits in float32.

    Then with logits that are not rounded to bfloat16, which cost a copy of the matrix without Transformer Engine.
    """
    import torch

    from phimr_nemo.losses import token_logprobs

    sizes = LOGPROB_SIZES_REHEARSED if rehearse else LOGPROB_SIZES
    where, dtype = device(rehearse), torch.float32 if rehearse else torch.bfloat16
    torch.manual_seed(0)
    hidden = torch.randn(sizes["tokens"], sizes["hidden"], device=where).to(dtype).requires_grad_()
    weight = torch.randn(sizes["vocabulary"], sizes["hidden"], device=where)
    weight = weight.mul_(sizes["hidden"] ** -0.5).to(dtype).requires_grad_()
    labels = torch.randint(sizes["vocabulary"], (sizes["tokens"],), device=where)

    def of(logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits.float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def full() -> torch.Tensor:
        return of(hidden @ weight.T)

    def chunked() -> torch.Tensor:
        return token_logprobs(hidden, weight, labels)

    def one_chunk() -> torch.Tensor:
        return token_logprobs(hidden, weight, labels, chunk_size=sizes["tokens"])

    def wide() -> torch.Tensor:
        return token_logprobs(hidden, weight, labels, chunk_size=sizes["tokens"], output_format="fp32")

    values: dict[str, torch.Tensor] = {}
    for name, way in (("chunked", chunked), ("one_chunk", one_chunk), ("wide_logits", wide), ("all_logits", full)):
        seconds, peak = _forward_and_backward(way, (hidden, weight), rehearse)
        with torch.no_grad():
            values[name] = way()
        print_result(
            {f"{name}_tokens_per_second": round(sizes["tokens"] / seconds, 1), f"{name}_peak_gib": peak, **sizes}
        )
    ours = ("chunked", "one_chunk")
    error = max(float((values[name] - values["all_logits"]).abs().max()) for name in ours)
    with torch.no_grad():
        unrounded = of(hidden.float() @ weight.float().T)
    wide_error = float((values["wide_logits"] - unrounded).abs().max())
    print_result({"largest_difference_nats": error, "largest_difference_of_wide_logits_nats": wide_error})
    if not (error < LOGPROB_ERROR and wide_error < WIDE_LOGPROB_ERROR):
        raise RuntimeError(f"the ways differ by {error} nats, with wide logits by {wide_error}")


def _forward_and_backward(
    way: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...], rehearse: bool
) -> tuple[float, float | None]:
    """Median seconds, and GiB at the peak."""
    import torch

    if not rehearse:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + REPEATS):
        for leaf in leaves:
            leaf.grad = None
        synchronize(rehearse)
        started = time.perf_counter()
        way().mean().backward()
        synchronize(rehearse)
        seconds.append(time.perf_counter() - started)
    peak = None if rehearse else round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return statistics.median(seconds[1:]), peak


def sampler(rehearse: bool) -> None:
    """The built-in sampler at Phi-4-mini's size; its log-probabilities are those of its own greedy tokens again."""
    import torch
    import yaml
    from train_gpu import PRESET, SMALL, WEIGHT_SIZE

    from phimr_nemo.generate.local.engine import LocalSampler
    from phimr_nemo.generate.sampler import Request, SamplingParams
    from phimr_nemo.model.architecture import Architecture
    from phimr_nemo.model.table import tensor_shapes

    sequences, prompt, tokens = SAMPLER_REHEARSED if rehearse else (SAMPLER_SEQUENCES, SAMPLER_PROMPT, SAMPLER_TOKENS)
    arch = Architecture.from_preset(yaml.safe_load(PRESET.read_text("utf-8")), **(SMALL if rehearse else {}))
    where, dtype = device(rehearse), torch.float32 if rehearse else torch.bfloat16
    generator = torch.Generator(device=where).manual_seed(0)
    tensors = (
        (
            name,
            torch.empty(shape, dtype=dtype, device=where).normal_(
                1.0 if "norm" in name else 0.0, WEIGHT_SIZE, generator=generator
            ),
        )
        for name, shape in tensor_shapes(arch).items()
    )
    engine = LocalSampler(
        arch,
        tensors,
        stop_token_ids=[],
        max_batch=sequences,
        longrope_policy="long_when_max_length_exceeds_original",
        max_length=prompt + tokens,
        dtype=dtype,
        device=where,
    )
    requests = [
        Request(str(n), tuple((7 * n + 13 * place) % (arch.vocab_size - 1) + 1 for place in range(prompt)), seed=n)
        for n in range(sequences)
    ]
    params = SamplingParams(1.0, 1.0, tokens)
    engine.sample(requests[:2], SamplingParams(1.0, 1.0, min(tokens, 8)))
    synchronize(rehearse)
    started = time.perf_counter()
    first = engine.sample(requests, params)
    synchronize(rehearse)
    rate = sequences * tokens / (time.perf_counter() - started)
    print_result(
        {
            "tokens_per_second": round(rate, 1),
            "sequences": sequences,
            "new_tokens": tokens,
            "parameters": arch.num_parameters,
            "peak_gib": None if rehearse else round(torch.cuda.max_memory_allocated() / 2**30, 1),
        }
    )
    if any(len(completion.token_ids) != tokens for completion in first):
        raise RuntimeError("a response without a stop token ended early")
    if any(not -100.0 < logprob <= 0.0 for completion in first for logprob in completion.logprobs):
        raise RuntimeError("a log-probability is none")
    again = engine.sample(requests, params)
    same = sum(a.token_ids == b.token_ids for a, b in zip(first, again, strict=True))
    print_result({"responses_the_same_when_sampled_again": f"{same} of {sequences}"})


def recipe(rehearse: bool) -> None:
    """Steps of mid-training through NeMo 2.0, of a model of SmolLM2's shape with random weights."""
    import train

    from phimr_nemo.training import platform

    platform.prepare()
    settings = {**(RECIPE_REHEARSED if rehearse else RECIPE), "device": "cpu" if rehearse else "cuda"}
    options = argparse.Namespace(**settings, seed=0, base="", profile=False)
    steps = train.Steps(options)
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.object(train, "MODEL", train.MODEL if rehearse else SMOLLM2),
    ):
        root = Path(scratch)
        train.make_inputs(root, options)
        out = root / "run"
        out.mkdir()
        train.train_ours(root, out, options, steps)
        losses = _losses(out)
        tokens = sum(len(item["input_ids"]) for item in train.documents(root, options))
    count = len(steps.ends)
    seconds = steps.ends[-1] - steps.ends[0]
    print_result(
        {
            "steps": count,
            "tokens_per_second": round(tokens * (count - 1) / count / seconds, 1),
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }
    )
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss went from {losses[0]} to {losses[-1]}: this is no training")


def _losses(run: Path) -> list[float]:
    from phimr_nemo.store.runs import read_metrics

    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def device_tests(rehearse: bool) -> None:
    """The tests in tests/gpu; without a GPU (in a rehearsal) all of them are skipped."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run([*command, str(GPU_TESTS)], check=False)
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors")}
    print_result(counts)
    if done.returncode != 0:
        raise RuntimeError(f"pytest ended with {done.returncode}")
    if not rehearse and counts["skipped"] == counts["tests"]:
        raise RuntimeError("every test was skipped")


PARTS: Final[dict[str, Callable[[bool], None]]] = {
    "parity-te-bf16": lambda rehearse: parity(rehearse, engine=True),
    "parity-bf16": lambda rehearse: parity(rehearse, engine=False),
    "train-bf16": lambda rehearse: training(rehearse, fp8=False),
    "train-fp8": lambda rehearse: training(rehearse, fp8=True),
    "logprobs": logprobs,
    "sampler": sampler,
    "recipe": recipe,
    "device-tests": device_tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes")
    options = parser.parse_args()
    if options.rehearse:
        import torch

        torch.set_num_threads(1)
    PARTS[options.part](options.rehearse)


if __name__ == "__main__":
    main()
