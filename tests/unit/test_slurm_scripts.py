"""The Slurm scripts: syntax, what they run, arguments that arrive unchanged, and what a signal does.

A recording `srun` stands at the place of Slurm's; a real Slurm is not needed here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from processes import Terminal, start

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.jobs.server_node import serve_arguments
from recipes import RECIPES

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = REPOSITORY / "slurm"
ARRAY_STAGES = ("prepare", "generate", "verify", "curate")
PLAIN_STAGES = (*ARRAY_STAGES, "pack", "evaluate", "export")
DISTRIBUTED_STAGES = ("midtrain", "sft", "dpo", "grpo", "distill")
STAGE_ORDER = (
    "generate",
    "verify",
    "curate",
    "pack",
    "midtrain",
    "sft",
    "dpo",
    "grpo",
    "evaluate",
    "export",
)
HOSTILE = (
    "a=with spaces",
    "b='single' \"double\"",
    "c=$(touch pwned)",
    "d=`touch pwned`",
    "e=; touch pwned #",
    "f=*",
    "g=line\nbreak",
    "h=\\n\\",
    "i=$HOME",
    "j=",
    "k=日本 | & > < !",
)
# What the paper's presets leave to the user.
OPEN = {
    "generate": ("problems.path=problems.jsonl",),
    "pack": ("tokenizer=models/b",),
    "midtrain": ("base=models/b",),
}
UNCHECKED = {"PHIMR_PYTHON": "no-such-interpreter", "PHIMR_SERVER_PYTHON": "no-such-interpreter"}
WAIT_SECONDS = 30.0
STILL_SECONDS = 0.2


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without anything that configures the scripts."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PHIMR", "DRY_RUN"))}
    # An absent site file: a developer's own must not change what is tested.
    return {**kept, "PHIMR_SITE": "no-such-file", **extra}


def bash(
    *command: str, env: Mapping[str, str], cwd: Path = REPOSITORY, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["bash", *command], capture_output=True, text=True, env=dict(env), cwd=cwd, timeout=60, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def words(printed: str) -> list[str]:
    """Undo bash's %q by bash itself."""
    program = f"set -f; a=({printed}); printf '%s\\0' \"${{a[@]}}\""
    return bash("-c", program, env=environment()).stdout.split("\0")[:-1]


def dry_run(stage: str, *arguments: str, **extra: str) -> list[str]:
    return words(bash(f"slurm/{stage}.sh", *arguments, env=environment(DRY_RUN="1", **extra)).stdout)


def unchecked(stage: str, *arguments: str, **extra: str) -> list[str]:
    """A dry run on a machine that has no interpreter for the check."""
    return dry_run(stage, *arguments, **UNCHECKED, **extra)


