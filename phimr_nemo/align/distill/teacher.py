"""The teacher: a model of its own size in the student's processes and layout, without gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from phimr_nemo.align.forward import build_part, row_log_probs, run_micro_batches
from phimr_nemo.align.microbatch import MicroBatch
from phimr_nemo.config import DistillConfig
from phimr_nemo.config.sampled.distill import DirectoryTeacher as DirectoryTeacherConfig
from phimr_nemo.losses import TeacherStates
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.vocabulary import check_same_words


class Teacher(Protocol):
    """What scores the student's tokens."""

    def log_probs(self, batch: Mapping[str, Tensor], micros: Sequence[MicroBatch], temperature: float) -> Tensor:
        """Log-probabilities of a batch's labels (collective).

        Args:
            batch: `response_tokens` and `labels` int64 [n, s].
            micros: of the batch, as the student trains on it.
            temperature: divides the logits.

        Returns:
            float32 [n, s] on the CPU, 0 where there is no label; the same on all ranks of the replica.
        """
        ...


class DirectoryTeacher:
    """This rank's part of a teacher in the student's layout.

    Args:
        config: of the stage; Megatron's groups are up already.
        teacher: its own section.

    Raises:
        UserError: the layout cannot hold the teacher, or its words are not the student's.
    """

    def __init__(self, config: DistillConfig, teacher: DirectoryTeacherConfig) -> None:
        check_same_words(config.base, teacher.path)
        model = replace(config.model, dtype=teacher.dtype or config.model.dtype, recompute="none")
        directory = HFDirectory(teacher.path)
        self._part = build_part(directory, model, config.parallel, config.sequence_length)
        self._part.eval().requires_grad_(False)

    @torch.no_grad()
    def log_probs(self, batch: Mapping[str, Tensor], micros: Sequence[MicroBatch], temperature: float) -> Tensor:
        """As :class:`Teacher` says."""
        return row_log_probs(self._part, micros, batch["labels"], temperature)

    @torch.no_grad()
    def taught(self, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The same micro-batches, on the last pipeline stage with the states of their tokens (collective)."""
        states = run_micro_batches(
            self._part,
            micros,
            lambda _, hidden: hidden.cpu(),
            forward_only=True,
            collect=True,
            options={"as_states": True},
        )
        if not states:
            return list(micros)
        weight = self._part.output_weight().detach()
        return [
            replace(micro, teacher=TeacherStates(hidden, weight, self._part.output_format))
            for micro, hidden in zip(micros, states, strict=True)
        ]
