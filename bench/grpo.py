"""GRPO: seconds a step, by part, and the reward's curve, against TRL's GRPOTrainer.

    python bench/grpo.py [--quick] [--steps 20] [--prompts 8] [--group 8] [--new-tokens 48] [--repeats 3]
    python bench/grpo.py --base DIR --learning-rate 1e-5 --steps 6 --prompts 2 --repeats 1

TRL comes from a directory of its own: `pip install --no-deps --target DIR trl==0.24.0`, then PYTHONPATH=DIR; where it
is absent only our side is measured.

Both start from one untrained model directory (0.8 M parameters), or from any that `phimr adopt` has made, and train
with the token-mean loss (DAPO), the same clip range, AdamW, learning rate, temperature 1, no KL penalty, one update a
round, and every response of it. A response is right when more of its characters are digits than of half of the first
model's responses, which a model without any knowledge can learn; the reward is +1 or -1. Ours samples with the
built-in engine, TRL with transformers' generate; vLLM is on neither side. Every run is a process of its own with one
thread, float32; the order of the sides alternates.

Times are CPU seconds, medians over the steps after the first two of all runs: `sample` is drawing responses, `reward`
is decoding and grading them, `logprobs` is log-probabilities before the update, `sync` is new weights to the sampler,
`train` is the rest of a step. The reward's curve is the share of right responses, a quarter of the steps at a time,
with its standard error over the responses of all runs; different random numbers make the curves differ by it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from common import in_child, machine, print_result, versions

REPOSITORY = Path(__file__).resolve().parents[1]
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
ADAM = (0.9, 0.95)
SEQUENCE_LENGTH = 128
WARM_UP_STEPS = 2
QUARTERS = 4
CALIBRATION = 256
"""Responses of the untrained model that say what is right."""
PARTS = ("sample", "reward", "logprobs", "sync", "train")
QUICK = {"steps": 8, "repeats": 1, "new_tokens": 24}
SIZES = ("steps", "prompts", "group", "new_tokens")
HANDED_ON = (*SIZES, "learning_rate", "base")
"""Options that a child gets too."""


def digit_share(text: str) -> float:
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def questions(count: int) -> list[str]:
    return [f"Compute {a} + {100 - a}." for a in range(count)]


def make_inputs(root: Path, options: argparse.Namespace) -> float:
    """A base model and the prompts as records; what share of digits is right."""
    from phimr_nemo.config import BaseConfig, load_config
    from phimr_nemo.data.chat import decode_response, load_tokenizer, render_prompt, stop_token_ids
    from phimr_nemo.generate.local.engine import LocalSampler
    from phimr_nemo.generate.sampler import Request, SamplingParams
    from phimr_nemo.model.base import run_base
    from phimr_nemo.model.files.hf import HFDirectory
    from phimr_nemo.store.shards import finish, rows_to_table, write_shard

    if options.base is None:
        run_base(load_config(BaseConfig, REPOSITORY / "conf" / "base" / "tiny.yaml", [f"run.output={root / 'base'}"]))
    facts = {"answer": "0", "pass_rate": 0.5, "mean_length": 10.0, "length_spread": 0.0, "hard": False}
    rows = [
        {"id": f"p{n}", "problem_id": f"p{n}", "question": question, **facts}
        for n, question in enumerate(questions(options.prompts))
    ]
    write_shard(root / "prompts", 0, rows_to_table(rows, "prompts"), kind="prompts")
    finish(root / "prompts", kind="prompts", config={})

    base = HFDirectory(base_of(root, options))
    tokenizer = load_tokenizer(base_of(root, options))
    prompt = tuple(render_prompt(tokenizer, questions(1)[0]))
    sampler = LocalSampler(
        base.architecture,
        ((name, base.read(name)) for name in base.names()),
        stop_token_ids=stop_token_ids(tokenizer),
        max_batch=CALIBRATION,
        longrope_policy="always_short",
        max_length=SEQUENCE_LENGTH,
    )
    requests = [Request(str(n), prompt, n) for n in range(CALIBRATION)]
    found = sampler.sample(requests, SamplingParams(1.0, 1.0, options.new_tokens))
    return statistics.median(digit_share(decode_response(tokenizer, c.token_ids)) for c in found)


def base_of(root: Path, options: argparse.Namespace) -> Path:
    """The directory that both sides start from."""
    return options.base or root / "base" / "hf"


class DigitGrader:
    """In the place of `verify.Grader`: TRL's reward function, as a grader."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def __enter__(self) -> DigitGrader:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def grade_many(self, pairs: Sequence[tuple[str, str]], _cut_off: Sequence[bool]) -> list[Any]:
        verdicts = ["correct" if digit_share(text) > self._threshold else "wrong" for text, _ in pairs]
        return [SimpleNamespace(verdict=verdict, reason="") for verdict in verdicts]


