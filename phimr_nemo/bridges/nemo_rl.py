"""`phimr bridge nemo-rl`: a stage in the YAML and JSONL of NeMo-RL 0.7's examples/run_{sft,dpo,grpo}.py.

The YAML holds what a stage decides and takes the rest from the example's own file (`defaults`), beside which it is
put. The model is computed by transformers there (its DTensor backend), which looks at each batch for LongRoPE's
regime; `hf_config_overrides` makes it the run's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from phimr_nemo.bridges.counterparts import Counterpart, check_common, check_grpo, check_layout, refused
from phimr_nemo.bridges.export import Export
from phimr_nemo.bridges.files import TRAIN, VALIDATION
from phimr_nemo.bridges.samples import Sample, dpo_samples, grpo_samples, sft_samples
from phimr_nemo.bridges.schedule import torch_schedulers
from phimr_nemo.config import DPOConfig, GRPOConfig, ModelConfig, SFTConfig
from phimr_nemo.config.dpo import RPOLoss
from phimr_nemo.config.engine import ServerEngine, VLLMEngine
from phimr_nemo.config.sampled.rounds import TruncatedCorrection
from phimr_nemo.model import Architecture

TARGET: Final = "NeMo-RL"
VERSION: Final = "NeMo-RL 0.7"
DEFAULTS: Final = {"sft": "sft.yaml", "dpo": "dpo.yaml", "grpo": "grpo_math_1B.yaml"}
MEMORY_SHARE: Final = 0.6
"""Of a GPU's, for vLLM beside the policy, in its own grpo_math_1B.yaml."""
PRECISIONS: Final = {"fp32": "float32", "bf16": "bfloat16"}
Settings = dict[str, Any]
Config = SFTConfig | DPOConfig | GRPOConfig

