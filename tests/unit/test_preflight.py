"""Checks before a stage starts: what is refused, and that the numbers of --dry-run follow from the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import small

from phimr_nemo.config import STAGES, ParallelConfig, find_config, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.preflight import derived_numbers, preflight
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.plan.weights import state_memory
from phimr_nemo.store.inputs import MADE_BY
from phimr_nemo.store.records import Kind
from phimr_nemo.store.shards import finish, rows_to_table, write_shard

ROLLOUT = {
    "id": "r",
    "problem_id": "p",
    "question": "1+1?",
    "answer": "2",
    "response": "2",
    "teacher": "t",
    "sample_index": 0,
    "seed": 0,
    "finish_reason": "stop",
    "tokens": 1,
    "domain": None,
    "difficulty": None,
    "metadata": "{}",
}
ROWS: dict[Kind, dict[str, Any]] = {
    "rollouts": ROLLOUT,
    "verdicts": {**ROLLOUT, "verdict": "correct", "extracted": "2", "reason": "", "grader": "g"},
    "conversations": {"id": "c", "problem_id": "p", "question": "q", "response": "r"},
    "pairs": {"id": "a", "problem_id": "p", "question": "q", "chosen": "c", "rejected": "r", "mode": "random"},
    "prompts": {
        "id": "a",
        "problem_id": "p",
        "question": "q",
        "answer": "2",
        "pass_rate": 0.5,
        "mean_length": 1.0,
        "length_spread": 0.0,
        "hard": False,
    },
    "rows": {"input_ids": [1, 2], "loss_mask": [1, 1], "document_lengths": [2]},
}
# The stage, the key of its record input, and the kind it reads.
INPUTS: list[tuple[str, str, Kind]] = [
    ("verify", "rollouts", "rollouts"),
    ("curate", "verdicts", "verdicts"),
    ("pack", "conversations", "conversations"),
    ("midtrain", "data", "rows"),
    ("sft", "data", "conversations"),
    ("dpo", "pairs", "pairs"),
    ("grpo", "prompts", "prompts"),
]
TRAINING = ("midtrain", "sft", "dpo", "grpo")
ENOUGH = 400
"""Rows for a step of any preset."""
# 12 heads in groups of 3, 6 layers: tensor 2 and 4 and pipeline 2, 3 and 6 fit, tensor 3 and pipeline 4 do not.
ARCHITECTURE = small(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=6,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    short_factor=(1.0, 1.0, 1.0),
    long_factor=(1.0, 2.0, 3.0),
)


def records(directory: Path, kind: Kind, count: int = 1) -> Path:
    write_shard(directory, 0, rows_to_table([ROWS[kind]] * count, kind), kind=kind)
    finish(directory, kind=kind, config={})
    return directory


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """A finished record directory of every kind, for reading."""
    root = tmp_path_factory.mktemp("shelf")
    return {kind: records(root / kind, kind, ENOUGH) for kind in ROWS}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model directory as far as a check without torch can see."""
    path = tmp_path / "base"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(ARCHITECTURE.to_hf_config()))
    return path


def stage_config(stage: str, tmp_path: Path, *overrides: str) -> Any:
    fixed = [f"run.output={tmp_path / 'out'}"]
    if stage in TRAINING:
        fixed.append(f"base={tmp_path / 'base'}")
    if stage == "pack":
        fixed.append(f"tokenizer={tmp_path}")
    return load_config(STAGES[stage], Path("conf") / stage / "tiny.yaml", [*fixed, *overrides])


