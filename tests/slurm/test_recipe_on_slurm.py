"""The sbatch scripts on a real Slurm of two nodes: the whole chain, and what a cluster does to a job.

One chain is run undisturbed, over two nodes. A second mid-training is preempted, loses a rank and loses a node, and
must end with the same weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from controller import NODES, Slurm
from safetensors import safe_open

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.jobs.launch import launch
from phimr_nemo.store.records import Kind
from phimr_nemo.store.runs import RunDirectory, read_metrics
from phimr_nemo.store.shards import iter_shards

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES_IN_ORDER = ("generate", "verify", "curate", "pack", "midtrain", "sft", "dpo", "grpo", "evaluate", "export")
SHARDS = 2
SEED = 7
# The chain's mid-training, and the steps at which its disturbed twin is preempted and loses a node.
MIDTRAIN_STEPS, CHECKPOINT_EVERY, PREEMPTED_AT, KILLED_AT, CRASHED_AT = 40, 10, 5, 12, 18
FAILURES = 2
# Guards against hanging: a machine with other work takes many times what a quiet one does.
CHAIN_SECONDS, RUN_SECONDS, STATE_SECONDS = 1800.0, 600.0, 180.0
PACE_SECONDS = 0.02
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY")

SITE = f"""
SBATCH_OPTIONS_generate=(--array=0-{SHARDS - 1})
SBATCH_OPTIONS_verify=(--array=0-{SHARDS - 1})
SBATCH_OPTIONS_curate=(--array=0-{SHARDS - 1})
for stage in midtrain sft dpo grpo; do declare -a "SBATCH_OPTIONS_$stage=(--nodes={len(NODES)})"; done
export PHIMR_PROCS_PER_NODE=1
export PHIMR_RDZV_HOST=127.0.0.1
export PHIMR_PYTHON={{python}}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GLOO_SOCKET_IFNAME=lo
"""
BASE = (
    *("hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=4"),
    *("num_key_value_heads=2", "max_position_embeddings=2048"),
)


@dataclass(frozen=True)
class Chain:
    """The whole recipe, run once undisturbed.

    Attributes:
        root: a directory for each stage, and `base`.
        jobs: of each stage.
        killed: the job of the verify task whose process was killed.
    """

    root: Path
    jobs: dict[str, str]
    site: Path
    killed: str

    def output(self, stage: str) -> Path:
        return self.root / stage

    def weights(self, stage: str) -> str:
        return hashlib.sha256((self.output(stage) / "hf" / "model.safetensors").read_bytes()).hexdigest()


def overrides(root: Path) -> dict[str, tuple[str, ...]]:
    """Every stage's, in its smallest form; each reads what the one before it wrote."""
    after = {"sft": "midtrain", "dpo": "sft", "grpo": "dpo"}
    chosen: dict[str, tuple[str, ...]] = {
        "generate": ("problems.count=60", "teacher.mistake_rate=0.5", "rollouts_per_problem=4", "shard_size=20"),
        "verify": (f"rollouts={root}/generate", "workers=1"),
        "curate": (
            *(f"verdicts={root}/verify", "pairs.mode=near_miss", "pairs.nearness=common_beginning"),
            *("pairs.max_per_problem=2", "prompts.min_pass=0.0", "prompts.max_pass=1.0"),
            *("prompts.hard_below=0.5", "prompts.min_samples=1"),
        ),
        "pack": (f"conversations={root}/curate/midtrain", f"tokenizer={root}/base/hf", "sequence_length=256"),
        "midtrain": (
            *(f"base={root}/base/hf", f"data={root}/pack", "sequence_length=256", "global_batch=2", "micro_batch=1"),
            *(f"max_steps={MIDTRAIN_STEPS}", "epochs=10", "validation_rows=2", f"validate_every={MIDTRAIN_STEPS}"),
            *(f"checkpoint.every={CHECKPOINT_EVERY}", "run.log_every=1", "parallel.tensor=2", "optim.lr=2e-3"),
        ),
        "sft": (
            *(f"data={root}/curate/sft", "max_steps=2", "global_batch=4", "micro_batch=2", "validation_rows=4"),
            *("validate_every=2", "checkpoint.every=2", "parallel.data=2"),
        ),
        "dpo": (
            *(f"pairs={root}/curate/pairs", "max_steps=2", "global_batch=4", "micro_batch=2"),
            *("checkpoint.every=2", "parallel.data=2"),
        ),
        "grpo": (
            *(f"prompts={root}/curate/prompts", "steps=2", "prompts_per_step=4", "group_size=4"),
            *("max_new_tokens=12", "micro_batch=8", "checkpoint.every=2", "parallel.data=2"),
        ),
        "evaluate": (f"model={root}/grpo/hf", "problems.count=4", "samples=2", "max_new_tokens=12", "workers=1"),
        "export": (
            f"model={root}/grpo/hf",
            *(f"stages.{name}={root}/{name}" for name in ("midtrain", "sft", "dpo", "grpo")),
            f"evaluations.GRPO={root}/evaluate",
        ),
    }
    for stage, before in after.items():
        chosen[stage] += (f"base={root}/{before}/hf",)
    return {stage: (f"run.output={root}/{stage}", *values) for stage, values in chosen.items()}


