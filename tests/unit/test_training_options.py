"""Training options that do not go together are refused before anything starts; the paper presets are the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phimr_nemo.config import STAGES, ModelConfig, ParallelConfig, load_config
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.changes import check_same_run, made_from
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.layout import check_layout
from phimr_nemo.store.provenance import MADE_FROM
from phimr_nemo.store.runs import RunDirectory


def settings(stage: str, *overrides: str, preset: str = "tiny") -> Any:
    needed = ["base=base"] if stage == "midtrain" else []
    return load_config(STAGES[stage], Path(f"conf/{stage}/{preset}.yaml"), [*needed, *overrides])


@pytest.mark.parametrize("stage", ["midtrain", "sft", "dpo", "grpo"])
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_the_presets_go_together(stage: str, preset: str) -> None:
    settings(stage, preset=preset)


@pytest.mark.parametrize(
    ("stage", "overrides", "named"),
    [
        ("midtrain", ["model.fp8=delayed"], "model.dtype=fp32"),
        ("midtrain", ["overlap.param_gather=true"], "overlap.grad_reduce=False"),
        (
            "midtrain",
            ["overlap.param_gather=true", "overlap.grad_reduce=true", "optim.distributed=false"],
            "optim.distributed=False",
        ),
        ("sft", ["overlap.tensor=true"], "parallel.sequence=false"),
        ("sft", ["parallel.virtual=2", "parallel.pipeline=2", "micro_batch=32"], "1 micro-batches"),
        ("dpo", ["model.fp8=current"], "model.fp8=current"),
        ("grpo", ["parallel.virtual=2", "parallel.pipeline=2"], "parallel.virtual=2"),
    ],
)
def test_what_does_not_go_together_is_refused(stage: str, overrides: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(stage, *overrides)
    assert named in caught.value.problem


def test_virtual_pipelining_that_goes() -> None:
    settings("sft", "parallel.virtual=2", "parallel.pipeline=2", "micro_batch=16")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("guard.spike_factor=0.5", "guard.spike_factor"),
        ("early_stopping.patience=0 early_stopping.min_delta=0", "early_stopping.patience"),
        ("early_stopping.patience=1", "early_stopping.min_delta"),
        ("loss_on=prompt", "loss_on"),
        ("model.recompute=true", "model.recompute"),
        ("tracking.wandb.project=x", "tracking.wandb.mode"),
    ],
)
def test_bad_values_are_named(overrides: str, key: str) -> None:
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        settings("midtrain", *overrides.split())


@pytest.mark.parametrize(
    ("stage", "overrides", "named"),
    [
        ("midtrain", "checkpoint.best=true validation_rows=0", "checkpoint.metric=val_loss is never measured"),
        (
            "sft",
            "checkpoint.metric=pass1 early_stopping.patience=1 early_stopping.min_delta=0",
            "checkpoint.metric=pass1",
        ),
        ("dpo", "checkpoint.metric=val_loss checkpoint.best=true", "checkpoint.metric=val_loss"),
        ("grpo", "guard.on_nan=skip guard.spike_factor=2", "guard.spike_of=loss"),
    ],
)
def test_a_measure_that_there_never_is_is_refused(stage: str, overrides: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        settings(stage, *overrides.split())


LAYERS = {4: [(2, 2)], 8: [(2, 2), (4, 2), (2, 4)]}


@pytest.mark.parametrize("layers", LAYERS)
def test_virtual_stages_divide_the_layers(layers: int) -> None:
    arch = Architecture.from_hf_config(
        {
            "model_type": "phi3",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "partial_rotary_factor": 1.0,
        }
    )
    for pipeline in (2, 4):
        for virtual in (2, 4):
            if (pipeline, virtual) in LAYERS[layers]:
                check_layout(arch, ParallelConfig(pipeline=pipeline, virtual=virtual))
            else:
                with pytest.raises(UserError, match=f"parallel.virtual={virtual}"):
                    check_layout(arch, ParallelConfig(pipeline=pipeline, virtual=virtual))


def test_fp8_without_transformer_engine_is_refused_with_a_remedy() -> None:
    from phimr_nemo.model.megatron.configuration import has_transformer_engine
    from phimr_nemo.training.precision import require_fp8

    if has_transformer_engine():
        pytest.skip("Transformer Engine is here")
    with pytest.raises(UserError, match="Transformer Engine"):
        require_fp8(ModelConfig(dtype="bf16", fp8="delayed"))


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_fp8_recipes_are_nemo_s(recipe: Any) -> None:
    from phimr_nemo.supervised.assembly import call
    from phimr_nemo.training.precision import precision_plugins

    [plugin] = precision_plugins(ModelConfig(dtype="bf16", fp8=recipe), call)
    made = plugin.dtype_config
    assert (made.fp8, made.bf16, made.fp8_param_gather) == ("hybrid", True, False)
    # Built in the format they are kept in, and not in float32 first.
    assert made.params_dtype == torch.bfloat16
    assert made.fp8_recipe == {"delayed": "delayed", "current": "tensorwise"}[recipe]


def test_the_paper_s_numbers_are_the_presets() -> None:
    """Section 3 and the table of hyperparameters: 16 K packed and 20 K, batch 128, 1e-5, 10 % warm-up, 5 epochs."""
    for stage, length in (("midtrain", 16 * 1024), ("sft", 20 * 1024)):
        config = settings(stage, preset="paper")
        assert config.sequence_length == length
        assert (config.global_batch, config.epochs) == (128, 5)
        assert (config.optim.lr, config.optim.warmup_fraction) == (1e-5, 0.1)
        assert config.parallel.world_size == 128


def test_a_continued_run_may_change_what_guards_and_reports(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    from phimr_nemo.config import to_yaml

    before = settings("midtrain", f"run.output={tmp_path}")
    facts = {MADE_FROM: made_from(before).to_json()}
    run.describe(stage="midtrain", config_yaml=to_yaml(before), seed=before.run.seed, facts=facts)
    free = ["guard.on_nan=skip", "data_workers=3", "tracking.wandb.project=p", "tracking.wandb.mode=offline"]
    check_same_run("midtrain", run, settings("midtrain", f"run.output={tmp_path}", *free, "overlap.grad_reduce=true"))
    evaluation = ["every=2", "problems.kind=synthetic", "problems.count=2", "problems.split=heldout", "samples=1"]
    more = ["prompt='{question}'", "temperature=0.6", "top_p=0.9", "max_new_tokens=3"]
    added = [f"evaluation.{item}" for item in (*evaluation, *more)]
    check_same_run("midtrain", run, settings("midtrain", f"run.output={tmp_path}", *added))
    with pytest.raises(UserError, match="loss_on"):
        check_same_run("midtrain", run, settings("midtrain", f"run.output={tmp_path}", "loss_on=all"))
