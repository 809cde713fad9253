"""What is checked before a stage starts, and the numbers that `--dry-run` prints. Needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phimr_nemo.config import (
    AskConfig,
    BenchmarkProblems,
    CurateConfig,
    DistillConfig,
    DPOConfig,
    EndpointEngine,
    EvaluateConfig,
    ExportConfig,
    FileProblems,
    GenerateConfig,
    ModelTeacher,
    PackConfig,
    PrepareConfig,
    RecordedTeacher,
    RecordProblems,
    RoundsConfig,
    ServerEngine,
    SupervisedConfig,
    VerifyConfig,
    VLLMEngine,
)
from phimr_nemo.config.dpo import StoredReference
from phimr_nemo.config.sampled.distill import ServerTeacher
from phimr_nemo.data.chat import warn_of_other_template
from phimr_nemo.data.tokenizer import TOKENIZER_FILE
from phimr_nemo.endpoint.settings import Addressed, read_key
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.files.companions import check_companions
from phimr_nemo.model.layout import check_layout, check_length
from phimr_nemo.model.regime import regime_name, warn_of_other_regime
from phimr_nemo.model.vocabulary import check_same_tokenizer, check_same_words
from phimr_nemo.plan.weights import largest_state
from phimr_nemo.process.memory import GIBIBYTE
from phimr_nemo.store.inputs import model_remedy
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import is_complete, read_manifest
from phimr_nemo.verify import Grader


def grader_of(config: Any) -> str | None:
    """The grader of the user's own that a stage's configuration names; None for mathematics, or nothing to grade."""
    if isinstance(config, SupervisedConfig | DPOConfig):
        return None if config.evaluation is None else config.evaluation.grader
    return config.grader if isinstance(config, VerifyConfig | EvaluateConfig | RoundsConfig) else None


def preflight(stage: str, config: Any) -> None:
    """Check a stage's inputs and layout before anything is written or started.

    Raises:
        UserError: an input does not exist, is unfinished or of another kind, or the layout is impossible.
    """
    for path, kind in record_inputs(stage, config):
        read_manifest(path, kind)
    evaluated = _evaluated(config)
    if isinstance(evaluated, RecordProblems):
        read_manifest(evaluated.path, "problems")
    for path in file_inputs(config):
        if not path.exists():
            raise UserError(
                f"{path} does not exist",
                rule=f"{stage} reads it",
                remedy=model_remedy(path),
            )
    for asked in keyed(config):
        read_key(asked)
    _check_vllm(config)
    named = grader_of(config)
    if named is not None:
        with Grader(workers=1, function=named) as grader:
            grader.check()
    if isinstance(config, PackConfig):
        warn_of_other_template(config.tokenizer)
    if isinstance(config, SupervisedConfig | DPOConfig | RoundsConfig):
        architecture = Architecture.from_directory(config.base)
        check_layout(architecture, config.parallel)
        check_length(architecture, config.sequence_length)
        if (config.base / TOKENIZER_FILE).is_file():
            # The trained model hands them on: better known now than at its export.
            check_companions(architecture, config.base)
        warn_of_other_template(config.base)
        warn_of_other_regime(architecture, config.base, config.sequence_length, config.model.longrope)
        check_steps(stage, config)
    if isinstance(config, DistillConfig):
        _check_teacher(config)


def _check_teacher(config: DistillConfig) -> None:
    """Teacher and student speak of the same words, and the layout can hold a teacher beside the student.

    Raises:
        UserError: another tokenizer or number of words; a layout or length that the teacher cannot have.
    """
    if isinstance(config.teacher, ServerTeacher):
        check_same_tokenizer(config.base, config.teacher.tokenizer)
    else:
        check_same_words(config.base, config.teacher.path)
        teacher = Architecture.from_directory(config.teacher.path)
        check_layout(teacher, config.parallel)
        check_length(teacher, config.sequence_length)


def record_inputs(stage: str, config: Any) -> list[tuple[Path, Kind]]:
    """The record directories that a stage reads, with their kinds."""
    if isinstance(config, GenerateConfig | EvaluateConfig) and isinstance(config.problems, RecordProblems):
        answered: list[tuple[Path, Kind]] = [(path, "rollouts") for path in config.problems.answered]
        return [(config.problems.path, "problems"), *answered]
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
    if isinstance(config, RoundsConfig):
        return [(config.prompts, "prompts")]
    return []


def file_inputs(config: Any) -> list[Path]:
    """The other files and directories that a stage reads."""
    asked = _asked(config)
    paths: list[Path] = [asked.path] if asked is not None and asked.path is not None else []
    if isinstance(config, GenerateConfig | EvaluateConfig) and isinstance(
        config.problems, FileProblems | BenchmarkProblems
    ):
        paths += [config.problems.path] if config.problems.path else []
    evaluated = _evaluated(config)
    paths += [evaluated.path] if isinstance(evaluated, FileProblems) else []
    if isinstance(config, GenerateConfig) and isinstance(config.teacher, RecordedTeacher | ModelTeacher):
        paths += [config.teacher.path] if config.teacher.path else []
    if isinstance(config, CurateConfig):
        paths += [] if config.tokenizer is None else [config.tokenizer]
    if isinstance(config, PrepareConfig):
        paths += [Path(source.path) for source in config.sources if not source.hub]
        paths += [one.path for one in config.decontamination.sets] if config.decontamination else []
    if isinstance(config, EvaluateConfig | ExportConfig):
        paths += [config.model] if config.model else []
    if isinstance(config, ExportConfig):
        paths += [*config.stages.values(), *config.evaluations.values()]
    if isinstance(config, PackConfig):
        paths.append(config.tokenizer)
    if isinstance(config, SupervisedConfig | DPOConfig | RoundsConfig):
        paths.append(config.base)
    if isinstance(config, DistillConfig):
        paths.append(config.teacher.tokenizer if isinstance(config.teacher, ServerTeacher) else config.teacher.path)
    if isinstance(config, DPOConfig) and isinstance(config.reference, StoredReference) and config.reference.path:
        paths.append(config.reference.path)
    return paths


def _evaluated(config: Any) -> Any:
    """The problems of pass@1 while training."""
    if isinstance(config, SupervisedConfig | DPOConfig | RoundsConfig) and config.evaluation is not None:
        return config.evaluation.problems
    return None


def _asked(config: Any) -> AskConfig | None:
    """The judge or the annotator of a stage."""
    if isinstance(config, VerifyConfig):
        return None if config.judge is None else config.judge.ask
    if isinstance(config, PrepareConfig):
        return None if config.annotation is None else config.annotation.ask
    return None


def _engine(config: Any) -> tuple[Any, str]:
    """What samples in a stage, and where the configuration says so."""
    asked = _asked(config)
    if asked is not None:
        return asked.engine, "judge.ask." if isinstance(config, VerifyConfig) else "annotation.ask."
    if isinstance(config, GenerateConfig) and isinstance(config.teacher, ModelTeacher):
        return config.teacher.engine, "teacher."
    if isinstance(config, SupervisedConfig | DPOConfig):
        return (None if config.evaluation is None else config.evaluation.engine), "evaluation."
    return (config.engine if isinstance(config, EvaluateConfig | RoundsConfig) else None), ""


def keyed(config: Any) -> list[Addressed]:
    """What a stage asks for that may want a key: endpoints and servers."""
    engine, _ = _engine(config)
    asked: list[Addressed] = []
    if isinstance(config, DistillConfig) and isinstance(config.teacher, ServerTeacher):
        asked.append(config.teacher.endpoint)
    if isinstance(engine, ServerEngine):
        return [engine, *asked]
    return [engine.endpoint, *asked] if isinstance(engine, EndpointEngine) else asked


def _check_vllm(config: Any) -> None:
    """vLLM is to sample a finished model, and this environment has it."""
    engine, place = _engine(config)
    if isinstance(config, SupervisedConfig | DPOConfig | RoundsConfig):
        return  # the environment of the trainer has it or not, which is found when it is opened
    if isinstance(engine, VLLMEngine) and importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{place}engine.kind=vllm, but vLLM is not installed here",
            rule="vLLM has an environment of its own",
            remedy="make setup-vllm, then .venv-vllm/bin/phimr with the same arguments; or serve the model "
            f"and set {place}engine.kind=endpoint; or {place}engine.kind=local {place}engine.max_batch=64 "
            f"{place}engine.dtype=bf16",
        )


def check_steps(stage: str, config: SupervisedConfig | DPOConfig | RoundsConfig) -> None:
    """Refuse a run whose data, which is there, is too little for one step.

    Raises:
        UserError: it is.
    """
    steps = planned_steps(stage, config)
    if steps is None or steps > 0 or isinstance(config, RoundsConfig):
        return
    (path, kind), held_out = record_inputs(stage, config)[0], _held_out(config)
    rows = read_manifest(path, kind).rows
    raise UserError(
        f"{path} holds {rows} {kind}, {held_out} of them for validation: no step of "
        f"global_batch={config.global_batch} in epochs={config.epochs}",
        rule=f"at least one global batch of {config.global_batch} is left for training",
        remedy=f"bring more data, or lower global_batch or validation_{'pairs' if stage == 'dpo' else 'rows'}",
    )


def _held_out(config: SupervisedConfig | DPOConfig | RoundsConfig) -> int:
    """Rows or pairs that are not trained on, as many as the configuration names."""
    if isinstance(config, DPOConfig):
        return config.validation_pairs
    return config.validation_rows if isinstance(config, SupervisedConfig) else 0


def derived_numbers(stage: str, config: Any) -> Mapping[str, str]:
    """What follows from a config: processes, parameters, bytes per GPU, tokens per step, steps.

    Raises:
        UserError: the model cannot have this layout or length, or the data is too little for one step.
    """
    if not isinstance(config, SupervisedConfig | DPOConfig | RoundsConfig):
        return {}
    numbers = {"processes": str(config.parallel.world_size)}
    if config.parallel.nodes is not None:
        numbers["nodes"] = str(config.parallel.nodes)
    check_steps(stage, config)
    if config.base.is_dir():
        architecture = Architecture.from_directory(config.base)
        check_layout(architecture, config.parallel)
        check_length(architecture, config.sequence_length)
        numbers["parameters"] = f"{architecture.num_parameters:,}"
        numbers["LongRoPE factors"] = regime_name(architecture, config.sequence_length, config.model.longrope)
        state = largest_state(architecture, config.parallel, config.model.dtype, distributed=config.optim.distributed)
        numbers["weights, gradients, optimizer per GPU"] = f"{state.total / GIBIBYTE:.3f} GiB"
    else:
        numbers["parameters"] = f"unknown: {config.base} does not exist yet"
    numbers |= _batch_numbers(stage, config)
    return numbers


def _batch_numbers(stage: str, config: SupervisedConfig | DPOConfig | RoundsConfig) -> Mapping[str, str]:
    if isinstance(config, RoundsConfig):
        sequences = config.prompts_per_step * config.group_size
        return {
            "responses per step": f"{sequences:,}",
            "tokens per step, at most": f"{sequences * config.sequence_length:,}",
            "steps": f"{planned_steps(stage, config):,}",
        }
    sequences = config.global_batch * (2 if isinstance(config, DPOConfig) else 1)
    numbers = {
        "tokens per step" + ("" if stage == "midtrain" else ", at most"): f"{sequences * config.sequence_length:,}"
    }
    steps = planned_steps(stage, config)
    if steps is None:
        unfinished = [str(path) for path, kind in record_inputs(stage, config) if not is_complete(path, kind)]
        return numbers | {"steps": f"unknown: {', '.join(unfinished)} is not finished yet"}
    return numbers | {"steps": f"{steps:,}"}


def planned_steps(stage: str, config: SupervisedConfig | DPOConfig | RoundsConfig) -> int | None:
    """Optimizer steps (GRPO: rounds) that a training stage will take; None while its data is unfinished."""
    if isinstance(config, RoundsConfig):
        return config.steps
    if not all(is_complete(path, kind) for path, kind in record_inputs(stage, config)):
        return None
    rows = sum(read_manifest(path, kind).rows for path, kind in record_inputs(stage, config))
    steps = max(0, rows - _held_out(config)) * config.epochs // config.global_batch
    return min(steps, config.max_steps) if config.max_steps else steps
