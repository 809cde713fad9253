"""The one way to a model that samples: a teacher, an evaluation, rollouts while training, chat."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, overload

from phimr_nemo.config import (
    EndpointEngine,
    LocalEngine,
    LongRopePolicy,
    SamplingConfig,
    ServerEngine,
    ShardConfig,
    Stale,
    VLLMEngine,
)
from phimr_nemo.config.engine import QUESTION, SampledLongRope
from phimr_nemo.data.parallel import Team, team_of
from phimr_nemo.generate import sampler as protocol
from phimr_nemo.generate.plan import Plan
from phimr_nemo.generate.sampler import SamplingParams
from phimr_nemo.process.memory import GIBIBYTE, keep_freed_memory
from phimr_nemo.store.shards import conform

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedTokenizerFast

    from phimr_nemo.generate.local.engine import LocalSampler

S = TypeVar("S", bound=protocol.Engine, covariant=True)
_LOGGER: Final = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerRun:
    """What servers are told of the run that asks them.

    Attributes:
        name: of the run, the same in all its processes and no earlier run's.
        is_leader: whether this process sends new weights.
        stale: what becomes of responses of older weights.
        base_weights: hash of the weights that the servers were started with.
    """

    name: str
    is_leader: bool
    stale: Stale
    base_weights: str


@dataclass(frozen=True, kw_only=True)
class SampledModel:
    """A model to be sampled.

    Attributes:
        directory: a Hugging Face directory: architecture, tokenizer, and the weights unless others are given.
        longrope: which of LongRoPE's factors; a trainer gives its own policy.
        turns: all user turns that will be asked; the longest one and the longest response decide the longest
            sequence, and with it LongRoPE's factors.
        max_length: the longest sequence (tokens), prompt and response; None = by `turns`.
        weights: a trainer's, under their Hugging Face names, in place of the directory's; the engine then takes new
            ones between calls and returns log-probabilities.
        dtype: what to compute in where the engine's settings leave it open; None = what the weights are in.
        device: of this process, for the built-in engine; None = its GPU where there is one.
        run: of the trainer, for servers.
    """

    directory: Path
    longrope: SampledLongRope = "as_trained"
    turns: Sequence[str] = ()
    max_length: int | None = None
    weights: Iterable[tuple[str, torch.Tensor]] | None = None
    dtype: str | None = None
    device: torch.device | None = None
    run: ServerRun | None = None


@dataclass(frozen=True)
class TokenEngine(Generic[S]):
    """An opened engine that takes and gives token ids.

    Attributes:
        sampler: the engine.
        tokenizer: the model's.
        params: how tokens are drawn.
        directory: the model's.
    """

    sampler: S
    tokenizer: PreTrainedTokenizerFast
    params: SamplingParams
    directory: Path

    @cached_property
    def name(self) -> str:
        """The hash of the directory's weights: a part of ids and seeds."""
        return named_by_weights(self.directory)

    def write_rollouts(self, plan: Plan, out_dir: Path, team: Team, inputs: Mapping[str, str]) -> bool:
        """:func:`phimr_nemo.generate.rollouts.sample_rollouts`."""
        from phimr_nemo.generate.rollouts import sample_rollouts

        return sample_rollouts(
            plan, self.sampler, self.tokenizer, out_dir, params=self.params, inputs=inputs, team=team
        )

    def close(self) -> None:
        """Free what the engine holds."""
        self.sampler.close()


@dataclass(frozen=True)
class TextEngine:
    """An endpoint, which takes and gives text; every response is stored as it comes.

    Attributes:
        engine: its settings.
        params: how tokens are drawn.
    """

    engine: EndpointEngine
    params: SamplingParams

    @property
    def name(self) -> str:
        """The served model's: a part of ids and seeds."""
        return self.engine.endpoint.model

    def write_rollouts(self, plan: Plan, out_dir: Path, team: Team, inputs: Mapping[str, str]) -> bool:
        """:func:`phimr_nemo.generate.serving.remote.request_rollouts`."""
        from phimr_nemo.generate.serving.remote import request_rollouts

        return request_rollouts(
            plan, self.engine, self.params, out_dir, shard_indices=plan.shards, inputs=inputs, team=team
        )

    def close(self) -> None:
        """Nothing: the endpoint is not this process's."""


def named_by_weights(directory: Path) -> str:
    """:func:`phimr_nemo.generate.serving.vllm.weights_hash`, the name of a model in a directory."""
    from phimr_nemo.generate.serving.vllm import weights_hash

    return weights_hash(directory)


def params_of(sampling: SamplingConfig) -> SamplingParams:
    """How tokens are drawn."""
    return SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)


@overload
def open_engine(engine: EndpointEngine, model: None, sampling: SamplingParams) -> TextEngine: ...


