"""The stage `export`: the last stage's directory -> a release with a model card made from the runs' own facts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from phimr_nemo.config import ExportConfig
from phimr_nemo.data.turns import format_of
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import evaluated_model
from phimr_nemo.evaluate.stage import ROW_OF_STAGE
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.origin import Origin, read_origin
from phimr_nemo.model.regime import NAMES, was_trained_long
from phimr_nemo.report.collect import read_evaluation
from phimr_nemo.report.scores import as_in_the_paper, reference_table
from phimr_nemo.report.tables import Seeds, Table, markdown, markdown_text, score_table
from phimr_nemo.store.inputs import is_hub_name
from phimr_nemo.store.provenance import ABSENT, MADE_FROM, content_of, read_made_from
from phimr_nemo.store.runs import CONFIG_FILE, DONE_FILE, RESULTS_FILE, RUN_FILE, RunDirectory

MODEL_DIRECTORY: Final = "hf"
ARCHITECTURES: Final = {
    "phi3": "Phi-4-mini",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Check every tensor and write `<output>/hf` with its model card.

    Raises:
        UserError: an unreadable model, a stage or evaluation that has not finished, or a full disk.
    """
    from phimr_nemo.model.files.hf import HFDirectory, copy_hf_directory

    source = HFDirectory(config.model)
    origin = dataclasses.replace(read_origin(config.model), knows=config.knows)
    copy_hf_directory(
        config.run.output / "hf",
        source,
        tokenizer_from=config.model,
        extra_files={"README.md": model_card(config, source.architecture, origin)},
        origin=origin,
    )
    return {"hf": "hf", "parameters": source.architecture.num_parameters, "weights": source.weights_hash()}


