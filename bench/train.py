"""Training on chains of thought of varying length: tokens a second, ours packed against transformers and TRL.

    python bench/train.py [--quick] [--documents 1200] [--longest 1024] [--repeats 2] [--device cuda --base DIR]
    python bench/train.py --profile [--sides ours padded]
    python bench/train.py --gpu

`--profile` tells where the time of each side goes (parts.py); `--gpu` is described in train_gpu.py.

TRL comes from a directory of its own (`pip install --no-deps --target DIR trl==0.24.0`, then
PYTHONPATH=DIR); where it is absent the others are measured.

The same documents, tokenised alike, go once through

- ours: `phimr pack` and the stage `midtrain` (NeMo's trainer over Megatron-Core), documents packed and kept apart;
- transformers' Trainer, padded to the longest of the micro-batch, with and without its grouping by length;
- TRL's SFTTrainer with packing. Without flash attention its packed documents see one another, so its rows are as full
  as ours and its loss is not quite the same objective;

on one base model with AdamW, the same learning rate, clipping, number of optimizer steps, and loss on the responses.
Each side runs in a process of its own with one thread. Times are CPU seconds (on a GPU: wall seconds) from the end of
the first step to the end of the last, everything in between included; tokens are those of the documents, without
padding. The rounds alternate; the table shows medians. After training, every model's loss on documents kept out, as
the mean over documents of the mean over the response's tokens, is computed by one function. On some of them it is
also measured while training, with the clock stopped: how long a side took to the loss that the best other ends at.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from common import in_child, machine, print_result, versions
from held_out import (
    Document,
    documents_of,
    held_out_loss,
    made_up,
    median_or_none,
    megatron_loss,
    seconds_to,
    transformers_loss,
)
from parts import length_variance_between_rows, scopes, shares, table

REPOSITORY = Path(__file__).resolve().parents[1]
PRESETS = REPOSITORY / "conf"
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
EPSILON = 1e-8
CLIP = 1.0
ROWS_A_STEP = 4
PADDED_MICRO_BATCH = 4
HELD_OUT = 64
MEASURED_DOCUMENTS, MEASUREMENTS = 16, 8
"""Documents kept out that are measured while training, and how often."""
MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
QUICK = {"documents": 160, "longest": 512, "repeats": 1}
OPTIONS = ("documents", "longest", "seed", "device", "base", "dtype")
SIDES = ("ours", "padded", "grouped", "trl")
TITLES = {
    "ours": "ours, packed",
    "padded": "transformers Trainer, padded",
    "grouped": "transformers Trainer, padded, grouped by length",
    "trl": "TRL SFTTrainer, packed",
}
PROFILED_STEPS = 6
Rounds = list[dict[str, dict[str, Any]]]
"""Of every round what each side measured."""


def make_inputs(root: Path, options: argparse.Namespace) -> None:
    """The base model, the conversations, and the packed rows that both our side and the number of steps need."""
    from phimr_nemo.config import BaseConfig, PackConfig, load_config
    from phimr_nemo.data.rows.stage import run_pack
    from phimr_nemo.model.base import run_base
    from phimr_nemo.store.shards import finish, rows_to_table, write_shard

    if not options.base:
        shape = [f"{name}={value}" for name, value in MODEL.items()]
        run_base(load_config(BaseConfig, PRESETS / "base" / "tiny.yaml", [*run_in(root / "base", options), *shape]))
    rows = [
        {"id": f"c{n}", "problem_id": f"p{n}", "domain": None, "difficulty": None, **item}
        for n, item in enumerate(made_up(options.documents, options.longest, 2 * options.seed))
    ]
    write_shard(root / "conversations", 0, rows_to_table(rows, "conversations"), kind="conversations")
    finish(root / "conversations", kind="conversations", config={})
    settings = [*run_in(root / "rows", options), f"conversations={root / 'conversations'}"]
    settings += [f"tokenizer={base_of(root, options)}", f"sequence_length={options.longest}"]
    run_pack(load_config(PackConfig, PRESETS / "pack" / "tiny.yaml", settings))


def run_in(directory: Path, options: argparse.Namespace) -> list[str]:
    return [f"run.output={directory}", f"run.seed={options.seed}"]


def base_of(root: Path, options: argparse.Namespace) -> Path:
    return Path(options.base) if options.base else root / "base" / "hf"


def optimizer_steps(root: Path) -> int:
    from phimr_nemo.store.shards import read_manifest

    return read_manifest(root / "rows", "rows").rows // ROWS_A_STEP


def clock(options: argparse.Namespace) -> float:
    if options.device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


class Steps:
    """When the steps ended; profiles what comes after the first one when asked to."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.options, self.ends = options, list[float]()
        self.profiler: Any = None
        self.started = self.measuring = 0.0
        self.documents = [] if options.profile else kept_out(root, options)[:MEASURED_DOCUMENTS]
        self.every = max(1, optimizer_steps(root) // MEASUREMENTS)
        self.curve: list[tuple[float, float]] = []
        """(Seconds since the first step's end, loss on documents kept out.)"""

    def end(self, document_loss: Callable[[Document], float]) -> None:
        """A step has ended; `document_loss` is the model's mean loss on a document's response."""
        self.ends.append(clock(self.options) - self.measuring)
        if self.documents and len(self.ends) % self.every == 0:
            loss = statistics.fmean(map(document_loss, self.documents))
            self.curve.append((self.ends[-1] - self.ends[0], loss))
            self.measuring = clock(self.options) - self.ends[-1]
        if self.options.profile and self.profiler is None:
            from torch.profiler import ProfilerActivity, profile

            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.start()
            self.started = time.perf_counter()
        elif self.profiler is not None and len(self.ends) == 1 + PROFILED_STEPS:
            self.seconds = time.perf_counter() - self.started
            self.profiler.stop()

    def shares(self) -> dict[str, float]:
        """Part of the time -> share (see `parts.py`)."""
        if len(self.ends) <= PROFILED_STEPS:
            raise RuntimeError(f"{len(self.ends)} steps: --profile needs {1 + PROFILED_STEPS}; take more --documents")
        return shares(self.profiler.events(), self.seconds)


def train_ours(root: Path, out: Path, options: argparse.Namespace, steps: Steps) -> None:
    """The stage."""
    from phimr_nemo.config import MidtrainConfig, load_config
    from phimr_nemo.model.megatron.convert import phi_model
    from phimr_nemo.supervised.callbacks import RunMonitor
    from phimr_nemo.supervised.stage import run_midtrain

    settings = [*run_in(out, options), f"base={base_of(root, options)}", f"data={root / 'rows'}"]
    settings += [f"sequence_length={options.longest}", "micro_batch=1", f"global_batch={ROWS_A_STEP}", "epochs=1"]
    settings += ["validation_rows=0", "run.log_every=1", "checkpoint.every=1000000", f"model.dtype={options.dtype}"]
    settings += [f"optim.lr={LEARNING_RATE}", f"optim.min_lr={LEARNING_RATE}", "optim.schedule=constant"]
    settings += ["optim.warmup_fraction=0", "optim.weight_decay=0", f"optim.clip_grad={CLIP}"]
    settings += [f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}", f"optim.eps={EPSILON}"]
    real = RunMonitor.on_train_batch_end

    def timed(self: RunMonitor, trainer: Any, *more: Any) -> None:
        real(self, trainer, *more)
        model = phi_model(trainer.strategy.megatron_parallel)
        steps.end(lambda document: megatron_loss(model, document))

    config = load_config(MidtrainConfig, PRESETS / "midtrain" / "tiny.yaml", settings)
    with mock.patch.object(RunMonitor, "on_train_batch_end", timed), scopes() if options.profile else nullcontext():
        run_midtrain(config)


def documents(root: Path, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Ids and labels of the conversations."""
    from phimr_nemo.store.shards import read_table

    table = read_table(root / "conversations", "conversations", ["question", "response"])
    made = documents_of(base_of(root, options), table["question"].to_pylist(), table["response"].to_pylist())
    return [{"input_ids": ids, "labels": labels} for ids, labels in made]


def kept_out(root: Path, options: argparse.Namespace) -> list[Document]:
    """Documents of the same kind that no side trains on."""
    items = made_up(HELD_OUT, options.longest, 2 * options.seed + 1)
    return documents_of(base_of(root, options), [i["question"] for i in items], [i["response"] for i in items])


def train_peer(root: Path, out: Path, options: argparse.Namespace, steps: Steps) -> None:
    """transformers' or TRL's trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            steps.end(lambda document: transformers_loss(model, document))

    base = base_of(root, options)
    data = Dataset.from_list(documents(root, options))
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=dtype).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(base)
    common = {
        "output_dir": str(out / "trainer"),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "use_cpu": options.device == "cpu",
        "bf16": options.dtype == "bf16",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": options.seed,
    }
    if options.child == "trl":
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(
            **common,
            packing=True,
            packing_strategy="wrapped",
            max_length=options.longest,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS_A_STEP,
        )
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )
    else:
        from transformers import Trainer, TrainingArguments

        accumulation = max(1, round(len(data) / (optimizer_steps(root) * PADDED_MICRO_BATCH)))
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                **common,
                per_device_train_batch_size=PADDED_MICRO_BATCH,
                gradient_accumulation_steps=accumulation,
                group_by_length=options.child == "grouped",
            ),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[Clock()],
        )
    trainer.train()
    model.save_pretrained(out / "hf")


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    import torch

    if options.device == "cpu":
        torch.set_num_threads(1)
    out = Path(tempfile.mkdtemp(dir=root))
    clocked = Steps(root, options)
    (train_ours if options.child == "ours" else train_peer)(root, out, options, clocked)
    if options.profile:
        return clocked.shares()
    ends = clocked.ends
    steps = len(ends)
    tokens = sum(len(item["input_ids"]) for item in documents(root, options))
    return {
        "tokens_per_second": tokens * (steps - 1) / steps / (ends[-1] - ends[0]),
        "steps": steps,
        "tokens": tokens,
        "held_out_loss": held_out_loss(out / "hf", root, options),
        "curve": clocked.curve,
    }


