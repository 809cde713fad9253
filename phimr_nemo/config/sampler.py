"""Settings of the engines that sample rollouts for GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from phimr_nemo.config.common import Positive, Share, config

Seconds = Annotated[float, Field(gt=0.0)]
BaseUrls = Annotated[tuple[str, ...], Field(min_length=1)]


@config
class LocalRollouts:
    """The built-in PyTorch engine, in every process of the trainer.

    Attributes:
        cache_gib: what the keys and values of the sequences under way may take, in each process; it decides how many
            are computed together.
    """

    kind: Literal["local"]
    cache_gib: Annotated[float, Field(gt=0.0)]


@config
class RolloutServers:
    """vLLM or TensorRT-LLM servers that `phimr serve` started; every process of the trainer asks all of them.

    Attributes:
        kind: "trtllm_server" for those of `phimr serve --engine trtllm`, which sample at temperature 1 only.
        base_urls: their addresses without a path, as `http://node1:8000`.
        api_key_env: the environment variable that holds their key; None for servers on loopback without one.
        in_flight: requests under way at once on one server, from one process.
        request_seconds: a response that takes longer is given up and sampled on another server; its server is out
            until it answers again.
        attempts: how often a request is tried in a round.
        probe_seconds: how often servers that are out are looked at.
        recovery_seconds: how long a round waits when no server is left.
        bucket_mb: tensors that travel together (MB); what a weight sync holds besides the model.
        directory: one that trainer and servers share (/dev/shm on one host, a shared file system between hosts),
            through which new weights go; None = over HTTP.
    """

    kind: Literal["vllm_server", "trtllm_server"]
    base_urls: BaseUrls
    api_key_env: str | None = None
    in_flight: Positive
    request_seconds: Seconds
    attempts: Positive
    probe_seconds: Seconds
    recovery_seconds: Seconds
    bucket_mb: Positive
    directory: Path | None = None


@config
class VLLMRollouts:
    """vLLM inside the trainer's processes, where one environment holds both.

    Attributes:
        max_batch: sequences computed together.
        memory_share: of the GPU's memory, for vLLM's copy of the weights and its KV cache.
        bucket_mb: tensors that travel together (MB).
        eager: no CUDA graphs and no compilation.
    """

    kind: Literal["vllm"]
    max_batch: Positive
    memory_share: Share
    bucket_mb: Positive
    eager: bool = False


RolloutSampler = Annotated[LocalRollouts | RolloutServers | VLLMRollouts, Field(discriminator="kind")]
Stale = Literal["resample", "keep"]


@config
class KeptOverlong:
    """A response that hit the length limit is graded like any other: unanswered, so most often wrong."""

    kind: Literal["keep"]


@config
class MaskedOverlong:
    """A response that hit the length limit is not trained on (DAPO's overlong filtering)."""

    kind: Literal["mask"]


@config
class SoftOverlong:
    """Responses lose reward as they near the length limit (DAPO's soft overlong punishment).

    Attributes:
        buffer: tokens before the limit in which the loss of reward grows from 0 to `penalty`.
        penalty: what a response of the full length loses.
    """

    kind: Literal["soft"]
    buffer: Positive
    penalty: Annotated[float, Field(gt=0.0)]


OverlongResponses = Annotated[KeptOverlong | MaskedOverlong | SoftOverlong, Field(discriminator="kind")]
