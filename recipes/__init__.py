"""The recipes: one table, and each of them as a task for any executor of NeMo-Run.

A recipe is a `run.Partial` of :func:`phimr`, the command that a user types, that Slurm's scripts and torchrun call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import nemo_run as run

COLUMNS: Final = ("stage", "in -> out", "tokens (paper)", "GPUs (`paper.yaml`)", "conf", "sbatch")


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
        number: of the paper's stage; empty beside them.
        flow: what is read and what is made.
        tokens: in the paper.
        gpus: of its default preset.
        script: in slurm/.
        preset: its default, conf/<name>/<preset>.yaml.
    """

    number: str
    flow: str
    tokens: str
    gpus: str
    script: str
    preset: str = "paper"


RECIPES: Final[Mapping[str, Recipe]] = {
    "prepare": Recipe(
        "0",
        "sources -> problems, rollouts of sources with trajectories",
        "1.6 M questions",
        "none",
        "prepare.sh",
    ),
    "generate": Recipe(
        "0", "problems -> rollouts", "10 M rollouts", "none here: the teacher's servers", "generate.sh"
    ),
    "verify": Recipe("0", "rollouts -> verdicts", "10 M answers", "none, array", "verify.sh"),
    "curate": Recipe(
        "0", "verdicts -> mid-training set, SFT subset, pairs, prompts", "30 B kept", "none", "curate.sh"
    ),
    "pack": Recipe("0", "mid-training set -> packed rows of 16 K", "30 B", "none", "pack.sh"),
    "midtrain": Recipe("1", "HF base + rows -> checkpoint 1", "150 B (30 B x 5 epochs)", "16 x 8", "midtrain.sh"),
    "sft": Recipe(
        "2", "checkpoint 1 + conversations -> checkpoint 2", "200 K samples, 20 K unpacked", "16 x 8", "sft.sh"
    ),
    "dpo": Recipe("3", "checkpoint 2 + pairs -> checkpoint 3", "300 K pairs", "4 x 8", "dpo.sh"),
    "grpo": Recipe("4", "checkpoint 3 + prompts -> checkpoint 4", "not published", "4 x 8", "grpo.sh"),
    "distill": Recipe("", "HF base + HF teacher + prompts -> checkpoint", "not in the paper", "4 x 8", "distill.sh"),
    "evaluate": Recipe("", "checkpoint -> responses, verdicts, scores", "", "1", "evaluate.sh"),
    "export": Recipe("", "checkpoint 4 -> release with model card", "", "none", "export.sh"),
    "quickstart": Recipe("", "problems -> release, tiny, on CPU", "2 M", "none", "pipeline.sh", "tiny"),
}


def phimr(arguments: list[str]) -> None:
    """Run the command `phimr` with these arguments in this process.

    Raises:
        SystemExit: with its exit code, unless that is 0.
    """
    from phimr_nemo.cli.main import app
    from phimr_nemo.errors import exit_with_message

    with exit_with_message():
        app(arguments, standalone_mode=False)


def default_preset(name: str) -> str:
    """The YAML file of a recipe when none is given."""
    return f"conf/{name}/{RECIPES[name].preset}.yaml"


def recipe(name: str, config: str | None = None, overrides: Sequence[str] = ()) -> run.Partial:
    """A recipe for any NeMo-Run executor.

    Args:
        name: a key of `RECIPES`.
        config: YAML file; None = its default.
        overrides: `key.sub=value` items.
    """
    return run.Partial(phimr, arguments=[name, "--config", config or default_preset(name), *overrides])


def table() -> str:
    """`RECIPES` as the table of README.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    for name, row in RECIPES.items():
        cells = (
            f"{row.number} {name}".strip(),
            row.flow,
            row.tokens,
            row.gpus,
            f"[conf/{name}](../conf/{name})",
            f"[{row.script}](../slurm/{row.script})",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
