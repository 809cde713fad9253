"""The settings of TRL's SFTConfig, DPOConfig and GRPOConfig (1.16) that a stage's configuration means.

TRL places each process's share itself, so batches are given a device: a stage of `parallel.data` replicas runs there
on as many processes. Tensor, pipeline and context parallelism have no counterpart and are refused.
"""

from __future__ import annotations

import math
from typing import Any, Final

from phimr_nemo.bridges.counterparts import Counterpart, check_common, refused
from phimr_nemo.config import DPOConfig, GRPOConfig, SFTConfig
from phimr_nemo.config.dpo import StoredReference
from phimr_nemo.config.engine import COLOCATED_SHARE, LocalEngine, ServerEngine, VLLMEngine
from phimr_nemo.config.sampled.rounds import MaskedCorrection, SamplerCorrection, TruncatedCorrection

TARGET: Final = "TRL"
Settings = dict[str, Any]

# TRL's names of the losses whose value and gradient are these ones (tests/bridge holds them against each other).
DPO_LOSSES: Final = {
    "dpo": "sigmoid",
    "length_normalized_dpo": "sigmoid_norm",
    "length_normalized_ipo": "ipo",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
GRPO_LOSSES: Final = {"grpo": "grpo", "dr_grpo": "dr_grpo", "dapo": "dapo", "gspo": "grpo", "cispo": "cispo"}

COMMON: Final = (
    Counterpart("run.output", "launcher", "output_dir", "the export's own directory; --output of the runner"),
    Counterpart("run.seed", "data", "seed", "the order of the data is in the file; the seed serves sampling"),
    Counterpart("run.log_every", "same", "logging_steps"),
    Counterpart("base", "same", "model"),
    Counterpart("model.dtype", "translated", "bf16, model_init_kwargs.dtype"),
    Counterpart("model.fp8", "none", "", "refused unless off"),
    Counterpart("model.fp32_output", "none", "", "refused unless off"),
    Counterpart("model.fp8_output", "none", "", "off where model.fp8 is"),
    Counterpart("model.logits_gib", "none", "", "memory against time, the numbers are the same"),
    Counterpart("model.deterministic", "translated", "full_determinism", "and NCCL_ALGO=^NVLS for its launcher"),
    Counterpart("lora", "none", "", "refused unless off"),
    Counterpart("model.longrope", "patch", "rope_parameters", "one regime a run: both sets of factors are its own"),
    Counterpart("model.recompute", "translated", "gradient_checkpointing"),
    Counterpart("optim.lr", "patch", "learning_rate", "every step's rate is in schedule.json"),
    Counterpart("optim.min_lr", "patch", "schedule.json"),
    Counterpart("optim.warmup_fraction", "patch", "schedule.json", "TRL's warm-up begins at a rate of 0"),
    Counterpart("optim.schedule", "patch", "schedule.json"),
    Counterpart("optim.decay_fraction", "patch", "schedule.json"),
    Counterpart("optim.weight_decay", "same", "weight_decay", "norms have none, as here"),
    Counterpart("optim.beta1", "same", "adam_beta1"),
    Counterpart("optim.beta2", "same", "adam_beta2"),
    Counterpart("optim.eps", "same", "adam_epsilon"),
    Counterpart("optim.clip_grad", "same", "max_grad_norm"),
    Counterpart("optim.distributed", "launcher", "", "how the optimizer's state is divided changes no number"),
    Counterpart("parallel.tensor", "none", "", "refused unless 1"),
    Counterpart("parallel.pipeline", "none", "", "refused unless 1"),
    Counterpart("parallel.context", "none", "", "refused unless 1"),
    Counterpart("parallel.virtual", "none", "", "of pipelines alone"),
    Counterpart("parallel.sequence", "none", "", "of tensor parallelism alone"),
    Counterpart("parallel.timeout_minutes", "translated", "ddp_timeout", "seconds; there of unequal work as well"),
    Counterpart("parallel.data", "launcher", "accelerate launch --num_processes"),
    Counterpart("parallel.nodes", "launcher", "accelerate launch --num_machines"),
    Counterpart("checkpoint.every", "same", "save_steps"),
    Counterpart("checkpoint.keep", "same", "save_total_limit"),
    Counterpart("checkpoint.best", "translated", "load_best_model_at_end", "SFT's by validation loss, else refused"),
    Counterpart("checkpoint.metric", "translated", "metric_for_best_model", "of checkpoint.best alone"),
    Counterpart("checkpoint.asynchronous", "none", "", "how a checkpoint is written changes no number"),
    Counterpart("guard.on_nan", "patch", "the runner stops at a loss that is not finite", "refused unless stop"),
    Counterpart("guard.", "none", "", "a spike rule is refused"),
    Counterpart("early_stopping", "none", "", "refused unless off"),
    Counterpart("evaluation", "none", "", "refused unless off"),
    Counterpart("tracking.", "launcher", "report_to", "none by default"),
)
SFT: Final = (
    *COMMON,
    Counterpart("data", "data", "train.jsonl"),
    Counterpart("sequence_length", "same", "max_length", "a longer conversation is refused here, before the export"),
    Counterpart("epochs", "data", "train.jsonl", "every epoch's own order is in the file; num_train_epochs is 1"),
    Counterpart("micro_batch", "same", "per_device_train_batch_size"),
    Counterpart("global_batch", "translated", "gradient_accumulation_steps"),
    Counterpart("validation_rows", "data", "validation.jsonl"),
    Counterpart("validate_every", "same", "eval_steps"),
    Counterpart("loss_on", "data", "labels"),
    Counterpart("data_workers", "same", "dataloader_num_workers"),
    Counterpart("max_steps", "data", "max_steps"),
    Counterpart("overlap.", "none", "", "how communication is hidden changes no number"),
)
DPO: Final = (
    *COMMON,
    Counterpart("pairs", "data", "train.jsonl"),
    Counterpart("sequence_length", "data", "max_length", "longer pairs are dropped or cut in the file"),
    Counterpart("overlong", "data", "train.jsonl"),
    Counterpart("beta", "same", "beta"),
    Counterpart("loss.", "translated", "loss_type", "losses of another value are refused"),
    Counterpart("reference.kind", "translated", "precompute_ref_log_probs"),
    Counterpart("reference.path", "none", "", "refused unless off: its file is this project's own"),
    Counterpart("packed", "none", "", "the same gradient as unpacked"),
    Counterpart("epochs", "data", "train.jsonl", "every epoch's own order is in the file; num_train_epochs is 1"),
    Counterpart("micro_batch", "same", "per_device_train_batch_size", "pairs"),
    Counterpart("global_batch", "translated", "gradient_accumulation_steps"),
    Counterpart("max_steps", "data", "max_steps"),
    Counterpart("validation_pairs", "data", "validation.jsonl"),
    Counterpart("validate_every", "same", "eval_steps", "the last step has none of its own"),
)
GRPO: Final = (
    *COMMON,
    Counterpart("prompts", "data", "train.jsonl"),
    Counterpart("sequence_length", "data", "vllm_max_model_length", "prompts that leave no room are not in the file"),
    Counterpart("max_new_tokens", "same", "max_completion_length"),
    Counterpart("steps", "translated", "max_steps", "times inner_batches"),
    Counterpart("prompts_per_step", "translated", "generation_batch_size", "times group_size"),
    Counterpart("group_size", "same", "num_generations"),
    Counterpart("loss.kind", "translated", "loss_type, scale_rewards, importance_sampling_level"),
    Counterpart("loss.clip_low", "same", "epsilon"),
    Counterpart("loss.clip_high", "translated", "epsilon_high", "the same, with cispo 1 + clip_high"),
    Counterpart("correction.", "translated", "vllm_importance_sampling_correction, _mode, _clip_min, _clip_max"),
    Counterpart("advantage_scale", "translated", "scale_rewards"),
    Counterpart("entropy_bonus", "translated", "entropy_coef", "refused unless 0: it weighs tokens by itself"),
    Counterpart("kl", "same", "beta"),
    Counterpart("kl_estimator", "translated", "use_bias_correction_kl"),
    Counterpart("inner_batches", "translated", "steps_per_generation"),
    Counterpart("passes", "translated", "num_iterations", "refused unless 1: it shuffles between them"),
    Counterpart("micro_batch", "same", "per_device_train_batch_size", "sequences"),
    Counterpart("packed", "none", "", "the same gradient as unpacked"),
    Counterpart("prompt", "data", "train.jsonl"),
    Counterpart("engine.", "translated", "use_vllm, vllm_mode, vllm_server_base_url"),
    Counterpart("ahead", "none", "", "refused unless 0"),
    Counterpart("stale", "none", "", "of responses sampled ahead alone"),
    Counterpart("partial_rollouts", "none", "", "of responses sampled ahead alone"),
    Counterpart("max_concurrent_rollouts", "none", "", "of responses sampled ahead alone"),
    Counterpart("overlong.", "translated", "mask_truncated_completions", "the soft penalty is refused"),
    Counterpart("reward.correct", "patch", "the reward function"),
    Counterpart("reward.wrong", "patch", "the reward function"),
    Counterpart("reward.", "none", "", "refused unless 0 or empty"),
    Counterpart("verify_workers", "patch", "the reward function", "this project's grader, in its own processes"),
    Counterpart("grader", "patch", "the reward function"),
    Counterpart("temperature.", "patch", "temperature", "the runner sets every round's, from schedule.json"),
    Counterpart("rebalance.", "none", "", "refused unless off: TRL trains on every response of every group"),
    Counterpart("curriculum.", "none", "", "refused unless null"),
    Counterpart("prompt_optimization.", "data", "train.jsonl", "uneven prompts are not in the file"),
    Counterpart("monitor.ungraded_stop", "none", "", "there a run whose grader gives up goes on"),
    Counterpart("monitor.", "none", "", "watches, and changes no number"),
)


def sft_settings(config: SFTConfig, steps: int) -> Settings:
    """SFTConfig's.

    Raises:
        UserError: a setting without a counterpart.
    """
    validated = config.validation_rows > 0
    return {
        **_common(config, steps),
        **_batches(config.micro_batch, config.global_batch, config.parallel.data),
        "max_length": config.sequence_length,
        "packing": False,
        "loss_type": "nll",
        "dataloader_num_workers": config.data_workers,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": config.validate_every,
        "per_device_eval_batch_size": config.micro_batch,
        "train_sampling_strategy": "sequential",
        **({"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"} if config.checkpoint.best else {}),
    }


def dpo_settings(config: DPOConfig, steps: int) -> Settings:
    """DPOConfig's.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.loss.kind not in DPO_LOSSES:
        # Its `robust`, `sft` and summed `ipo` are other functions than label_smoothed_dpo, rpo and ipo here.
        raise refused(f"loss.kind={config.loss.kind}", TARGET, f"loss.kind is one of {list(DPO_LOSSES)}")
    stored = isinstance(config.reference, StoredReference)
    if isinstance(config.reference, StoredReference) and config.reference.path is not None:
        raise refused("reference.path", TARGET, "reference.path=null")
    return {
        **_common(config, steps),
        **_batches(config.micro_batch, config.global_batch, config.parallel.data),
        "max_length": config.sequence_length,
        "beta": config.beta,
        "loss_type": [DPO_LOSSES[config.loss.kind]],
        "precompute_ref_log_probs": stored,
        "eval_strategy": "steps" if config.validation_pairs else "no",
        "eval_steps": config.validate_every,
        "per_device_eval_batch_size": config.micro_batch,
        "train_sampling_strategy": "sequential",
    }


def grpo_settings(config: GRPOConfig, steps: int) -> Settings:
    """GRPOConfig's.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.ahead:
        raise refused(f"ahead={config.ahead}", TARGET, "ahead=0")
    if config.rebalance.enabled:
        raise refused("rebalance.enabled: equal negatives, refilled rounds", TARGET, "rebalance.enabled=false")
    if config.overlong.kind == "soft":
        raise refused("overlong.kind=soft", TARGET, "overlong.kind=keep or overlong.kind=mask")
    if config.reward.format or config.reward.length or config.reward.functions:
        raise refused("reward.format, reward.length or reward.functions", TARGET, "set them to 0 and {}")
    if config.loss.kind not in GRPO_LOSSES:
        raise refused(f"loss.kind={config.loss.kind}", TARGET, f"loss.kind is one of {list(GRPO_LOSSES)}")
    round_size = config.prompts_per_step * config.group_size
    batches = _batches(config.micro_batch, round_size // config.inner_batches, config.parallel.data)
    if config.passes > 1 or config.entropy_bonus:
        raise refused("passes above 1, or entropy_bonus", TARGET, "passes=1 entropy_bonus=0")
    is_cispo = config.loss.kind == "cispo"
    if is_cispo and config.loss.clip_low < 1.0:
        raise refused(f"loss.kind=cispo with loss.clip_low={config.loss.clip_low}", TARGET, "loss.clip_low=1")
    sequence_level = config.loss.kind == "gspo"
    published = "none" if config.loss.kind == "dr_grpo" else "group"
    return {
        **_common(config, steps * config.inner_batches),
        **batches,
        "num_generations": config.group_size,
        "generation_batch_size": round_size,
        "max_completion_length": config.max_new_tokens,
        "shuffle_dataset": False,
        "temperature": config.temperature.start,
        "top_p": 1.0,
        "top_k": 0,
        "loss_type": GRPO_LOSSES[config.loss.kind],
        "scale_rewards": config.advantage_scale or published,
        "importance_sampling_level": "sequence" if sequence_level else "token",
        "epsilon": config.loss.clip_low,
        "epsilon_high": config.loss.clip_high + is_cispo,
        "beta": config.kl,
        "use_bias_correction_kl": config.kl_estimator == "importance_weighted_k3",
        "mask_truncated_completions": config.overlong.kind == "mask",
        **_engine(config),
        **_correction(config.correction),
    }


def _correction(correction: SamplerCorrection) -> Settings:
    name = "vllm_importance_sampling_"
    if isinstance(correction, TruncatedCorrection):
        return {f"{name}correction": True, f"{name}mode": "token_truncate", f"{name}clip_max": correction.cap}
    if isinstance(correction, MaskedCorrection):
        mode = "token_mask" if correction.kind == "masked" else "sequence_mask"
        bounds = {f"{name}clip_min": correction.low, f"{name}clip_max": correction.high}
        return {f"{name}correction": True, f"{name}mode": mode, **bounds}
    return {f"{name}correction": False}


def _engine(config: GRPOConfig) -> Settings:
    engine = config.engine
    if isinstance(engine, LocalEngine):
        return {"use_vllm": False}
    if isinstance(engine, VLLMEngine):
        return {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": engine.memory_share,
            "vllm_max_model_length": config.sequence_length,
        }
    assert isinstance(engine, ServerEngine)
    if engine.colocated:
        return {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_enable_sleep_mode": True,
            "vllm_gpu_memory_utilization": COLOCATED_SHARE if engine.memory_share is None else engine.memory_share,
            "vllm_max_model_length": config.sequence_length,
        }
    if engine.kind != "vllm_server" or len(engine.base_urls) != 1:
        raise refused(
            f"engine.kind={engine.kind} with {len(engine.base_urls)} servers",
            TARGET,
            "engine.kind=vllm_server with one address (there it is `trl vllm-serve`)",
        )
    return {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": engine.base_urls[0],
        "vllm_server_timeout": engine.recovery_seconds,
    }


def _common(config: SFTConfig | DPOConfig | GRPOConfig, steps: int) -> Settings:
    check_common(config, TARGET)
    parallel = config.parallel
    if (parallel.tensor, parallel.pipeline, parallel.context) != (1, 1, 1):
        raise refused(
            f"parallel.tensor={parallel.tensor}, pipeline={parallel.pipeline}, context={parallel.context}",
            TARGET,
            "parallel.tensor=1 parallel.pipeline=1 parallel.context=1 with more of parallel.data",
        )
    if config.model.fp8 is not None:
        raise refused(f"model.fp8={config.model.fp8}", TARGET, "model.fp8=null")
    return {
        "max_steps": steps,
        "num_train_epochs": 1,
        "learning_rate": config.optim.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": config.optim.weight_decay,
        "adam_beta1": config.optim.beta1,
        "adam_beta2": config.optim.beta2,
        "adam_epsilon": config.optim.eps,
        "max_grad_norm": config.optim.clip_grad,
        "bf16": config.model.dtype == "bf16",
        "gradient_checkpointing": config.model.recompute != "none",
        "seed": config.run.seed,
        "full_determinism": config.model.deterministic,
        "ddp_timeout": math.ceil(60 * parallel.timeout_minutes),
        "logging_steps": config.run.log_every,
        "save_steps": config.checkpoint.every,
        "save_total_limit": config.checkpoint.keep,
        "report_to": "none",
    }


def _batches(micro: int, whole: int, replicas: int) -> Settings:
    if whole % (micro * replicas):
        raise refused(
            f"a batch of {whole} in micro-batches of {micro} on parallel.data={replicas}",
            TARGET,
            "choose a micro_batch that divides the batch of one replica",
        )
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": whole // (micro * replicas)}
