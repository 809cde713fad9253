"""How a model is served: what `phimr serve` was told, and the key it asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from phimr_nemo.errors import UserError
from phimr_nemo.redact import shown_variable

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
ServedLongRope = Literal["long_when_max_length_exceeds_original", "always_short"]
"""The policies that vLLM and TensorRT-LLM can follow; they do not know a sequence's final length."""


@dataclass(frozen=True)
class Served:
    """How a model is served.

    Attributes:
        model: a Hugging Face directory of the Phi3 family.
        max_length: prompt and response together (tokens).
        dtype: what to compute in.
        host, port: where it listens; other hosts than loopback need a key.
        api_key_env: the environment variable with the key.
        tensor: GPUs that share the model.
        max_batch: sequences computed together.
        memory_share: of each GPU's memory; for TensorRT-LLM, of what the weights leave free.
        longrope: the training run's policy.
        weights_directory: where the trainer leaves buckets for this server; None = they come over HTTP.
        eager: no CUDA graphs and no compilation.
        refit_directory: where TensorRT-LLM's checkpoints are kept; None = shared memory where there is such.
        name: what clients call the model, besides the digest of its weights; None = by that alone.
        colocated: a trainer computes on the same GPUs: it is asleep from the start, and awake from new weights on
            until it is told to sleep.
    """

    model: Path
    max_length: int
    dtype: Literal["fp32", "bf16", "fp16"]
    host: str
    port: int
    api_key_env: str | None
    tensor: int
    max_batch: int
    memory_share: float
    longrope: ServedLongRope
    weights_directory: Path | None
    eager: bool
    refit_directory: Path | None
    name: str | None = None
    colocated: bool = False


def api_key(served: Served) -> str | None:
    """The server's key.

    Raises:
        UserError: there is none, and others than this machine could reach the server; or it is empty.
    """
    if served.api_key_env is None:
        if served.host not in LOOPBACK:
            raise UserError(
                f"--host {served.host} without a key",
                rule="whoever reaches the server can replace its weights: beyond loopback it asks for a key",
                remedy="export PHIMR_KEY=... and add --api-key-env PHIMR_KEY, here and in the run's sampler section",
            )
        return None
    key = os.environ.get(served.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {shown_variable(served.api_key_env)} is not set or empty",
            rule="--api-key-env names the variable that holds the key",
            remedy="export it with the key, and give its name",
        )
    return key
