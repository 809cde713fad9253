"""The sampler of a run of rounds: the engine that its configuration names, with the policy's weights.

Servers that share the trainer's GPUs take turns with it.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch.distributed as dist

from phimr_nemo.align.offload import HostMemory
from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import LocalEngine, RoundsConfig, ServerEngine
from phimr_nemo.errors import UserError
from phimr_nemo.generate.ahead import Lead
from phimr_nemo.generate.engines import SampledModel, ServerRun, open_engine
from phimr_nemo.generate.sampler import Sampler, SamplingParams
from phimr_nemo.training import platform
from phimr_nemo.training.distributed import wait_for_all

if TYPE_CHECKING:
    from phimr_nemo.generate.serving.servers import ServerSampler

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


class Turns(Protocol):
    """Who computes on the trainer's GPUs. All processes call the same methods in the same order (collective)."""

    def begin_sampling(self) -> None:
        """New weights come next, and requests then; again for a round that is under way."""
        ...

    def begin_training(self) -> None:
        """All is sampled."""
        ...

    def abandon(self) -> None:
        """As `begin_training`, by one process whose round failed (not collective); what fails here is not said."""
        ...


class NoTurns:
    """The sampler has GPUs of its own, or is a part of the trainer."""

    def begin_sampling(self) -> None:
        """Nothing."""

    def begin_training(self) -> None:
        """Nothing."""

    def abandon(self) -> None:
        """Nothing."""


class ColocatedTurns:
    """Servers sleep while the trainer computes; what it needs for updates alone is away while they are awake.

    Args:
        sampler: of this process.
        memory: of this process's optimizer.
    """

    def __init__(self, sampler: ServerSampler, memory: HostMemory) -> None:
        self._sampler, self._memory = sampler, memory

    def begin_sampling(self) -> None:
        """Make room on all GPUs: the first weights wake a server."""
        self._memory.put_away()
        wait_for_all("the trainer makes room")

    def begin_training(self) -> None:
        """Take the room when all servers sleep.

        Raises:
            UserError: one does not.
        """
        wait_for_all("responses are sampled")
        self._sampler.sleep()
        wait_for_all("servers go to sleep")
        self._memory.bring_back()

    def abandon(self) -> None:
        """The same as far as this process can."""
        with contextlib.suppress(UserError):
            self._sampler.sleep()
            self._memory.bring_back()


def turns_of(config: RoundsConfig, sampler: Sampler, policy: MegatronPolicy) -> Turns:
    """Who computes when, for the sampler of :func:`open_sampler`."""
    if not is_colocated(config):
        return NoTurns()
    from phimr_nemo.generate.serving.servers import ServerSampler

    assert isinstance(sampler, ServerSampler)
    return ColocatedTurns(sampler, policy.update_memory())


def is_colocated(config: RoundsConfig) -> bool:
    """Whether servers share the trainer's GPUs."""
    return isinstance(config.engine, ServerEngine) and config.engine.colocated


def free_gpus(config: RoundsConfig) -> None:
    """Before the trainer takes its share: servers start on empty GPUs, or were left awake by a killed trainer.

    Those that do not answer within `recovery_seconds` are not waited for any longer (collective).

    Raises:
        UserError: one does not go to sleep.
    """
    if not is_colocated(config):
        return
    from phimr_nemo.generate.serving.replies import put_to_sleep

    assert isinstance(config.engine, ServerEngine)
    if dist.get_rank() == 0:
        put_to_sleep(config.engine, patience=config.engine.recovery_seconds)
    wait_for_all("servers start")
