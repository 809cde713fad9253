"""What slurm/pipeline.sh asks first: `python -m phimr_nemo.jobs.chain STAGE --config FILE ... -- STAGE ...`.

Every stage's configuration is checked, in one process for all of them; a line for each says how many nodes its preset
asks for, empty where that is left to the script.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import UserError, exit_with_message
from phimr_nemo.jobs.changes import check_same_run, check_same_settings
from phimr_nemo.jobs.preflight import derived_numbers
from phimr_nemo.store.runs import RunDirectory

BETWEEN: Final = "--"


def jobs_of(words: Sequence[str]) -> Iterator[list[str]]:
    """The arguments of each job, which stand between the separators."""
    rest = list(words)
    while BETWEEN in rest:
        end = rest.index(BETWEEN)
        yield rest[:end]
        rest = rest[end + 1 :]
    yield rest


def nodes_of(words: Sequence[str]) -> int | None:
    """Check one job's configuration.

    Args:
        words: `STAGE --config FILE key=value ...`, as after `phimr`.

    Returns:
        Nodes that its preset asks for, if it does.

    Raises:
        UserError: what the stage itself would refuse without its inputs; a finished one of other inputs or settings.
    """
    stage, _, file, *overrides = words
    try:
        resolved: Any = load_config(STAGES[stage], Path(file), overrides)
        derived_numbers(stage, resolved)
        run = RunDirectory(resolved.run.output)
        if run.is_done:
            check_same_run(stage, run, resolved)
        else:
            check_same_settings(run, resolved)
    except UserError as error:
        raise UserError(f"{stage}: {error.problem}", rule=error.rule, remedy=error.remedy) from error
    parallel = getattr(resolved, "parallel", None)
    return None if parallel is None else parallel.nodes


if __name__ == "__main__":
    with exit_with_message():
        for job in jobs_of(sys.argv[1:]):
            print(nodes_of(job) or "")
