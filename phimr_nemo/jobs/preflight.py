"""What is checked before a stage starts, and the numbers that `--dry-run` prints. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import (
    BenchmarkProblems,
    CurateConfig,
    DPOConfig,
    EndpointTeacher,
    EvaluateConfig,
    ExportConfig,
    FileProblems,
    GenerateConfig,
    GRPOConfig,
    ModelTeacher,
    PackConfig,
    PrepareConfig,
    ProgrammaticTeacher,
    RecordedTeacher,
    RecordProblems,
    ShardConfig,
    SupervisedConfig,
    SyntheticProblems,
    VerifyConfig,
    VLLMTeacher,
)
from phimr_nemo.config.alignment import StoredReference
from phimr_nemo.data.chat import warn_of_other_template
from phimr_nemo.endpoint.settings import check_endpoint
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.benchmarks import check_benchmark
from phimr_nemo.evaluate.sampling import check_engine
from phimr_nemo.generate.plan import check_template
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.layout import check_layout, check_length
from phimr_nemo.model.regime import regime_name, warn_of_other_regime
from phimr_nemo.plan.memory import largest_state
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import is_complete, read_manifest
from phimr_nemo.verify import Grader

GIBIBYTE: Final = 2**30


def grader_of(config: Any) -> str | None:
    """The grader of the user's own that a stage's configuration names; None for mathematics, or nothing to grade."""
    if isinstance(config, SupervisedConfig):
        return None if config.evaluation is None else config.evaluation.grader
    return config.grader if isinstance(config, VerifyConfig | EvaluateConfig | GRPOConfig) else None


def preflight(stage: str, config: Any) -> None:
    """Check a stage's inputs and layout before anything is written or started.

    Raises:
        UserError: an input does not exist, is unfinished or of another kind, or the layout is impossible.
    """
    for path, kind in record_inputs(stage, config):
        read_manifest(path, kind)
    for path in file_inputs(config):
        if not path.exists():
            raise UserError(
                f"{path} does not exist",
                rule=f"{stage} reads it",
                remedy="run the stage that makes it first, or correct the path",
            )
    if isinstance(config, GenerateConfig):
        _check_teacher(config)
    if isinstance(config, EvaluateConfig):
        check_evaluation(config)
    if isinstance(config, PrepareConfig):
        check_sources(config)
    if isinstance(config, VerifyConfig) and config.judge is not None:
        check_endpoint(config.judge.ask.endpoint)
    named = grader_of(config)
    if named is not None:
        with Grader(workers=1, function=named) as grader:
            grader.check()
    if isinstance(config, PackConfig):
        warn_of_other_template(config.tokenizer)
    if isinstance(config, GenerateConfig | VerifyConfig | PackConfig):
        check_shard(config.shard)
    if isinstance(config, SupervisedConfig | DPOConfig | GRPOConfig):
        architecture = Architecture.from_directory(config.base)
        check_layout(architecture, config.parallel)
        check_length(architecture, config.sequence_length)
        warn_of_other_template(config.base)
        warn_of_other_regime(architecture, config.base, config.sequence_length, config.model.longrope)
        check_batches(config)
        check_options(config)


def record_inputs(stage: str, config: Any) -> list[tuple[Path, Kind]]:
    """The record directories that a stage reads, with their kinds."""
    if isinstance(config, GenerateConfig | EvaluateConfig) and isinstance(config.problems, RecordProblems):
        return [(config.problems.path, "problems")]
    if isinstance(config, VerifyConfig):
        return [(config.rollouts, "rollouts")]
    if isinstance(config, CurateConfig):
        return [(path, "verdicts") for path in config.verdict_directories]
    if isinstance(config, PackConfig):
        return [(config.conversations, "conversations")]
    if isinstance(config, SupervisedConfig):
        return [(config.data, "rows" if stage == "midtrain" else "conversations")]
    if isinstance(config, DPOConfig):
        return [(config.pairs, "pairs")]
    if isinstance(config, GRPOConfig):
        return [(config.prompts, "prompts")]
    return []


def file_inputs(config: Any) -> list[Path]:
    """The other files and directories that a stage reads."""
    paths: list[Path] = []
    if isinstance(config, GenerateConfig | EvaluateConfig) and isinstance(
        config.problems, FileProblems | BenchmarkProblems
    ):
        paths += [config.problems.path] if config.problems.path else []
    if isinstance(config, GenerateConfig) and isinstance(
        config.teacher, RecordedTeacher | ModelTeacher | VLLMTeacher
    ):
        paths.append(config.teacher.path)
    if isinstance(config, PrepareConfig):
        paths += [Path(source.path) for source in config.sources if not source.hub]
        paths += [one.path for one in config.decontamination.sets] if config.decontamination else []
    if isinstance(config, EvaluateConfig | ExportConfig):
        paths += [config.model] if config.model else []
    if isinstance(config, ExportConfig):
        paths += [*config.stages.values(), *config.evaluations.values()]
    if isinstance(config, PackConfig):
        paths.append(config.tokenizer)
    if isinstance(config, SupervisedConfig | DPOConfig | GRPOConfig):
        paths.append(config.base)
    if isinstance(config, DPOConfig) and isinstance(config.reference, StoredReference) and config.reference.path:
        paths.append(config.reference.path)
    return paths


def _check_teacher(config: GenerateConfig) -> None:
    if config.problems is None and not isinstance(config.teacher, RecordedTeacher):
        raise UserError(
            f"teacher.kind={config.teacher.kind} without problems",
            rule="only a recorded teacher brings its own questions",
            remedy="set problems.kind=synthetic or problems.kind=file problems.path=FILE",
        )
    if isinstance(config.teacher, ProgrammaticTeacher) and not isinstance(config.problems, SyntheticProblems):
        raise UserError(
            f"teacher.kind=programmatic with problems {config.problems}",
            rule="the programmatic teacher solves the project's own synthetic problems only",
            remedy="use teacher.kind=model or teacher.kind=recorded for problems from a file",
        )
    if isinstance(config.teacher, EndpointTeacher):
        check_endpoint(config.teacher.endpoint)
    if isinstance(config.teacher, EndpointTeacher | VLLMTeacher):
        check_template(config.teacher.prompt)


def check_evaluation(config: EvaluateConfig) -> None:
    """Refuse an evaluation that cannot work before anything is read.

    Raises:
        UserError: a prompt without the question, an unknown benchmark or none to read, or no model to sample.
    """
    check_template(config.prompt)
    if isinstance(config.problems, BenchmarkProblems):
        check_benchmark(config.problems)
    check_engine(config)


def check_sources(config: PrepareConfig) -> None:
    """Refuse settings of sources that cannot work before anything is read.

    Raises:
        UserError: two sources have one name, columns are named for a preset, or the annotator cannot be asked.
    """
    names = [source.name for source in config.sources]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            f"sources {repeated} occur more than once",
            rule="every source has its own name: it stands in the records and in the counts",
            remedy="rename one of them",
        )
    for source in config.sources:
        given = [name for name in ("question", "answer", "solution", "response") if getattr(source, name) is not None]
        if source.preset is not None and given:
            raise UserError(
                f"source {source.name}: preset={source.preset} and the columns {given}",
                rule="a preset knows its columns; columns are named where there is no preset",
                remedy="leave out the one or the other",
            )
    if config.annotation is not None and config.annotation.ask is not None:
        check_endpoint(config.annotation.ask.endpoint)


def check_shard(shard: ShardConfig) -> None:
    """Refuse a share of the shards that does not exist.

    Raises:
        UserError: shard.index is not below shard.count.
    """
    if shard.index >= shard.count:
        raise UserError(
            f"shard.index={shard.index} with shard.count={shard.count}",
            rule="shard.index counts from 0 and is below shard.count",
            remedy=f"use 0 to {shard.count - 1}, or raise shard.count",
        )


def check_batches(config: SupervisedConfig | DPOConfig | GRPOConfig) -> None:
    """Refuse batch sizes that the data-parallel ranks cannot share.

    Raises:
        UserError: the global batch is no multiple of micro_batch x parallel.data.
    """
    if isinstance(config, GRPOConfig):
        if config.prompts_per_step % config.parallel.data:
            raise UserError(
                f"prompts_per_step={config.prompts_per_step} with parallel.data={config.parallel.data}",
                rule="parallel.data divides prompts_per_step",
                remedy=f"use a multiple of {config.parallel.data}",
            )
        return
    share = config.micro_batch * config.parallel.data
    if config.global_batch % share:
        raise UserError(
            f"global_batch={config.global_batch} with micro_batch={config.micro_batch} "
            f"and parallel.data={config.parallel.data}",
            rule=f"global_batch is a multiple of micro_batch x parallel.data = {share}",
            remedy=f"use global_batch={max(1, round(config.global_batch / share)) * share}",
        )


def check_options(config: SupervisedConfig | DPOConfig | GRPOConfig) -> None:
    """Refuse options that do not go together, or that a stage does not have.

    Raises:
        UserError: the option, its rule and what to do.
    """
    parallel, model = config.parallel, config.model
    if not isinstance(config, SupervisedConfig):
        if model.fp8 is not None or parallel.virtual > 1:
            raise UserError(
                f"model.fp8={model.fp8}, parallel.virtual={parallel.virtual} in an alignment stage",
                rule="8-bit products and virtual pipelining are for mid-training and SFT",
                remedy="leave both out",
            )
        return
    if model.fp8 is not None and model.dtype != "bf16":
        raise UserError(
            f"model.fp8={model.fp8} with model.dtype={model.dtype}",
            rule="8-bit products are a part of bf16 training",
            remedy="set model.dtype=bf16, or leave model.fp8 out",
        )
    if config.overlap.param_gather and not (config.optim.distributed and config.overlap.grad_reduce):
        raise UserError(
            f"overlap.param_gather=true with optim.distributed={config.optim.distributed} and "
            f"overlap.grad_reduce={config.overlap.grad_reduce}",
            rule="the distributed optimizer gathers weights ahead, and only where gradients are reduced ahead",
            remedy="set optim.distributed=true overlap.grad_reduce=true, or overlap.param_gather=false",
        )
    if config.overlap.tensor and not parallel.sequence:
        raise UserError(
            "overlap.tensor=true with parallel.sequence=false",
            rule="tensor-parallel exchange is overlapped under sequence parallelism only",
            remedy="set parallel.sequence=true, or overlap.tensor=false",
        )
    micro_batches = config.global_batch // (config.micro_batch * parallel.data)
    if parallel.virtual > 1 and micro_batches % parallel.pipeline:
        raise UserError(
            f"{micro_batches} micro-batches a step with parallel.pipeline={parallel.pipeline} and "
            f"parallel.virtual={parallel.virtual}",
            rule="with virtual pipelining parallel.pipeline divides the micro-batches of a step",
            remedy="change micro_batch, global_batch or parallel.data, or set parallel.virtual=1",
        )


def derived_numbers(stage: str, config: Any) -> Mapping[str, str]:
    """What follows from a config: processes, parameters, bytes a GPU, tokens a step, steps.

    Raises:
        UserError: the layout or the batch sizes are impossible.
    """
    if not isinstance(config, SupervisedConfig | DPOConfig | GRPOConfig):
        return {}
    numbers = {"processes": str(config.parallel.world_size)}
    if config.parallel.nodes is not None:
        numbers["nodes"] = str(config.parallel.nodes)
    check_batches(config)
    check_options(config)
    if config.base.is_dir():
        architecture = Architecture.from_directory(config.base)
        check_layout(architecture, config.parallel)
        check_length(architecture, config.sequence_length)
        numbers["parameters"] = f"{architecture.num_parameters:,}"
        numbers["LongRoPE factors"] = regime_name(architecture, config.sequence_length, config.model.longrope)
        state = largest_state(architecture, config.parallel, config.model.dtype, distributed=config.optim.distributed)
        numbers["weights, gradients, optimizer a GPU"] = f"{state.total / GIBIBYTE:.3f} GiB"
    else:
        numbers["parameters"] = f"unknown: {config.base} does not exist yet"
    numbers |= _batch_numbers(stage, config)
    return numbers


def _batch_numbers(stage: str, config: SupervisedConfig | DPOConfig | GRPOConfig) -> Mapping[str, str]:
    if isinstance(config, GRPOConfig):
        sequences = config.prompts_per_step * config.group_size
        return {
            "responses a step": f"{sequences:,}",
            "tokens a step, at most": f"{sequences * config.sequence_length:,}",
            "steps": f"{planned_steps(stage, config):,}",
        }
    sequences = config.global_batch * (2 if isinstance(config, DPOConfig) else 1)
    numbers = {
        "tokens a step" + ("" if stage == "midtrain" else ", at most"): f"{sequences * config.sequence_length:,}"
    }
    steps = planned_steps(stage, config)
    if steps is None:
        unfinished = [str(path) for path, kind in record_inputs(stage, config) if not is_complete(path, kind)]
        return numbers | {"steps": f"unknown: {', '.join(unfinished)} is not finished yet"}
    return numbers | {"steps": f"{steps:,}"}


def planned_steps(stage: str, config: SupervisedConfig | DPOConfig | GRPOConfig) -> int | None:
    """Optimizer steps (GRPO: rounds) that a training stage will take; None while its data is unfinished."""
    if isinstance(config, GRPOConfig):
        return config.steps
    if not all(is_complete(path, kind) for path, kind in record_inputs(stage, config)):
        return None
    rows = sum(read_manifest(path, kind).rows for path, kind in record_inputs(stage, config))
    steps = (rows - getattr(config, "validation_rows", 0)) * config.epochs // config.global_batch
    return min(steps, config.max_steps) if config.max_steps else steps
