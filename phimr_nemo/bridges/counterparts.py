"""What becomes of every setting of a stage in another trainer: nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phimr_nemo.config import DPOConfig, GRPOConfig, SFTConfig
from phimr_nemo.errors import UserError

How = Literal["same", "translated", "data", "patch", "launcher", "none"]
"""The same number under another name; another number that means the same; done to the exported data; done by code of
this project that runs there; said to the launcher and not to the trainer; nothing there that it could act on."""


@dataclass(frozen=True)
class Counterpart:
    """One line of the table.

    Attributes:
        ours: a setting's dotted name, or a section's with a dot at its end.
        how: what becomes of it.
        theirs: where it went.
        note: what a user has to know of it.
    """

    ours: str
    how: How
    theirs: str = ""
    note: str = ""


def settings_of(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of all settings of a configuration."""
    names: list[str] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            names += settings_of(value, f"{prefix}{key}.")
        else:
            names.append(f"{prefix}{key}")
    return names


def covered(config: Mapping[str, Any], table: Sequence[Counterpart]) -> list[tuple[str, Any, Counterpart]]:
    """Every setting with its value and its line of the table.

    Raises:
        LookupError: a setting that the table does not name.
    """
    found = []
    for name in settings_of(config):
        lines = [line for line in table if name == line.ours or (line.ours[-1] == "." and name.startswith(line.ours))]
        if not lines:
            raise LookupError(f"no line for {name}")
        found.append((name, _value(config, name), lines[0]))
    return found


def markdown(rows: Iterable[tuple[str, Any, Counterpart]]) -> str:
    """The table for a reader."""
    lines = ["| setting | value | how | there | note |", "|---|---|---|---|---|"]
    for name, value, line in rows:
        cells = (f"`{name}`", f"`{value}`", line.how, f"`{line.theirs}`" if line.theirs else "", line.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def refused(found: str, target: str, remedy: str) -> UserError:
    """The error of a setting that the other trainer cannot honour."""
    return UserError(
        found, rule=f"{target} has no counterpart of this, and leaving it out would change the run", remedy=remedy
    )


def check_common(config: SFTConfig | DPOConfig | GRPOConfig, target: str) -> None:
    """Refuse what none of the other trainers does.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.guard.on_nan != "stop" or config.guard.spike_factor is not None:
        raise refused("guard.on_nan=skip or a spike rule", target, "guard.on_nan=stop guard.spike_factor=null")
    if isinstance(config, GRPOConfig) and config.curriculum.solved_from is not None:
        raise refused("curriculum.solved_from", target, "curriculum.solved_from=null")
    if config.lora is not None:
        raise refused(f"lora.rank={config.lora.rank}", target, "lora=null")
    if config.model.dtype == "fp16":
        raise refused("model.dtype=fp16", target, "model.dtype=bf16")
    if config.model.fp32_output:
        raise refused("model.fp32_output=true", target, "model.fp32_output=false")
    if config.evaluation is not None:
        raise refused("evaluation is on", target, "evaluation=null")
    if config.early_stopping is not None:
        raise refused("early_stopping is on", target, "early_stopping=null")
    by_validation = isinstance(config, SFTConfig) and config.checkpoint.metric == "val_loss"
    if config.checkpoint.best and not by_validation:
        raise refused("checkpoint.best", target, "checkpoint.best=false")


def check_layout(config: SFTConfig | DPOConfig | GRPOConfig, target: str) -> None:
    """Refuse what neither NeMo-RL's DTensor backend nor Automodel is asked for.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.parallel.pipeline != 1:
        raise refused(f"parallel.pipeline={config.parallel.pipeline}", target, "parallel.pipeline=1")
    if config.model.fp8 is not None:
        raise refused(f"model.fp8={config.model.fp8}", target, "model.fp8=null")
    if config.model.deterministic:
        raise refused("model.deterministic=true", target, "model.deterministic=false")


def check_plain_gradient(config: GRPOConfig, target: str) -> None:
    """Refuse what changes GRPO's gradient and NeMo-RL does otherwise, or not at all.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.passes > 1 or config.entropy_bonus:
        raise refused("passes above 1, or entropy_bonus", target, "passes=1 entropy_bonus=0")
    if config.advantage_scale not in (None, "group"):
        raise refused(f"advantage_scale={config.advantage_scale}", target, "advantage_scale=group")
    if config.kl_estimator != "k3":
        raise refused(f"kl_estimator={config.kl_estimator}", target, "kl_estimator=k3")
    if config.correction.kind not in ("none", "truncated"):
        raise refused(f"correction.kind={config.correction.kind}", target, "correction.kind is none or truncated")


def check_grpo(config: GRPOConfig, target: str) -> None:
    """Refuse what NeMo-RL's GRPO does not do.

    Raises:
        UserError: a setting without a counterpart.
    """
    if config.loss.kind not in ("grpo", "dapo", "gspo"):
        raise refused(f"loss.kind={config.loss.kind}", target, "loss.kind is grpo, dapo or gspo")
    check_plain_gradient(config, target)
    if config.temperature.start != config.temperature.end:
        raise refused("temperature annealing", target, "temperature.end equal to temperature.start")
    if config.rebalance.enabled:
        raise refused("rebalance.enabled: equal negatives, refilled rounds", target, "rebalance.enabled=false")
    if config.overlong.kind == "soft":
        raise refused("overlong.kind=soft", target, "overlong.kind=keep or overlong.kind=mask")
    if config.reward.format or config.reward.length or config.reward.functions:
        raise refused("reward.format, reward.length or reward.functions", target, "set them to 0 and {}")
    if config.grader is not None:
        raise refused(f"grader={config.grader}", target, "grader=null")
    if config.ahead:
        raise refused(f"ahead={config.ahead}", target, "ahead=0")


def _value(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for key in name.split("."):
        value = value[key]
    return value
