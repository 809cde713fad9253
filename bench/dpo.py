"""DPO: memory of a step with stored and with online references against SFT, and pairs a second against TRL.

    python bench/dpo.py [--quick] [--pairs 256] [--micro-batch 4] [--global-batch 32] [--longest 512]

TRL comes from a directory of its own: `pip install --no-deps --target DIR trl==0.24.0`, then PYTHONPATH=DIR; where it
is absent only our side is measured. Every measurement runs in a process of its own with one thread, float32.

Memory: the same model, sequences and micro-batches go through SFT's loss, through DPO with stored reference
log-probabilities, and through DPO with an online reference. Reported is the peak resident set of a step (after one
step to warm up) minus the resident set before the model was built.

Speed: NeMo-Aligner's DPOTrainer over our policy, with padded and with packed pairs, and TRL's DPOTrainer (padded; its
padding-free mode needs flash attention), both with reference log-probabilities computed beforehand, on one model
directory with the same tokens (checked: equal reference log-probabilities), AdamW, clipping, and pairs a micro-batch.
Times are CPU seconds from the end of the second step to the end of the last, everything in between included: loading,
collating, logging. The rounds alternate; the table shows medians. Lengths are long-tailed (lognormal, sigma 0.8, as
of long chains of thought) or uniform (within 10 % of each other); both sides of a pair are drawn independently.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from common import MIB, ONE_THREAD, in_child, machine, print_result, status_bytes, versions

REPOSITORY = Path(__file__).resolve().parents[1]
SEED = 0
BETA = 0.1
LEARNING_RATE = 1e-5
WARM_UP_STEPS = 2
TOKENS_A_LINE = 17.0
"""About what a line of the made-up solutions takes."""
LONGTAIL_SIGMA = 0.8
LONGTAIL_MEDIAN_SHARE = 0.25
"""Of the longest sequence."""
LN_2_TOLERANCE = 1e-3
AGREEMENT = 1e-5
"""Relative, on the mean reference log-probability of a pair: the trainers compute the same tokens."""
MMAP_THRESHOLD = "65536"
MEMORY_STEPS = 2
MEMORY_MODEL = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 12}
QUICK = {"pairs": 64, "global_batch": 16, "repeats": 1, "longest": 256}
OURS = ("padded", "packed")
MEMORY_CASES = ("sft", "stored", "online")
LENGTHS = ("longtail", "uniform")


def made_up_pairs(count: int, longest: int, lengths: str) -> list[dict[str, str]]:
    """Solutions of random length, no two alike; the texts mean nothing, their tokens cost the same."""
    generator = random.Random(SEED)

    def solution() -> str:
        if lengths == "longtail":
            tokens = generator.lognormvariate(math.log(LONGTAIL_MEDIAN_SHARE * longest), LONGTAIL_SIGMA)
        else:
            tokens = LONGTAIL_MEDIAN_SHARE * longest * generator.uniform(0.95, 1.05)
        lines = max(1, round(min(tokens, 0.75 * longest) / TOKENS_A_LINE))
        return "\n".join(f"{a} + {b} = {a + b}." for a, b in ((digits(), digits()) for _ in range(lines)))

    def digits() -> int:
        return generator.randint(100, 999)

    return [
        {"question": f"Compute {digits()} + {digits()}.", "chosen": solution(), "rejected": solution()}
        for _ in range(count)
    ]


def make_inputs(root: Path, options: argparse.Namespace) -> None:
    """Two base models, and the pairs of both length distributions as records."""
    from phimr_nemo.config import BaseConfig, load_config
    from phimr_nemo.model.base import run_base
    from phimr_nemo.store.shards import finish, rows_to_table, write_shard

    preset = REPOSITORY / "conf" / "base" / "tiny.yaml"
    run_base(load_config(BaseConfig, preset, [f"run.output={root / 'base'}"]))
    larger = [f"{name}={value}" for name, value in MEMORY_MODEL.items()]
    run_base(load_config(BaseConfig, preset, [f"run.output={root / 'large'}", *larger]))
    for lengths in LENGTHS:
        pairs = made_up_pairs(options.pairs, options.longest, lengths)
        rows = [{"id": f"r{n}", "problem_id": f"p{n}", "mode": "random", **pair} for n, pair in enumerate(pairs)]
        write_shard(root / lengths, 0, rows_to_table(rows, "pairs"), kind="pairs")
        finish(root / lengths, kind="pairs", config={})


def our_config(root: Path, options: argparse.Namespace, base: str, *extra: str) -> Any:
    from phimr_nemo.config import DPOConfig, load_config

    settings = [f"base={root / base / 'hf'}", f"sequence_length={options.longest}", f"beta={BETA}"]
    settings += [f"micro_batch={options.micro_batch}", f"global_batch={options.global_batch}"]
    settings += [f"optim.lr={LEARNING_RATE}", f"optim.min_lr={LEARNING_RATE}", "optim.schedule=constant"]
    settings += ["optim.warmup_fraction=0", "checkpoint.every=100000", "overlong=error"]
    return load_config(DPOConfig, REPOSITORY / "conf" / "dpo" / "tiny.yaml", [*settings, *extra])


def run_ours(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """The whole stage; seconds of its steps."""
    from safetensors.torch import load_file

    from phimr_nemo.align.dpo import stage as dpo
    from phimr_nemo.align.dpo.log import DPOLog
    from phimr_nemo.align.dpo.reference import REFERENCE_FILE

    config = our_config(
        root,
        options,
        "base",
        f"pairs={root / options.lengths}",
        f"packed={str(options.child == 'packed').lower()}",
        f"run.output={Path(tempfile.mkdtemp(dir=root))}",
    )
    ends: list[float] = []
    losses: list[float] = []
    real = DPOLog.log_metrics

    def timed(self: Any, metrics: Mapping[str, Any], step: int, prefix: str) -> None:
        real(self, metrics, step, prefix)
        ends.append(time.process_time())
        losses.append(float(metrics["loss"]))

    with mock.patch.object(DPOLog, "log_metrics", timed):
        dpo.run_dpo(config)
    stored = load_file(config.run.output / REFERENCE_FILE)
    return speed(ends, losses, options) | {"reference": float((stored["chosen"] + stored["rejected"]).mean())}


def run_trl(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """TRL's DPOTrainer on the same texts, rendered as our chat template renders them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from phimr_nemo.data.chat import END, load_tokenizer, render_prompt

    torch.set_num_threads(1)
    base = root / "base" / "hf"
    chat = load_tokenizer(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = END  # TRL ends a response with it, as our template does
    items = made_up_pairs(options.pairs, options.longest, options.lengths)
    prompts = [tokenizer.decode(render_prompt(chat, item["question"])) for item in items]
    data = Dataset.from_list(
        [
            {"prompt": prompt, "chosen": item["chosen"], "rejected": item["rejected"]}
            for prompt, item in zip(prompts, items, strict=True)
        ]
    )
    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Mapping[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    arguments = DPOConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.global_batch // options.micro_batch,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=BETA,
        max_length=options.longest,
        max_prompt_length=None,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    columns = (trainer.train_dataset[name] for name in ("ref_chosen_logps", "ref_rejected_logps"))
    reference = statistics.fmean(chosen + rejected for chosen, rejected in zip(*columns, strict=True))
    return speed(ends, losses, options) | {"reference": reference}


def speed(ends: list[float], losses: list[float], options: argparse.Namespace) -> dict[str, float]:
    """Pairs a CPU second after the warm-up; a first loss that is not ln 2 means a broken comparison."""
    if abs(losses[0] - math.log(2)) > LN_2_TOLERANCE:
        raise RuntimeError(f"the first loss is {losses[0]}, not ln 2")
    steps = len(ends) - WARM_UP_STEPS
    seconds = ends[-1] - ends[WARM_UP_STEPS - 1]
    return {"pairs_per_second": steps * options.global_batch / seconds, "steps": len(ends), "last_loss": losses[-1]}


def run_memory(root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of a step of one global batch with the larger model."""
    import torch

    from phimr_nemo.align.dpo.pairs import PairCollate, load_pairs
    from phimr_nemo.align.dpo.stage import build_policy
    from phimr_nemo.data.chat import load_tokenizer
    from phimr_nemo.losses import IGNORED_LABEL, sft_loss
    from phimr_nemo.model.files.hf import HFDirectory
    from phimr_nemo.training.distributed import start_process_group
    from phimr_nemo.training.guard import BatchGuard

    class SFTObjective:
        """SFT's loss on the chosen and the rejected sides alike: the same sequences, no reference."""

        def __init__(self, pairs: Any) -> None:
            self.micro_batches = pairs.micro_batches
            self.wants_entropy = False

        def loss(self, logprobs: Any, micro: Any, entropy: Any = None) -> Any:
            del entropy
            return (*sft_loss(logprobs, micro.labels != IGNORED_LABEL), {})

        def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
            return {"loss": sums["loss"] / sums["count"]}

    # Short, one pair a micro-batch: with more tokens, activations hide what a second model adds.
    paths = (f"pairs={root / 'uniform'}", f"run.output={root / 'unused'}")
    config = our_config(root, options, "large", "micro_batch=1", *paths)
    start_process_group(config.parallel, SEED)
    base = HFDirectory(config.base)
    pairs = load_pairs(config.pairs, load_tokenizer(config.base), config.sequence_length, config.overlong)
    before = status_bytes("VmRSS")
    policy = build_policy(config, base, 10, BatchGuard(config.run.output, config.guard, lambda _: []))
    case = options.child
    if case == "sft":
        policy.objective = SFTObjective(policy.objective)
    if case == "online":
        policy.keep_reference()
    stored = None if case == "online" else torch.full((2, len(pairs)), -100.0)
    batch_of = PairCollate(pairs, stored, base.architecture.pad_token_id, rank=0, ranks=1)
    for step in range(1 + MEMORY_STEPS):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
        batch = batch_of(range(options.global_batch))
        reference = policy.get_ref_policy_logprobs(batch)
        batch["ref_policy_log_probs_chosen"], batch["ref_policy_log_probs_rejected"] = reference.chunk(2)
        policy.prepare_for_training_step()
        policy.get_loss_and_metrics(batch, forward_only=False)
        policy.optimizer.step()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in policy.model.parameters())
    return {"bytes": status_bytes("VmHWM") - before, "weights": weights}


def measured(case: str, root: Path, options: argparse.Namespace, lengths: str = "longtail") -> dict[str, float]:
    """What one side's process measures."""
    arguments = ["--child", case, "--root", str(root), "--lengths", lengths]
    for name in ("pairs", "micro-batch", "global-batch", "longest"):
        arguments += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    # Freed memory goes back at once, so that peaks are what is held and not what the allocator keeps.
    peaks = {"MALLOC_MMAP_THRESHOLD_": MMAP_THRESHOLD} if case in MEMORY_CASES else {}
    return in_child(__file__, arguments, {**ONE_THREAD, **peaks})


def compare_memory(root: Path, options: argparse.Namespace) -> dict[str, object]:
    print("| step | peak MiB | of SFT's |\n|---|---:|---:|")
    peaks = {}
    for case in MEMORY_CASES:
        found = measured(case, root, options)
        peaks[case] = found["bytes"]
        print(f"| {case} | {found['bytes'] / MIB:,.0f} | {found['bytes'] / peaks['sft']:.3f} |", flush=True)
    print(f"weights alone: {found['weights'] / MIB:,.0f} MiB")
    return {
        "weights_mib": round(found["weights"] / MIB, 1),
        **{f"{case}_mib": round(value / MIB, 1) for case, value in peaks.items()},
        "stored_over_sft": round(peaks["stored"] / peaks["sft"], 4),
        "online_over_sft": round(peaks["online"] / peaks["sft"], 4),
    }


def compare_speed(root: Path, options: argparse.Namespace, cases: tuple[str, ...]) -> dict[str, object]:
    print("| lengths | trainer | pairs a CPU second | of TRL's |\n|---|---|---:|---:|")
    result: dict[str, object] = {}
    for lengths in LENGTHS:
        rounds = [{case: measured(case, root, options, lengths) for case in cases} for _ in range(options.repeats)]
        sums = [found["reference"] for found in rounds[0].values()]
        if max(sums) - min(sums) > AGREEMENT * abs(sums[0]):
            raise RuntimeError(f"mean reference log-probabilities of a pair are {sums}: not the same tokens")
        rates = {case: statistics.median(found[case]["pairs_per_second"] for found in rounds) for case in cases}
        for case, rate in rates.items():
            share = f"{rate / rates['trl']:.2f}" if "trl" in rates else ""
            print(f"| {lengths} | {case if case == 'trl' else 'ours, ' + case} | {rate:.1f} | {share} |", flush=True)
        result[lengths] = {case: round(rate, 2) for case, rate in rates.items()}
        if "trl" in rates:
            result[f"ratio_{lengths}"] = round(rates["packed"] / rates["trl"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute or two instead of ten")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=32)
    parser.add_argument("--longest", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", choices=[*OURS, "trl", *MEMORY_CASES], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", choices=LENGTHS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure = run_memory if options.child in MEMORY_CASES else run_trl if options.child == "trl" else run_ours
        print(json.dumps(measure(options.root, options)))
        return
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    has_trl = importlib.util.find_spec("trl") is not None
    if not has_trl:
        print("TRL is not installed: not compared")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_inputs(root, options)
        memory = compare_memory(root, options)
        rates = compare_speed(root, options, (*OURS, "trl") if has_trl else OURS)
    result = {
        "bench": "dpo",
        "sizes": {name: getattr(options, name) for name in ("pairs", "micro_batch", "global_batch", "longest")},
        "memory": memory,
        "pairs_per_cpu_second": rates,
        "peer": "TRL DPOTrainer, padded, precompute_ref_log_probs" if has_trl else None,
        "versions": versions("torch", "megatron-core", "nemo-aligner", "transformers", "trl"),
        "machine": machine(threads=1),
    }
    print_result(result)


if __name__ == "__main__":
    main()
