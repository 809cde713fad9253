"""The stage `generate`: problems and a teacher -> rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config import (
    FileProblems,
    GenerateConfig,
    ModelTeacher,
    Problems,
    ProgrammaticTeacher,
    RecordedTeacher,
    RecordProblems,
    to_dict,
)
from phimr_nemo.data.parallel import team_of
from phimr_nemo.data.sources.problems import load_problems
from phimr_nemo.data.sources.recorded import load_recorded_rollouts
from phimr_nemo.data.synthetic.problems import generate_problems
from phimr_nemo.data.synthetic.teacher import teacher_rollouts
from phimr_nemo.errors import UserError
from phimr_nemo.store.progress import track
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

    return _write(config, problems, solve, counts, inputs=_problem_files(config))


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
    return _write(config, rollouts, lambda part: part, counts, inputs=[teacher.path, *_problem_files(config)])


def _problem_files(config: GenerateConfig) -> list[Path]:
    if isinstance(config.problems, RecordProblems):
        return [config.problems.path, *config.problems.answered]
    return [config.problems.path] if isinstance(config.problems, FileProblems) else []


def _write(
    config: GenerateConfig,
    table: pa.Table,
    make: Callable[[pa.Table], pa.Table],
    counts: dict[str, int],
    inputs: list[Path],
) -> dict[str, Any] | None:
    """Make shards of `shard_size` rows of `table` that are not there yet and that nobody else makes."""
    directory = config.run.output
    shards = range(-(-table.num_rows // config.shard_size))
    with team_of(config.shard, directory) as team:
        free = team.free_shards(directory, shards)
        for index in track(free.one_by_one(), title="generate", unit="shard", total=len(shards)):
            part = table.slice(index * config.shard_size, config.shard_size)
            write_shard(directory, index, make(part), kind="rollouts")
    if not all(shard_is_complete(directory, index) for index in shards):
        return None
    manifest = finish(directory, kind="rollouts", config=to_dict(config), inputs=inputs, counts=counts)
    return closing_facts(manifest)


def closing_facts(manifest: Manifest) -> dict[str, Any]:
    """What a data step says when it is done: rows and counts."""
    return {"rows": manifest.rows, **manifest.counts}


def _sampled(config: GenerateConfig, teacher: ModelTeacher, problems: pa.Table) -> dict[str, Any] | None:
    from phimr_nemo.generate.engines import write_rollouts

    # The weights' hash names the teacher in every row; this is the rest of the model.
    own = () if teacher.path is None else (teacher.path / "config.json", teacher.path / "tokenizer.json")
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
        inputs=[*own, *_problem_files(config)],
    )
    return closing_facts(read_manifest(config.run.output, "rollouts")) if complete else None