def refusal(stage: str, tmp_path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        preflight(stage, stage_config(stage, tmp_path, *overrides))
    assert caught.value.rule
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()
    return caught.value


@pytest.mark.parametrize(("stage", "key", "kind"), INPUTS)
def test_a_stage_accepts_the_finished_records_of_its_kind(
    stage: str, key: str, kind: Kind, tmp_path: Path, shelf: dict[Kind, Path], base: Path
) -> None:
    preflight(stage, stage_config(stage, tmp_path, f"{key}={shelf[kind]}"))


@pytest.mark.parametrize(("stage", "key", "kind"), INPUTS)
def test_a_stage_before_its_input(stage: str, key: str, kind: Kind, tmp_path: Path, base: Path) -> None:
    missing = tmp_path / "in"
    assert f"{missing} does not exist" in refusal(stage, tmp_path, f"{key}={missing}").problem
    write_shard(missing, 0, rows_to_table([ROWS[kind]], kind), kind=kind)
    unfinished = refusal(stage, tmp_path, f"{key}={missing}")
    assert f"{missing} is not finished" in unfinished.problem
    assert f"run the step that makes it first, `{MADE_BY[kind]}`" in unfinished.remedy


@pytest.mark.parametrize(("stage", "key", "kind"), INPUTS)
def test_records_of_another_kind(
    stage: str, key: str, kind: Kind, tmp_path: Path, shelf: dict[Kind, Path], base: Path
) -> None:
    other: Kind = "pairs" if kind != "pairs" else "prompts"
    error = refusal(stage, tmp_path, f"{key}={shelf[other]}")
    assert repr(other) in error.problem
    assert repr(kind) in error.rule


@pytest.mark.parametrize("stage", TRAINING)
def test_a_base_that_does_not_exist(stage: str, tmp_path: Path, shelf: dict[Kind, Path]) -> None:
    key, kind = next((key, kind) for name, key, kind in INPUTS if name == stage)
    error = refusal(stage, tmp_path, f"{key}={shelf[kind]}")
    assert str(tmp_path / "base") in error.problem


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "gemma2"}', "[]"])
def test_a_base_that_is_no_model(content: str | None, tmp_path: Path, shelf: dict[Kind, Path], base: Path) -> None:
    if content is None:
        (base / "config.json").unlink()
    else:
        (base / "config.json").write_text(content)
    error = refusal("sft", tmp_path, f"data={shelf['conversations']}")
    assert ("gemma2" if content and "gemma2" in content else str(base)) in error.problem


@pytest.mark.parametrize(
    ("overrides", "value", "rule"),
    [
        (["parallel.tensor=5"], "parallel.tensor=5 with 12 attention heads", "divides"),
        (["parallel.tensor=3"], "parallel.tensor=3 with 4 key/value heads", "divides"),
        (["parallel.pipeline=4"], "parallel.pipeline=4 with 6 layers", "divides"),
        (["parallel.pipeline=7"], "parallel.pipeline=7 with 6 layers", "divides"),
        (["parallel.sequence=true"], "parallel.sequence=true with parallel.tensor=1", "tensor-parallel group"),
        (["sequence_length=4097"], "sequence_length=4097", "4096"),
    ],
)
@pytest.mark.parametrize("stage", TRAINING)
def test_an_impossible_layout(
    stage: str, overrides: list[str], value: str, rule: str, tmp_path: Path, shelf: dict[Kind, Path], base: Path
) -> None:
    key, kind = next((key, kind) for name, key, kind in INPUTS if name == stage)
    error = refusal(stage, tmp_path, f"{key}={shelf[kind]}", *overrides)
    assert value in error.problem
    assert rule in error.rule
    # --dry-run, which asks for no data, says the same.
    with pytest.raises(UserError, match=value.split(" with")[0]):
        derived_numbers(stage, stage_config(stage, tmp_path, *overrides))


def test_the_remedy_of_a_layout_names_one_that_fits(tmp_path: Path, shelf: dict[Kind, Path], base: Path) -> None:
    data = f"data={shelf['conversations']}"
    error = refusal("sft", tmp_path, data, "parallel.tensor=3")
    assert "[1, 2, 4]" in error.remedy  # the common divisors of 12 heads, 4 groups, 512 words and 256 dimensions
    for tensor in (1, 2, 4):
        preflight("sft", stage_config("sft", tmp_path, data, f"parallel.tensor={tensor}"))


@pytest.mark.parametrize(("micro", "data", "total", "suggested"), [(3, 1, 32, 33), (4, 3, 32, 36), (32, 2, 32, 64)])
def test_a_global_batch_that_the_ranks_cannot_share(
    micro: int, data: int, total: int, suggested: int, tmp_path: Path, shelf: dict[Kind, Path], base: Path
) -> None:
    overrides = [f"data={shelf['conversations']}", "validation_rows=0"]
    sizes = [f"micro_batch={micro}", f"parallel.data={data}"]
    error = refusal("sft", tmp_path, *overrides, *sizes, f"global_batch={total}")
    assert f"global_batch={total} with micro_batch={micro} and parallel.data={data}" in error.problem
    assert error.remedy == f"use global_batch={suggested}"
    preflight("sft", stage_config("sft", tmp_path, *overrides, *sizes, f"global_batch={suggested}"))


