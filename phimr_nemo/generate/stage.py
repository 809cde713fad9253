"""The stage `generate`: problems and a teacher -> rollouts."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import (
    FileProblems,
    GenerateConfig,
    ModelTeacher,
    Problems,
    ProgrammaticTeacher,
    RecordedTeacher,
    RecordProblems,
)
from phimr_nemo.data.parallel import team_of
from phimr_nemo.data.sources.problems import load_problems
from phimr_nemo.data.sources.recorded import load_recorded_rollouts
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.errors import UserError
from phimr_nemo.store.check import open_for
from phimr_nemo.store.content import content_id
from phimr_nemo.store.progress import track
from phimr_nemo.store.provenance import MadeFrom, content_of
from phimr_nemo.store.shards import (
    Manifest,
    finish,
    iter_shards,
    read_manifest,
    read_table,
    shard_is_complete,
    write_shard,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

WITHOUT_ANSWER: Final = "problems without an answer, passed over"


def run_generate(config: GenerateConfig) -> dict[str, Any] | None:
    """Write the shards that this process is to make, and the manifest once all shards are there.

    Returns:
        Rows and counts, or None when other processes still have shards to write.

    Raises:
        UserError: bad input, or no rollout is left.
    """
    if isinstance(config.teacher, RecordedTeacher):
        return _recorded(config, config.teacher)
    assert config.problems is not None, "the configuration has problems for a teacher that brings none"
    problems, counts = read_configured_problems(config.problems, config.run.seed)
    if isinstance(config.teacher, ModelTeacher):
        return _sampled(config, config.teacher, problems)
    teacher: ProgrammaticTeacher = config.teacher

    def solve(part: pa.Table) -> pa.Table:
        return teacher_rollouts(
            part, config.rollouts_per_problem, config.run.seed, teacher.mistake_rate, teacher.style
        )

    deciding = {
        "rollouts_per_problem": config.rollouts_per_problem,
        "seed": config.run.seed,
        "mistake_rate": teacher.mistake_rate,
        "style": teacher.style,
    }
    return _write(config, problems, solve, counts, deciding, inputs=_problem_files(config))


def read_configured_problems(problems: Problems, seed: int) -> tuple[pa.Table, dict[str, int]]:
    """The problems that a config names, and counts of what was read and dropped.

    Raises:
        UserError: the file is missing, empty or malformed, or the record directory is not finished.
    """
    import pyarrow.compute as pc

    if isinstance(problems, RecordProblems):
        table = read_table(problems.path, "problems")
        answered = table.filter(pc.not_equal(table.column("answer"), ""))
        without = table.num_rows - answered.num_rows
        table, counts = _unanswered(answered, problems)
        table = table.slice(0, problems.limit or None)
        return table, {"read": table.num_rows, **({WITHOUT_ANSWER: without} if without else {}), **counts}
    if isinstance(problems, FileProblems):
        return load_problems(
            problems.path,
            question=problems.question,
            answer=problems.answer,
            solution=problems.solution,
            limit=problems.limit,
        )
    return generate_problems(seed, problems.count, problems.split), {"read": problems.count}


def _unanswered(table: pa.Table, problems: RecordProblems) -> tuple[pa.Table, dict[str, int]]:
    """The problems that have no response yet, and how many have.

    Raises:
        UserError: a directory of rollouts is not finished, or every problem has a response.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not problems.answered:
        return table, {}
    known: set[str] = set()
    for directory in problems.answered:
        for shard in iter_shards(directory, "rollouts", ["problem_id"]):
            known.update(shard.column("problem_id").to_pylist())
    has_one = pc.is_in(table.column("id"), value_set=pa.array(sorted(known), pa.string()))
    left = table.filter(pc.invert(has_one))
    if not left.num_rows:
        raise UserError(
            f"every problem of {problems.path} has a response in {[str(path) for path in problems.answered]}",
            rule="a teacher is asked about problems that have no response yet",
            remedy="verify those responses; or set problems.answered=[] to sample more",
        )
    return left, {"problems with a response": table.num_rows - left.num_rows}


