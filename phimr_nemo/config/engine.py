"""A model and what samples it: the same words for a teacher, an evaluation, rollouts while training, a judge.

A section `engine` says what samples: the built-in engine, vLLM in the process, servers of `phimr serve` (which take
new weights), or an OpenAI-compatible endpoint. :class:`SamplingConfig` adds the prompt and how tokens are drawn.
`phimr_nemo.generate.engines.open_engine` opens all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from phimr_nemo.config.common import Dtype, LongRopePolicy
from phimr_nemo.config.rules import AT, KEY, RuleBroken, config
from phimr_nemo.config.values import AboveZero, AtLeastZero, Name, Positive, PositiveShare, Share
from phimr_nemo.redact import shown_variable

QUESTION: Final = "{question}"
"""Where a prompt holds the question; by itself the prompt that adds nothing."""
GRADER_RULE: Final = "grader is MODULE:FUNCTION, a function (response, answer) -> phimr_nemo.verify.Verdict"
OWN_SHARE: Final = 0.9
"""Of a GPU's memory, for a server: vLLM's own default."""
COLOCATED_SHARE: Final = 0.5
"""The same beside a trainer's weights: verl's rollouts take as much (`gpu_memory_utilization`)."""
NO_WORKERS: Final = "TensorRT-LLM's server starts its engine anew, from files: no worker could join a process group"
NO_SHARED_GPU: Final = "NCCL has no group with two members on one GPU"
ONE_WAY: Final = "new weights travel in one way; what NCCL does not deliver goes over HTTP"
VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _holds_question(prompt: str) -> str:
    if prompt.count(QUESTION) != 1:
        raise RuleBroken(
            f"prompt template {prompt!r} in {KEY}",
            rule=f"a prompt template holds {QUESTION} once",
            remedy=f"put {QUESTION} where the question belongs, for example '{KEY}=\"{QUESTION}\"'",
        )
    return prompt


def _variable(name: str) -> str:
    if not VARIABLE_NAME.fullmatch(name) or shown_variable(name) != name:
        raise RuleBroken(
            f"{KEY} is not the name of an environment variable (it is not repeated here)",
            rule="a name is set in the environment, or made of capitals, digits and underscores; "
            "the key itself never stands in a setting",
            remedy=f"export ENDPOINT_KEY=..., and {KEY}=ENDPOINT_KEY",
        )
    return name


def _address(url: str) -> str:
    parts = _split(url)
    # Credentials would be written into config.yaml and manifests; they are not repeated here either.
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise RuleBroken(
            f"the endpoint address of host {parts.hostname} carries credentials, a query or a fragment",
            rule="base_urls hold scheme, host, port and path only: they are recorded with the run",
            remedy="put the key into an environment variable and its name into api_key_env",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _no_address(f"endpoint address {url!r}")
    return url


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # a bad one is found only when it is read
    except ValueError as error:
        raise _no_address(f"an endpoint address cannot be read ({error})") from error
    return parts


def _no_address(problem: str) -> RuleBroken:
    return RuleBroken(
        problem,
        rule="an address is http:// or https:// with a host, up to and with the version",
        remedy="for example base_urls=[http://localhost:8000/v1]",
    )


def _is_function(name: str) -> bool:
    module, _, function = name.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), function))


def _function(name: str) -> str:
    if not _is_function(name):
        raise RuleBroken(
            f"{KEY}: {name!r} names no function",
            rule="a function is named as MODULE:FUNCTION",
            remedy="for example my_domain.rewards:score",
        )
    return name


def _grader(grader: str) -> str:
    if not _is_function(grader):
        raise RuleBroken(
            f"{KEY}={grader!r}: no grader",
            rule=GRADER_RULE,
            remedy=f"for example {KEY}=my_domain.grading:grade, or {KEY}=null for mathematics",
        )
    return grader


SampledLongRope = Literal["as_trained"] | LongRopePolicy
"""How a finished model is sampled: "as_trained" takes the factors of its last training run where its directory tells
them, and of a model from elsewhere those that its longest sequence asks for, as vLLM does."""
Prompt = Annotated[str, AfterValidator(_holds_question)]
FunctionName = Annotated[str, AfterValidator(_function)]
GraderName = Annotated[str, AfterValidator(_grader)]
Variable = Annotated[str, AfterValidator(_variable)]
BaseUrls = Annotated[tuple[Annotated[str, AfterValidator(_address)], ...], Field(min_length=1)]


@config
class Prices:
    """What tokens cost, in any one currency, for a million of them."""

    input_per_million: AtLeastZero
    output_per_million: AtLeastZero


@config
class EndpointConfig:
    """An OpenAI-compatible endpoint.

    Attributes:
        base_urls: its addresses up to and with the version, as `http://host:8000/v1`; requests go round them,
            and one that fails is rested.
        model: the model's name there.
        api_key_env: the environment variable that holds the key; None for a server without one.
        concurrency: requests under way together, over all addresses.
        idle_seconds: a reply that sends nothing for so long is given up and asked for again; the wait in the
            server's own queue counts.
        total_seconds: one attempt takes at most this long.
        attempts: how often a request is tried before it counts as failed.
        backoff_seconds: the wait before the second attempt is drawn from 0 to this, and the bound doubles
            with each further one.
        prices: for the account of costs.
        extra_body: more fields of the request's body, for settings of one server alone. With vLLM, SGLang and
            trtllm-serve `skip_special_tokens: false` keeps special tokens in the text, as engines in this process do.
    """

    base_urls: BaseUrls
    model: Name
    api_key_env: Variable | None = None
    concurrency: Positive
    idle_seconds: AboveZero
    total_seconds: AboveZero
    attempts: Positive
    backoff_seconds: AboveZero
    prices: Prices | None = None
    extra_body: Mapping[str, JsonValue] = field(default_factory=dict)


@config
class LocalEngine:
    """The built-in PyTorch engine in this process; while training, in every process of the trainer that samples.

    Attributes:
        max_batch: sequences computed together at most.
        cache_gib: what the keys and values of the sequences under way may take (GiB, in each process); fewer are
            computed together where `max_batch` would take more. None = no bound.
        dtype: what to compute in; None = what the weights are in.
    """

    kind: Literal["local"] = "local"
    max_batch: Positive = 256
    cache_gib: AboveZero | None = None
    dtype: Dtype | None = None


@config
class VLLMEngine:
    """vLLM in this process, which then runs in an environment that has it.

    Attributes:
        max_batch: sequences computed together.
        dtype: what to compute in; None = what the weights are in.
        tensor: GPUs that share the model.
        memory_share: of each GPU's memory, for weights and KV cache; on a CPU, VLLM_CPU_KVCACHE_SPACE counts.
        bucket_mb: tensors of new weights that travel together (MB), where a trainer gives them.
        eager: no CUDA graphs and no compilation.
    """

    kind: Literal["vllm"]
    max_batch: Positive
    dtype: Dtype | None = None
    tensor: Positive = 1
    memory_share: PositiveShare
    bucket_mb: Positive = 512
    eager: bool = False


@config
class ServerEngine:
    """vLLM or TensorRT-LLM servers that `phimr serve` started; every process of the trainer asks all of them.

    Attributes:
        kind: "trtllm_server" for those of `phimr serve --engine trtllm`, which sample at temperature 1 only.
        base_urls: their addresses without a path, as `http://node1:8000`.
        api_key_env: the environment variable that holds their key; None for servers on loopback without one.
        dtype: what the servers that a Slurm job starts compute in; None = what is trained in.
        colocated: they run on the trainer's own nodes and GPUs (`phimr serve --colocated`): they sleep while it
            computes, and while they sample its optimizer's state is in the host's memory.
        memory_share: what the servers that a Slurm job starts take of a GPU's memory; None = as `phimr serve` does.
        in_flight: requests under way at once on one server, from one process.
        request_seconds: a response that takes longer is given up and sampled on another server; its server is out
            until it answers again.
        attempts: how often a request is tried in a round.
        probe_seconds: how often servers that are out are looked at.
        recovery_seconds: how long a round waits when no server is left.
        bucket_mb: tensors that travel together (MB); what a weight sync holds besides the model.
        directory: one that trainer and servers share (/dev/shm on one host, a shared file system between hosts),
            through which new weights go; None = over HTTP.
        transfer: how new weights travel: through the "host"'s memory, over HTTP or by way of `directory`; or from GPU
            to GPU, by "nccl", in one process group of the trainer's process 0 and all workers of all vLLM servers.
            Over NCCL nothing is protected: it is for a network of one's own.
        transfer_seconds: with NCCL, what forming the group may take, and what one bucket may; a bucket that does not
            arrive goes over HTTP, with those after it, and the next weights form another group.
    """

    kind: Literal["vllm_server", "trtllm_server"]
    base_urls: BaseUrls
    api_key_env: Variable | None = None
    dtype: Dtype | None = None
    colocated: bool = False
    memory_share: PositiveShare | None = None
    in_flight: Positive
    request_seconds: AboveZero
    attempts: Positive
    probe_seconds: AboveZero
    recovery_seconds: AboveZero
    bucket_mb: Positive
    directory: Path | None = None
    transfer: Literal["host", "nccl"] = "host"
    transfer_seconds: AboveZero = 120.0

    def __post_init__(self) -> None:
        if self.transfer == "nccl":
            self._can_use_nccl()
        if self.colocated and self.kind != "vllm_server":
            raise RuleBroken(
                f"{AT}colocated=true with {AT}kind={self.kind}",
                rule="a server that shares the trainer's GPUs frees them while the trainer computes, and comes back "
                "without a new start: vLLM's sleep mode",
                remedy=f"use {AT}colocated=false with servers on other GPUs, or {AT}kind=vllm_server",
            )

    def _can_use_nccl(self) -> None:
        hindrances = (
            (self.kind != "vllm_server", f"kind={self.kind}", NO_WORKERS, "kind=vllm_server"),
            (self.colocated, "colocated=true", NO_SHARED_GPU, "colocated=false with servers on other GPUs"),
            (self.directory is not None, f"directory={self.directory}", ONE_WAY, "directory=null"),
        )
        for applies, setting, rule, change in hindrances:
            if applies:
                raise RuleBroken(
                    f"{AT}transfer=nccl with {AT}{setting}",
                    rule=rule,
                    remedy=f"use {AT}transfer=host, or {AT}{change}",
                )


@config
class EndpointEngine:
    """A served model behind an OpenAI-compatible interface: vLLM, SGLang, trtllm-serve, an API.

    Attributes:
        system: the system's turn; None leaves it out (a model of this recipe brings its own in the chat template).
        max_missing: the share of a shard's responses that may be missing for good (refused or failed).
    """

    kind: Literal["endpoint"]
    endpoint: EndpointConfig
    system: str | None = None
    max_missing: Share = 0.0


Engine = Annotated[LocalEngine | VLLMEngine | EndpointEngine, Field(discriminator="kind")]
"""What samples a finished model."""


def _takes_weights(engine: Any) -> Any:
    if getattr(engine, "kind", engine.get("kind") if isinstance(engine, Mapping) else None) == "endpoint":
        raise RuleBroken(
            f"{KEY}.kind=endpoint while a model is trained",
            rule="an endpoint has the weights that it was started with, and takes none of the run's",
            remedy=f"use {KEY}.kind=local, or vLLM in the trainer's environment, or servers of `phimr serve`",
        )
    return engine


TrainedEngine = Annotated[
    Annotated[LocalEngine | VLLMEngine | ServerEngine, Field(discriminator="kind")], BeforeValidator(_takes_weights)
]
"""What samples a model while it is trained: it takes new weights."""


@config
class SamplingConfig:
    """What a model is asked, and how tokens are drawn.

    Attributes:
        prompt: the user's turn, with `{question}` in it once.
        temperature: logits are divided by it; 0 = greedy.
        top_p: nucleus mass; 1 = the whole distribution.
        max_new_tokens: longest response, reasoning included.
    """

    prompt: Prompt = QUESTION
    temperature: AtLeastZero
    top_p: PositiveShare
    max_new_tokens: Positive


def samples_as_trained(
    temperatures: Mapping[str, float], top_p: float, engine: Any, *, key: str = "engine", place: str = ""
) -> None:
    """What an engine that takes a trainer's weights can sample with.

    Args:
        temperatures: key -> value.
        top_p: the nucleus.
        engine: a :data:`TrainedEngine`.
        key: where it stands.
        place: where `top_p` stands, ending in a dot.

    Raises:
        RuleBroken: the engine cannot.
    """
    if engine.kind == "trtllm_server" and set(temperatures.values()) != {1.0}:
        raise RuleBroken(
            f"{AT}{key}.kind=trtllm_server with " + " ".join(f"{AT}{k}={v}" for k, v in temperatures.items()),
            rule="TensorRT-LLM's server returns log-probabilities before the temperature; the trainer needs those of "
            "the distribution that is sampled from, and at temperature 1 they are the same",
            remedy="use " + " ".join(f"{AT}{k}=1.0" for k in temperatures) + f", or vLLM servers ({AT}{key}.kind="
            "vllm_server)",
        )
    if top_p < 1.0 and not isinstance(engine, LocalEngine):
        raise RuleBroken(
            f"{AT}{key}.kind={engine.kind} with {AT}{place}top_p={top_p}",
            rule="with new weights, vLLM and servers of `phimr serve` sample from the whole distribution",
            remedy=f"use {AT}{place}top_p=1.0, or the built-in engine ({AT}{key}.kind=local)",
        )
    if isinstance(engine, VLLMEngine) and engine.tensor > 1:
        raise RuleBroken(
            f"{AT}{key}.tensor={engine.tensor} in the trainer's processes",
            rule="every process of the trainer has its own vLLM, on its own GPU",
            remedy=f"use {AT}{key}.tensor=1, or servers ({AT}{key}.kind=vllm_server)",
        )


def not_colocated(engine: Any, *, place: str = "") -> None:
    """Where nothing gives the servers their turn, they have GPUs of their own.

    Args:
        engine: a :data:`TrainedEngine`.
        place: where it stands, ending in a dot.

    Raises:
        RuleBroken: they would share the trainer's.
    """
    if isinstance(engine, ServerEngine) and engine.colocated:
        raise RuleBroken(
            f"{AT}{place}engine.colocated=true in a stage that samples only to be measured",
            rule="GRPO and distillation take turns with the servers on their GPUs, round after round",
            remedy=f"use {AT}{place}engine.colocated=false with servers on other GPUs",
        )
