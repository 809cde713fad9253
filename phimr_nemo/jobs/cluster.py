"""The command `phimr launch`: a stage as a Slurm job through NeMo-Run's SlurmExecutor, for those who prefer Python.

The job is in substance the one of slurm/<stage>.sh: its directives, the settings of slurm/site.env, one task a node,
:mod:`phimr_nemo.jobs.node` in it, back in the queue after a preemption, one run of a name at a time.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from phimr_nemo.config import STAGES, ParallelConfig, load_config
from phimr_nemo.errors import EXIT_USER, UserError
from phimr_nemo.process.stopping import stoppable
from phimr_nemo.text.printable import say

LAUNCHED: Final = tuple(stage for stage in STAGES if stage != "base")
SCRIPTS: Final = Path("slurm")
SITE: Final = SCRIPTS / "site.env"
DIRECTIVE: Final = "#SBATCH --"
SIGNAL: Final = "USR1@120"
"""To the tasks, 120 s before the time limit: NeMo-Run's script would die of a signal of its own."""
LAST_NODE_SECONDS: Final = 60
"""As in slurm/common.sh: how long the other nodes may go on when the first has ended."""
MAX_RESTARTS: Final = 100
RENDEZVOUS_PORT: Final = "$((20000 + SLURM_JOB_ID % 10000))"
NUMBERS: Final = ("nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task")
OWN_ARGUMENTS: Final = (*NUMBERS, "account", "partition", "time", "mem", "exclusive", "open_mode", "array")
"""Options of sbatch that NeMo-Run's executor has as arguments of the same name."""
REPLACED: Final = ("job_name", "output", "signal")
"""Options that NeMo-Run writes itself, or that its script needs otherwise."""
# NeMo-Run requeues a job that failed for any reason; a user's mistake would be made again.
SETUP_LINES: Final = (
    'scontrol() { [ "$1" = requeue ] && [ "${exitcode:-0}" = ' + str(EXIT_USER) + ' ] || command scontrol "$@"; }'
)
SITE_VARIABLES: Final = (
    "SBATCH_ACCOUNT",
    "SBATCH_PARTITION",
    "PHIMR_CONTAINER_RUNTIME",
    "PHIMR_CONTAINER_IMAGE",
    "PHIMR_CONTAINER_MOUNTS",
    "PHIMR_PYTHON",
    "PHIMR_PROCS_PER_NODE",
    "PHIMR_SERVER_NODES",
    "PHIMR_COLOCATED",
)
"""Those that shape a job before it runs; the job itself sources the file, as the scripts do."""
# The file is a program of the site's own: bash says what it comes to.
READ_SITE: Final = """
set -euo pipefail
SBATCH_OPTIONS=()
if [[ -n $1 ]]; then source "$1" >/dev/null; fi
declare -n own=SBATCH_OPTIONS_$2
for name in "${@:3}"; do printf '%s\\0' "${!name:-}"; done
printf '%s\\0' "${SBATCH_OPTIONS[@]}" "${own[@]}"
"""


@dataclass(frozen=True)
class Site:
    """What slurm/site.env says about a stage's job.

    Attributes:
        variables: `SITE_VARIABLES` that are set.
        options: of sbatch, as name -> value; True for a flag.
        file: the file, absolute; None where there is none.
    """

    variables: Mapping[str, str]
    options: Mapping[str, str | bool]
    file: Path | None


def read_site(path: Path, stage: str) -> Site:
    """The settings of a site, as its jobs and slurm/pipeline.sh read them.

    Args:
        path: a copy of slurm/site.env.example; a site may have none.
        stage: whose options are taken beside those of every stage.

    Raises:
        UserError: bash cannot read it, or an option of sbatch is not in its long form.
    """
    file = path.resolve() if path.is_file() else None
    if file is None and path != SITE:
        raise UserError(
            f"--site {path} does not exist", rule="a file of settings", remedy=f"cp {SITE}.example {path}"
        )
    words = ["bash", "-c", READ_SITE, "site", str(file or ""), stage, *SITE_VARIABLES]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"{path}: {done.stderr.strip()}", rule="bash can read it", remedy=f"compare with {SITE}.example"
        )
    values = done.stdout.split("\0")[:-1]
    named = dict(zip(SITE_VARIABLES, values, strict=False))
    # Without options printf writes one empty word.
    options = _options([word for word in values[len(SITE_VARIABLES) :] if word], f"SBATCH_OPTIONS in {path}")
    return Site({name: value for name, value in named.items() if value}, options, file)


