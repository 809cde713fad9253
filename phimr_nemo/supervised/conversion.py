"""`phimr convert`: weights from one of the three kinds of checkpoint into another, in bounded memory."""

from __future__ import annotations

from pathlib import Path

from phimr_nemo.config import ParallelConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.files.checkpoints import KINDS, Kind, open_checkpoint, write_hf, write_megatron
from phimr_nemo.model.layout import check_layout


def convert(source: Path, target: Path, *, kind: str | None, layout: ParallelConfig, hf: Path | None) -> Kind:
    """Write the weights in `source` to `target`, whole or not at all.

    Args:
        source: a checkpoint of any kind and layout; its files tell which.
        target: where to; must not exist or be empty.
        kind: of the target: "hf", "megatron" or "nemo". None is "megatron" from Hugging Face, else "hf".
        layout: `tensor` and `pipeline` of a Megatron or NeMo target.
        hf: where config.json and tokenizer come from when the source does not carry them.

    Returns:
        The kind of the target.

    Raises:
        UserError: no checkpoint, a damaged one, an unknown kind, a target in the way, a layout that cannot hold the
            model, or a full disk.
    """
    checkpoint = open_checkpoint(source, hf)
    check_layout(checkpoint.source.architecture, layout)
    wanted = _target_kind(kind, checkpoint.kind)
    if wanted == "hf":
        write_hf(target, checkpoint)
    elif wanted == "megatron":
        write_megatron(target, checkpoint, layout)
    else:
        from phimr_nemo.training import platform
        from phimr_nemo.training.distributed import quiet_libraries

        # Before NeMo is imported, which takes seconds and is needed for its settings only.
        platform.prepare()
        from phimr_nemo.supervised.nemo_model import write_nemo

        quiet_libraries()
        write_nemo(target, checkpoint, layout)
    return wanted


def _target_kind(given: str | None, source: Kind) -> Kind:
    if given is None:
        return "megatron" if source == "hf" else "hf"
    for kind in KINDS:
        if given == kind:
            return kind
    raise UserError(
        f"--to {given!r}",
        rule=f"the target is one of {', '.join(KINDS)}",
        remedy="for example: phimr convert DIRECTORY CHECKPOINT --to megatron --tp 2",
    )