def compare(options: argparse.Namespace, sides: tuple[str, ...], root: Path) -> dict[str, Any]:
    """Print the table; the figures for the RESULT line."""
    make_inputs(root, options)
    arguments = [text for name in OPTIONS for text in (f"--{name}", str(getattr(options, name)))]
    program = str(Path(__file__).resolve())

    def run(side: str, *more: str) -> dict[str, Any]:
        return in_child(program, ["--child", side, "--root", str(root), *arguments, *more])

    if options.profile:
        parts = {TITLES[side]: run(side, "--profile") for side in sides}
        print(f"shares of {PROFILED_STEPS} steps' wall time under torch's profiler\n{table(parts)}")
        return {"bench": "train", "unit": "share of the time", "parts": parts, "ours": None, "ratio": None}
    rounds = [{side: run(side) for side in sides} for _ in range(options.repeats)]
    return report(options, sides, rounds, root)


def report(options: argparse.Namespace, sides: Sequence[str], rounds: Rounds, root: Path) -> dict[str, Any]:
    """Print the table of measured sides; the figures for the RESULT line."""
    from phimr_nemo.store.shards import read_table

    first = rounds[0]
    rates = {side: statistics.median(found[side]["tokens_per_second"] for found in rounds) for side in sides}
    peers = [side for side in sides if side != "ours"]
    print(f"{options.documents} documents, {first[sides[0]]['tokens']:,} tokens, rows of {options.longest}")
    print("| trainer | tokens/s | steps | loss on documents kept out | seconds to the best other side's loss |")
    print("|---|---:|---:|---:|---:|")
    target, times = None, dict[str, float | None]()
    if peers:
        target = min(first[side]["curve"][-1][1] for side in peers)
        times = {
            side: median_or_none([seconds_to(target, found[side]["curve"]) for found in rounds]) for side in sides
        }
    for side in sides:
        found, seconds = first[side], times.get(side)
        reached = "not reached" if seconds is None else f"{seconds:,.1f}"
        print(
            f"| {TITLES[side]} | {rates[side]:,.0f} | {found['steps']} | {found['held_out_loss']:.4f} | {reached} |",
            flush=True,
        )
    result: dict[str, Any] = {
        "bench": "train",
        "unit": "tokens/s",
        "tokens_per_second": {side: round(rates[side], 1) for side in sides},
        "equal_loss": None if target is None else round(target, 4),
        "seconds_to_equal_loss": {side: None if s is None else round(s, 2) for side, s in times.items()},
        "steps": {side: first[side]["steps"] for side in sides},
        "held_out_loss": {side: round(first[side]["held_out_loss"], 4) for side in sides},
        "sizes": {name: getattr(options, name) for name in OPTIONS},
    }
    if "ours" not in sides:
        return result
    lengths = read_table(root / "rows", "rows", ["document_lengths"])["document_lengths"].to_pylist()
    share = length_variance_between_rows(lengths)
    print(
        f"ours: {share:.0%} of the variance of log lengths lies between rows (random rows: about 1 / documents a row)"
    )
    result["length_variance_between_rows"] = round(share, 3)
    result["ratios"] = {side: round(rates["ours"] / rates[side], 3) for side in peers}
    reached = [times[side] for side in peers if times[side] is not None]
    if times.get("ours") and reached:
        result["ratio_to_equal_loss"] = round(min(reached) / times["ours"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a minute instead of ten")
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a row, and of the longest document")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda with --gpu, else cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of how much it is")
    parser.add_argument("--gpu", action="store_true", help="steps of the 3.8 B model on one GPU, without NeMo")
    parser.add_argument("--fp8", action="store_true", help="with --gpu: products in FP8 (Transformer Engine)")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none", help="with --gpu")
    for name in ("length", "rows", "steps"):
        parser.add_argument(f"--{name}", type=int, help="with --gpu")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--base", default="", help="a Hugging Face directory instead of a small random model")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = options.device or ("cuda" if options.gpu else "cpu")
    if options.child:
        print(json.dumps(measure(options.root, options)))
        return
    if options.quick:
        parser.set_defaults(**QUICK, device=options.device)
        options = parser.parse_args()
    if options.gpu:
        import train_gpu

        train_gpu.run(options)
        return
    sides = tuple(options.sides)
    if "trl" in sides and importlib.util.find_spec("trl") is None:
        print("TRL is not installed: not compared")
        sides = tuple(side for side in sides if side != "trl")
    with tempfile.TemporaryDirectory() as scratch:
        result = compare(options, sides, Path(scratch))
    packages = ("torch", "megatron-core", "nemo-toolkit", "transformers", "trl", "accelerate")
    print_result({**result, "versions": versions(*packages), "machine": machine(device=options.device, threads=1)})


if __name__ == "__main__":
    main()