COMMON: Final = (
    Counterpart("run.output", "same", "checkpointing.checkpoint_dir"),
    Counterpart("run.seed", "data", "seed", "the order of the data is in the file"),
    Counterpart("run.log_every", "none", "", "every step is logged there"),
    Counterpart("base", "same", "policy.model_name"),
    Counterpart("model.dtype", "translated", "policy.precision"),
    Counterpart("model.fp8", "none", "", "refused unless off"),
    Counterpart("model.fp32_output", "none", "", "refused unless off"),
    Counterpart("model.fp8_output", "none", "", "off where model.fp8 is"),
    Counterpart("model.logits_gib", "none", "", "memory against time, the numbers are the same"),
    Counterpart("model.deterministic", "none", "", "refused unless off"),
    Counterpart("lora", "none", "", "refused unless off"),
    Counterpart("model.longrope", "patch", "policy.hf_config_overrides", "both sets of factors are the regime's"),
    Counterpart("model.recompute", "translated", "policy.dtensor_cfg.activation_checkpointing"),
    Counterpart("optim.lr", "same", "policy.optimizer.kwargs.lr"),
    Counterpart("optim.min_lr", "translated", "policy.scheduler"),
    Counterpart("optim.warmup_fraction", "translated", "policy.scheduler"),
    Counterpart("optim.schedule", "translated", "policy.scheduler"),
    Counterpart("optim.decay_fraction", "translated", "policy.scheduler"),
    Counterpart("optim.weight_decay", "same", "policy.optimizer.kwargs.weight_decay", "there of norms as well"),
    Counterpart("optim.beta1", "same", "policy.optimizer.kwargs.betas"),
    Counterpart("optim.beta2", "same", "policy.optimizer.kwargs.betas"),
    Counterpart("optim.eps", "same", "policy.optimizer.kwargs.eps"),
    Counterpart("optim.clip_grad", "same", "policy.max_grad_norm"),
    Counterpart("optim.distributed", "none", "", "how the optimizer's state is divided changes no number"),
    Counterpart("parallel.tensor", "same", "policy.dtensor_cfg.tensor_parallel_size"),
    Counterpart("parallel.context", "same", "policy.dtensor_cfg.context_parallel_size"),
    Counterpart("parallel.sequence", "same", "policy.dtensor_cfg.sequence_parallel"),
    Counterpart("parallel.pipeline", "none", "", "refused unless 1"),
    Counterpart("parallel.virtual", "none", "", "of pipelines alone"),
    Counterpart("parallel.timeout_minutes", "none", "", "when a job that hangs ends changes no number"),
    Counterpart("parallel.data", "launcher", "cluster.gpus_per_node"),
    Counterpart("parallel.nodes", "launcher", "cluster.num_nodes"),
    Counterpart("checkpoint.every", "same", "checkpointing.save_period"),
    Counterpart("checkpoint.keep", "same", "checkpointing.keep_top_k"),
    Counterpart(
        "checkpoint.best", "translated", "checkpointing.metric_name", "SFT's by validation loss, else refused"
    ),
    Counterpart("checkpoint.metric", "translated", "checkpointing.metric_name", "of checkpoint.best alone"),
    Counterpart("checkpoint.asynchronous", "none", "", "how a checkpoint is written changes no number"),
    Counterpart("guard.", "none", "", "refused unless on_nan=stop without a spike rule; there a NaN goes on"),
    Counterpart("early_stopping", "none", "", "refused unless off"),
    Counterpart("evaluation", "none", "", "refused unless off"),
    Counterpart("tracking.", "launcher", "logger.wandb_enabled", "off"),
)
SFT: Final = (
    *COMMON,
    Counterpart("data", "data", TRAIN),
    Counterpart("sequence_length", "same", "policy.max_total_sequence_length"),
    Counterpart("epochs", "data", TRAIN, "every epoch's own order is in the file; sft.max_num_epochs is 1"),
    Counterpart("micro_batch", "same", "policy.train_micro_batch_size"),
    Counterpart("global_batch", "same", "policy.train_global_batch_size"),
    Counterpart("validation_rows", "data", VALIDATION),
    Counterpart("validate_every", "same", "sft.val_period"),
    Counterpart("loss_on", "none", "", "refused unless response"),
    Counterpart("data_workers", "same", "data.num_workers"),
    Counterpart("max_steps", "translated", "sft.max_num_steps"),
    Counterpart("overlap.", "none", "", "how communication is hidden changes no number"),
)
DPO: Final = (
    *COMMON,
    Counterpart("pairs", "data", TRAIN),
    Counterpart("sequence_length", "same", "policy.max_total_sequence_length"),
    Counterpart("overlong", "data", TRAIN, "truncate is refused: the file holds whole texts"),
    Counterpart("beta", "same", "dpo.reference_policy_kl_penalty"),
    Counterpart("loss.kind", "translated", "dpo.preference_average_log_probs, dpo.sft_loss_weight"),
    Counterpart("loss.nll_weight", "same", "dpo.sft_loss_weight"),
    Counterpart("reference.kind", "none", "", "it computes the reference in every step, with the same values"),
    Counterpart("reference.path", "none", "", "refused unless off: its file is this project's own"),
    Counterpart("packed", "translated", "policy.sequence_packing.enabled", "off: its DPO has none"),
    Counterpart("epochs", "data", TRAIN, "every epoch's own order is in the file; dpo.max_num_epochs is 1"),
    Counterpart("micro_batch", "same", "policy.train_micro_batch_size", "pairs"),
    Counterpart("global_batch", "same", "policy.train_global_batch_size", "pairs"),
    Counterpart("max_steps", "translated", "dpo.max_num_steps"),
    Counterpart("validation_pairs", "data", VALIDATION, "measured in whole global batches; fewer are refused"),
    Counterpart("validate_every", "same", "dpo.val_period"),
)
GRPO: Final = (
    *COMMON,
    Counterpart("prompts", "data", TRAIN),
    Counterpart("sequence_length", "same", "policy.max_total_sequence_length"),
    Counterpart("max_new_tokens", "same", "policy.generation.max_new_tokens"),
    Counterpart("steps", "same", "grpo.max_num_steps"),
    Counterpart("prompts_per_step", "same", "grpo.num_prompts_per_step"),
    Counterpart("group_size", "same", "grpo.num_generations_per_prompt"),
    Counterpart("loss.kind", "translated", "loss_fn.token_level_loss, sequence_level_importance_ratios"),
    Counterpart("loss.clip_low", "same", "loss_fn.ratio_clip_min"),
    Counterpart("loss.clip_high", "same", "loss_fn.ratio_clip_max"),
    Counterpart("correction.", "translated", "loss_fn.truncated_importance_sampling_type, _ratio"),
    Counterpart("advantage_scale", "none", "", "refused unless the group's, which is its own"),
    Counterpart("entropy_bonus", "none", "", "refused unless 0"),
    Counterpart("passes", "none", "", "refused unless 1"),
    Counterpart("kl", "same", "loss_fn.reference_policy_kl_penalty", "k3, as here"),
    Counterpart("kl_estimator", "same", "loss_fn.reference_policy_kl_type", "refused unless k3"),
    Counterpart("inner_batches", "translated", "policy.train_global_batch_size"),
    Counterpart("micro_batch", "same", "policy.train_micro_batch_size", "sequences"),
    Counterpart("packed", "same", "policy.sequence_packing.enabled"),
    Counterpart("prompt", "data", TRAIN),
    Counterpart("engine.", "translated", "policy.generation", "vLLM beside the trainer, whatever samples here"),
    Counterpart("ahead", "none", "", "refused unless 0"),
    Counterpart("stale", "none", "", "of responses sampled ahead alone"),
    Counterpart("partial_rollouts", "none", "", "of responses sampled ahead alone"),
    Counterpart("max_concurrent_rollouts", "none", "", "of responses sampled ahead alone"),
    Counterpart("overlong.", "translated", "grpo.overlong_filtering", "the soft penalty is refused"),
    Counterpart("reward.correct", "translated", "grpo.reward_scaling.target_max"),
    Counterpart("reward.wrong", "translated", "grpo.reward_scaling.target_min"),
    Counterpart("reward.", "none", "", "refused unless 0 or empty"),
    Counterpart("verify_workers", "same", "env.math.num_workers"),
    Counterpart("grader", "translated", "env.math", "its own math-verify; another domain's is refused"),
    Counterpart("temperature.", "translated", "policy.generation.temperature", "annealing is refused"),
    Counterpart("rebalance.", "none", "", "refused unless off: it drops whole prompts at most"),
    Counterpart("curriculum.", "none", "", "refused unless null"),
    Counterpart("prompt_optimization.", "data", TRAIN, "uneven prompts are not in the file"),
    Counterpart("monitor.ungraded_stop", "none", "", "there a run whose grader gives up goes on"),
    Counterpart("monitor.", "none", "", "watches, and changes no number"),
)


