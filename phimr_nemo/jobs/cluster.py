"""The command `phimr launch`: a stage as a Slurm job through NeMo-Run's SlurmExecutor, for those who prefer Python.

The job is in substance the one of slurm/<stage>.sh: one task a node, :mod:`phimr_nemo.jobs.node` in it, back in the
queue after a preemption, one run of a name at a time. The cluster's settings come from conf/cluster/*.yaml.
"""

from __future__ import annotations

import inspect
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml

from phimr_nemo.config import STAGES, ParallelConfig, find_config, load_config, locate
from phimr_nemo.errors import EXIT_USER, UserError

EXAMPLE: Final = "conf/cluster/example.yaml"
LAUNCHED: Final = tuple(stage for stage in STAGES if stage != "base")
SIGNAL: Final = "USR1@120"
"""To the tasks, 120 s before the time limit: NeMo-Run's script would die of a signal of its own."""
LAST_NODE_SECONDS: Final = 60
"""As in slurm/common.sh: how long the other nodes may go on when the first has ended."""
MAX_RESTARTS: Final = 100
RENDEZVOUS_PORT: Final = "$((20000 + SLURM_JOB_ID % 10000))"
# NeMo-Run requeues a job that failed for any reason; a user's mistake would be made again.
SETUP_LINES: Final = (
    'scontrol() { [ "$1" = requeue ] && [ "${exitcode:-0}" = ' + str(EXIT_USER) + ' ] || command scontrol "$@"; }'
)


def read_cluster(path: Path) -> dict[str, Any]:
    """The arguments of NeMo-Run's SlurmExecutor in a file of conf/cluster.

    Raises:
        UserError: the file cannot be read, or a key is no argument of the executor.
    """
    import nemo_run as run

    try:
        values = yaml.safe_load(find_config(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"--cluster {path}: {error}", rule="a YAML file", remedy=f"copy and adapt {locate(EXAMPLE)}"
        ) from error
    known = set(inspect.signature(run.SlurmExecutor).parameters)
    unknown = sorted(set(values) - known) if isinstance(values, dict) else [str(values)]
    if unknown:
        raise UserError(
            f"{path}: {', '.join(map(str, unknown))}",
            rule="keys are the arguments of nemo_run.SlurmExecutor",
            remedy=f"see {locate(EXAMPLE)}",
        )
    return dict(values)


def check_layout(stage: str, config: Any, nodes: int, processes: int) -> None:
    """The allocation holds one process a rank.

    Raises:
        UserError: it holds more or fewer.
    """
    parallel: ParallelConfig | None = getattr(config, "parallel", None)
    if parallel is not None and parallel.world_size != nodes * processes:
        raise UserError(
            f"{stage}: {nodes} nodes with {processes} processes each, for a layout of {parallel.world_size}",
            rule="nodes x gpus_per_node = tensor x pipeline x context x data",
            remedy=f"set nodes in the cluster's file, or parallel.data, so that both are {parallel.world_size}",
        )


def stage_command(
    stage: str, config_file: Path, overrides: Sequence[str], *, python: str, nodes: int, processes: int | None
) -> list[str]:
    """What each node runs, as words of a shell: values are quoted, the job's own facts are not.

    Args:
        stage: a key of `STAGES`.
        config_file: its preset.
        overrides: `key=value` items; any character may be in them.
        python: the interpreter on the nodes.
        nodes: of the job.
        processes: a node; None = the stage is one process without torchrun.
    """
    arguments = ["--config", str(config_file), *overrides]
    if processes is None:
        return [shlex.quote(word) for word in (python, "-m", "phimr_nemo.cli", stage, *arguments)]
    recipe = ["-m", f"recipes.{stage}", *arguments]
    torchrun = [python, "-m", "phimr_nemo.jobs.node", "--nnodes", str(nodes), "--nproc-per-node", str(processes)]
    meeting = [
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f'"$head_node_ip":{RENDEZVOUS_PORT}'),
        *("--rdzv-id", '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"', "--max-restarts", "0"),
    ]
    return [*map(shlex.quote, torchrun), *meeting, *map(shlex.quote, recipe)]


