"""What a round of rollouts costs beside the training on it: sampling, new weights for what samples, room for it.

Three kinds of samplers: an engine in the trainer's processes, servers in turns on the trainer's GPUs, and servers on
GPUs of their own, which sample the next rounds while a step trains where `ahead` allows it.
"""

from __future__ import annotations

from dataclasses import dataclass

from phimr_nemo.config import RoundsConfig, ServerEngine, TrainingPlanConfig
from phimr_nemo.config.engine import OWN_SHARE
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.plan.hardware import SLEEPING_BYTES, Gpu
from phimr_nemo.plan.sampling import SamplingTime, colocated_turn, sampling_time, sync_time
from phimr_nemo.plan.weights import BYTES_PER_NUMBER
from phimr_nemo.plan.workload import Lengths


@dataclass(frozen=True)
class Held:
    """Bytes on a trainer's GPU while something samples.

    Attributes:
        by_engine: that training keeps beside an engine in its processes.
        by_server: that it keeps while a colocated server has its turn.
        moved: that it sends to the host's memory for that turn.
    """

    by_engine: float
    by_server: float
    moved: float


@dataclass(frozen=True)
class Round:
    """The rollouts of a step.

    Attributes:
        sampling: on each GPU that samples; None where not even one sequence of mean length fits.
        sync: seconds in which new weights reach what samples.
        offload: seconds in which the trainer makes room for colocated servers and takes it back; 0 without them.
        kept: bytes of a trainer's GPU that the sampler holds while a step trains.
        servers: GPUs beside the trainer's.
        overlaps: whether a step trains while the next rounds are sampled.
    """

    sampling: SamplingTime | None
    sync: float
    offload: float
    kept: float
    servers: int
    overlaps: bool

    def seconds(self, training: float) -> float:
        """Of a whole step whose training takes so long; weights are sent while nothing else is done."""
        sampled = 0.0 if self.sampling is None else self.sampling.seconds
        both = max(training, sampled) if self.overlaps else training + sampled
        return both + self.sync + self.offload


def planned_round(
    plan: TrainingPlanConfig,
    config: RoundsConfig,
    arch: Architecture,
    gpu: Gpu,
    lengths: Lengths,
    *,
    usable: float,
    held: Held,
) -> Round:
    """A round of a layout.

    Args:
        plan: how many GPUs train, and how many servers have for themselves.
        config: the stage's.
        arch: the model.
        gpu: of the trainer and of the servers.
        lengths: of the responses with their prompts.
        usable: bytes of a GPU without head-room.
        held: of them, by the trainer.

    Raises:
        UserError: servers sample, and no rate is given at which weights reach them.
    """
    dtype, engine = config.model.dtype, config.engine
    weights = float(arch.num_parameters * BYTES_PER_NUMBER[dtype])
    gpus, servers, offload, kept = plan.gpus, 0, 0.0, weights
    free = usable - held.by_engine - weights
    if isinstance(engine, ServerEngine) and engine.colocated:
        turn = colocated_turn(
            gpu, engine.memory_share, usable=usable, stays=held.by_server, moves=held.moved, weights=weights
        )
        free, offload, kept = turn.free_bytes, turn.seconds, SLEEPING_BYTES
    elif isinstance(engine, ServerEngine):
        gpus = servers = plan.gpus if plan.server_gpus is None else plan.server_gpus
        share = OWN_SHARE if engine.memory_share is None else engine.memory_share
        free, kept = share * gpu.memory - weights, 0.0
    sampling = sampling_time(
        arch,
        gpu,
        dtype,
        sequences=max(1, config.prompts_per_step * config.group_size // gpus),
        lengths=lengths,
        free_bytes=free,
    )
    sync = sync_time(arch, gpu, dtype, engine=engine, gpus=gpus, bytes_a_second=plan.sync_bytes_a_second)
    return Round(sampling, sync, offload, kept, servers, overlaps=servers > 0 and config.ahead > 0)
