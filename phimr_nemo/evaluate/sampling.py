"""Responses of the evaluated model, through the engine that the configuration names."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from phimr_nemo.config import (
    EndpointSampling,
    EndpointTeacher,
    EvaluateConfig,
    LocalSampling,
    VLLMSampling,
    VLLMTeacher,
)
from phimr_nemo.endpoint.settings import check_endpoint
from phimr_nemo.errors import UserError
from phimr_nemo.generate.plan import QUESTION, Plan
from phimr_nemo.generate.sampler import SamplingParams
from phimr_nemo.store.shards import conform

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from phimr_nemo.generate.sampler import Engine


def sample_responses(config: EvaluateConfig, problems: pa.Table, out_dir: Path) -> None:
    """Write `config.samples` responses to every problem as a record directory of kind "rollouts".

    What is there already is kept. The weights' hash (behind an endpoint the model's name) is part of ids, seeds and
    settings, so a changed model is refused and never given old responses.

    Args:
        config: the evaluation.
        problems: a table of kind "problems".
        out_dir: the record directory.

    Raises:
        UserError: an unreadable model or tokenizer, an engine that is not there or refuses the model, or a
            directory begun with other settings.
    """
    engine = config.engine
    if isinstance(engine, EndpointSampling):
        _ask_endpoint(config, engine, problems, out_dir)
        return
    model = own_model(config)
    if isinstance(engine, LocalSampling):
        import torch

        from phimr_nemo.data.chat import load_tokenizer
        from phimr_nemo.generate.engines import open_local

        tokenizer = load_tokenizer(model)
        sampler, name = open_local(
            model,
            [config.prompt.replace(QUESTION, question) for question in problems["question"].to_pylist()],
            max_new_tokens=config.max_new_tokens,
            max_batch=engine.max_batch,
            longrope=config.longrope,
            dtype=torch.bfloat16 if engine.dtype == "bf16" else torch.float32,
        )
        _sample(config, problems, out_dir, sampler, tokenizer, name)
        return
    from phimr_nemo.generate.serving.vllm import open_vllm

    opened, tokenizer, name = open_vllm(_as_teacher(config, engine, model), problems["question"].to_pylist())
    _sample(config, problems, out_dir, opened, tokenizer, name)


def check_engine(config: EvaluateConfig) -> None:
    """Refuse an engine that cannot work here before anything is read.

    Raises:
        UserError: bad settings of an endpoint, no model directory, or vLLM is to sample and is not installed here.
    """
    if isinstance(config.engine, EndpointSampling):
        check_endpoint(config.engine.endpoint)
        return
    own_model(config)
    if isinstance(config.engine, VLLMSampling) and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "engine.kind=vllm, but vLLM is not installed here",
            rule="vLLM has an environment of its own",
            remedy="make setup-vllm, then .venv-vllm/bin/phimr evaluate with the same arguments; or serve the model "
            "and set engine.kind=endpoint; or engine.kind=local engine.max_batch=64 engine.dtype=bf16",
        )


def own_model(config: EvaluateConfig) -> Path:
    """The model's directory.

    Raises:
        UserError: none is given, but the engine runs in this process.
    """
    if config.model is None:
        raise UserError(
            f"no model for engine.kind={config.engine.kind}",
            rule="an engine in this process reads the model from a Hugging Face directory",
            remedy="set model=DIRECTORY, or engine.kind=endpoint for a served model",
        )
    return config.model


def _params(config: EvaluateConfig) -> SamplingParams:
    return SamplingParams(config.temperature, config.top_p, config.max_new_tokens)


def _sample(
    config: EvaluateConfig,
    problems: pa.Table,
    out_dir: Path,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> None:
    from phimr_nemo.generate.rollouts import sample_rollouts

    try:
        sample_rollouts(
            problems,
            engine,
            tokenizer,
            out_dir,
            rollouts_per_problem=config.samples,
            params=_params(config),
            teacher_name=name,
            shard_size=config.shard_questions,
            stage_seed=config.run.seed,
            prompt_template=config.prompt,
        )
    finally:
        engine.close()


def _as_teacher(config: EvaluateConfig, engine: VLLMSampling, model: Path) -> VLLMTeacher:
    """The evaluated model as vLLM's opener takes it."""
    return VLLMTeacher(
        kind="vllm",
        path=model,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        prompt=config.prompt,
        max_batch=engine.max_batch,
        dtype=engine.dtype,
        tensor=engine.tensor,
        memory_share=engine.memory_share,
        longrope=config.longrope,
        eager=engine.eager,
    )


def _ask_endpoint(config: EvaluateConfig, engine: EndpointSampling, problems: pa.Table, out_dir: Path) -> None:
    from phimr_nemo.generate.serving.remote import request_rollouts

    plan = Plan(
        problems=conform(problems, "problems"),
        rollouts_per_problem=config.samples,
        shard_size=config.shard_questions,
        teacher=engine.endpoint.model,
        stage_seed=config.run.seed,
        prompt_template=config.prompt,
    )
    teacher = EndpointTeacher(
        kind="endpoint",
        endpoint=engine.endpoint,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        prompt=config.prompt,
        system=engine.system,
        max_missing=engine.max_missing,
    )
    request_rollouts(plan, teacher, out_dir, shard_indices=plan.shards)