def export_nemo_rl(config: Config) -> Export:
    """A stage's settings and data for NeMo-RL.

    Raises:
        UserError: a setting without a counterpart, or data that is not usable.
    """
    if isinstance(config, SFTConfig):
        samples = sft_samples(config)
        return Export(VERSION, sft_settings(config, samples.steps), SFT, samples, conversation)
    if isinstance(config, DPOConfig):
        samples = dpo_samples(config)
        return Export(VERSION, dpo_settings(config, samples.steps), DPO, samples, pair)
    samples = grpo_samples(config)
    return Export(VERSION, grpo_settings(config, samples.steps), GRPO, samples, problem)


def conversation(sample: Sample) -> Sample:
    """A line that `ResponseDataset` reads."""
    return {"input": sample["question"], "output": sample["response"]}


def pair(sample: Sample) -> Sample:
    """A line that `BinaryPreferenceDataset` reads."""
    return {"prompt": sample["question"], "chosen": sample["chosen_text"], "rejected": sample["rejected_text"]}


def problem(sample: Sample) -> Sample:
    """A line that `ResponseDataset` reads for GRPO: its output is the answer to grade by."""
    return {"input": sample["question"], "output": sample["answer"]}


def sft_settings(config: SFTConfig, steps: int) -> Settings:
    """Those of examples/configs/sft.yaml.

    Raises:
        UserError: a setting without a counterpart.
    """
    check_sft(config, TARGET)
    settings = _common("sft", config, steps)
    settings["sft"] = {
        "max_num_epochs": 1,
        "max_num_steps": steps,
        "val_period": config.validate_every if config.validation_rows else 0,
        "val_batches": config.validation_rows // config.global_batch,
        "val_global_batch_size": config.global_batch,
        "val_micro_batch_size": config.micro_batch,
        "val_at_start": False,
        "seed": config.run.seed,
    }
    settings["policy"] |= _batches(config.micro_batch, config.global_batch)
    settings["data"] |= {
        # The chat template writes every special token itself.
        "add_bos": False,
        "add_eos": False,
        "num_workers": max(config.data_workers, 1),
        **_files("ResponseDataset", has_validation=config.validation_rows > 0),
    }
    settings["checkpointing"] |= {"metric_name": "val:val_loss", "higher_is_better": False}
    return settings


