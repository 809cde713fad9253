"""The sampler that a GRPO run's configuration names."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Final

import torch.distributed as dist

from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import GRPOConfig, LocalRollouts, VLLMRollouts
from phimr_nemo.errors import UserError
from phimr_nemo.generate.local.engine import LocalSampler
from phimr_nemo.generate.sampler import Sampler
from phimr_nemo.generate.serving.replies import Wanted
from phimr_nemo.generate.serving.servers import ServerSampler
from phimr_nemo.generate.serving.vllm import VLLMSampler, check_longrope
from phimr_nemo.generate.serving.weights import LOGPROBS, RAW_LOGPROBS, tokenizer_hash
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.training import platform

ROLLOUT_BATCH: Final = 256
"""Sequences that the built-in engine samples together at most, in one process."""
RUN_NAME_BYTES: Final = 4
GIB: Final = 2**30


def check_sampler(config: GRPOConfig) -> None:
    """Refuse settings that would train on responses of another policy as if they were the policy's own.

    Raises:
        UserError: `ahead` or `stale=keep` without a correction, or TensorRT-LLM at another temperature than 1.
    """
    start, end = config.temperature.start, config.temperature.end
    if config.sampler.kind == "trtllm_server" and (start, end) != (1.0, 1.0):
        raise UserError(
            f"sampler.kind=trtllm_server with temperature.start={start} temperature.end={end}",
            rule="TensorRT-LLM's server returns log-probabilities before the temperature; the trainer needs those of "
            "the distribution that is sampled from, and at temperature 1 they are the same",
            remedy="use temperature.start=1.0 temperature.end=1.0, or vLLM servers (sampler.kind=vllm_server)",
        )
    used = (["ahead=1"] if config.ahead else []) + (["stale=keep"] if config.stale == "keep" else [])
    if used and config.correction.kind == "none":
        raise UserError(
            f"{' and '.join(used)} with correction.kind=none",
            rule="responses of older weights are weighed by how probable the trained weights find them",
            remedy="use correction.kind=truncated correction.cap=2, or ahead=0 stale=resample",
        )


def open_sampler(config: GRPOConfig, policy: MegatronPolicy, base_weights: str, stop_ids: tuple[int, ...]) -> Sampler:
    """This process's sampler (collective).

    Args:
        config: the run's.
        policy: what is trained.
        base_weights: hash of the run's base.
        stop_ids: a response ends with the first of these.

    Raises:
        UserError: servers that do not answer or serve something else, vLLM that is not there, or settings that
            vLLM does not follow.
    """
    options = config.sampler
    if isinstance(options, LocalRollouts):
        return _local(config, options, policy, stop_ids)
    if isinstance(options, VLLMRollouts):
        return VLLMSampler(
            config.base,
            options,
            dtype=config.model.dtype,
            max_length=config.sequence_length,
            longrope=config.model.longrope,
            stop_ids=stop_ids,
        )
    check_longrope(config.base, config.model.longrope, config.sequence_length)
    # All processes ask for the weights of one trainer, and not for those of an earlier one with the same step.
    name = [secrets.token_hex(RUN_NAME_BYTES)]
    dist.broadcast_object_list(name, 0)
    return ServerSampler(
        options,
        wanted(config, policy, base_weights),
        stop_token_ids=stop_ids,
        run=name[0],
        is_leader=dist.get_rank() == 0,
        stale=config.stale,
    )


def wanted(config: GRPOConfig, policy: MegatronPolicy, base_weights: str) -> Wanted:
    """What a rollout server of this run has to serve."""
    architecture = policy.architecture
    return Wanted(
        weights=base_weights,
        tokenizer=tokenizer_hash(Path(config.base)),
        longest=config.sequence_length,
        original=architecture.original_max_position_embeddings if architecture.long_factor is not None else None,
        longrope=config.model.longrope,
        vocab_size=architecture.vocab_size,
        logprobs=RAW_LOGPROBS if config.sampler.kind == "trtllm_server" else LOGPROBS,
    )


def _local(
    config: GRPOConfig, options: LocalRollouts, policy: MegatronPolicy, stop_ids: tuple[int, ...]
) -> LocalSampler:
    return LocalSampler(
        policy.architecture,
        policy.weights(),
        stop_token_ids=stop_ids,
        max_batch=ROLLOUT_BATCH,
        longrope_policy=config.model.longrope,
        max_length=config.sequence_length,
        dtype=torch_dtype(config.model.dtype),
        device=platform.device(),
        cache_bytes=int(options.cache_gib * GIB),
    )