def run_ours(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The whole stage; its own timers, with a clock of CPU seconds."""
    import nemo.utils.timers

    from phimr_nemo.align.grpo import stage as grpo
    from phimr_nemo.config import GRPOConfig, load_config

    output = Path(tempfile.mkdtemp(dir=root))
    settings = [f"run.output={output}", f"run.seed={options.seed}", f"base={base_of(root, options)}"]
    settings += [f"prompts={root / 'prompts'}", f"sequence_length={SEQUENCE_LENGTH}", f"steps={options.steps}"]
    settings += [f"prompts_per_step={options.prompts}", f"group_size={options.group}"]
    settings += [f"max_new_tokens={options.new_tokens}", f"micro_batch={options.prompts * options.group}"]
    settings += ["loss.kind=dapo", f"loss.clip_low={CLIP_LOW}", f"loss.clip_high={CLIP_HIGH}", "kl=0"]
    settings += ["rebalance.enabled=false", "prompt_optimization.enabled=false"]
    settings += ["temperature.start=1", "temperature.end=1", "checkpoint.every=100000"]
    settings += [
        f"optim.lr={options.learning_rate}",
        f"optim.min_lr={options.learning_rate}",
        "optim.schedule=constant",
    ]
    settings += ["optim.warmup_fraction=0", "optim.weight_decay=0", "optim.clip_grad=1"]
    settings += [f"optim.beta1={ADAM[0]}", f"optim.beta2={ADAM[1]}", "optim.eps=1e-8"]
    config = load_config(GRPOConfig, REPOSITORY / "conf" / "grpo" / "tiny.yaml", settings)
    grader = mock.patch.object(grpo, "Grader", return_value=DigitGrader(options.threshold))
    clock = mock.patch.object(nemo.utils.timers, "time", SimpleNamespace(time=time.process_time))
    with grader, clock:
        grpo.run_grpo(config)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = []
    for row in rows:
        parts = {
            "sample": row["sample_seconds"],
            "reward": row["reward_seconds"],
            "logprobs": row["logprob_seconds"],
            "sync": row["sync_seconds"],
        }
        steps.append({**parts, "train": row["step_time"] - sum(parts.values())})
    return {
        "steps": steps,
        "right": [row["pass_rate"] for row in rows],
        "tokens": [row["response_length"] for row in rows],
    }


def run_trl(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """TRL's GRPOTrainer on the same token ids; its methods timed with a clock of CPU seconds."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from phimr_nemo.data.chat import load_tokenizer, render_prompt, stop_token_ids

    torch.set_num_threads(1)
    base = base_of(root, options)
    chat, tokenizer = load_tokenizer(base), AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop_token_ids(chat)[0])  # what ends a response
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # what the model takes
    prompts = [tokenizer.decode(render_prompt(chat, question)) for question in questions(options.prompts)]
    seconds = dict.fromkeys(PARTS, 0.0)
    steps: list[dict[str, float]] = []
    right: list[float] = []
    tokens: list[float] = []

    @contextmanager
    def counted(part: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[part] += time.process_time() - start

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args: Any) -> Any:
            with counted("sample"):
                return super()._generate_single_turn(*args)

        def _calculate_rewards(self, *args: Any) -> Any:
            with counted("reward"):
                return super()._calculate_rewards(*args)

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
            with counted("logprobs"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.process_time()
            seconds.update(dict.fromkeys(PARTS, 0.0))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            parts = dict(seconds)
            parts["train"] = time.process_time() - self.start - sum(parts.values())
            steps.append(parts)

    def reward(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        correct = [digit_share(text) > options.threshold for text in completions]
        right.append(statistics.fmean(correct))
        tokens.append(statistics.fmean(len(ids) for ids in completion_ids))
        return [1.0 if is_correct else -1.0 for is_correct in correct]

    arguments = GRPOConfig(
        output_dir=str(root / "trl"),
        per_device_train_batch_size=options.prompts * options.group,
        gradient_accumulation_steps=1,
        num_generations=options.group,
        max_steps=options.steps,
        max_prompt_length=None,
        max_completion_length=options.new_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=ADAM[0],
        adam_beta2=ADAM[1],
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return {"steps": steps, "right": right, "tokens": tokens}


def child(side: str, root: Path, threshold: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    arguments = ["--child", side, "--root", str(root), "--threshold", str(threshold), "--seed", str(seed)]
    for name in HANDED_ON:
        value = getattr(options, name)
        arguments += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return in_child(__file__, arguments)


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds a step of each part, and of the whole step."""
    steps = [step for run in runs for step in run["steps"][WARM_UP_STEPS:]]
    parts = {part: statistics.median(step[part] for step in steps) for part in PARTS}
    return parts | {"step": statistics.median(sum(step.values()) for step in steps)}


def curve(runs: Sequence[dict[str, Any]], responses: int) -> list[tuple[float, float]]:
    """Share of right responses and its standard error, quarter by quarter."""
    found = []
    steps = len(runs[0]["right"])
    for quarter in range(QUARTERS):
        part = slice(quarter * steps // QUARTERS, (quarter + 1) * steps // QUARTERS)
        shares = [share for run in runs for share in run["right"][part]]
        mean = statistics.fmean(shares)
        found.append((mean, math.sqrt(mean * (1 - mean) / (len(shares) * responses))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one short run of each side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--base", type=Path, help="a Hugging Face directory with a chat template")
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps((run_trl if options.child == "trl" else run_ours)(options.root, options)))
        return
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    sides = ["ours"]
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed: not compared")
    else:
        sides.append("trl")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        threshold = make_inputs(root, options)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for seed in range(options.repeats):
            for side in sides if seed % 2 == 0 else sides[::-1]:
                runs[side].append(child(side, root, threshold, seed, options))
    seconds = {side: medians(runs[side]) for side in sides}
    curves = {side: curve(runs[side], options.prompts * options.group) for side in sides}
    columns = (*PARTS, "step")
    print("| side | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for side in sides:
        print(f"| {side} | " + " | ".join(f"{seconds[side][name]:.3f}" for name in columns) + " |")
    print("\n| side | right, by quarter of the steps |\n|---|---|")
    for side in sides:
        print(f"| {side} | " + ", ".join(f"{mean:.3f} +- {error:.3f}" for mean, error in curves[side]) + " |")
    result: dict[str, Any] = {
        "bench": "grpo",
        "sizes": {name: getattr(options, name) for name in (*SIZES, "repeats")},
        "base": options.base.name if options.base else "tiny",
        "cpu_seconds_a_step": {
            side: {name: round(value, 4) for name, value in seconds[side].items()} for side in sides
        },
        "right_by_quarter": {side: [round(mean, 4) for mean, _ in curves[side]] for side in sides},
        "response_tokens": {
            side: round(statistics.fmean(n for run in runs[side] for n in run["tokens"]), 1) for side in sides
        },
        "peer": "TRL GRPOTrainer, transformers generate" if "trl" in sides else None,
        "ratio": round(seconds["trl"]["step"] / seconds["ours"]["step"], 3) if "trl" in sides else None,
        "versions": versions("torch", "megatron-core", "nemo-aligner", "transformers", "trl"),
        "machine": machine(threads=1),
    }
    print_result(result)


if __name__ == "__main__":
    main()
