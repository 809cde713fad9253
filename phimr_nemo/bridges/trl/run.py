"""Runs an export of `phimr bridge trl` where TRL is: python -m phimr_nemo.bridges.trl.run EXPORT --output DIR.

TRL's own trainers do the work. What they lack of the stage is added here and named "patch" in `counterparts.md`: the
learning rate and the temperature of every step, LongRoPE's one regime a run, data that is tokenised already, and the
reward of this project's grader.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from phimr_nemo.bridges.files import SCHEDULE, SETTINGS, TRAIN, VALIDATION
from phimr_nemo.data.chat import decode_response
from phimr_nemo.store.records import UNGRADED_VERDICTS
from phimr_nemo.text.turn import opened_thinking
from phimr_nemo.verify import Grader

LOG: Final = "log.json"


class FiniteLoss(TrainerCallback):
    """A run ends at a loss that is not finite, as the stage's guard does."""

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Look at what is logged."""
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {logs}")


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's, for pairs that are tokenised already: it would add another end token to each response."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class AnnealedGRPOTrainer(GRPOTrainer):
    """TRL's, with a temperature for every round."""

    temperatures: Sequence[float] = ()
    inner_batches = 1

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            self.temperature = self.temperatures[self.state.global_step // self.inner_batches]
            if self.use_vllm:
                self.vllm_generation.temperature = self.temperature
            else:
                self.generation_config.temperature = self.temperature
        scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return scored


def run(export: Path, output: Path, max_steps: int | None = None) -> list[dict[str, float]]:
    """Train, save the model in `output`, and give what was logged.

    Args:
        export: directory of `phimr bridge trl`.
        output: TRL's output directory.
        max_steps: stop earlier.
    """
    settings = yaml.safe_load((export / SETTINGS).read_text("utf-8"))
    schedule = json.loads((export / SCHEDULE).read_text("utf-8"))
    arguments = {
        **settings["trainer"],
        "output_dir": str(output),
        "use_cpu": not torch.cuda.is_available(),
        # Elsewhere a loss that is not finite would be logged as the last one that was.
        "logging_nan_inf_filter": False,
    }
    if max_steps is not None:
        arguments["max_steps"] = max_steps
    parts: dict[str, Any] = {
        "model": load_model(settings),
        "processing_class": AutoTokenizer.from_pretrained(settings["model"]),
        "callbacks": [FiniteLoss()],
    }
    for name, file in (("train_dataset", TRAIN), ("eval_dataset", VALIDATION)):
        if (export / file).exists():
            parts[name] = Dataset.from_json(str(export / file), cache_dir=str(output / ".cache"))
    with contextlib.ExitStack() as processes:
        trainer = _trainer(settings, schedule, arguments, parts, processes)
        if trainer.optimizer is None:
            trainer.create_optimizer()
        rates, largest = schedule["rates"], settings["trainer"]["learning_rate"]
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: rates[min(step, len(rates) - 1)] / largest)
        trainer.train()
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        # The model computed with one set of factors; what is saved is what it was made from.
        AutoConfig.from_pretrained(settings["model"]).save_pretrained(output)
        (output / LOG).write_text(json.dumps(trainer.state.log_history))
    return list(trainer.state.log_history)


def load_model(settings: dict[str, Any]) -> PreTrainedModel:
    """The base, with LongRoPE's factors of the run's regime in both places: transformers looks at each batch."""
    config = AutoConfig.from_pretrained(settings["model"])
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        policy = settings["longrope"]
        is_long = settings["sequence_length"] > rope["original_max_position_embeddings"]
        if policy == "always_short":
            rope["long_factor"] = rope["short_factor"]
        elif policy == "long_when_max_length_exceeds_original":
            name = "long_factor" if is_long else "short_factor"
            rope["short_factor"] = rope["long_factor"] = rope[name]
    return AutoModelForCausalLM.from_pretrained(
        settings["model"], config=config, dtype=getattr(torch, settings["dtype"])
    )


def _trainer(
    settings: dict[str, Any],
    schedule: dict[str, Any],
    arguments: dict[str, Any],
    parts: dict[str, Any],
    processes: contextlib.ExitStack,
) -> Any:
    if settings["stage"] == "sft":
        return SFTTrainer(args=SFTConfig(**arguments), **parts)
    if settings["stage"] == "dpo":
        return TokenisedDPOTrainer(args=DPOConfig(**arguments), **parts)
    given = settings["reward"]
    grader = processes.enter_context(Grader(workers=given["workers"], function=given["grader"]))
    worth = {"correct": given["correct"], **dict.fromkeys(UNGRADED_VERDICTS)}

    def reward(
        prompts: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float | None]:
        """The verdict's worth; None, which TRL leaves out, where the grader gave up.

        TRL's own texts lack special tokens, and so the turns that a model made up.
        """
        tokenizer = parts["processing_class"]
        texts = [
            opened_thinking(prompt) + decode_response(tokenizer, ids)
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        cut_off = [ids[-1] not in trainer.eos_token_ids for ids in completion_ids]
        verdicts = grader.grade_many(list(zip(texts, answer, strict=True)), cut_off)
        return [worth.get(verdict.verdict, given["wrong"]) for verdict in verdicts]

    trainer = AnnealedGRPOTrainer(args=GRPOConfig(**arguments), reward_funcs=reward, **parts)
    trainer.temperatures = schedule["temperatures"]
    trainer.inner_batches = given["inner_batches"]
    return trainer


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-steps", type=int)
    given = parser.parse_args()
    run(given.export, given.output, given.max_steps)


if __name__ == "__main__":
    main()
