"""What a rank does in the parity tests of distillation: one update of made-up responses, or a run of the stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from grpo_worker import NOISE, Update, rows_of
from megatron.core import parallel_state
from torch import Tensor

from phimr_nemo.align.distill.objective import DistillObjective
from phimr_nemo.align.distill.stage import open_teacher
from phimr_nemo.align.distill.teacher import DirectoryTeacher
from phimr_nemo.align.grpo import stage as rounds
from phimr_nemo.align.microbatch import MicroBatch
from phimr_nemo.config import DistillConfig, load_config
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.convert import export_tensors
from phimr_nemo.training.distributed import start_process_group
from phimr_nemo.training.guard import BatchGuard


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """Break one thing that the teacher's place beside the student depends on."""
    if fault is None:
        yield
        return
    assert fault == "states of the token before"
    real = DirectoryTeacher.taught

    def shifted(self: DirectoryTeacher, micros: Sequence[MicroBatch]) -> list[MicroBatch]:
        found = []
        for micro in real(self, micros):
            assert micro.teacher is not None
            states = micro.teacher._replace(hidden=micro.teacher.hidden.roll(1, 0))
            found.append(replace(micro, teacher=states))
        return found

    with mock.patch.object(DirectoryTeacher, "taught", shifted):
        yield


def one_update(path: Path, overrides: Sequence[str], lengths: Sequence[int], fault: str | None) -> Update:
    """Loss and gradients of all rows in one step, as the trainer makes it; the sampler's values are made up."""
    config = load_config(DistillConfig, path, overrides)
    base = HFDirectory(config.base)
    start_process_group(config.parallel, config.run.seed)
    objective = DistillObjective(config, open_teacher(config), **rounds.layout_of(config, base))
    guard = BatchGuard(config.run.output, config.guard, lambda _: [])
    trained = rounds.build_policy(config, base, guard, objective)
    batch = rows_of(lengths, base.architecture.vocab_size, base.architecture.pad_token_id)
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    batch = {name: value[rank::ranks] for name, value in batch.items()}
    batch["sampler_logprobs"] = torch.zeros(batch["labels"].shape)
    plain = objective.plain_micro_batches(batch)
    taught = objective.teacher.log_probs(batch, plain, trained.temperature)
    if config.weighs_tokens:
        generator = torch.Generator().manual_seed(1)
        before = trained.batch_log_probs(batch)
        for name in ("sampler_logprobs", "old_logprobs"):
            batch[name] = before + NOISE * torch.randn(before.shape, generator=generator)
        batch["teacher_logprobs"] = taught
    trained.prepare_for_training_step()
    with planted(fault):
        loss, metrics = trained.get_loss_and_metrics(batch, forward_only=False)
    return Update(
        loss, metrics, _gradients(trained.model, base), taught, len(plain), sum(m.tokens.numel() for m in plain), 0
    )


def _gradients(model: torch.nn.Module, base: HFDirectory) -> Tensor:
    """Of all parameters under their Hugging Face names, whole, flat, in the order of the names."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.copy_(parameter.main_grad)
        whole = dict(export_tensors([model], base.architecture))
    return torch.cat([whole[name].float().flatten() for name in sorted(whole)])
