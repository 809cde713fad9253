"""The tiny recipe under fire: killed by SIGKILL at random moments, each time continued on another parallel layout.

    under_fire.py ROOT KILLS SEED STAGE [STAGE ...]

Everything is imported once; a run of a stage is a fork for each rank of its layout, all of which are killed at once,
as by a node that is lost, or finish. A run that was killed is started again in the same directory, on another layout
that is drawn, until one finishes; every third keeps its layout, which promises the same bits. Prints a line of JSON
for each run that has finished, compared with an undisturbed one of one process.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.align.grpo.rewards import Graded
from phimr_nemo.config import STAGES, load_config
from phimr_nemo.jobs.launch import launch, stage_function
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.runs import RunDirectory, read_metrics

LAYOUTS: Final = {
    "1": (1, ()),
    "TP2": (2, ("parallel.tensor=2",)),
    "PP2": (2, ("parallel.pipeline=2",)),
    "DP2": (2, ("parallel.data=2",)),
    "CP2": (2, ("parallel.context=2",)),
}
DATA: Final = ("generate", "verify", "curate", "pack")
TRAINING: Final = ("midtrain", "sft", "dpo", "grpo", "distill")
SAME_LAYOUT_EVERY: Final = 3
BY_CLOCK: Final = 0.3
"""Share of the kills at any moment from the start on; the others come after a step or shard that is drawn."""
STEP_SECONDS: Final = 0.5
POLL_SECONDS: Final = 0.02
SIZES: Final = {
    "base": (
        *("hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=4"),
        *("num_key_value_heads=2", "original_max_position_embeddings=64", "max_position_embeddings=2048"),
    ),
    "generate": ("problems.count=60", "rollouts_per_problem=4", "shard_size=15"),
    "verify": ("workers=1",),
    "curate": ("workers=1",),
    "pack": ("sequence_length=256",),
    "midtrain": (
        *("sequence_length=256", "max_steps=6", "global_batch=2", "micro_batch=1", "validation_rows=2"),
        *("validate_every=3", "checkpoint.every=1", "run.log_every=1"),
    ),
    "sft": (
        *("max_steps=6", "global_batch=4", "micro_batch=2", "validation_rows=4", "validate_every=3"),
        *("checkpoint.every=1", "run.log_every=1"),
    ),
    "dpo": ("max_steps=4", "global_batch=4", "micro_batch=2", "checkpoint.every=1", "run.log_every=1"),
    "grpo": (
        *("steps=3", "prompts_per_step=4", "group_size=4", "max_new_tokens=12", "micro_batch=8"),
        *("checkpoint.every=1", "run.log_every=1", "verify_workers=1"),
        # So small a model is never right: what its responses differ in is rewarded, so that they have gradients.
        *("reward.functions={under_fire:variety: 1.0}", "rebalance.enabled=false"),
    ),
    "distill": (
        *("steps=3", "prompts_per_step=4", "group_size=4", "max_new_tokens=12", "micro_batch=8"),
        *("checkpoint.every=1", "run.log_every=1", "verify_workers=0"),
    ),
}
"""A model of 40 K parameters and a few steps a stage, a checkpoint after each."""


@dataclass(frozen=True)
class Flight:
    """What came of one run of a stage that was killed and continued until it finished.

    Attributes:
        stage: of the recipe.
        layouts: of each start, in order.
        kept: checkpoints or shards that each start found.
        same: whether what it made is the undisturbed run's, bit for bit.
        weight: the largest difference of a weight from the undisturbed run's; 0 for data.
        loss: the largest difference of a step's loss; 0 for data.
    """

    stage: str
    layouts: list[str]
    kept: list[int]
    same: bool
    weight: float
    loss: float


def variety(graded: Graded) -> float:
    """A reward: how many different characters a response has, over its length."""
    return len(set(graded.response)) / max(len(graded.response), 1)


def main() -> None:
    root, kills, draw = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    stages = sys.argv[4:]
    seconds = undisturbed(root, stages)
    left, number = kills, 0
    for stage in itertools.cycle(stages):
        if not left:
            return
        flight = fly(root, stage, root / f"killed-{number}", seconds[stage], min(left, draw.randint(1, 3)), draw)
        left, number = left - len(flight.layouts) + 1, number + 1
        print(json.dumps(vars(flight)), flush=True)


def undisturbed(root: Path, stages: Sequence[str]) -> dict[str, float]:
    """Run the recipe up to the last of the stages on one process; the seconds of each stage's last start."""
    seconds = {}
    for stage in ("base", *DATA, *TRAINING):
        config = settings(root, stage, root / stage)
        stage_function(stage)
        for output in (root / stage, root / f"warm-{stage}") if stage in stages else (root / stage,):
            began = time.monotonic()
            finish(start(stage, replaced(config, output), "1"))
            seconds[stage] = time.monotonic() - began
        if stage in stages and set(stages) <= set(seconds):
            break
    return seconds