@overload
def open_engine(engine: LocalEngine, model: SampledModel, sampling: SamplingParams) -> TokenEngine[LocalSampler]: ...


@overload
def open_engine(
    engine: LocalEngine | VLLMEngine | ServerEngine, model: SampledModel, sampling: SamplingParams
) -> TokenEngine[Any]: ...


def open_engine(
    engine: LocalEngine | VLLMEngine | ServerEngine | EndpointEngine,
    model: SampledModel | None,
    sampling: SamplingParams,
) -> TextEngine | TokenEngine[Any]:
    """Open what a configuration names.

    Args:
        engine: a section `engine`.
        model: what is sampled; None behind an endpoint, which has the model.
        sampling: how tokens are drawn.

    Raises:
        UserError: an unreadable model or tokenizer, a turn that spells a special token, an engine that is not
            installed here, refuses the model or does not follow its LongRoPE policy, servers that do not answer or
            serve something else.
    """
    if isinstance(engine, EndpointEngine):
        return TextEngine(engine, sampling)
    assert model is not None, "an engine in this process has a model"
    tokenizer = _tokenizer(engine, model)
    longest = model.max_length or _longest(tokenizer, model.turns) + sampling.max_new_tokens
    max_length, longrope = _regime(model, longest)
    if isinstance(engine, LocalEngine):
        sampler: protocol.Engine = _local(engine, model, tokenizer, max_length, longrope)
    elif isinstance(engine, VLLMEngine):
        sampler = _vllm(engine, model, tokenizer, max_length, longrope)
    else:
        sampler = _servers(engine, model, tokenizer, max_length, longrope)
    return TokenEngine(sampler, tokenizer, sampling, model.directory)


def write_rollouts(
    engine: LocalEngine | VLLMEngine | EndpointEngine,
    directory: Path | None,
    sampling: SamplingConfig,
    problems: pa.Table,
    out_dir: Path,
    *,
    longrope: SampledLongRope,
    samples: int,
    shard_size: int,
    seed: int,
    shard: ShardConfig | None = None,
    inputs: Mapping[str, str],
) -> bool:
    """Sample a finished model's responses to problems into a record directory of kind "rollouts".

    What is there already is kept. The weights' hash (behind an endpoint the model's name) is a part of ids, seeds and
    settings, so a changed model is refused and never given old responses.

    Args:
        engine: what samples.
        directory: the model's; None behind an endpoint.
        sampling: the prompt, and how tokens are drawn.
        problems: a table of kind "problems" with distinct ids.
        out_dir: the record directory.
        longrope: which of LongRoPE's factors.
        samples: responses to each problem.
        shard_size: problems per shard.
        seed: another one gives other responses.
        shard: this process's place among those that share the shards; None = it is alone.
        inputs: what the problems were read from and the model's directory, by content.

    Returns:
        Whether all shards are there; the manifest is then written.

    Raises:
        UserError: see :func:`open_engine`; or there are no problems, ids repeat, the directory was begun with other
            settings, or requests to an endpoint failed for good.
    """
    questions = problems.column("question").to_pylist()
    params = params_of(sampling)
    if isinstance(engine, EndpointEngine):
        opened: TextEngine | TokenEngine[Any] = open_engine(engine, None, params)
    else:
        assert directory is not None, "the configuration has a model for an engine in this process"
        turns = [sampling.prompt.replace(QUESTION, question) for question in questions]
        opened = open_engine(engine, SampledModel(directory=directory, longrope=longrope, turns=turns), params)
    with closing(opened):
        plan = Plan(
            problems=conform(problems, "problems"),
            rollouts_per_problem=samples,
            shard_size=shard_size,
            teacher=opened.name,
            stage_seed=seed,
            prompt_template=sampling.prompt,
        )
        with team_of(shard or ShardConfig(), out_dir) as team:
            return opened.write_rollouts(plan, out_dir, team, inputs)


def _tokenizer(engine: LocalEngine | VLLMEngine | ServerEngine, model: SampledModel) -> Any:
    """vLLM samples models of any family, the others those that this project trains."""
    from phimr_nemo.data.chat import load_tokenizer

    if isinstance(engine, VLLMEngine) and model.weights is None:
        from phimr_nemo.generate.serving.vllm import load_any_tokenizer

        return load_any_tokenizer(model.directory)
    return load_tokenizer(model.directory)


def _longest(tokenizer: Any, turns: Sequence[str]) -> int:
    from phimr_nemo.data.chat import render_prompts

    return max(map(len, render_prompts(tokenizer, list(turns))), default=0)


