"""The sampler of a run of rounds: the engine that its configuration names, with the policy's weights."""

from __future__ import annotations

import secrets
from typing import Any, Final

import torch.distributed as dist

from phimr_nemo.align.grpo.rounds import Lead
from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import LocalEngine, RoundsConfig, ServerEngine
from phimr_nemo.generate.engines import SampledModel, ServerRun, open_engine
from phimr_nemo.generate.sampler import Sampler, SamplingParams
from phimr_nemo.training import platform

RUN_NAME_BYTES: Final = 4


def open_sampler(config: RoundsConfig, policy: MegatronPolicy, base_weights: str) -> Sampler:
    """This process's sampler (collective).

    Args:
        config: the run's.
        policy: what is trained.
        base_weights: hash of the run's base.

    Raises:
        UserError: see :func:`phimr_nemo.generate.engines.open_engine`.
    """
    # All processes ask for the weights of one trainer, and not for those of an earlier one with the same step.
    name = [secrets.token_hex(RUN_NAME_BYTES)]
    dist.broadcast_object_list(name, 0)
    model = SampledModel(
        directory=config.base,
        longrope=config.model.longrope,
        max_length=config.sequence_length,
        weights=policy.weights(),
        dtype=config.model.dtype,
        device=platform.device(),
        run=ServerRun(name[0], dist.get_rank() == 0, config.stale, base_weights),
    )
    opened: Any = open_engine(
        config.engine, model, SamplingParams(config.temperature.start, 1.0, config.max_new_tokens)
    )
    sampler: Sampler = opened.sampler
    return sampler


def lead_of(config: RoundsConfig) -> Lead:
    """How far this process's sampler may be ahead of training."""
    if config.partial_rollouts == "wait":
        return Lead(config.ahead, None, config.stale)
    engine = config.engine
    if isinstance(engine, ServerEngine):
        own = engine.in_flight * len(engine.base_urls)
    else:
        assert isinstance(engine, LocalEngine), "no other engine can be interrupted"
        own = engine.max_batch
    cap = config.max_concurrent_rollouts
    return Lead(config.ahead, own if cap is None else min(own, cap // dist.get_world_size()), config.stale)
