"""What a rank does to compare adapters with what is exported of them: log-probabilities, and what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phimr_nemo.align.dpo import stage as dpo
from phimr_nemo.config import DPOConfig, load_config
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.origin import trained_from
from phimr_nemo.training.adapters.peft import write_adapter
from phimr_nemo.training.distributed import export_hf, start_process_group
from phimr_nemo.training.guard import BatchGuard


@dataclass(frozen=True)
class Adapted:
    """What the trained model says, and of what its parameters are made.

    Attributes:
        logprobs: [n, s].
        again: the same after a round trip of all weights through a state dictionary.
        trained, frozen: names of parameters with and without a gradient.
    """

    logprobs: Tensor
    again: Tensor
    trained: list[str]
    frozen: list[str]


def adapted(path: Path, overrides: Sequence[str], tokens: Tensor, labels: Tensor, output: Path) -> Adapted:
    """Random adapters, written merged to `output/hf` and by themselves to `output/adapter`."""
    config = load_config(DPOConfig, path, overrides)
    assert config.lora is not None
    start_process_group(config.parallel, config.run.seed)
    guard = BatchGuard(config.run.output, config.guard, lambda _: [])
    policy = dpo.build_policy(config, HFDirectory(config.base), 1, guard)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    trained: list[str] = []
    frozen: list[str] = []
    with torch.no_grad():
        for name, parameter in policy.model.module.named_parameters():
            (trained if parameter.requires_grad else frozen).append(name)
            if "linear_out" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    logprobs = policy.log_probs(tokens, labels)
    origin = trained_from(config.base, config.sequence_length, config.model.longrope)
    export_hf([policy.model], policy.architecture, config.base, output / "hf", origin)
    write_adapter([policy.model], policy.architecture, config.lora, config.base, output / "adapter")
    saved = {name: value.clone() for name, value in policy.model.module.state_dict().items() if value is not None}
    with torch.no_grad():
        for parameter in policy.model.module.parameters():
            parameter.zero_()
    policy.model.module.load_state_dict(saved)
    return Adapted(logprobs, policy.log_probs(tokens, labels), trained, frozen)
