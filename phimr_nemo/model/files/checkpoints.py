"""The three things that weights are kept in, told apart by their files, opened as one kind of source.

- `hf`: a Hugging Face directory: config.json, *.safetensors, tokenizer.
- `megatron`: a Megatron distributed checkpoint: metadata.json, .metadata, *.distcp. It does not say which model it
  holds; written here, it carries config.json and tokenizer in `hf/`.
- `nemo`: a NeMo 2.0 checkpoint: such a checkpoint in `weights/`, the model's settings and tokenizer in `context/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import yaml

from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import CONFIG_FILE, Architecture
from phimr_nemo.model.files.blocks import RowSource
from phimr_nemo.model.files.companions import write_model_files
from phimr_nemo.model.files.distcheckpoint import DistCheckpoint, write_dist_checkpoint
from phimr_nemo.model.files.distindex import FORMAT_FILE
from phimr_nemo.model.files.hf import HFDirectory, copy_hf_directory
from phimr_nemo.model.origin import Origin
from phimr_nemo.store.atomic import atomic_directory
from phimr_nemo.store.inputs import model_remedy

Kind = Literal["hf", "megatron", "nemo"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

HF_FILES: Final = "hf"
NEMO_WEIGHTS: Final = "weights"
NEMO_CONTEXT: Final = "context"
NEMO_TOKENIZER: Final = "nemo_tokenizer"
NEMO_MODEL_FILE: Final = "model.yaml"


@dataclass(frozen=True)
class Checkpoint:
    """Weights with what belongs to them.

    Attributes:
        kind: what they are kept in.
        source: the weights and the architecture.
        tokenizer: the directory of the tokenizer's files.
    """

    kind: Kind
    source: RowSource
    tokenizer: Path


def recognise(path: Path) -> Kind:
    """What a directory holds, by the names of its files.

    Raises:
        UserError: none of the three, or no directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path} is no directory",
            rule="a checkpoint is a directory of Hugging Face, of Megatron (torch_dist) or of NeMo 2.0",
            remedy=f"{model_remedy(path)}; an archive (.nemo) is unpacked first",
        )
    if (path / NEMO_WEIGHTS / FORMAT_FILE).is_file():
        return "nemo"
    if (path / FORMAT_FILE).is_file():
        return "megatron"
    if (path / CONFIG_FILE).is_file():
        return "hf"
    found = sorted(entry.name for entry in path.iterdir())[:5]
    raise UserError(
        f"{path} is no checkpoint that is understood here; it holds {found or 'nothing'}",
        rule=f"Hugging Face: {CONFIG_FILE}; Megatron: {FORMAT_FILE}; NeMo 2.0: {NEMO_WEIGHTS}/{FORMAT_FILE}",
        remedy=f"{model_remedy(path)}; an older checkpoint (mp_rank_00) is saved anew as torch_dist",
    )


def open_checkpoint(path: Path, hf: Path | None = None) -> Checkpoint:
    """Open weights of any kind, after checking that all tensors are there in the right shapes.

    Args:
        path: the checkpoint.
        hf: where config.json and tokenizer come from when the checkpoint does not carry them.

    Raises:
        UserError: none of the three kinds, damaged, or without the files that say which model it is.
    """
    path = Path(path)
    kind = recognise(path)
    if kind == "hf":
        return Checkpoint(kind, HFDirectory(path), path)
    if kind == "megatron":
        files = hf if hf is not None else path / HF_FILES
        if not (files / CONFIG_FILE).is_file():
            raise _no_model(f"{path} has no {HF_FILES}/{CONFIG_FILE}")
        return Checkpoint(kind, DistCheckpoint(path, Architecture.from_directory(files)), files)
    context = path / NEMO_CONTEXT
    architecture = (
        Architecture.from_directory(hf) if hf is not None else _nemo_architecture(context / NEMO_MODEL_FILE)
    )
    tokenizer = hf if hf is not None else context / NEMO_TOKENIZER
    return Checkpoint(kind, DistCheckpoint(path / NEMO_WEIGHTS, architecture), tokenizer)


def write_hf(target: Path, checkpoint: Checkpoint, origin: Origin | None = None) -> None:
    """Write a Hugging Face directory, whole or not at all.

    Args:
        target: where to; must not exist or be empty.
        checkpoint: weights and tokenizer.
        origin: how the model was made; None: as the tokenizer's directory says.

    Raises:
        UserError: the target is in the way, the disk is full, or the checkpoint is damaged or has no tokenizer.
    """
    copy_hf_directory(target, checkpoint.source, tokenizer_from=checkpoint.tokenizer, origin=origin)


def write_megatron(target: Path, checkpoint: Checkpoint, layout: ParallelConfig) -> None:
    """Write a Megatron distributed checkpoint of a layout, whole or not at all.

    Raises:
        UserError: as ``write_hf``, or the layout cannot hold the model.
    """
    with atomic_directory(target) as directory:
        files = directory / HF_FILES
        files.mkdir()
        write_model_files(files, checkpoint.source.architecture, checkpoint.tokenizer, None)
        write_dist_checkpoint(directory, checkpoint.source, layout)


def _nemo_architecture(file: Path) -> Architecture:
    """The architecture in the settings that NeMo saves, read as plain data: nothing that they name is called."""
    try:
        fields: dict[str, Any] = dict(yaml.safe_load(file.read_text("utf-8"))["config"]["architecture"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise _no_model(f"{file} does not describe a model of this project ({error!r})") from error
    fields.pop("_target_", None)
    return Architecture.from_preset(fields)


def _no_model(found: str) -> UserError:
    return UserError(
        found,
        rule="weights need the config.json and the tokenizer of their model",
        remedy="give the Hugging Face directory of the model with --hf",
    )