def dpo_settings(config: DPOConfig, steps: int) -> Settings:
    """Those of examples/configs/dpo.yaml.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.loss.kind not in ("dpo", "length_normalized_dpo", "rpo"):
        raise refused(f"loss.kind={config.loss.kind}", TARGET, "loss.kind is dpo, length_normalized_dpo or rpo")
    if config.overlong == "truncate":
        raise refused("overlong=truncate", TARGET, "overlong=drop")
    if getattr(config.reference, "path", None) is not None:
        raise refused("reference.path", TARGET, "reference.path=null")
    if 0 < config.validation_pairs < config.global_batch:
        remedy = f"validation_pairs is 0, or global_batch={config.global_batch} or more"
        raise refused(f"validation_pairs={config.validation_pairs} below global_batch", TARGET, remedy)
    is_validated = config.validation_pairs > 0
    settings = _common("dpo", config, steps)
    nll = config.loss.nll_weight if isinstance(config.loss, RPOLoss) else 0.0
    settings["dpo"] = {
        "max_num_epochs": 1,
        "max_num_steps": steps,
        "val_period": config.validate_every if is_validated else 0,
        "val_batches": config.validation_pairs // config.global_batch,
        "val_global_batch_size": config.global_batch,
        "val_micro_batch_size": config.micro_batch,
        "val_at_start": False,
        "val_at_end": is_validated,
        "seed": config.run.seed,
        "reference_policy_kl_penalty": config.beta,
        "preference_average_log_probs": config.loss.kind == "length_normalized_dpo",
        "sft_average_log_probs": True,
        "preference_loss_weight": 1.0,
        "sft_loss_weight": nll,
    }
    settings["policy"] |= _batches(config.micro_batch, config.global_batch)
    settings["policy"]["sequence_packing"] = {"enabled": False}
    settings["data"] |= _files("BinaryPreferenceDataset", has_validation=is_validated)
    settings["checkpointing"] |= {"metric_name": None}
    return settings


def grpo_settings(config: GRPOConfig, steps: int) -> Settings:
    """Those of examples/configs/grpo_math_1B.yaml.

    Raises:
        UserError: a setting without a counterpart.
    """
    check_grpo(config, TARGET)
    settings = _common("grpo", config, steps * config.inner_batches)
    settings["grpo"] = {
        "num_prompts_per_step": config.prompts_per_step,
        "num_generations_per_prompt": config.group_size,
        "max_num_epochs": 1,
        "max_num_steps": steps,
        "normalize_rewards": True,
        "use_leave_one_out_baseline": False,
        "val_period": 0,
        "val_at_start": False,
        "seed": config.run.seed,
        "overlong_filtering": config.overlong.kind == "mask",
        "use_dynamic_sampling": False,
        "reward_scaling": {
            "enabled": True,
            "source_min": 0.0,
            "source_max": 1.0,
            "target_min": config.reward.wrong,
            "target_max": config.reward.correct,
        },
    }
    corrected = isinstance(config.correction, TruncatedCorrection)
    settings["loss_fn"] = {
        "reference_policy_kl_penalty": config.kl,
        "reference_policy_kl_type": "k3",
        "ratio_clip_min": config.loss.clip_low,
        "ratio_clip_max": config.loss.clip_high,
        "use_importance_sampling_correction": corrected,
        "truncated_importance_sampling_type": "tis" if corrected else None,
        "truncated_importance_sampling_ratio": getattr(config.correction, "cap", None),
        "sequence_level_importance_ratios": config.loss.kind == "gspo",
        "token_level_loss": config.loss.kind == "dapo",
    }
    round_size = config.prompts_per_step * config.group_size
    settings["policy"] |= _batches(config.micro_batch, round_size // config.inner_batches)
    settings["policy"] |= {
        "logprob_batch_size": config.micro_batch,
        "sequence_packing": {"enabled": config.packed},
        "generation": {
            "backend": "vllm",
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature.start,
            "top_p": 1.0,
            "top_k": None,
            "vllm_cfg": {"gpu_memory_utilization": _memory_share(config)},
        },
    }
    settings["data"] |= {
        **_files("ResponseDataset", has_validation=False),
        "default": {"prompt_file": None, "processor": "math_hf_data_processor", "env_name": "math"},
    }
    settings["env"] = {"math": {"num_workers": config.verify_workers, "math_verify_impl": "hf_math_verify"}}
    settings["checkpointing"] |= {"metric_name": None}
    return settings


def _memory_share(config: GRPOConfig) -> float:
    """Of a GPU's memory, for the engine: what is set, else NeMo-RL's own."""
    engine = config.engine
    stated = engine.memory_share if isinstance(engine, (VLLMEngine, ServerEngine)) else None
    return MEMORY_SHARE if stated is None else stated


def check_sft(config: SFTConfig, target: str) -> None:
    """Refuse what neither NeMo-RL nor Automodel does.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.loss_on != "response":
        raise refused(f"loss_on={config.loss_on}", target, "loss_on=response")


