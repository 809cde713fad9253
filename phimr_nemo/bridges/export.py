"""A stage's configuration and data in another trainer's form, as one directory.

- `train.jsonl`, `validation.jsonl`: every sample in the order of use (``phimr_nemo.bridges.samples``);
- `config.yaml`: the other trainer's settings;
- `counterparts.md`: every setting of the stage and what became of it there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phimr_nemo.bridges.counterparts import Counterpart, covered, markdown
from phimr_nemo.bridges.files import SETTINGS, TABLE, TRAIN, VALIDATION
from phimr_nemo.bridges.samples import Sample, Samples
from phimr_nemo.config import to_dict
from phimr_nemo.store.atomic import atomic_directory, atomic_write_text


@dataclass(frozen=True)
class Export:
    """What is written for a stage.

    Attributes:
        target: the other trainer, with its version.
        settings: its own.
        counterparts: a line for every setting of the stage.
        samples: the data.
        shape: a sample -> a line of its JSONL.
        files: further text files.
    """

    target: str
    settings: Mapping[str, Any]
    counterparts: Sequence[Counterpart]
    samples: Samples
    shape: Callable[[Sample], Sample] = dict
    files: Mapping[str, str] = field(default_factory=dict)


def write_export(directory: Path, stage: str, config: Any, export: Export) -> dict[str, Any]:
    """Write an export, whole or not at all.

    Returns:
        Its target, samples and steps.

    Raises:
        UserError: the directory is in the way, or the data is not usable.
        LookupError: a setting that the table of counterparts does not name.
    """
    table = markdown(covered(to_dict(config), export.counterparts))
    with atomic_directory(directory) as scratch:
        _write_lines(scratch / TRAIN, map(export.shape, export.samples.train))
        _write_lines(scratch / VALIDATION, map(export.shape, export.samples.validation))
        atomic_write_text(scratch / SETTINGS, yaml.safe_dump(dict(export.settings), sort_keys=False))
        atomic_write_text(scratch / TABLE, f"# {stage} for {export.target}\n\n{table}")
        for name, text in export.files.items():
            atomic_write_text(scratch / name, text)
    return {"target": export.target, "samples": export.samples.count, "steps": export.samples.steps}


def _write_lines(file: Path, samples: Iterable[Sample]) -> None:
    """JSON lines; no file where there is no sample."""
    stream = None
    try:
        for sample in samples:
            stream = stream or file.open("w", encoding="utf-8")
            stream.write(json.dumps(sample, ensure_ascii=False) + "\n")
    finally:
        if stream is not None:
            stream.close()
