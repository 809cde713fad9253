"""What a training stage would start is compared with the machine before the first process is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from architectures import small
from warm_phimr import phimr

from phimr_nemo.config import STAGES, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs import machine
from phimr_nemo.jobs.machine import check_default, check_machine, count_cores, free_memory, needed_memory
from phimr_nemo.store.atomic import write_json

REPOSITORY = Path(__file__).resolve().parents[2]
TRAINED = ("midtrain", "sft", "dpo", "grpo", "distill")
CLUSTERS = [
    (stage, preset)
    for stage in TRAINED
    for preset in ("paper", "phi4mini-8xh100", "phi4mini-128xh100")
    if (REPOSITORY / "conf" / stage / f"{preset}.yaml").is_file()
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_json(tmp_path / "base" / "config.json", small().to_hf_config())
    return tmp_path / "base"


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, 8 GiB free, no GPU, and not one of several ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "count_gpus", lambda: 0)
    monkeypatch.setattr(machine, "count_cores", lambda: 4)
    monkeypatch.setattr(machine, "free_memory", lambda: 8 * machine.GIBIBYTE)


def config(stage: str, preset: str, base: Path, *overrides: str) -> Any:
    return load_config(STAGES[stage], REPOSITORY / "conf" / stage / f"{preset}.yaml", [f"base={base}", *overrides])


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize("stage", TRAINED)
def test_a_cluster_is_not_started_on_a_laptop(stage: str, base: Path) -> None:
    paper = config(stage, "paper", base)
    with pytest.raises(
        UserError, match=f"would start {paper.parallel.world_size} processes .* 4 CPU cores"
    ) as caught:
        check_machine(stage, paper)
    for way in ("parallel.data=", f"conf/{stage}/tiny.yaml", f"sbatch slurm/{stage}.sh"):
        assert way in caught.value.remedy


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize(("stage", "preset"), CLUSTERS)
@pytest.mark.parametrize("cores", [1, 3, 4, 6])
def test_the_layout_of_the_remedy_is_accepted(
    stage: str, preset: str, cores: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "count_cores", lambda: cores)
    monkeypatch.setattr(machine, "free_memory", lambda: 1e15)
    asked = config(stage, preset, base)
    if asked.parallel.world_size <= max(machine.FEWEST_CORES, cores):
        check_machine(stage, asked)
        return
    with pytest.raises(UserError) as caught:
        check_machine(stage, asked)
    words = caught.value.remedy.split("; ")[0].split()
    # As many as fit, and the batch can be shared among them: a rule of the configuration.
    check_machine(stage, config(stage, preset, base, *words))


@pytest.mark.parametrize(("gpus", "ranks"), list(itertools.product([1, 2, 8], [1, 2, 4, 8, 16])))
def test_there_is_one_process_a_gpu(gpus: int, ranks: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores and memory say nothing there."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(machine, "count_gpus", lambda: gpus)
    monkeypatch.setattr(machine, "count_cores", lambda: 1)
    monkeypatch.setattr(machine, "free_memory", lambda: 0.0)
    asked = config("sft", "tiny", base, f"parallel.data={ranks}", "micro_batch=1", "global_batch=16")
    if ranks <= gpus:
        check_machine("sft", asked)
        return
    with pytest.raises(UserError, match=f"{ranks} processes .* {gpus} GPUs"):
        check_machine("sft", asked)


@pytest.mark.usefixtures("laptop")
def test_too_little_memory_is_told_in_gib(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GiB hold the libraries of eight ranks with 0.9 GiB each, and not of nine."""
    monkeypatch.setattr(machine, "count_cores", lambda: 64)
    sizes = ("micro_batch=1", "global_batch=72", "validation_rows=72")
    check_machine("sft", config("sft", "tiny", base, "parallel.data=8", *sizes))
    with pytest.raises(UserError, match=r"at least 8\.1 GiB .* 9 processes .* 8\.0 GiB free"):
        check_machine("sft", config("sft", "tiny", base, "parallel.data=9", *sizes))


def test_the_estimate_of_a_large_model_is_its_state(tmp_path: Path) -> None:
    """AdamW in fp32 holds 16 bytes a parameter: weights, gradients and two moments of 4 bytes each."""
    arch = small(hidden_size=2048, intermediate_size=4096, num_hidden_layers=8)
    write_json(tmp_path / "base" / "config.json", arch.to_hf_config())
    needed = needed_memory("sft", config("sft", "tiny", tmp_path / "base"))
    assert needed == pytest.approx(machine.RANK_BYTES + 16 * arch.num_parameters, rel=1e-3)


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize("stage", TRAINED)
def test_a_clusters_preset_is_no_silent_default_without_a_gpu(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Path("conf") / stage / "paper.yaml"
    with pytest.raises(UserError, match="without --config") as caught:
        check_default(stage, preset)
    assert f"--config conf/{stage}/tiny.yaml" in caught.value.remedy
    monkeypatch.setattr(machine, "count_gpus", lambda: 1)
    check_default(stage, preset)


@pytest.mark.usefixtures("laptop")
def test_other_stages_keep_their_default() -> None:
    for stage in set(STAGES) - set(TRAINED):
        check_default(stage, Path("conf") / stage / "paper.yaml")
        check_machine(stage, object())


@pytest.mark.usefixtures("laptop")
def test_ranks_that_torchrun_started_are_counted(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    asked = ("parallel.data=16", "micro_batch=1", "global_batch=16")
    check_machine("sft", config("sft", "tiny", base, *asked))
    with pytest.raises(UserError, match="16 processes were started"):
        check_machine("sft", config("sft", "tiny", base))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="8 processes on this machine"):
        check_machine("sft", config("sft", "tiny", base, *asked))


def test_a_containers_share_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_cores, whole_memory = count_cores(), free_memory()
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name, text in {
        "cpu.max": "100000 100000",
        "memory.max": str(1 << 20),
        "memory.current": str(1 << 19),
        "memory.stat": f"anon 1\ninactive_file {1 << 18}",
    }.items():
        (tmp_path / name).write_text(text + "\n", "utf-8")
    assert count_cores() == 1
    # Half of it is used, and half of that are files, which the kernel gives up.
    assert free_memory() == (1 << 19) + (1 << 18)
    for name in ("cpu.max", "memory.max"):
        (tmp_path / name).write_text("max 100000\n", "utf-8")
    assert count_cores() >= whole_cores
    assert free_memory() > whole_memory / 2


@pytest.mark.parametrize("stage", TRAINED)
def test_the_command_refuses_before_it_writes(stage: str, tmp_path: Path) -> None:
    if machine.count_gpus():
        pytest.skip("this machine has a GPU")
    done = phimr(stage, f"base={tmp_path}", f"run.output={tmp_path / 'run'}", place=REPOSITORY)
    assert done.returncode == 2
    assert "without --config on a machine without a GPU" in done.stderr
    assert not (tmp_path / "run").exists()