@pytest.mark.parametrize(
    ("stage", "key", "kind", "overrides"),
    [
        ("sft", "data", "conversations", ["global_batch=32", f"validation_rows={ENOUGH + 16}"]),
        ("midtrain", "data", "rows", ["global_batch=2", f"validation_rows={ENOUGH}"]),
        ("dpo", "pairs", "pairs", [f"global_batch={ENOUGH + 8}"]),
    ],
)
def test_too_little_data_is_said_by_the_dry_run_too(
    stage: str, key: str, kind: Kind, overrides: list[str], tmp_path: Path, shelf: dict[Kind, Path], base: Path
) -> None:
    config = stage_config(stage, tmp_path, f"{key}={shelf[kind]}", "micro_batch=1", "epochs=1", *overrides)
    for check in (preflight, derived_numbers):
        with pytest.raises(
            UserError, match=f"holds {ENOUGH} {kind}, .* of them for validation: no step of"
        ) as caught:
            check(stage, config)
        assert "lower global_batch or validation_" in caught.value.remedy


def test_prompts_that_the_ranks_cannot_share(tmp_path: Path, shelf: dict[Kind, Path], base: Path) -> None:
    prompts = f"prompts={shelf['prompts']}"
    error = refusal("grpo", tmp_path, prompts, "prompts_per_step=32", "parallel.data=3")
    assert "prompts_per_step=32 with parallel.data=3" in error.problem


@pytest.mark.parametrize("stage", ["generate", "verify"])
def test_a_share_of_the_shards_that_does_not_exist(stage: str, tmp_path: Path, shelf: dict[Kind, Path]) -> None:
    overrides = [] if stage == "generate" else [f"rollouts={shelf['rollouts']}"]
    preflight(stage, stage_config(stage, tmp_path, *overrides, "shard.index=3", "shard.count=4"))
    error = refusal(stage, tmp_path, *overrides, "shard.index=4", "shard.count=4")
    assert "shard.index=4 with shard.count=4" in error.problem


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["problems.kind=file", "problems.path={}/none.jsonl", "teacher.kind=recorded", "teacher.path={}"],
            "none.jsonl",
        ),
        (["problems=null", "teacher.kind=recorded", "teacher.path={}/none.jsonl"], "none.jsonl"),
        (["problems=null"], "teacher.kind=programmatic without problems"),
        (["problems.kind=file", "problems.path={}"], "teacher.kind=programmatic"),
    ],
)
def test_generation_without_what_it_needs(overrides: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in refusal("generate", tmp_path, *(item.format(tmp_path) for item in overrides)).problem


def test_evaluation_and_export_without_a_model(tmp_path: Path) -> None:
    for stage in ("evaluate", "export"):
        assert "none/hf does not exist" in refusal(stage, tmp_path, f"model={tmp_path}/none/hf").problem


def test_export_without_a_stage_that_it_is_to_report(tmp_path: Path) -> None:
    error = refusal("export", tmp_path, f"model={tmp_path}", f"stages.sft={tmp_path}/none")
    assert f"{tmp_path}/none does not exist" in error.problem


def test_parameters_are_those_of_transformers(tmp_path: Path, base: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config(**ARCHITECTURE.to_hf_config()))
    count = sum(parameter.numel() for parameter in model.parameters())
    for stage in TRAINING:
        assert derived_numbers(stage, stage_config(stage, tmp_path))["parameters"] == f"{count:,}"


def megatron_state_bytes(parameters: int, dtype: torch.dtype, ranks: int, share: int) -> int:
    """Bytes on one rank by counting the tensors of mixed-precision AdamW, one by one."""
    mine = parameters // share
    sharded = mine // ranks
    tensors = [
        torch.empty(mine, dtype=dtype, device="meta"),  # weights
        torch.empty(mine, dtype=torch.float32, device="meta"),  # gradients
        torch.empty(sharded, dtype=torch.float32, device="meta"),  # first moment
        torch.empty(sharded, dtype=torch.float32, device="meta"),  # second moment
    ]
    if dtype is torch.bfloat16:
        tensors.append(torch.empty(sharded, dtype=torch.float32, device="meta"))  # master weights
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(
    ("tensor", "pipeline", "context", "data"), [(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 1, 4), (1, 3, 1, 8), (2, 1, 2, 4)]
)
def test_bytes_of_weights_gradients_and_optimizer(
    dtype: str, distributed: bool, tensor: int, pipeline: int, context: int, data: int
) -> None:
    parameters = 96_000
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context, data=data)
    assert layout.world_size == tensor * pipeline * context * data
    expected = megatron_state_bytes(
        parameters,
        torch.bfloat16 if dtype == "bf16" else torch.float32,
        data * context if distributed else 1,  # Megatron shards over the data- and context-parallel group
        tensor * pipeline,
    )
    share = parameters / (tensor * pipeline)
    assert state_memory(share, layout, dtype, distributed=distributed).total == expected