def read_directives(stage: str) -> dict[str, str | bool]:
    """The `#SBATCH` lines of a stage's script, as name -> value.

    Raises:
        UserError: the script is not there.
    """
    script = SCRIPTS / f"{stage}.sh"
    if not script.is_file():
        raise UserError(
            f"{script} does not exist",
            rule="a job is started from the source tree, which its nodes see",
            remedy="cd to a clone of the repository",
        )
    lines = script.read_text("utf-8").splitlines()
    return _options([line.removeprefix("#SBATCH ") for line in lines if line.startswith(DIRECTIVE)], str(script))


def _options(words: Sequence[str], where: str) -> dict[str, str | bool]:
    found: dict[str, str | bool] = {}
    for word in words:
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise UserError(f"{word!r} in {where}", rule="long options: --name or --name=value", remedy="write it so")
        found[name.replace("-", "_")] = value if given else True
    return found


def check_layout(stage: str, config: Any, nodes: int, processes: int) -> None:
    """The allocation holds one process a rank.

    Raises:
        UserError: it holds more or fewer.
    """
    parallel: ParallelConfig | None = getattr(config, "parallel", None)
    if parallel is None or parallel.world_size == nodes * processes:
        return
    ways = [f"parallel.data so that the product is {nodes * processes}"]
    needed, rest = divmod(parallel.world_size, processes)
    if not needed:
        ways.insert(0, f"sbatch --nodes=1 --gpus-per-node={parallel.world_size} slurm/{stage}.sh")
    elif not rest:
        ways.insert(0, f"sbatch --nodes={needed} slurm/{stage}.sh, for phimr launch parallel.nodes={needed}")
    raise UserError(
        f"{stage}: {nodes} nodes with {processes} processes each, for a layout of {parallel.world_size}",
        rule="nodes x processes on each = tensor x pipeline x context x data",
        remedy="; or ".join(ways),
    )


def parse_allocation(text: str) -> tuple[int, int]:
    """Nodes and processes on each, of "16x8".

    Raises:
        UserError: it is not of this form.
    """
    nodes, found, processes = text.partition("x")
    if not (found and nodes.isdigit() and processes.isdigit() and int(nodes) and int(processes)):
        raise UserError(f"--allocation {text!r}", rule="NODESxPROCESSES", remedy="for example --allocation 16x8")
    return int(nodes), int(processes)


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
    command = ["-m", "phimr_nemo.cli", stage, *arguments]
    torchrun = [python, "-m", "phimr_nemo.jobs.node", "--nnodes", str(nodes), "--nproc-per-node", str(processes)]
    meeting = [
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f'"$head_node_ip":{RENDEZVOUS_PORT}'),
        *("--rdzv-id", '"$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"', "--max-restarts", "0"),
    ]
    return [*map(shlex.quote, torchrun), *meeting, *map(shlex.quote, command)]


def slurm_executor(cluster: Mapping[str, Any], source_tree: Path, jobs: Path) -> Any:
    """NeMo-Run's executor with what every job of this project has; a run of a name waits for the one before it."""
    import nemo_run as run

    values = {"signal": SIGNAL, "job_name_prefix": "phimr-", **cluster}
    place = "--container-workdir" if values.get("container_image") else "--chdir"
    # A repeated option of srun replaces the one that NeMo-Run gives.
    values["srun_args"] = [
        *("--kill-on-bad-exit=0", f"--wait={LAST_NODE_SECONDS}", f"{place}={shlex.quote(str(source_tree))}"),
    ]
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


