"""On-policy distillation: a student learns from its teacher on what it says itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phimr_nemo.align.distill.objective import DistillObjective
from phimr_nemo.align.distill.server import ServerTeacher
from phimr_nemo.align.distill.teacher import DirectoryTeacher, Teacher
from phimr_nemo.align.distill.trainer import DistillTrainer
from phimr_nemo.align.grpo.log import RoundsLog
from phimr_nemo.align.grpo.stage import Learning, layout_of, run_rounds
from phimr_nemo.align.lifecycle import shared_hash
from phimr_nemo.config import DistillConfig
from phimr_nemo.config.sampled.distill import ServerTeacher as ServerTeacherConfig
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.vocabulary import check_same_tokenizer
from phimr_nemo.training.plots import plot_rounds


class DistillLog(RoundsLog):
    """The log whose picture is `distill.png`."""

    def _plot(self, directory: Path, collapses: Mapping[str, int]) -> None:
        plot_rounds(directory, collapses, "distill")


def open_teacher(config: DistillConfig) -> Teacher:
    """The configured teacher; Megatron's groups are up already (collective).

    Raises:
        UserError: its tokenizer is not the student's, or the layout cannot hold it.
    """
    if isinstance(config.teacher, ServerTeacherConfig):
        check_same_tokenizer(config.base, config.teacher.tokenizer)
        return ServerTeacher(config.teacher.endpoint)
    return DirectoryTeacher(config, config.teacher)


def run_distill(config: DistillConfig) -> dict[str, Any]:
    """Bring the base nearer to its teacher on its own responses; export `<run.output>/hf`. Called in every process.

    An unfinished run in `run.output` continues at its newest checkpoint.

    Returns:
        The closing facts.

    Raises:
        UserError: bad input, a teacher of other words, an impossible layout, or a resumed run whose inputs changed.
        Preempted: the run was told to stop and has saved its state.
    """

    def objective(base: HFDirectory) -> DistillObjective:
        return DistillObjective(config, open_teacher(config), **layout_of(config, base))

    def identity() -> dict[str, str]:
        if isinstance(config.teacher, ServerTeacherConfig):
            return {"teacher weights": f"served as {config.teacher.endpoint.model}"}
        return {"teacher weights": shared_hash(HFDirectory(config.teacher.path))}

    return run_rounds(config, Learning("distill", objective, DistillTrainer, DistillLog, identity))
