"""A Slurm of its own on this machine: munged, slurmctld and two slurmd, from a configuration written here."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from processes import start

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SYSTEM_PATH = "/usr/sbin:/usr/local/sbin"
NODES = ("n1", "n2")
# What the nodes say they have: enough for the scripts' own directives.
CPUS_PER_NODE, MIB_PER_NODE, GPUS_PER_NODE = 64, 200_000, 8
START_SECONDS = 30.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2
COMMAND_SECONDS = 60.0
LOG_CHARACTERS = 1500
# What this machine's own environment must not tell the jobs.
FOREIGN = ("SLURM", "SBATCH", "PHIMR", "DRY_RUN", "MUNGE")

# Nodes share this machine, so each has a port of its own. Jobs wait `cred_expire` before they start again, and a
# node that is gone is found after SlurmdTimeout: short, so that tests need not wait. A partition is preempted by
# the one above it: SIGTERM, GraceTime to save, then back to the queue.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
KillWait=5
InactiveLimit=0
MessageTimeout=60
SlurmdTimeout=15
SlurmctldTimeout=300
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> str | None:
    """Why a Slurm cannot be started here, or None."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"Slurm is absent ({', '.join(absent)} not found; make setup-slurm)"
    if os.geteuid() != 0:
        return "only root can start a Slurm of its own"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}{SYSTEM_PATH}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


class Slurm:
    """A running Slurm; use as a context manager. What it started is gone when it ends."""

    def __init__(self) -> None:
        # Not below pytest's directory, which munged's user may not enter.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-test-"))
        self.root.chmod(0o755)
        self.configuration = self.root / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self.environment = {
            **kept,
            "PATH": f"{kept['PATH']}{os.pathsep}{SYSTEM_PATH}",
            "SLURM_CONF": str(self.configuration),
            "PHIMR_SITE": "no-such-file",
        }

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        self._start_munged()
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(
            host=host,
            root=self.root,
            ports=_free_ports(3),
            cpus=CPUS_PER_NODE,
            memory=MIB_PER_NODE,
            gpus=GPUS_PER_NODE,
        )
        self.configuration.write_text(text.lstrip(), "utf-8")
        # A GPU is a file to Slurm.
        for number in range(GPUS_PER_NODE):
            (self.root / f"gpu{number}").touch()
        gpus = f"Name=gpu File={self.root}/gpu[0-{GPUS_PER_NODE - 1}]\n"
        (self.root / "gres.conf").write_text(gpus, "utf-8")
        (self.root / "state").mkdir()
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: [self.node_state(n) for n in NODES] == ["IDLE"] * len(NODES), "idle nodes", START_SECONDS)

    def _start_munged(self) -> None:
        """With a key and a socket of its own; munged refuses to run as root."""
        user = pwd.getpwnam("munge")
        place = self.root / "munge"
        place.mkdir(mode=0o755)
        key = place / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for path in (place, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        files = [f"--{name}-file={place / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(
            "munged",
            "munged",
            "--foreground",
            f"--socket={place / 'socket'}",
            *files,
            user=user.pw_uid,
            group=user.pw_gid,
        )
        self.wait((place / "socket").exists, "munged's socket", START_SECONDS)

    def _daemon(self, name: str, *command: str, user: int | None = None, group: int | None = None) -> None:
        program = _program(command[0])
        assert program is not None
        with (self.root / f"{name}.out").open("ab") as log:
            self._daemons[name] = start(
                [program, *command[1:]],
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=user,
                group=group,
                start_new_session=True,
            )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def crash_node(self, node: str) -> None:
        """SIGKILL to slurmd and everything that runs below it, at once: a machine that loses power."""
        self.kill_slurmd(node)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node or f"-{node}" in " ".join(process.cmdline()):
                    process.kill()

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to a node's slurmd alone; its tasks live on."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def _stop(self) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--signal=KILL", "--user=root", check=False)
        # Controller first: nothing new is started.
        for name in ("slurmctld", *NODES, "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.processes(), STOP_SECONDS)
        shutil.rmtree(self.root)

    def processes(self) -> list[psutil.Process]:
        """Every living process of this Slurm but its daemons: what was started with its configuration."""
        daemons = {daemon.pid for daemon in self._daemons.values()}
        if "slurmctld" in self._daemons:
            # It has a helper, slurmscriptd.
            daemons |= {child.pid for child in psutil.Process(self._daemons["slurmctld"].pid).children()}
        return [p for p in psutil.process_iter() if p.pid not in daemons and self._is_ours(p)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            # slurmstepd writes its title over its environment; it works in slurmd's directory.
            is_configured = process.environ().get("SLURM_CONF") == str(self.configuration)
            return is_configured or Path(process.cwd()) == self.root
        except psutil.Error:
            return False

    # What a user types -----------------------------------------------------------------------------------------

    def run(
        self, *command: str, check: bool = True, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """A Slurm command's output."""
        done = subprocess.run(
            command,
            env={**self.environment, **(env or {})},
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says about a job or an array task ("12_3")."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def node_state(self, node: str) -> str:
        text = self.run("scontrol", "--oneliner", "show", "node", node, check=False)
        found = re.search(r" State=(\S+)", text)
        return found.group(1) if found else "unknown"

    def wait(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Until the condition holds; with the logs in the message if it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:g} s\n{self.logs()}")
            time.sleep(POLL_SECONDS)

    def wait_state(self, job: str, states: Sequence[str], seconds: float) -> str:
        """Until a job is in one of the states; which."""
        self.wait(lambda: self.state(job) in states, f"job {job} in {states}", seconds)
        return self.state(job)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted([*self.root.glob("*.out"), *self.root.glob("*.log")])
        texts = [f"{path.name}:\n{path.read_text('utf-8', 'replace')[-LOG_CHARACTERS:]}" for path in files]
        return "\n".join([self.run("squeue", "--all", check=False), *texts])
