"""NeMo's own style of launching trains what `phimr` trains; its recipes can be changed and shipped like NeMo's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch
from distributed import run_distributed
from supervised_inputs import make_inputs, overrides, weights
from supervised_worker import train

from phimr_nemo.config import MidtrainConfig, load_config, to_yaml
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.runs import RunDirectory

STAGE: Final = "midtrain"
STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def config(inputs: Path, output: Path, *changes: str) -> MidtrainConfig:
    return load_config(MidtrainConfig, Path("conf/midtrain/tiny.yaml"), overrides(STAGE, inputs, output, changes))


def test_a_native_recipe_trains_the_same_weights_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    """`python -m recipes`, an override on its command line, against `phimr midtrain`: the best of a few wild steps.

    The planted fault is the base itself: the two agree because both trained, not because neither did.
    """
    ours = [f"max_steps={STEPS}", "optim.schedule=constant", "optim.lr=1.0", "optim.min_lr=1.0"]
    ours += ["validation_rows=4", "validate_every=1", "checkpoint.best=true", "optim.warmup_fraction=0"]
    run_distributed(train, 1, STAGE, overrides(STAGE, inputs, tmp_path / "phimr", ours))
    # One value of the file is wrong and set right on the command line.
    path = tmp_path / "midtrain.yaml"
    atomic_write_text(path, to_yaml(config(inputs, tmp_path / "native", *ours, "optim.weight_decay=0.9")))
    factory = f"phi4mini_midtrain(config={path},accelerator=cpu)"
    done = subprocess.run(
        [sys.executable, "-m", "recipes", "--yes", "--factory", factory, "optim.config.weight_decay=0.1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = weights(tmp_path / "phimr"), weights(tmp_path / "native")
    base = weights(inputs / "base")
    done_with = RunDirectory(tmp_path / "phimr").closing_facts()
    assert done_with["exported_step"] < STEPS, "the last step is the best: the test shows less"
    exported = json.loads((tmp_path / "native" / "exported.json").read_text("utf-8"))
    assert exported["exported_step"] == done_with["exported_step"]
    assert exported["measure"] == pytest.approx(done_with["measure"])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not all(torch.equal(base[name], found[name]) for name in base)


def test_recipes_are_descriptions_that_an_executor_can_ship(inputs: Path, tmp_path: Path) -> None:
    from nemo.collections import llm
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from phimr_nemo.supervised.data import training_steps
    from recipes.native import native_recipe

    settings = config(inputs, tmp_path / "run", "max_steps=0", "validation_rows=4", "parallel.tensor=2")
    recipe = native_recipe(STAGE, settings, nodes=1, accelerator="gpu")
    assert recipe.__fn_or_cls__ is llm.train
    # Descriptions are made on a login node: nothing in them is what this machine happens to be.
    assert (recipe.trainer.accelerator, recipe.trainer.strategy.process_group_backend) == ("gpu", "nccl")
    assert recipe.trainer.strategy.tensor_model_parallel_size == recipe.model.config.parallel.tensor == 2
    assert recipe.trainer.devices == 2
    steps = (data_rows(inputs) - 4) * settings.epochs // settings.global_batch
    assert recipe.trainer.max_steps == recipe.optim.lr_scheduler.max_steps == steps
    assert training_steps(settings, data_rows(inputs)) == steps
    assert settings.global_batch == 4, "one global batch is kept out"
    assert recipe.trainer.limit_val_batches * settings.micro_batch == (4 if settings.validate_every <= steps else 0)
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(recipe)) == recipe
    recipe.optim.config.lr = 1.0
    assert serializer.deserialize(serializer.serialize(recipe)).optim.config.lr == 1.0


def data_rows(inputs: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(path).num_rows for path in (inputs / "rows").glob("*.parquet"))


def test_what_only_phimr_offers_is_refused(inputs: Path, tmp_path: Path) -> None:
    from recipes.native import native_recipe

    stops = ("early_stopping.patience=1", "early_stopping.min_delta=0.0", "checkpoint.metric=loss")
    settings = config(inputs, tmp_path / "run", *stops)
    with pytest.raises(UserError, match="early_stopping"):
        native_recipe(STAGE, settings, nodes=1, accelerator="gpu")
    best = config(inputs, tmp_path / "run", "checkpoint.best=true", "checkpoint.metric=loss")
    with pytest.raises(UserError, match=r"checkpoint\.metric=loss"):
        native_recipe(STAGE, best, nodes=1, accelerator="gpu")
