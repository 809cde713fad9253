"""`phimr bridge nemotron`: a stage for the steps of NVIDIA's Nemotron repository (0.1).

- `sft` -> `steps/sft/automodel`: chat JSONL and the Automodel recipe's YAML;
- `dpo` -> `steps/rl/nemo_rl/dpo`, `grpo` -> `steps/rl/nemo_rl/rlvr`: NeMo-RL's own YAML and JSONL, which these steps
  hand on, over the step's `default.yaml`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from phimr_nemo.bridges.counterparts import Counterpart, check_common, check_layout, refused
from phimr_nemo.bridges.export import Export
from phimr_nemo.bridges.files import TRAIN, VALIDATION
from phimr_nemo.bridges.nemo_rl import (
    COMMON,
    PRECISIONS,
    Config,
    Settings,
    check_sft,
    export_nemo_rl,
    regime_overrides,
)
from phimr_nemo.bridges.samples import Sample, sft_samples
from phimr_nemo.config import SFTConfig

TARGET: Final = "Nemotron"
VERSION: Final = "Nemotron 0.1"
STEP_DEFAULTS: Final = "default.yaml"

# Where NeMo-RL's lines lead in Automodel; "" where there is no place.
_THERE: Final = {
    "run.output": "checkpoint.checkpoint_dir",
    "run.seed": "rng.seed",
    "base": "model.pretrained_model_name_or_path",
    "model.dtype": "model.torch_dtype",
    "model.longrope": "model.rope_scaling",
    "model.recompute": "distributed.activation_checkpointing",
    "optim.lr": "optimizer.lr",
    "optim.min_lr": "lr_scheduler.min_lr",
    "optim.warmup_fraction": "lr_scheduler.lr_warmup_steps",
    "optim.schedule": "lr_scheduler.lr_decay_style",
    "optim.decay_fraction": "",
    "optim.weight_decay": "optimizer.weight_decay",
    "optim.beta1": "optimizer.betas",
    "optim.beta2": "optimizer.betas",
    "optim.eps": "optimizer.eps",
    "optim.clip_grad": "clip_grad_norm.max_norm",
    "parallel.tensor": "distributed.tp_size",
    "parallel.context": "distributed.cp_size",
    "parallel.sequence": "distributed.sequence_parallel",
    "parallel.data": "torchrun --nproc-per-node",
    "parallel.nodes": "torchrun --nnodes",
    "checkpoint.every": "step_scheduler.ckpt_every_steps",
    "checkpoint.keep": "",
    "checkpoint.best": "",
    "checkpoint.metric": "",
    "tracking.": "wandb",
}
SFT: Final = (
    Counterpart("parallel.timeout_minutes", "same", "dist_env.timeout_minutes"),
    *(
        dataclasses.replace(line, theirs=_THERE[line.ours], how=line.how if _THERE[line.ours] else "none")
        if line.ours in _THERE
        else line
        for line in COMMON
        if line.ours != "parallel.timeout_minutes"
    ),
    Counterpart("data", "data", TRAIN),
    Counterpart(
        "sequence_length", "data", "dataset.seq_length", "a longer conversation is refused before the export"
    ),
    Counterpart("epochs", "data", TRAIN, "every epoch's own order is in the file"),
    Counterpart("micro_batch", "same", "step_scheduler.local_batch_size"),
    Counterpart("global_batch", "same", "step_scheduler.global_batch_size"),
    Counterpart("validation_rows", "data", VALIDATION),
    Counterpart("validate_every", "same", "step_scheduler.val_every_steps"),
    Counterpart("loss_on", "none", "", "refused unless response"),
    Counterpart("data_workers", "none", "", "changes no number"),
    Counterpart("max_steps", "translated", "step_scheduler.max_steps"),
    Counterpart("overlap.", "none", "", "how communication is hidden changes no number"),
)


def export_nemotron(config: Config) -> Export:
    """A stage's settings and data for Nemotron's steps.

    Raises:
        UserError: a setting without a counterpart, or data that is not usable.
    """
    if not isinstance(config, SFTConfig):
        export = export_nemo_rl(config)
        return dataclasses.replace(
            export, target=f"{VERSION} ({export.target})", settings={**export.settings, "defaults": STEP_DEFAULTS}
        )
    samples = sft_samples(config)
    return Export(VERSION, automodel_settings(config, samples.steps), SFT, samples, chat)


def chat(sample: Sample) -> Sample:
    """A line of chat JSONL."""
    turns = (("user", sample["question"]), ("assistant", sample["response"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def automodel_settings(config: SFTConfig, steps: int) -> Settings:
    """Those of steps/sft/automodel.

    Raises:
        UserError: a setting without a counterpart.
    """
    check_common(config, TARGET)
    check_sft(config, TARGET)
    check_layout(config, TARGET)
    parallel, optim = config.parallel, config.optim
    if optim.schedule == "wsd":
        raise refused("optim.schedule=wsd", TARGET, "optim.schedule=cosine, linear or constant")
    if config.checkpoint.best:
        raise refused("checkpoint.best", TARGET, "checkpoint.best=false")
    data = "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset"
    settings: dict[str, Any] = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "step_scheduler": {
            "global_batch_size": config.global_batch,
            "local_batch_size": config.micro_batch,
            "ckpt_every_steps": config.checkpoint.every,
            "val_every_steps": config.validate_every,
            "max_steps": steps,
        },
        "dist_env": {"backend": "nccl", "timeout_minutes": parallel.timeout_minutes},
        "rng": {
            "_target_": "nemo_automodel.components.training.rng.StatefulRNG",
            "seed": config.run.seed,
            "ranked": True,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(config.base),
            "torch_dtype": PRECISIONS[config.model.dtype],
            **regime_overrides(config.model, config.base, config.sequence_length),
        },
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(config.run.output),
            "model_save_format": "safetensors",
            "save_consolidated": True,
        },
        "distributed": {
            "_target_": "nemo_automodel.components.distributed.config.FSDP2Config",
            "dp_size": "none",
            "tp_size": parallel.tensor,
            "cp_size": parallel.context,
            "pp_size": 1,
            "sequence_parallel": parallel.sequence,
            "activation_checkpointing": config.model.recompute != "none",
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {"_target_": data, "path_or_dataset_id": TRAIN},
        "packed_sequence": {"packed_sequence_size": 0},
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
            "shuffle": False,
        },
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "betas": [optim.beta1, optim.beta2],
            "eps": optim.eps,
            "lr": optim.lr,
            "weight_decay": optim.weight_decay,
        },
        "lr_scheduler": {
            "lr_decay_style": optim.schedule,
            "lr_warmup_steps": round(optim.warmup_fraction * steps),
            "min_lr": optim.min_lr,
        },
        "clip_grad_norm": {"max_norm": optim.clip_grad},
    }
    if config.validation_rows:
        settings["validation_dataset"] = {"_target_": data, "path_or_dataset_id": VALIDATION}
        settings["validation_dataloader"] = {
            name: value for name, value in settings["dataloader"].items() if name != "shuffle"
        }
    return settings
