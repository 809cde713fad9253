"""A step of a recipe: one command of `phimr`, whether it has changed, what its exit code says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import EXIT_USER, Preempted, UserError
from phimr_nemo.jobs.changes import NOT_RECORDED, changed_settings, changes, is_remade
from phimr_nemo.jobs.continuing import kept
from phimr_nemo.process.stopping import CONTINUE, KEPT
from phimr_nemo.store.runs import RunDirectory

PROGRAM: Final = "phimr_nemo.cli"


@dataclass(frozen=True)
class Step:
    """One command of a recipe.

    Attributes:
        name: of the step, and of its directory.
        arguments: of `phimr`.
        output: its run directory.
        program: the module that is run with them, and what it takes before them; () = `phimr` itself.
        processes: that it runs as, by its arguments.
    """

    name: str
    arguments: tuple[str, ...]
    output: Path
    program: tuple[str, ...] = ()
    processes: int = 1

    def __str__(self) -> str:
        return shlex.join((*(("python", "-m", *self.program) if self.program else ("phimr",)), *self.arguments))

    @property
    def invocation(self) -> tuple[str, tuple[str, ...]]:
        """The module to run, and its arguments."""
        module, *before = self.program or (PROGRAM,)
        return module, (*before, *self.arguments)

    def reads(self, other: Step) -> bool:
        """Whether one of its arguments names something in another's output."""
        there = re.compile(rf"(?<![^=\[{{,:\s]){re.escape(str(other.output))}(?![^/\]}},\s])")
        return self.output != other.output and any(there.search(argument) for argument in self.arguments)


def changed_since(step: Step) -> list[str]:
    """What is different from when a step was begun, in words; nothing where it can be kept or continued.

    Raises:
        UserError: the step's configuration is bad, or its run is damaged.
    """
    stage, _, preset, *overrides = step.arguments
    config: Any = load_config(STAGES[stage], Path(preset), overrides)
    run = RunDirectory(step.output)
    if not run.is_done and is_remade(config):
        return changed_settings(run, config)
    return changes(run, config)


def refuse_changed(steps: Sequence[Step]) -> None:
    """Name every step that is not what its command would make now.

    Raises:
        UserError: there is one.
    """
    found = [(step.output, changed) for step in steps if (changed := changed_since(step))]
    if found:
        lines = [f"{output}: {'; '.join(changed)}" for output, changed in found if changed != [NOT_RECORDED]]
        unknown = [str(output) for output, changed in found if changed == [NOT_RECORDED]]
        if unknown:
            lines.append(f"{NOT_RECORDED}, so it cannot be compared: {', '.join(unknown)}")
        named = "".join(f"\n    {line}" for line in lines)
        raise UserError(
            f"steps that are not, for all that is known, what their commands would make now:{named}",
            rule="a recipe goes on from steps that are what its commands would make",
            remedy="for a quickstart add --redo, which makes them and what follows from them again, or give another "
            "--out; or remove these directories, or choose another output",
        )


def interrupted(steps: Sequence[Step]) -> Preempted:
    """What is said of steps that were told to stop."""
    names = ", ".join(step.name for step in steps)
    return Preempted(f"stopped in {names}; {CONTINUE}" + "".join(f"{KEPT}{kept(step.output)}" for step in steps))


def failure(step: Step, code: int) -> Exception:
    """What is said of a step by its exit code."""
    if code == EXIT_USER:
        return UserError(
            f"the step {step.name!r} refused its input, see above",
            rule="every step of a recipe finishes",
            remedy=f"correct the named value; the command was: {step}",
        )
    return RuntimeError(f"the step {step.name!r} failed with exit code {code}, see above: {step}")