@pytest.mark.parametrize(("stage", "key", "kind"), INPUTS[3:6])
def test_steps_follow_from_the_rows(stage: str, key: str, kind: Kind, tmp_path: Path, base: Path) -> None:
    count, epochs, kept_out = 50, 3, 4
    overrides = [
        f"{key}={records(tmp_path / 'in', kind, count)}",
        f"epochs={epochs}",
        "global_batch=4",
        "micro_batch=2",
        "sequence_length=100",
    ]
    if stage != "dpo":
        overrides.append(f"validation_rows={kept_out}")
    rows = count if stage == "dpo" else count - kept_out
    whole_batches = sum(1 for _ in range(4, rows * epochs + 1, 4))
    numbers = derived_numbers(stage, stage_config(stage, tmp_path, *overrides))
    assert numbers["steps"] == str(whole_batches)
    assert derived_numbers(stage, stage_config(stage, tmp_path, *overrides, "max_steps=5"))["steps"] == "5"
    sequences = 4 * (2 if stage == "dpo" else 1)  # a pair is two sequences
    tokens = next(value for name, value in numbers.items() if name.startswith("tokens per step"))
    assert tokens == str(sequences * 100)


def test_numbers_of_a_grpo_step(tmp_path: Path, base: Path) -> None:
    overrides = ["prompts_per_step=6", "group_size=5", "sequence_length=70", "max_new_tokens=60", "steps=9"]
    numbers = derived_numbers("grpo", stage_config("grpo", tmp_path, *overrides))
    assert numbers["responses per step"] == "30"
    assert numbers["tokens per step, at most"] == "2,100"
    assert numbers["steps"] == "9"


def test_what_is_not_known_yet_is_said(tmp_path: Path) -> None:
    numbers = derived_numbers("sft", stage_config("sft", tmp_path, f"data={tmp_path}/none"))
    assert f"{tmp_path}/base does not exist yet" in numbers["parameters"]
    assert f"{tmp_path}/none is not finished yet" in numbers["steps"]


def test_the_papers_midtraining_in_numbers(tmp_path: Path) -> None:
    """16,384 tokens x 128 rows; the 3.8 B of Phi-4-mini in bf16 over 128 ranks with a distributed optimizer."""
    import yaml

    values = yaml.safe_load(find_config(Path("conf/model/phi4mini.yaml")).read_text("utf-8"))
    (tmp_path / "base").mkdir()
    architecture = Architecture.from_preset(values)
    (tmp_path / "base" / "config.json").write_text(json.dumps(architecture.to_hf_config()))
    config = load_config(
        STAGES["midtrain"],
        Path("conf/midtrain/paper.yaml"),
        [f"base={tmp_path / 'base'}", f"data={tmp_path / 'none'}"],
    )
    numbers = derived_numbers("midtrain", config)
    assert numbers["processes"] == "128"
    assert numbers["parameters"] == "3,836,021,760"  # Microsoft's own safetensors index
    assert numbers["tokens per step"] == f"{16_384 * 128:,}"
    gibibytes = 3_836_021_760 * (2 + 4 + 12 / 128) / 2**30
    assert numbers["weights, gradients, optimizer per GPU"] == f"{gibibytes:.3f} GiB"