def job_settings(stage: str, config: Any, site: Site, source_tree: Path) -> dict[str, Any]:
    """The arguments of NeMo-Run's SlurmExecutor: the script's directives, then the preset's nodes, then the site's.

    Raises:
        UserError: the site wants what only the sbatch scripts do.
    """
    runtime = site.variables.get("PHIMR_CONTAINER_RUNTIME", "none")
    servers = {name: site.variables.get(name, "0") for name in ("PHIMR_SERVER_NODES", "PHIMR_COLOCATED")}
    if runtime not in ("none", "pyxis") or set(servers.values()) != {"0"}:
        raise UserError(
            " ".join(f"{name}={value}" for name, value in {"PHIMR_CONTAINER_RUNTIME": runtime, **servers}.items()),
            rule="NeMo-Run starts bare processes or pyxis containers, and no rollout servers",
            remedy=f"sbatch slurm/{stage}.sh",
        )
    options = {name: value for name, value in read_directives(stage).items() if name not in REPLACED}
    parallel: ParallelConfig | None = getattr(config, "parallel", None)
    if parallel is not None and parallel.nodes is not None:
        options["nodes"] = str(parallel.nodes)
    for variable in ("SBATCH_ACCOUNT", "SBATCH_PARTITION"):
        if variable in site.variables:
            options[variable.removeprefix("SBATCH_").lower()] = site.variables[variable]
    options |= site.options
    settings: dict[str, Any] = {"account": None}
    for name in OWN_ARGUMENTS:
        if name in options:
            value = options.pop(name)
            settings[name] = int(value) if name in NUMBERS else value
    settings["additional_parameters"] = options
    if runtime == "pyxis":
        mounts = site.variables.get("PHIMR_CONTAINER_MOUNTS", "")
        settings["container_image"] = site.variables.get("PHIMR_CONTAINER_IMAGE")
        settings["container_mounts"] = [f"{source_tree}:{source_tree}", *filter(None, mounts.split(","))]
    sourced = f"source {shlex.quote(str(site.file))}" if site.file else None
    settings["setup_lines"] = "\n".join(filter(None, (sourced, SETUP_LINES)))
    return settings


def launch(
    stage: Annotated[str, typer.Argument(help="The stage.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of config values.")
    ] = None,
    site: Annotated[Path, typer.Option(help="The site's settings, the same as of the sbatch scripts.")] = SITE,
    config: Annotated[Path | None, typer.Option(help="YAML file; default conf/<stage>/paper.yaml.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch script, submit nothing.")] = False,
) -> None:
    """Submit a stage as a Slurm job through NeMo-Run; slurm/<stage>.sh does the same through sbatch."""
    if stage not in LAUNCHED:
        raise UserError(f"phimr launch {stage}", rule=f"one of {', '.join(LAUNCHED)}", remedy="see phimr --help")
    path = config if config is not None else Path("conf") / stage / "paper.yaml"
    resolved: Any = load_config(STAGES[stage], path, overrides or [])
    facts = read_site(site, stage)
    settings = job_settings(stage, resolved, facts, Path.cwd())
    is_distributed = hasattr(resolved, "parallel")
    processes = int(facts.variables.get("PHIMR_PROCS_PER_NODE") or settings.get("gpus_per_node") or 1)
    check_layout(stage, resolved, settings["nodes"], processes)
    interpreter = "python3" if settings.get("container_image") else sys.executable
    words = stage_command(
        stage,
        path,
        overrides or [],
        python=facts.variables.get("PHIMR_PYTHON", interpreter),
        nodes=settings["nodes"],
        processes=processes if is_distributed else None,
    )
    import nemo_run as run
    from nemo_run.config import get_nemorun_home

    jobs = Path(os.environ.get("NEMORUN_HOME", get_nemorun_home())) / "jobs"
    executor = slurm_executor(settings, Path.cwd(), jobs)
    task = run.Script(path=words[1], entrypoint=words[0], args=words[2:])
    if dry_run:
        say(sbatch_script(task, executor, stage))
        return
    with (
        stoppable(f"the submission of {stage}", lambda: "the job, if squeue shows it; else nothing"),
        run.Experiment(f"phimr-{stage}", executor=executor) as experiment,
    ):
        experiment.add(task, executor=executor, name=stage)
        experiment.run(detach=True)
