"""What a rank does in the lane's tests of the stages, with or without Transformer Engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from align_worker import run_case
from supervised_worker import train, train_and_stop

__all__ = ["learnt", "run_case", "run_case_with_half_a_gradient", "train", "train_and_stop"]


def learnt(checkpoint: str, base: str, target: str) -> dict[str, torch.Tensor]:
    """A native checkpoint's weights under their Hugging Face names, by way of a directory that is written for it."""
    from phimr_nemo.model.files.checkpoints import open_checkpoint, write_hf
    from phimr_nemo.model.files.hf import HFDirectory

    write_hf(Path(target), open_checkpoint(Path(checkpoint), Path(base)))
    written = HFDirectory(Path(target))
    return {name: written.read(name) for name in written.names()}


def run_case_with_half_a_gradient(case: Any) -> None:
    """Run a stage whose products for weights' gradients give half of them."""
    import te_kernels

    right = te_kernels.generic_gemm

    def half(a: Any, transa: bool, b: Any, transb: bool, *rest: Any, **more: Any) -> Any:
        result = right(a, transa, b, transb, *rest, **more)
        if transb:
            result[0].mul_(0.5)
        return result

    with mock.patch.object(te_kernels, "generic_gemm", half):
        run_case(case)