def fly(root: Path, stage: str, output: Path, seconds: float, kills: int, draw: random.Random) -> Flight:
    """Kill a run and continue it until no kill is left, then let it finish."""
    config = replaced(settings(root, stage, root / stage), output)
    is_bound = draw.randrange(SAME_LAYOUT_EVERY) == 0 or stage in DATA
    layouts: list[str] = []
    kept: list[int] = []
    while not RunDirectory(output).is_done:
        names = [name for name in LAYOUTS if name != (layouts[-1] if layouts else "")]
        layouts.append("1" if is_bound else draw.choice(names))
        kept.append(sum(1 for _ in output.rglob("SEAL.json")) or sum(1 for _ in output.rglob("part-*.json")))
        ranks = start(stage, config, layouts[-1])
        if len(layouts) > kills:
            finish(ranks)
        else:
            moment = seconds * len(ranks) if draw.random() < BY_CLOCK else STEP_SECONDS
            steps = 0 if moment > STEP_SECONDS else made(output) + draw.randint(1, 3)
            kill(ranks, output, steps, draw.uniform(0.0, moment))
    return Flight(stage, layouts, kept, *compared(root / stage, output, stage))


def kill(ranks: Sequence[int], output: Path, steps: int, seconds: float) -> None:
    """Kill all ranks at once, so long after so many steps or shards; those that have finished before are past it."""
    ended: dict[int, int] = {}

    def reap(flags: int) -> None:
        for pid in ranks:
            if pid not in ended and (found := os.waitpid(pid, flags))[0]:
                ended[pid] = found[1]

    while made(output) < steps and len(ended) < len(ranks):
        time.sleep(POLL_SECONDS)
        reap(os.WNOHANG)
    time.sleep(seconds)
    reap(os.WNOHANG)
    for pid in ranks:
        if pid not in ended:
            os.kill(pid, signal.SIGKILL)
    reap(0)
    assert all(status in (0, signal.SIGKILL) for status in ended.values()), f"ranks ended with {ended}"


def made(output: Path) -> int:
    """Steps that a run has made, or shards."""
    steps = [row["step"] for row in read_metrics(output)]
    return max(steps) if steps else sum(1 for _ in output.rglob("part-*.json"))


def start(stage: str, config: Sequence[str], layout: str) -> list[int]:
    """Fork the ranks of a stage in a layout."""
    world, overrides = LAYOUTS[layout]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world):
        child = os.fork()
        if not child:
            run_rank(stage, [*config, *overrides], rank, world, port)
        ranks.append(child)
    return ranks


def run_rank(stage: str, config: Sequence[str], rank: int, world: int, port: int) -> None:
    """Be a rank, as torchrun would have started it; never returns."""
    code = 1
    try:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "fire"}
        launch(stage, load_config(STAGES[stage], Path(config[0]), config[1:]))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, this fork must not go on as its parent
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def finish(ranks: Sequence[int]) -> None:
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    assert not any(codes), f"ranks ended with {codes}"


def settings(root: Path, stage: str, output: Path) -> list[str]:
    """The preset of a stage and its overrides."""
    inputs = {
        "verify": [f"rollouts={root}/generate"],
        "curate": [f"verdicts={root}/verify"],
        "pack": [f"conversations={root}/curate/midtrain", f"tokenizer={root}/base/hf"],
        "midtrain": [f"base={root}/base/hf", f"data={root}/pack"],
        "sft": [f"base={root}/midtrain/hf", f"data={root}/curate/sft"],
        "dpo": [f"base={root}/sft/hf", f"pairs={root}/curate/pairs"],
        "grpo": [f"base={root}/dpo/hf", f"prompts={root}/curate/prompts"],
        # The teacher is the model that the student was made from: as far from it as any here.
        "distill": [f"base={root}/dpo/hf", f"teacher.path={root}/base/hf", f"prompts={root}/curate/prompts"],
    }
    # Only the paper's curation makes all four sets.
    preset = f"conf/{stage}/{'paper' if stage == 'curate' else 'tiny'}.yaml"
    return [preset, f"run.output={output}", *inputs.get(stage, []), *SIZES[stage]]


def replaced(config: Sequence[str], output: Path) -> list[str]:
    """The same settings with another output."""
    return [f"run.output={output}" if item.startswith("run.output=") else item for item in config]


def compared(expected: Path, found: Path, stage: str) -> tuple[bool, float, float]:
    """Whether two outputs are the same bits, and the largest differences of a weight and of a step's loss."""
    assert RunDirectory(found).is_done
    if stage in DATA:
        places = [path.parent.relative_to(expected) for path in sorted(expected.rglob("manifest.json"))]
        assert places
        return all(content_of(found / place) == content_of(expected / place) for place in places), 0.0, 0.0
    pairs = list(weights(expected, found))
    difference = max(float((one.double() - other.double()).abs().max()) for one, other in pairs)
    losses = [{row["step"]: row["loss"] for row in read_metrics(path) if "loss" in row} for path in (expected, found)]
    assert losses[0].keys() == losses[1].keys(), losses
    loss = max((abs(losses[0][step] - losses[1][step]) for step in losses[0]), default=0.0)
    return all(bool((one == other).all()) for one, other in pairs), difference, loss


def weights(expected: Path, found: Path) -> Iterator[tuple[Any, Any]]:
    from safetensors.torch import load_file

    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (expected, found))
    assert ours.keys() == theirs.keys()
    for name in ours:
        yield ours[name], theirs[name]


if __name__ == "__main__":
    main()