def _regime(model: SampledModel, max_length: int) -> tuple[int, LongRopePolicy]:
    """The length to open a model for, and the policy, so that it computes with the factors that are asked for."""
    from phimr_nemo.model.architecture import Architecture, is_phi
    from phimr_nemo.model.origin import read_origin
    from phimr_nemo.model.regime import LONG_WITH_ITS_LENGTH, opening_as_trained

    if model.longrope != "as_trained":
        return max_length, model.longrope
    if not is_phi(model.directory):
        return max_length, LONG_WITH_ITS_LENGTH
    opening = opening_as_trained(
        Architecture.from_directory(model.directory), read_origin(model.directory), max_length
    )
    for note in opening.notes:
        _LOGGER.warning("%s: %s", model.directory, note)
    return opening.max_length, opening.policy


def _local(
    engine: LocalEngine, model: SampledModel, tokenizer: Any, max_length: int, longrope: LongRopePolicy
) -> LocalSampler:
    import torch

    from phimr_nemo.data.chat import stop_token_ids
    from phimr_nemo.generate.local.engine import LocalSampler
    from phimr_nemo.model.architecture import Architecture
    from phimr_nemo.model.dtypes import torch_dtype
    from phimr_nemo.model.files.hf import HFDirectory
    from phimr_nemo.model.regime import warn_of_other_regime

    device = model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    named = engine.dtype or model.dtype
    if model.weights is None:
        source = HFDirectory(model.directory)
        architecture = source.architecture
        warn_of_other_regime(architecture, model.directory, max_length, longrope)
        tensors: Iterable[tuple[str, torch.Tensor]] = ((name, source.read(name)) for name in source.names())
        own = source.dtype(source.names()[0])
    else:
        assert named is not None, "a trainer says what it computes in"
        architecture = Architecture.from_directory(model.directory)
        tensors = model.weights
        own = torch_dtype(named)
    return LocalSampler(
        architecture,
        tensors,
        stop_token_ids=stop_token_ids(tokenizer),
        max_batch=engine.max_batch,
        longrope_policy=longrope,
        max_length=max_length,
        dtype=own if named is None else torch_dtype(named),
        device=device,
        cache_bytes=None if engine.cache_gib is None else int(engine.cache_gib * GIBIBYTE),
    )


def _vllm(
    engine: VLLMEngine, model: SampledModel, tokenizer: Any, max_length: int, longrope: LongRopePolicy
) -> protocol.Engine:
    from phimr_nemo.data.chat import stop_token_ids
    from phimr_nemo.data.turns import FORMATS
    from phimr_nemo.generate.serving.vllm import FixedVLLM, VLLMSampler, check_longrope

    check_longrope(model.directory, longrope, max_length)
    dtype = engine.dtype or model.dtype
    if model.weights is None:
        added = tokenizer.get_added_vocab()
        has_turns = any({turns.end, turns.end_of_text} <= added.keys() for turns in FORMATS)
        stop_ids = stop_token_ids(tokenizer) if has_turns else ()
        return FixedVLLM(model.directory, engine, dtype=dtype, max_length=max_length, stop_ids=stop_ids)
    return VLLMSampler(
        model.directory, engine, dtype=dtype, max_length=max_length, stop_ids=stop_token_ids(tokenizer)
    )


def _servers(
    engine: ServerEngine, model: SampledModel, tokenizer: Any, max_length: int, longrope: LongRopePolicy
) -> protocol.Sampler:
    from phimr_nemo.data.chat import stop_token_ids
    from phimr_nemo.generate.serving.broadcast.trainer import Broadcaster
    from phimr_nemo.generate.serving.replies import Wanted
    from phimr_nemo.generate.serving.servers import ServerSampler
    from phimr_nemo.generate.serving.vllm import check_longrope
    from phimr_nemo.generate.serving.weights import LOGPROBS, RAW_LOGPROBS, tokenizer_hash
    from phimr_nemo.model.architecture import Architecture

    assert model.run is not None, "servers belong to a trainer's run"
    check_longrope(model.directory, longrope, max_length)
    architecture = Architecture.from_directory(model.directory)
    wanted = Wanted(
        weights=model.run.base_weights,
        tokenizer=tokenizer_hash(model.directory),
        longest=max_length,
        original=architecture.original_max_position_embeddings if architecture.long_factor is not None else None,
        longrope=longrope,
        vocab_size=architecture.vocab_size,
        logprobs=RAW_LOGPROBS if engine.kind == "trtllm_server" else LOGPROBS,
    )
    return ServerSampler(
        engine,
        wanted,
        stop_token_ids=stop_token_ids(tokenizer),
        run=model.run.name,
        is_leader=model.run.is_leader,
        stale=model.run.stale,
        broadcaster=Broadcaster(engine) if engine.transfer == "nccl" and model.run.is_leader else None,
    )