def slurm_executor(cluster: Mapping[str, Any], source_tree: Path, jobs: Path) -> Any:
    """NeMo-Run's executor with what every job of this project has; a run of a name waits for the one before it."""
    import nemo_run as run

    values = {"signal": SIGNAL, "open_mode": "append", "job_name_prefix": "phimr-", **cluster}
    place = "--container-workdir" if values.get("container_image") else "--chdir"
    # A repeated option of srun replaces the one that NeMo-Run gives.
    values["srun_args"] = [
        *("--kill-on-bad-exit=0", f"--wait={LAST_NODE_SECONDS}", f"{place}={shlex.quote(str(source_tree))}"),
        *values.get("srun_args", ()),
    ]
    array = {} if values.get("array") else {"dependency": "singleton"}
    values["additional_parameters"] = {"requeue": True, **array, **(values.get("additional_parameters") or {})}
    values["setup_lines"] = "\n".join(filter(None, (values.get("setup_lines"), SETUP_LINES)))
    if values.get("container_image"):
        values["container_mounts"] = [f"{source_tree}:{source_tree}", *values.get("container_mounts", ())]
    executor = run.SlurmExecutor(**values, packager=run.Packager(), tunnel=run.LocalTunnel(job_dir=str(jobs)))
    executor.retries = MAX_RESTARTS
    return executor


def sbatch_script(task: Any, executor: Any, stage: str) -> str:
    """The script that NeMo-Run would submit, made in a directory that is gone afterwards."""
    import nemo_run as run
    from nemo_run.config import get_nemorun_home, set_nemorun_home

    before = get_nemorun_home()
    with tempfile.TemporaryDirectory() as home:
        set_nemorun_home(home)
        try:
            with run.Experiment(f"phimr-{stage}", executor=executor, log_level="ERROR") as experiment:
                experiment.add(task, executor=executor, name=stage)
                experiment.dryrun(log=False, delete_exp_dir=False)
        finally:
            set_nemorun_home(before)
        script = next(Path(home).rglob(f"{stage}_sbatch.sh"))
        return script.read_text("utf-8")


def launch(
    stage: Annotated[str, typer.Argument(help="The stage.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of config values.")
    ] = None,
    cluster: Annotated[Path, typer.Option(help="Arguments of NeMo-Run's SlurmExecutor.")] = Path(EXAMPLE),
    config: Annotated[Path | None, typer.Option(help="YAML file; default conf/<stage>/paper.yaml.")] = None,
    python: Annotated[
        str | None, typer.Option(help="On the nodes; default this one, in a container python3.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch script, submit nothing.")] = False,
) -> None:
    """Submit a stage as a Slurm job through NeMo-Run; slurm/<stage>.sh does the same through sbatch."""
    if stage not in LAUNCHED:
        raise UserError(f"phimr launch {stage}", rule=f"one of {', '.join(LAUNCHED)}", remedy="see phimr --help")
    path = config if config is not None else Path("conf") / stage / "paper.yaml"
    resolved: Any = load_config(STAGES[stage], path, overrides or [])
    values = read_cluster(cluster)
    is_distributed = hasattr(resolved, "parallel")
    nodes = int(values.get("nodes", 1))
    processes = int(values.get("torchrun_nproc_per_node") or values.get("gpus_per_node") or 1)
    check_layout(stage, resolved, nodes, processes)
    if not is_distributed:
        values["nodes"] = 1
    interpreter = python or ("python3" if values.get("container_image") else sys.executable)
    words = stage_command(
        stage,
        path,
        overrides or [],
        python=interpreter,
        nodes=nodes,
        processes=processes if is_distributed else None,
    )
    import nemo_run as run
    from nemo_run.config import get_nemorun_home

    jobs = Path(os.environ.get("NEMORUN_HOME", get_nemorun_home())) / "jobs"
    executor = slurm_executor(values, Path.cwd(), jobs)
    task = run.Script(path=words[1], entrypoint=words[0], args=words[2:])
    if dry_run:
        typer.echo(sbatch_script(task, executor, stage))
        return
    with run.Experiment(f"phimr-{stage}", executor=executor) as experiment:
        experiment.add(task, executor=executor, name=stage)
        experiment.run(detach=True)