def follows(sequence: Sequence[str], part: Sequence[str]) -> bool:
    return any(list(sequence[i : i + len(part)]) == list(part) for i in range(len(sequence)))


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A directory for PATH with an srun that records its arguments and an scontrol that records requeues."""
    programs = {
        "srun": 'printf "%s\\0" "$@" >"$RECORD"; exit "${SRUN_CODE:-0}"',
        "scontrol": """
            case "$1 $2" in
              "show job") printf "   UserId=a\\n   Comment=%s\\n" "$(cat "$RECORD.comment" 2>/dev/null)" ;;
              show*) printf "node-a\\nnode-b\\n" ;;
              update*) printf "%s" "${3#Comment=}" >"$RECORD.comment" ;;
              *) printf "%s" "$*" >"$RECORD.requeue" ;;
            esac""",
    }
    for name, body in programs.items():
        program = tmp_path / name
        program.write_text(f"#!/usr/bin/env bash\n{body}\n", "utf-8")
        program.chmod(0o755)
    return tmp_path


def job(cluster: Path, **extra: str) -> dict[str, str]:
    return environment(
        PATH=f"{cluster}:{os.environ['PATH']}",
        RECORD=str(cluster / "record"),
        SLURM_JOB_ID="12345",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node-[a-b]",
        SLURM_GPUS_ON_NODE="8",
        SLURM_SUBMIT_DIR=str(REPOSITORY),
        PHIMR_PYTHON=sys.executable,
        **extra,
    )


def recorded(cluster: Path) -> list[str]:
    return (cluster / "record").read_text("utf-8").split("\0")[:-1]


def test_every_stage_has_a_script_and_every_script_a_stage() -> None:
    scripts = {path.stem for path in SLURM.glob("*.sh")} - {"common", "pipeline"}
    # Problems are prepared once, before the chain; distillation is beside it.
    assert scripts == {*PLAIN_STAGES, *DISTRIBUTED_STAGES} == {"prepare", "distill", *STAGE_ORDER}
    assert scripts <= set(STAGES)


@pytest.mark.parametrize("stage", ["prepare", "distill", *STAGE_ORDER])
def test_what_a_script_runs_exists(stage: str) -> None:
    assert RECIPES[stage].script == f"{stage}.sh"
    assert (REPOSITORY / "conf" / stage / "paper.yaml").is_file()


@pytest.mark.parametrize("stage", DISTRIBUTED_STAGES)
def test_a_script_asks_for_as_many_gpus_as_its_preset_needs(stage: str) -> None:
    parallel = yaml.safe_load((REPOSITORY / "conf" / stage / "paper.yaml").read_text("utf-8"))["parallel"]
    text = (SLURM / f"{stage}.sh").read_text("utf-8")
    nodes, gpus = (int(text.split(f"#SBATCH --{name}=")[1].split()[0]) for name in ("nodes", "gpus-per-node"))
    assert nodes * gpus == parallel["tensor"] * parallel["pipeline"] * parallel["data"]
    assert nodes == parallel["nodes"]


@pytest.mark.parametrize(
    "preset", sorted((REPOSITORY / "conf").glob("*/phi4mini-*.yaml")), ids=lambda p: p.parent.name + p.stem
)
def test_a_preset_s_nodes_hold_its_layout(preset: Path) -> None:
    parallel = load_config(STAGES[preset.parent.name], preset, ["base=models/b"]).parallel
    gpus = int(preset.stem.split("-")[1].split("x")[0])
    assert parallel.world_size == gpus
    assert parallel.nodes == max(1, gpus // 8)


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sh")), ids=lambda p: p.name)
def test_syntax(script: Path) -> None:
    bash("-n", str(script), env=environment())


def test_shellcheck() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed (it comes with the dev extra)")
    scripts = [str(p.relative_to(REPOSITORY)) for p in sorted(SLURM.glob("*.sh"))]
    done = subprocess.run(
        [program, "-x", *scripts, ".ci/run"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("stage", ["prepare", "verify", "curate", "pack"])
def test_a_data_stage_uses_the_cores_that_its_script_asks_for(stage: str) -> None:
    preset = yaml.safe_load((REPOSITORY / "conf" / stage / "paper.yaml").read_text("utf-8"))
    text = (SLURM / f"{stage}.sh").read_text("utf-8")
    cores = int(text.split("#SBATCH --cpus-per-task=")[1].split()[0])
    # cpus-per-task counts hardware threads, two a core, for verify.
    assert preset["workers"] in ((cores,) if stage in ("prepare", "curate") else (cores, cores // 2))


@pytest.mark.parametrize("stage", ["prepare", "distill", *STAGE_ORDER])
def test_directives(stage: str) -> None:
    lines = (SLURM / f"{stage}.sh").read_text("utf-8").splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@120", "--ntasks-per-node=1"} <= set(directives)
    assert f"--job-name=phimr-{stage}" in directives
    # Singleton would run the tasks of an array one after the other.
    is_array = any(d.startswith("--array=") for d in directives)
    assert is_array == (stage in ARRAY_STAGES)
    assert ("--dependency=singleton" in directives) != is_array


@pytest.mark.parametrize("stage", PLAIN_STAGES)
def test_plain_dry_run(stage: str) -> None:
    command = dry_run(stage, *OPEN.get(stage, ()), "run.seed=3")
    assert command[0] == "srun"
    assert "phimr_nemo.jobs.node" not in command
    given = [*OPEN.get(stage, ()), "run.seed=3"]
    start = command.index("phimr_nemo.cli")
    assert command[start:] == ["phimr_nemo.cli", stage, "--config", f"conf/{stage}/paper.yaml", *given]


def test_evaluation_takes_the_software_that_has_vllm() -> None:
    def interpreter(**extra: str) -> str:
        command = dry_run("evaluate", **extra)
        return command[command.index("phimr_nemo.cli") - 2]

    assert interpreter(PHIMR_PYTHON="trainer", PHIMR_SERVER_PYTHON="server") == "server"
    has_vllm = (REPOSITORY / ".venv-vllm" / "bin" / "python").exists()
    assert interpreter(PHIMR_PYTHON="trainer") == (f"{REPOSITORY}/.venv-vllm/bin/python" if has_vllm else "trainer")


@pytest.mark.parametrize("stage", DISTRIBUTED_STAGES)
def test_distributed_dry_run_uses_the_directives(stage: str) -> None:
    text = (SLURM / f"{stage}.sh").read_text("utf-8")
    nodes = text.split("#SBATCH --nodes=")[1].split()[0]
    given = [*OPEN.get(stage, ()), "optim.lr=2e-5"]
    command = dry_run(stage, *given)
    assert command[:3] == ["srun", f"--nodes={nodes}", f"--ntasks={nodes}"]
    assert follows(command, ["--nnodes", nodes, "--nproc-per-node", "8", "--rdzv-backend", "c10d"])
    start = command.index("phimr_nemo.cli")
    assert command[start:] == ["phimr_nemo.cli", stage, "--config", f"conf/{stage}/paper.yaml", *given]


@pytest.mark.parametrize(
    ("stage", "arguments", "nodes", "named"),
    [
        ("midtrain", ["bse=typo"], None, "did you mean base?"),
        ("verify", ["worker=2"], None, "worker"),
        # A layout of 8 GPUs and the script's own 16 nodes.
        (
            "sft",
            ["--config", "conf/sft/phi4mini-8xh100.yaml", "base=models/b"],
            None,
            "sbatch --nodes=1 slurm/sft.sh",
        ),
        ("dpo", ["parallel.data=32"], None, "sbatch --nodes=8 slurm/dpo.sh"),
        ("grpo", [], "3", "sbatch --nodes=4 slurm/grpo.sh"),
        ("dpo", ["parallel.tensor=1", "parallel.data=1"], "1", "--gpus-per-node=1"),
    ],
)
def test_a_dry_run_refuses_what_the_job_would(
    stage: str, arguments: list[str], nodes: str | None, named: str
) -> None:
    extra = {} if nodes is None else {"SLURM_JOB_NUM_NODES": nodes}
    done = bash(f"slurm/{stage}.sh", *arguments, env=environment(DRY_RUN="1", **extra), code=2)
    assert named in done.stderr
    assert done.stdout == ""


def test_a_dry_run_stands_for_a_job_of_other_nodes() -> None:
    preset = ("--config", "conf/sft/phi4mini-8xh100.yaml", "base=models/b")
    command = dry_run("sft", *preset, SLURM_JOB_NUM_NODES="1")
    assert follows(command, ["--nnodes", "1", "--nproc-per-node", "8"])


def test_a_dry_run_without_an_interpreter_says_that_nothing_was_checked() -> None:
    done = bash("slurm/sft.sh", "no.such=key", env=environment(DRY_RUN="1", **UNCHECKED))
    assert "not checked" in done.stderr
    assert words(done.stdout)[-1] == "no.such=key"


@pytest.mark.parametrize("stage", STAGE_ORDER)
def test_hostile_arguments_arrive_unchanged(stage: str, cluster: Path, tmp_path: Path) -> None:
    bash(f"{SLURM}/{stage}.sh", *HOSTILE, env=job(cluster), cwd=tmp_path)
    assert recorded(cluster)[-len(HOSTILE) :] == list(HOSTILE)
    assert unchecked(stage, *HOSTILE)[-len(HOSTILE) :] == list(HOSTILE)
    assert not (tmp_path / "pwned").exists()
    assert not (REPOSITORY / "pwned").exists()


def test_job_facts_reach_torchrun(cluster: Path) -> None:
    bash("slurm/midtrain.sh", env=job(cluster, SLURM_RESTART_COUNT="2"))
    command = recorded(cluster)
    assert command[:2] == ["--nodes=2", "--ntasks=2"]
    # Port: 20000 + 12345 mod 10000.
    assert follows(command, ["--nnodes", "2", "--nproc-per-node", "8"])
    assert follows(command, ["--rdzv-endpoint", "node-a:22345", "--rdzv-id", "12345-2"])


@pytest.mark.parametrize(
    ("extra", "processes"),
    [
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "h100:4"}, "4"),
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": ""}, "1"),
        ({"PHIMR_PROCS_PER_NODE": "2"}, "2"),
    ],
)
def test_processes_per_node(extra: dict[str, str], processes: str, cluster: Path) -> None:
    bash("slurm/sft.sh", env={**job(cluster), **extra})
    assert follows(recorded(cluster), ["--nproc-per-node", processes])


def test_config_and_preset(cluster: Path) -> None:
    assert follows(unchecked("sft", PHIMR_PRESET="tiny"), ["--config", "conf/sft/tiny.yaml"])
    command = unchecked("sft", "--config", "my conf.yaml", "a=1")
    assert command[-3:] == ["--config", "my conf.yaml", "a=1"]
    assert command.count("--config") == 1
    assert "--config has no value" in bash("slurm/sft.sh", "--config", env=job(cluster), code=2).stderr


def test_array_task_takes_its_shard(cluster: Path) -> None:
    task = {
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": "63",
    }
    bash("slurm/verify.sh", "run.seed=1", env=job(cluster, **task, SLURM_ARRAY_TASK_COUNT="64"))
    assert recorded(cluster)[-3:] == ["run.seed=1", "shard.index=5", "shard.count=64"]


def test_a_redone_array_task_keeps_the_split_of_the_whole(cluster: Path) -> None:
    task = {
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_ARRAY_TASK_MIN": "5",
        "SLURM_ARRAY_TASK_MAX": "5",
    }
    alone = job(cluster, **task, SLURM_ARRAY_TASK_COUNT="1")
    # Not 1 of 1: that would be all the work in one task.
    assert "PHIMR_SHARDS" in bash("slurm/verify.sh", env=alone, code=2).stderr
    assert not (cluster / "record").exists()
    bash("slurm/verify.sh", env={**alone, "PHIMR_SHARDS": "64"})
    assert recorded(cluster)[-2:] == ["shard.index=5", "shard.count=64"]


def test_containers() -> None:
    settings = {"PHIMR_CONTAINER_IMAGE": "/images/a b.sqsh", "PHIMR_CONTAINER_MOUNTS": "/data:/data"}
    mounts = f"{REPOSITORY}:{REPOSITORY},/data:/data"
    pyxis = dry_run("sft", PHIMR_CONTAINER_RUNTIME="pyxis", **settings)
    assert "--container-image=/images/a b.sqsh" in pyxis
    assert f"--container-mounts={mounts}" in pyxis
    assert follows(pyxis, ["python3", "-m", "phimr_nemo.jobs.node"])
    apptainer = dry_run("sft", PHIMR_CONTAINER_RUNTIME="apptainer", **settings)
    assert follows(apptainer, ["apptainer", "exec", "--nv", "--no-home", "--bind", mounts])
    assert follows(apptainer, ["/images/a b.sqsh", "python3", "-m", "phimr_nemo.jobs.node"])
    unknown = environment(DRY_RUN="1", PHIMR_CONTAINER_RUNTIME="docker")
    assert "docker is unknown" in bash("slurm/sft.sh", env=unknown, code=2).stderr


def test_site_file_is_read_and_its_example_is_valid(tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text((SLURM / "site.env.example").read_text("utf-8") + "\nexport PHIMR_PROCS_PER_NODE=3\n", "utf-8")
    assert follows(unchecked("sft", PHIMR_SITE=str(site)), ["--nproc-per-node", "3"])


def test_outside_a_job_is_an_error() -> None:
    assert "not inside a Slurm job" in bash("slurm/sft.sh", env=environment(), code=2).stderr


def test_the_exit_code_of_a_stage_is_the_jobs(cluster: Path) -> None:
    bash("slurm/sft.sh", env=job(cluster, SRUN_CODE="7", PHIMR_FAILURE_RESTARTS="0"), code=7)
    assert not (cluster / "record.requeue").exists()


@pytest.mark.parametrize(
    ("code", "failures", "requeued"),
    [
        (0, "0", False),
        (1, "0", True),
        (1, "1", True),
        (1, "2", False),  # it failed three times
        (137, "0", True),  # SIGKILL
        (2, "0", False),  # the user's mistake would be made again
        (3, "2", True),  # saved its state: a preemption
        (143, "2", True),  # died of SIGTERM: a preemption of a step that has nothing to save
        (138, "2", True),  # of SIGUSR1
    ],
)
def test_what_puts_a_job_back_in_the_queue(code: int, failures: str, requeued: bool, cluster: Path) -> None:
    """However often it was preempted before."""
    (cluster / "record.comment").write_text(f"phimr-failures={failures}", "utf-8")
    bash("slurm/sft.sh", env=job(cluster, SRUN_CODE=str(code), SLURM_RESTART_COUNT="50"), code=code)
    assert (cluster / "record.requeue").exists() == requeued


def test_failures_are_counted_behind_the_jobs_own_comment(cluster: Path) -> None:
    comment = cluster / "record.comment"
    comment.write_text("project x, phimr-failures=7 is not at the end", "utf-8")
    for failures in (1, 2):
        bash("slurm/sft.sh", env=job(cluster, SRUN_CODE="1"), code=1)
        told = f"project x, phimr-failures=7 is not at the end phimr-failures={failures}"
        assert comment.read_text("utf-8") == told
    bash("slurm/sft.sh", env=job(cluster, SRUN_CODE="3"), code=3)
    assert comment.read_text("utf-8") == told


def test_an_array_task_puts_back_itself_and_not_the_array(cluster: Path) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "63", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "63"}
    # The last task's own id is the array's.
    whole = {"SLURM_ARRAY_TASK_COUNT": "64", "SLURM_ARRAY_JOB_ID": "12345"}
    bash("slurm/verify.sh", env=job(cluster, SRUN_CODE="1", **task, **whole), code=1)
    assert (cluster / "record.requeue").read_text("utf-8") == "requeue 12345_63"


def test_a_missing_interpreter_is_named(cluster: Path) -> None:
    done = bash("slurm/sft.sh", env={**job(cluster), "PHIMR_PYTHON": "/no/such/python"}, code=2)
    assert "/no/such/python" in done.stderr
    assert "make setup" in done.stderr
    assert not (cluster / "record").exists()


def test_grpo_with_servers_on_the_last_nodes() -> None:
    extra = {"DRY_RUN": "1", "PHIMR_SERVER_NODES": "2", "PHIMR_SERVERS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "6"}
    server, trainer = map(words, bash("slurm/grpo.sh", "steps=3", env=environment(**extra)).stdout.splitlines())
    urls = ",".join(f"http://node-{node}:{port}" for node in (5, 6) for port in (8000, 8001))
    added = ["steps=3", f"engine.base_urls=[{urls}]", "engine.api_key_env=PHIMR_KEY"]
    assert trainer[:3] == ["srun", "--nodes=4", "--ntasks=4"]
    assert "--nodelist=node-1,node-2,node-3,node-4" in trainer
    assert follows(trainer, ["--nnodes", "4"])
    assert server[:4] == ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    assert {"--nodelist=node-5,node-6", "--gpus-per-task=1"} <= set(server)
    assert follows(server, [f"{REPOSITORY}/.venv-vllm/bin/python", "-m", "phimr_nemo.jobs.server_node"])
    for command in (server, trainer):
        assert command[-len(added) :] == added
    # Where those servers listen is where the trainer looks for them.
    config = load_config(STAGES["grpo"], REPOSITORY / "conf/grpo/paper.yaml", [*added, "base=models/b"])
    ports = [words[words.index("--port") + 1] for words in (serve_arguments(config, number) for number in (0, 1))]
    assert ports == ["8000", "8001"]


def test_grpo_with_servers_on_the_trainers_gpus() -> None:
    extra = {"DRY_RUN": "1", "PHIMR_COLOCATED": "1", "PHIMR_SERVERS_PER_NODE": "4", "SLURM_JOB_NUM_NODES": "4"}
    server, trainer = map(words, bash("slurm/grpo.sh", "steps=3", env=environment(**extra)).stdout.splitlines())
    urls = ",".join(f"http://node-{node}:{port}" for node in range(1, 5) for port in range(8000, 8004))
    added = ["steps=3", "engine.colocated=true", f"engine.base_urls=[{urls}]", "engine.api_key_env=PHIMR_KEY"]
    assert trainer[:3] == ["srun", "--nodes=4", "--ntasks=4"]
    assert server[:4] == ["srun", "--nodes=4", "--ntasks=16", "--ntasks-per-node=4"]
    # Slurm gives the servers nothing of their own, and what the trainer has.
    assert "--overlap" in server
    assert not [word for word in server if word.startswith("--gpus")]
    assert follows(server, ["--servers", "4"])
    for command in (server, trainer):
        assert command[-len(added) :] == added
    both = {**extra, "PHIMR_SERVER_NODES": "1"}
    assert "PHIMR_COLOCATED=1 with nodes for servers" in bash("slurm/grpo.sh", env=environment(**both), code=2).stderr


def test_grpo_keeps_the_kind_of_servers_that_it_is_given() -> None:
    extra = {"DRY_RUN": "1", "PHIMR_SERVER_NODES": "1", "PHIMR_SERVER_PYTHON": "/trt/python"}
    extra["SLURM_JOB_NUM_NODES"] = "5"
    settings = environment(PHIMR_PRESET="trtllm", **extra)
    server, trainer = map(words, bash("slurm/grpo.sh", "base=models/b", env=settings).stdout.splitlines())
    assert follows(server, ["/trt/python", "-m", "phimr_nemo.jobs.server_node"])
    for command in (server, trainer):
        start = command.index("--config") + 1
        config = load_config(STAGES["grpo"], REPOSITORY / command[start], command[start + 1 :])
        arguments = serve_arguments(config, 0)
        assert arguments[arguments.index("--engine") + 1] == "trtllm"


def test_grpo_as_a_heterogeneous_job(cluster: Path) -> None:
    (cluster / "scontrol").write_text('#!/bin/sh\nprintf "%s\\n" "$3"\n', "utf-8")
    # The servers' step is still there when the trainer's has ended.
    (cluster / "srun").write_text(
        "#!/usr/bin/env bash\n"
        'case " $* " in *server_node*) name=server ;; *) name=trainer; sleep 1 ;; esac\n'
        'printf "%s\\0" "$@" >"$RECORD.$name"; [ $name = trainer ] || exec sleep 60\n',
        "utf-8",
    )
    groups = {"SLURM_JOB_NODELIST_HET_GROUP_0": "train", "SLURM_JOB_NODELIST_HET_GROUP_1": "serve"}
    extra = {"SLURM_HET_SIZE": "2", "PHIMR_SERVER_PYTHON": sys.executable, "PHIMR_SERVERS_PER_NODE": "1"}
    bash("slurm/grpo.sh", env=job(cluster, **groups, **extra))
    trainer, server = ((cluster / f"record.{name}").read_text("utf-8").split("\0") for name in ("trainer", "server"))
    assert "--het-group=0" in trainer
    assert follows(trainer, ["--rdzv-endpoint", "train:22345"])
    assert "--het-group=1" in server
    assert "engine.base_urls=[http://serve:8000]" in trainer


# --- the pipeline ------------------------------------------------------------------------------------------


def test_pipeline_chains_every_stage() -> None:
    given = [f"{stage}:{value}" for stage, values in OPEN.items() for value in values]
    lines = bash("slurm/pipeline.sh", *given, env=environment(DRY_RUN="1")).stdout.splitlines()
    commands = [words(line) for line in lines]
    for stage, command in zip(STAGE_ORDER, commands, strict=True):
        assert command[command.index(f"slurm/{stage}.sh") + 1 :] == list(OPEN.get(stage, ()))
        # As many as the preset says.
        asked = [word for word in command if word.startswith("--nodes")]
        assert asked == {"midtrain": ["--nodes=16"], "dpo": ["--nodes=4"]}.get(stage, asked)
        assert bool(asked) == (stage in DISTRIBUTED_STAGES)
    assert not any(word.startswith("--dependency") for word in commands[0])
    for before, stage, command in zip(STAGE_ORDER, STAGE_ORDER[1:], commands[1:], strict=False):
        singleton = "" if stage in ARRAY_STAGES else ",singleton"
        assert f"--dependency=afterok:<{before}>{singleton}" in command
        assert "--parsable" in command
        assert "--kill-on-invalid-dep=yes" in command


def test_pipeline_submits_with_the_ids_it_gets(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >>"{log}"; printf "\\n" >>"{log}"\n'
        f'echo "$((100 + $(wc -l <"{log}")));cluster"\n',
        "utf-8",
    )
    sbatch.chmod(0o755)
    site = tmp_path / "site.env"
    site.write_text("SBATCH_OPTIONS=(--nodes=2 '--comment=a b')\nSBATCH_OPTIONS_grpo=(--nodes=8)\n", "utf-8")
    value = "midtrain:base=dir $(touch pwned)"
    bash(
        "slurm/pipeline.sh",
        "run.seed=1",
        value,
        env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}", PHIMR_SITE=str(site), **UNCHECKED),
    )
    calls = [line.split("\0")[:-1] for line in log.read_text("utf-8").splitlines()]
    assert len(calls) == len(STAGE_ORDER)
    for number, (stage, call) in enumerate(zip(STAGE_ORDER, calls, strict=True)):
        assert call[:3] == ["--parsable", "--nodes=2", "--comment=a b"]
        assert ("--nodes=8" in call) == (stage == "grpo")
        if number:
            singleton = "" if stage in ARRAY_STAGES else ",singleton"
            assert call[3 + (stage == "grpo")] == f"--dependency=afterok:{100 + number}{singleton}"
        rest = call[call.index(f"slurm/{stage}.sh") + 1 :]
        assert rest == ["run.seed=1"] + ["base=dir $(touch pwned)"] * (stage == "midtrain")
    assert not (REPOSITORY / "pwned").exists()


def test_pipeline_refuses_an_unknown_stage_before_submitting() -> None:
    done = bash("slurm/pipeline.sh", "midtrian:a=1", env=environment(DRY_RUN="1"), code=2)
    assert "midtrian" in done.stderr
    assert done.stdout == ""


def test_pipeline_checks_every_stage_before_submitting(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ntouch '{tmp_path}/submitted'\n", "utf-8")
    sbatch.chmod(0o755)
    given = [f"{stage}:{value}" for stage, values in OPEN.items() for value in values]
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    done = bash("slurm/pipeline.sh", *given, "export:no_such=1", env=env, code=2)
    assert "no_such" in done.stderr
    assert not (tmp_path / "submitted").exists()


def test_ctrl_c_takes_back_what_the_pipeline_has_submitted(tmp_path: Path) -> None:
    programs = {
        "sbatch": f'n=$(ls "{tmp_path}" | grep -c "^job"); touch "{tmp_path}/job$n"\n'
        'if [ "$n" = 2 ]; then sleep 3; fi; echo "10$n"',
        "scancel": f'echo "$@" >"{tmp_path}/cancelled"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", "utf-8")
        (tmp_path / name).chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", **UNCHECKED)
    with Terminal(["bash", "slurm/pipeline.sh"], env=env, cwd=REPOSITORY) as terminal:
        terminal.wait_for(lambda: (tmp_path / "job2").exists(), WAIT_SECONDS)
        terminal.press_ctrl_c()
        assert terminal.end(WAIT_SECONDS) == 3
    assert (tmp_path / "cancelled").read_text() == "100 101\n"
    assert "2 submitted jobs are cancelled" in terminal.text


def test_pipeline_keeps_colons_in_values() -> None:
    settings = environment(DRY_RUN="1", **UNCHECKED)
    lines = bash("slurm/pipeline.sh", "run.output=s3://x:y", env=settings).stdout.splitlines()
    assert all(words(line)[-1] == "run.output=s3://x:y" for line in lines)


# --- signals -----------------------------------------------------------------------------------------------


def wait_for(paths: Sequence[Path]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} appeared"
        time.sleep(0.02)


def wait_for_waiting(shell: subprocess.Popen[Any]) -> None:
    """Until a shell stands in `wait`: bash hears a signal in the instant before only when its child has ended."""
    process = psutil.Process(shell.pid)
    times, deadline = process.cpu_times(), time.monotonic() + WAIT_SECONDS
    while True:
        time.sleep(STILL_SECONDS)
        before, times = times, process.cpu_times()
        if process.status() == psutil.STATUS_SLEEPING and times[:2] == before[:2]:
            return
        assert time.monotonic() < deadline, "the shell does not come to rest"


@pytest.mark.parametrize(
    ("step_code", "restarts", "job_code", "requeued"),
    [(3, "0", 3, True), (0, "0", 0, False), (3, "100", 2, False)],
    ids=["saved and unfinished", "finished in time", "too many restarts"],
)
def test_a_job_that_runs_out_of_time_requeues_itself(
    step_code: int, restarts: str, job_code: int, requeued: bool, cluster: Path
) -> None:
    (cluster / "srun").write_text(
        f"#!/usr/bin/env bash\ntrap 'exit {step_code}' USR1\ntouch \"$RECORD\"\n"
        "for _ in $(seq 600); do sleep 0.05; done\nexit 9\n",
        "utf-8",
    )
    shell = start(["bash", "slurm/midtrain.sh"], env=job(cluster, SLURM_RESTART_COUNT=restarts), cwd=REPOSITORY)
    try:
        wait_for([cluster / "record"])
        wait_for_waiting(shell)
        # Slurm signals the batch shell alone (--signal=B:USR1).
        shell.send_signal(signal.SIGUSR1)
        assert shell.wait(WAIT_SECONDS) == job_code
    finally:
        if shell.poll() is None:
            shell.kill()
    assert (cluster / "record.requeue").exists() == requeued
    if requeued:
        assert (cluster / "record.requeue").read_text("utf-8") == "requeue 12345"


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_an_interactive_allocation_stops_the_step_and_puts_nothing_back(
    presses: int, cluster: Path
) -> None:
    # The first is passed on as the signal that lets the stage save; a step that does not answer is ended.
    answer = "exit 3" if presses == 1 else ":"
    (cluster / "srun").write_text(
        f"#!/usr/bin/env bash\ntrap '{answer}' USR1\ntouch \"$RECORD\"\n"
        "for _ in $(seq 600); do sleep 0.05; done\nexit 9\n",
        "utf-8",
    )
    with Terminal(["bash", "slurm/sft.sh"], env=job(cluster), cwd=REPOSITORY) as terminal:
        terminal.wait_for((cluster / "record").exists, WAIT_SECONDS)
        wait_for_waiting(terminal.process)
        for _ in range(presses):
            terminal.press_ctrl_c()
            time.sleep(0.5)
        assert terminal.end(WAIT_SECONDS) == (3 if presses == 1 else 137)
    assert not (cluster / "record.requeue").exists()