def environment(site: Path, **extra: str) -> dict[str, str]:
    return {"PHIMR_SITE": str(site), "PHIMR_PRESET": "tiny", **extra}


def tasks(slurm: Slurm, stage: str, **variables: str) -> list[psutil.Process]:
    """The Python processes of a stage's tasks, launchers and ranks alike, whose environment has the variables."""
    found = []
    for process in slurm.processes():
        with contextlib.suppress(psutil.Error):
            line, environ = process.cmdline(), process.environ()
            in_task = "SLURM_PROCID" in environ and line[0].endswith("python")
            in_stage = "phimr_nemo.cli" in line and stage in line
            if in_task and in_stage and all(environ.get(k) == v for k, v in variables.items()):
                found.append(process)
    return found


def ranks(slurm: Slurm, stage: str) -> list[psutil.Process]:
    return [process for rank in range(len(NODES)) for process in tasks(slurm, stage, RANK=str(rank))]


def steps_done(output: Path) -> int:
    return max((line["step"] for line in read_metrics(output)), default=0) if output.is_dir() else 0


@pytest.fixture(scope="module")
def chain(slurm: Slurm) -> Chain:
    root = slurm.root / "runs"
    launch(
        "base", load_config(STAGES["base"], REPOSITORY / "conf/base/tiny.yaml", [f"run.output={root}/base", *BASE])
    )
    site = slurm.root / "site.env"
    site.write_text(SITE.format(python=sys.executable), "utf-8")
    arguments = [f"{stage}:{value}" for stage, values in overrides(root).items() for value in values]
    printed = slurm.run(
        *(str(REPOSITORY / "slurm" / "pipeline.sh"), f"run.seed={SEED}", *arguments),
        env=environment(site, SBATCH_OUTPUT=str(slurm.root / "%x-%j.log")),
    )
    jobs = {line.split()[0]: line.split()[-1] for line in printed.splitlines()}
    assert tuple(jobs) == STAGES_IN_ORDER
    # One of an array's tasks dies.
    slurm.wait(lambda: bool(tasks(slurm, "verify", SLURM_ARRAY_TASK_ID="1")), "verify task 1", STATE_SECONDS)
    victim = tasks(slurm, "verify", SLURM_ARRAY_TASK_ID="1")[0]
    killed = victim.environ()["SLURM_JOB_ID"]
    victim.kill()
    slurm.wait_state(jobs["export"], FINISHED, CHAIN_SECONDS)
    return Chain(root, jobs, site, killed)


def job_logs(slurm: Slurm) -> str:
    return "\n".join(f"== {p.name}\n{p.read_text('utf-8')[-1500:]}" for p in sorted(slurm.root.glob("phimr-*.log")))


