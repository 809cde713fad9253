"""What a NeMo user does with the model, in NeMo's own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SEQUENCE_LENGTH = 32
SEED = 3
# Kingma and Ba (2015), section 2.1: with these betas a step changes no weight by more than the learning rate.
BETAS = (0.9, 0.95)


def round_trip(hf: Path, work: Path) -> None:
    """Import into `work/nemo`, export again into `work/hf`."""
    from nemo.collections import llm

    _leave_group()
    imported = llm.import_ckpt(model=_model(hf), source=f"hf://{hf}", output_path=work / "nemo")
    llm.export_ckpt(path=imported, target="hf", output_path=work / "hf")


def finetune(hf: Path, work: Path, steps: int, learning_rate: float, restore: bool) -> list[str]:
    """Import, fine-tune, export into `work/tuned`; without `restore` training starts from random weights.

    Returns:
        The words that the tokenizer of the imported model makes of a text.
    """
    from nemo import lightning as nl
    from nemo.collections import llm

    _leave_group()
    model = _model(hf)
    imported = llm.import_ckpt(model=model, source=f"hf://{hf}", output_path=work / "nemo")
    checkpoints = work / "checkpoints"
    llm.finetune(
        model=model,
        data=llm.MockDataModule(
            seq_length=SEQUENCE_LENGTH,
            tokenizer=model.tokenizer,
            micro_batch_size=1,
            global_batch_size=1,
            num_train_samples=steps,
            num_workers=0,
            pin_memory=False,
        ),
        trainer=nl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            strategy=nl.MegatronStrategy(process_group_backend="gloo"),
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        ),
        log=nl.NeMoLogger(
            log_dir=str(work / "log"),
            ckpt=nl.ModelCheckpoint(
                dirpath=checkpoints,
                filename="{step}",
                monitor="step",
                mode="max",
                every_n_train_steps=steps,
                save_last=False,
                always_save_context=True,
            ),
        ),
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(imported))) if restore else None,
        optim=_optimizer(learning_rate),
    )
    (tuned,) = checkpoints.glob("*")
    llm.export_ckpt(path=tuned, target="hf", output_path=work / "tuned")
    words: list[str] = model.tokenizer.text_to_tokens("1 + 2")
    return words


def _leave_group() -> None:
    """NeMo starts the process group itself."""
    torch.distributed.destroy_process_group()


def _model(hf: Path) -> Any:
    """A model of the directory's architecture with random weights."""
    from phimr_nemo.config import ModelConfig, ParallelConfig
    from phimr_nemo.model.architecture import Architecture
    from phimr_nemo.supervised.nemo_model import Phi4MiniModel, architecture_config

    config = architecture_config(
        Architecture.from_directory(hf),
        ModelConfig(dtype="fp32"),
        ParallelConfig(),
        max_length=SEQUENCE_LENGTH,
        seed=SEED,
    )
    return Phi4MiniModel(config)


def _optimizer(learning_rate: float) -> Any:
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl

    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=learning_rate,
            min_lr=learning_rate,
            weight_decay=0.0,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            bf16=False,
            use_distributed_optimizer=False,
        )
    )


def convert_and_export(hf: Path, work: Path) -> None:
    """Hugging Face -> `work/megatron` -> `work/nemo` -> `work/hf`; NeMo makes `work/exported` of `work/nemo`."""
    from nemo.collections import llm

    from phimr_nemo.config import ParallelConfig
    from phimr_nemo.supervised.conversion import convert

    _leave_group()
    for kind, source, layout in [
        ("megatron", hf, ParallelConfig(tensor=2, pipeline=4)),
        ("nemo", work / "megatron", ParallelConfig(tensor=2, pipeline=2)),
        ("hf", work / "nemo", ParallelConfig()),
    ]:
        convert(source, work / kind, kind=kind, layout=layout, hf=None)
    llm.export_ckpt(path=work / "nemo", target="hf", output_path=work / "exported")
