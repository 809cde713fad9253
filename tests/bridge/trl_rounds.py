"""Runs an export of GRPO in TRL and writes down what each round sampled: trl_rounds.py EXPORT OUTPUT FILE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from phimr_nemo.bridges.trl import run

RECORDED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")


def main(export: Path, output: Path, file: Path) -> None:
    # The machine may have fewer cores than torch takes.
    torch.set_num_threads(1)
    rounds: list[dict[str, Any]] = []
    inherited = run.AnnealedGRPOTrainer._generate_and_score_completions

    def recorded(trainer: run.AnnealedGRPOTrainer, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        scored = inherited(trainer, inputs)
        rounds.append(
            {name: scored[name].tolist() for name in RECORDED}
            | {"prompts": [item["prompt"] for item in inputs], "temperature": trainer.temperature}
            | {"sampled_at": trainer.generation_config.temperature}
        )
        return scored

    run.AnnealedGRPOTrainer._generate_and_score_completions = recorded  # type: ignore[method-assign,assignment]
    log = run.run(export, output)
    file.write_text(json.dumps({"rounds": rounds, "log": log}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