def model_card(config: ExportConfig, architecture: Architecture, origin: Origin) -> str:
    """The model card: hub metadata, what was trained how, and what was measured.

    Args:
        config: names the runs to report.
        architecture: of the model.
        origin: how it was trained, and what it can be asked.

    Raises:
        UserError: a stage or an evaluation has not finished.
    """
    parts = [
        front_matter(config),
        f"# {markdown_text(config.run.output.name)}",
        f"A model of {architecture.num_parameters:,} parameters in the architecture of "
        f"{ARCHITECTURES.get(architecture.family, architecture.family.capitalize())} "
        f"(`{architecture.traits.hf_class}`), trained "
        f"from {markdown_text(config.base_model)} with the Phi-4-Mini-Reasoning recipe "
        "(arXiv 2504.21233) in phimr-nemo.",
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\nmodel = AutoModelForCausalLM.from_pretrained(".")\n```\n\n'
        "The chat template comes with the tokenizer. Generation ends with "
        f"{_end(config.model, architecture)}.",
        *([f"What it can be asked: {markdown_text(origin.knows)}"] if origin.knows else []),
        *_length(architecture, origin),
    ]
    if config.stages:
        parts.append("## Training\n\n" + _stage_table(config.stages))
    if config.evaluations:
        check_evaluated(config)
        parts.append("## Measured\n\n" + _measured(config.evaluations))
    return "\n\n".join(parts) + "\n"


def _end(model: Path, architecture: Architecture) -> str:
    """What ends a response, for people."""
    from phimr_nemo.model.files.companions import read_added_tokens

    turns = format_of(read_added_tokens(model, architecture))
    return "the tokens that generation_config.json names" if turns is None else f"`{turns.end}`"


def front_matter(config: ExportConfig) -> str:
    """The card's metadata for the hub, between lines of dashes; a base is named there if it is one of the hub's."""
    base = {"base_model": config.base_model} if is_hub_name(config.base_model) else {}
    metadata = {
        "license": config.licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **base,
        "tags": ["math", "reasoning", Architecture.from_directory(config.model).family],
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _length(architecture: Architecture, origin: Origin) -> list[str]:
    """How long sequences may be, where LongRoPE makes that a matter of accuracy."""
    was_long = was_trained_long(architecture, origin)
    if was_long is None:
        return []
    original = architecture.original_max_position_embeddings
    factors = f"LongRoPE's {NAMES[was_long]} factors"
    trained = f"Trained on sequences of up to {origin.sequence_length:,} tokens with {factors}"
    if was_long:
        return [
            f"{trained}: serve it with a maximum length above {original:,} tokens, for short questions too "
            f"(vLLM's default is the context, {architecture.max_position_embeddings:,}). transformers computes "
            "short sequences with the short factors."
        ]
    return [
        f"{trained}: serve it with a maximum length of at most {original:,} tokens "
        f"(vLLM: `--max-model-len {original}`), because engines take the long factors above it."
    ]


def _stage_table(stages: Mapping[str, Path]) -> str:
    rows = []
    for name, directory in stages.items():
        run = RunDirectory(directory)
        if not run.is_done:
            raise UserError(
                f"stage {name!r} in {directory} has not finished",
                rule="the model card reports finished stages",
                remedy="finish the stage, or leave it out of `stages`",
            )
        rows.append((name, *_trained_with(name, run)))
    header = ("stage", "steps", "longest sequence", "peak learning rate", "seed", "code")
    return markdown(Table("Training", header, tuple(rows))).rstrip("\n")


def _trained_with(name: str, run: RunDirectory) -> tuple[str, ...]:
    """Steps, sequence length, rate, seed and code of a finished training run.

    Raises:
        UserError: it is none, or its files are damaged.
    """
    facts = run.closing_facts()
    try:
        settings = yaml.safe_load((run.path / CONFIG_FILE).read_text("utf-8"))
        made = json.loads((run.path / RUN_FILE).read_text("utf-8"))
        return (
            str(facts["steps"]),
            str(settings["sequence_length"]),
            f"{settings['optim']['lr']:g}",
            str(made["seed"]),
            str(made["versions"]["git"])[:12],
        )
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"stage {name!r} in {run.path} is no training run, or damaged: {error!r:.200}",
            rule=f"the card reports finished training stages from their {CONFIG_FILE}, {RUN_FILE} and {DONE_FILE}",
            remedy="give the run.output of midtrain, sft, dpo, grpo or distill; restore its files; or leave it out",
        ) from error


def check_evaluated(config: ExportConfig) -> None:
    """A card never carries a score of other weights: each evaluation asked the model itself, one of its stages'
    models, or the model that a stage started from.

    Raises:
        UserError: an evaluation has not finished, or asked something else; it is named.
    """
    models = {name: content_of(directory / MODEL_DIRECTORY) for name, directory in config.stages.items()}
    bases = filter(None, map(_base_of, config.stages.values()))
    known = {content_of(config.model), *models.values(), *bases} - {ABSENT}
    for name, directory in config.evaluations.items():
        _check_finished(name, directory)
        asked = evaluated_model(directory / RESULTS_FILE)
        expected = {content for stage, content in models.items() if ROW_OF_STAGE.get(stage, stage) == name} - {ABSENT}
        expected = expected or known
        if asked in expected:
            continue
        raise UserError(
            f"evaluation {name!r} in {directory} is of other weights ({_shown(asked)}) than "
            f"{', '.join(sorted(_shown(one) for one in expected))}",
            rule="a card carries scores of the model itself, of its stages' models and of what they started from",
            remedy=f"evaluate the model that is there now: remove {directory} and run its command again"
            if asked is not None
            else f"remove {directory} and evaluate the model's own directory: what an endpoint serves, or an earlier "
            "version has asked, is not known here",
        )


def _base_of(stage: Path) -> str | None:
    """The content of the model that a stage started from."""
    made_from = read_made_from((RunDirectory(stage).description() or {}).get(MADE_FROM))
    return None if made_from is None else made_from.inputs.get("base")


def _shown(content: str | None) -> str:
    return "unknown" if content is None else content


def _check_finished(name: str, directory: Path) -> None:
    if not (directory / RESULTS_FILE).is_file():
        raise UserError(
            f"evaluation {name!r} in {directory} has not finished",
            rule=f"the model card reports finished evaluations, which hold {RESULTS_FILE}",
            remedy="finish the evaluation, or leave it out of `evaluations`",
        )


def _measured(evaluations: Mapping[str, Path]) -> str:
    """The tables of `phimr report` for these evaluations, the paper's where they hold one of its benchmarks."""
    benchmarks: dict[str, dict[str, Seeds]] = {}
    for name, directory in evaluations.items():
        found = read_evaluation(directory)
        benchmarks.setdefault(found.benchmark, {})[name] = {found.seed: found.result}
    tables = [score_table(benchmark, models) for benchmark, models in benchmarks.items()]
    ours = as_in_the_paper(benchmarks)
    if ours:
        tables.append(reference_table(ours))
    return "\n".join(
        f"### {markdown_text(table.title)}\n\n{markdown(table)}\n{markdown_text(table.note)}\n" for table in tables
    ).rstrip("\n")