def _recorded(config: GenerateConfig, teacher: RecordedTeacher) -> dict[str, Any] | None:
    import pyarrow.compute as pc

    rollouts, counts = load_recorded_rollouts(
        teacher.path,
        question=teacher.question,
        answer=teacher.answer,
        response=teacher.response,
        limit=teacher.limit,
    )
    if config.problems is not None:
        wanted, _ = read_configured_problems(config.problems, config.run.seed)
        kept = rollouts.filter(
            pc.is_in(rollouts.column("problem_id"), value_set=wanted.column("id").combine_chunks())
        )
        counts = {**counts, "of other problems": rollouts.num_rows - kept.num_rows}
        rollouts = kept
    if rollouts.num_rows == 0:
        raise UserError(
            f"{teacher.path} holds no response to the given problems ({counts})",
            rule="a recorded response belongs to a problem with the same question and answer",
            remedy="problems=null uses every recorded question; or correct the columns",
        )
    inputs = {"teacher.path": content_of(teacher.path), **_problem_files(config)}
    return _write(config, rollouts, lambda part: part, counts, {}, inputs=inputs)


def _problem_files(config: GenerateConfig) -> dict[str, str]:
    """The content of the files and record directories that the problems come from."""
    if isinstance(config.problems, FileProblems):
        return {"problems.path": content_of(config.problems.path)}
    if isinstance(config.problems, RecordProblems):
        answered = {f"problems.answered.{n}": content_of(path) for n, path in enumerate(config.problems.answered)}
        return {"problems.path": content_of(config.problems.path), **answered}
    return {}


def _rows_content(part: pa.Table) -> str:
    return content_id("rows", *(json.dumps(row, sort_keys=True) for row in part.to_pylist()))


def _write(
    config: GenerateConfig,
    table: pa.Table,
    make: Callable[[pa.Table], pa.Table],
    counts: dict[str, int],
    deciding: dict[str, Any],
    inputs: dict[str, str],
) -> dict[str, Any] | None:
    """Make shards of `shard_size` rows of `table` that are not there, or of other rows, and that nobody else makes.

    Args:
        config: of the stage.
        table: what the shards are made of.
        make: rows of `table` -> rollouts.
        counts: for the manifest.
        deciding: the settings of `make`.
        inputs: what the table was read from.
    """
    directory = config.run.output
    shards = range(-(-table.num_rows // config.shard_size))
    whole = MadeFrom(inputs, {**deciding, "rows": table.num_rows, "shard_size": config.shard_size})
    open_for(directory, whole, len(shards))

    def part(index: int) -> pa.Table:
        return table.slice(index * config.shard_size, config.shard_size)

    @cache
    def made_from(index: int) -> MadeFrom:
        return MadeFrom({"rows": _rows_content(part(index))}, deciding)

    with team_of(config.shard, directory) as team:
        free = team.free_shards(directory, shards, made_from)
        for index in track(free.one_by_one(), title="generate", unit="shard", total=len(shards)):
            write_shard(directory, index, make(part(index)), kind="rollouts", made_from=made_from(index))
    if not all(shard_is_complete(directory, index, made_from(index)) for index in shards):
        return None
    return closing_facts(finish(directory, kind="rollouts", **whole.to_json(), counts=counts))


def closing_facts(manifest: Manifest) -> dict[str, Any]:
    """What a data step says when it is done: rows and counts."""
    return {"rows": manifest.rows, **manifest.counts}


def _sampled(config: GenerateConfig, teacher: ModelTeacher, problems: pa.Table) -> dict[str, Any] | None:
    from phimr_nemo.generate.engines import write_rollouts

    # The weights' hash names the teacher in every row; template and end tokens decide as well.
    own = {} if teacher.path is None else {"teacher.path": content_of(teacher.path)}
    complete = write_rollouts(
        teacher.engine,
        teacher.path,
        teacher,
        problems,
        config.run.output,
        longrope=teacher.longrope,
        samples=config.rollouts_per_problem,
        shard_size=config.shard_size,
        seed=config.run.seed,
        shard=config.shard,
        inputs={**own, **_problem_files(config)},
    )
    return closing_facts(read_manifest(config.run.output, "rollouts")) if complete else None