def test_every_stage_of_the_chain_completed(slurm: Slurm, chain: Chain) -> None:
    states = {stage: slurm.state(job) for stage, job in chain.jobs.items()}
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{job_logs(slurm)}"
    for stage in STAGES_IN_ORDER:
        assert RunDirectory(chain.output(stage)).is_done, stage
    with safe_open(chain.output("export") / "hf" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 0


def test_training_ran_on_both_nodes(slurm: Slurm, chain: Chain) -> None:
    for stage in ("midtrain", "sft", "dpo", "grpo"):
        facts = slurm.facts(chain.jobs[stage])
        assert facts["NumNodes"] == str(len(NODES)), stage
        # Each node's launcher said so once.
        log = (slurm.root / f"phimr-{stage}-{chain.jobs[stage]}.log").read_text("utf-8")
        assert log.count("start 0, Python") == len(NODES), stage


def test_overrides_arrived(chain: Chain) -> None:
    for stage in STAGES_IN_ORDER:
        values = yaml.safe_load((chain.output(stage) / "config.yaml").read_text("utf-8"))
        assert values["run"]["seed"] == SEED, stage
    written = yaml.safe_load((chain.output("midtrain") / "config.yaml").read_text("utf-8"))
    assert (written["optim"]["lr"], written["parallel"]["tensor"]) == (2e-3, 2)
    assert steps_done(chain.output("midtrain")) == MIDTRAIN_STEPS


def test_an_array_task_that_died_was_done_again_alone(slurm: Slurm, chain: Chain) -> None:
    array = chain.jobs["verify"]
    restarts = {index: slurm.facts(f"{array}_{index}")["Restarts"] for index in range(SHARDS)}
    assert restarts == {0: "0", 1: "1"}
    assert slurm.facts(f"{array}_1")["JobId"] == chain.killed
    made: dict[str, Kind] = {"generate": "rollouts", "verify": "verdicts"}
    questions, verdicts = (
        [row["id"] for table in iter_shards(chain.output(stage), kind) for row in table.to_pylist()]
        for stage, kind in made.items()
    )
    assert len(set(questions)) == len(questions) == 240
    assert sorted(verdicts) == sorted(questions)


def submit(slurm: Slurm, chain: Chain, stage: str, output: Path, *options: str) -> str:
    values = [v for v in overrides(chain.root)[stage] if not v.startswith("run.output=")]
    return slurm.run(
        *("sbatch", "--parsable", f"--nodes={len(NODES)}", *options, f"slurm/{stage}.sh"),
        *(f"run.seed={SEED}", f"run.output={output}", *values),
        cwd=REPOSITORY,
        env=environment(
            chain.site, SBATCH_OUTPUT=str(slurm.root / "%x-%j.log"), PHIMR_FAILURE_RESTARTS=str(FAILURES)
        ),
    )


def freeze_at(slurm: Slurm, output: Path, step: int) -> list[psutil.Process]:
    """Stop a mid-training's ranks as soon as it has done a step, so that nothing depends on this machine's speed."""
    slurm.wait(lambda: len(ranks(slurm, "midtrain")) == len(NODES), "ranks", RUN_SECONDS)
    found = ranks(slurm, "midtrain")
    deadline = time.monotonic() + RUN_SECONDS
    while steps_done(output) < step:
        assert time.monotonic() < deadline, job_logs(slurm)
        time.sleep(PACE_SECONDS)
    for process in found:
        process.suspend()
    assert step <= steps_done(output) < MIDTRAIN_STEPS
    return found


def test_a_preempted_run_that_loses_a_rank_and_a_node_ends_with_the_same_weights(slurm: Slurm, chain: Chain) -> None:
    output = chain.root / "disturbed"
    job = submit(slurm, chain, "midtrain", output)
    freeze_at(slurm, output, PREEMPTED_AT)
    # The same run once more, while the first one is on its way.
    twin = submit(slurm, chain, "midtrain", output)
    # Preemption continues what is stopped and sends SIGTERM.
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=true"
    )
    slurm.wait(lambda: slurm.facts(job)["Restarts"] == "1", "requeue after preemption", STATE_SECONDS)
    slurm.wait_state(urgent, ["COMPLETED"], STATE_SECONDS)
    saved = steps_done(output)
    assert PREEMPTED_AT <= saved < MIDTRAIN_STEPS

    killed, other = freeze_at(slurm, output, max(KILLED_AT, saved + 1))
    killed.kill()
    other.resume()
    slurm.wait(lambda: slurm.facts(job)["Restarts"] == "2", "requeue after a killed rank", STATE_SECONDS)
    # The preemption is none of its failures.
    assert slurm.facts(job)["Comment"] == "phimr-failures=1"
    (log,) = slurm.root.glob(f"*-{job}.log")
    assert "ended with signal SIGKILL" in log.read_text("utf-8")

    freeze_at(slurm, output, max(CRASHED_AT, saved + 1))
    slurm.crash_node("n2")
    for process in ranks(slurm, "midtrain"):
        process.resume()
    slurm.wait(lambda: slurm.facts(job)["Restarts"] == "3", "requeue after a lost node", STATE_SECONDS)
    assert slurm.facts(twin)["JobState"] == "PENDING"
    assert slurm.facts(twin)["Reason"] == "Dependency"
    slurm.run("scancel", twin)
    slurm.start_node("n2")

    assert slurm.wait_state(job, FINISHED, RUN_SECONDS) == "COMPLETED", job_logs(slurm)
    weights = (output / "hf" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == chain.weights("midtrain")
    # Every step once, whatever was done again.
    assert [line["step"] for line in read_metrics(output) if "loss" in line] == list(range(1, MIDTRAIN_STEPS + 1))


def test_scancel_leaves_no_process(slurm: Slurm, chain: Chain) -> None:
    job = submit(slurm, chain, "sft", chain.root / "cancelled")
    slurm.wait(lambda: len(ranks(slurm, "sft")) == len(NODES), "ranks", RUN_SECONDS)
    slurm.run("scancel", job)
    slurm.wait(lambda: not slurm.processes(), "the end of every process", STATE_SECONDS)
    # Neither back in the queue nor finished.
    assert slurm.wait_state(job, FINISHED, STATE_SECONDS) == "CANCELLED"
    assert slurm.facts(job)["Restarts"] == "0"
    assert not RunDirectory(chain.root / "cancelled").is_done
