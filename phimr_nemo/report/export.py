"""The stage `export`: the last stage's directory -> a release with a model card made from the runs' own facts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import ExportConfig
from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import evaluated_model
from phimr_nemo.evaluate.stage import ROW_OF_STAGE
from phimr_nemo.model.origin import read_origin
from phimr_nemo.report.card import model_card
from phimr_nemo.store.provenance import ABSENT, MADE_FROM, content_of, read_made_from
from phimr_nemo.store.runs import RESULTS_FILE, RunDirectory

MODEL_DIRECTORY: Final = "hf"


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Check every tensor and write `<output>/hf` with its model card.

    Raises:
        UserError: an unreadable model, a stage or evaluation that has not finished, or a full disk.
    """
    from phimr_nemo.model.files.hf import HFDirectory, copy_hf_directory

    if config.evaluations:
        check_evaluated(config)
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
