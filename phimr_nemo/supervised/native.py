"""Stages 1 and 2 as NeMo 2.0's own kind of recipe: the arguments of `llm.train`, every part of them a description.

What `phimr` and such a recipe build comes from the same functions (:mod:`phimr_nemo.supervised.assembly`), so they
train alike. A recipe has NeMo's logger, checkpoints and resume in place of ours: use `phimr` where a run has to
survive damaged checkpoints and preemption, and a recipe where NeMo-Run's executors and experiments are at home.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from nemo import lightning as nl
from nemo.collections import llm

from phimr_nemo.config import LongRopePolicy, ModelConfig, ParallelConfig, SupervisedConfig
from phimr_nemo.errors import UserError
from phimr_nemo.model.architecture import Architecture
from phimr_nemo.model.origin import trained_from
from phimr_nemo.store.atomic import write_json
from phimr_nemo.store.shards import read_manifest
from phimr_nemo.supervised import assembly
from phimr_nemo.supervised.assembly import described
from phimr_nemo.supervised.data import SupervisedDataModule, midtrain_data, require_parent, sft_data, training_steps
from phimr_nemo.supervised.nemo_model import Phi4MiniConfig, Phi4MiniModel, phi4mini_config
from phimr_nemo.training import platform
from phimr_nemo.training.distributed import exported, quiet_libraries, write_hf_export
from phimr_nemo.training.precision import require_fp8

Stage = Literal["midtrain", "sft"]
Describe = Callable[..., Any]
"""`nemo_run.Config`: a class or function and its arguments -> their description."""

DATA: Final[dict[Stage, Callable[[SupervisedConfig], SupervisedDataModule]]] = {
    "midtrain": midtrain_data,
    "sft": sft_data,
}
KINDS: Final[dict[Stage, Literal["rows", "conversations"]]] = {"midtrain": "rows", "sft": "conversations"}
CHECKPOINT_NAME: Final = "{step}"
VAL_LOSS: Final = "val_loss"
EXPORTED: Final = "exported.json"
TRAIN: Final = llm.train
"""What a recipe calls."""


def starting_model(
    base: Path, model: ModelConfig, parallel: ParallelConfig, *, max_length: int, seed: int
) -> Phi4MiniConfig:
    """:func:`phimr_nemo.supervised.nemo_model.phi4mini_config`, in a process that is ready for this machine.

    Raises:
        UserError: as there, or FP8 without Transformer Engine.
    """
    require_parent(base)
    require_fp8(model)
    platform.prepare()
    quiet_libraries()
    return phi4mini_config(base, model, parallel, max_length=max_length, seed=seed)


class HFExport(pl.Callback):
    """Writes the trained model as a Hugging Face directory, the next stage's base (collective).

    With `best` it is written whenever the validation loss is the lowest so far, and `exported.json` beside it says of
    which step it is; else when training ends.

    Args:
        base: where tokenizer and chat template come from.
        target: the new directory; one that is there is replaced.
        sequence_length, longrope: of the run; see :func:`phimr_nemo.model.origin.trained_from`.
        best: the weights of the lowest validation loss instead of the last ones.
    """

    def __init__(
        self, base: Path, target: Path, sequence_length: int, longrope: LongRopePolicy, *, best: bool = False
    ) -> None:
        self.base, self.target, self.best = base, target, best
        self.sequence_length, self.longrope = sequence_length, longrope
        self._lowest = math.inf

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write where the loss is the lowest so far (Lightning's hook)."""
        box = [float(trainer.callback_metrics.get(VAL_LOSS, math.nan))]
        dist.broadcast_object_list(box)
        if not self.best or trainer.state.fn != "fit" or not box[0] < self._lowest:
            return
        self._lowest = box[0]
        self._write(trainer)
        if trainer.global_rank == 0:
            measure = {"metric": VAL_LOSS, "value": self._lowest}
            write_json(self.target.parent / EXPORTED, {"exported_step": trainer.global_step, "measure": measure})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write the last weights, unless the best ones are there (Lightning's hook)."""
        if math.isinf(self._lowest):
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        architecture = Architecture.from_directory(self.base)
        tensors = exported(trainer.strategy.megatron_parallel, architecture)
        origin = trained_from(self.base, self.sequence_length, self.longrope)
        write_hf_export(tensors, architecture, self.base, self.target, origin)

    def state_dict(self) -> dict[str, Any]:
        """The lowest loss so far, for a run that continues."""
        return {"lowest": self._lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._lowest = float(state_dict["lowest"])


def native_parts(
    stage: Stage, config: SupervisedConfig, *, nodes: int, accelerator: Literal["gpu", "cpu"], make: Describe
) -> dict[str, Any]:
    """The stage as arguments of `llm.train`, for NeMo-Run's command line and executors.

    Args:
        stage: whose data and settings these are.
        config: of the stage. `guard`, `evaluation`, `early_stopping` and `tracking` belong to `phimr`.
        nodes: machines, with equally many processes each.
        accelerator: of the machines that will run it, not of this one.
        make: `nemo_run.Config`.

    Returns:
        Descriptions whose parts can be overridden: `optim.config.lr=2e-5 trainer.max_steps=100 log.name=mine`.

    Raises:
        UserError: the data is not finished or too little for one batch, or what only `phimr` offers is asked for.
    """
    only_phimr = [name for name in ("early_stopping", "evaluation") if getattr(config, name) is not None]
    if only_phimr:
        raise UserError(
            f"{', '.join(only_phimr)} in a native recipe",
            rule="these need the run directory that `phimr` keeps",
            remedy=f"leave them out, or run `phimr {stage}`",
        )
    if config.checkpoint.best and config.checkpoint.metric != VAL_LOSS:
        raise UserError(
            f"checkpoint.best=true with checkpoint.metric={config.checkpoint.metric} in a native recipe",
            rule=f"NeMo's trainer knows {VAL_LOSS} of these measures",
            remedy=f"set checkpoint.metric={VAL_LOSS}, or checkpoint.best=false, or run `phimr {stage}`",
        )
    steps = training_steps(config, read_manifest(config.data, KINDS[stage]).rows)
    validation_steps = config.validation_rows // config.global_batch
    on_gpu = accelerator == "gpu"
    callbacks = [
        make(
            HFExport,
            base=described(config.base, make),
            target=described(config.run.output / "hf", make),
            sequence_length=config.sequence_length,
            longrope=config.model.longrope,
            best=config.checkpoint.best,
        )
    ]
    if config.overlap.tensor:
        callbacks.append(assembly.tensor_overlap(config, make))
    model = make(
        starting_model,
        base=described(config.base, make),
        model=described(config.model, make),
        parallel=described(config.parallel, make),
        max_length=config.sequence_length,
        seed=config.run.seed,
    )
    checkpoint = make(
        nl.ModelCheckpoint,
        monitor="step",
        mode="max",
        every_n_train_steps=config.checkpoint.every,
        save_top_k=config.checkpoint.keep,
        save_last=True,
        save_optim_on_train_end=True,
        filename=CHECKPOINT_NAME,
    )
    return {
        "model": make(Phi4MiniModel, config=model),
        "data": make(DATA[stage], config=described(config, make)),
        "trainer": assembly.trainer(
            config,
            steps=steps,
            validation_steps=validation_steps,
            nodes=nodes,
            on_gpu=on_gpu,
            callbacks=callbacks,
            make=make,
            enable_checkpointing=True,
            enable_progress_bar=True,
        ),
        "log": make(nl.NeMoLogger, log_dir=str(config.run.output), name=stage, ckpt=checkpoint),
        "resume": make(nl.AutoResume, resume_if_exists=True, resume_ignore_no_checkpoint=True),
        "optim": assembly.optimizer(config, steps, make),
    }