def regime_overrides(config: ModelConfig, base: Path, sequence_length: int) -> Settings:
    """Changes of config.json that give every sequence the regime of the run; none where transformers does so."""
    arch = Architecture.from_directory(base)
    if arch.long_factor is None or arch.short_factor is None or config.longrope == "per_sequence":
        return {}
    is_long = config.longrope != "always_short" and sequence_length > arch.original_max_position_embeddings
    factors = arch.long_factor if is_long else arch.short_factor
    return {"rope_scaling": {"type": "longrope", "short_factor": list(factors), "long_factor": list(factors)}}


def _common(stage: str, config: Config, steps: int) -> Settings:
    check_common(config, TARGET)
    check_layout(config, TARGET)
    parallel, optim = config.parallel, config.optim
    return {
        "defaults": DEFAULTS[stage],
        "policy": {
            "model_name": str(config.base),
            # Not the example's own, which is another model's.
            "tokenizer": {"name": str(config.base), "chat_template": "default"},
            "hf_config_overrides": regime_overrides(config.model, config.base, config.sequence_length),
            "max_total_sequence_length": config.sequence_length,
            "precision": PRECISIONS[config.model.dtype],
            "dtensor_cfg": {
                "enabled": True,
                "tensor_parallel_size": parallel.tensor,
                "context_parallel_size": parallel.context,
                "sequence_parallel": parallel.sequence,
                "activation_checkpointing": config.model.recompute != "none",
            },
            "megatron_cfg": {"enabled": False},
            "max_grad_norm": optim.clip_grad,
            "optimizer": {
                "name": "torch.optim.AdamW",
                "kwargs": {
                    "lr": optim.lr,
                    "weight_decay": optim.weight_decay,
                    "betas": [optim.beta1, optim.beta2],
                    "eps": optim.eps,
                },
            },
            "scheduler": torch_schedulers(optim, steps),
        },
        "data": {"max_input_seq_length": config.sequence_length, "shuffle": False},
        "checkpointing": {
            "enabled": True,
            "checkpoint_dir": str(config.run.output),
            "save_period": config.checkpoint.every,
            "keep_top_k": config.checkpoint.keep,
        },
        "logger": {"wandb_enabled": False, "tensorboard_enabled": True},
    }


def _batches(micro: int, whole: int) -> Settings:
    return {"train_micro_batch_size": micro, "train_global_batch_size": whole}


def _files(kind: str, *, has_validation: bool) -> Settings:
    """Paths are relative to where NeMo-RL is started: in the export's directory."""
    return {
        "train": {"dataset_name": kind, "data_path": TRAIN},
        "validation": {"dataset_name": kind, "data_path": VALIDATION} if has_validation else None,
    }
