"""Stage 3: rollout DPO with NeMo-Aligner's own DPOTrainer over the Megatron-Core policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from phimr_nemo.align.checkpoint import TrainerCheckpoints
from phimr_nemo.align.compat import DPOTrainer, MegatronPretrainingBatchSampler, show_progress_of
from phimr_nemo.align.dpo.log import DPOLog
from phimr_nemo.align.dpo.objective import DPOObjective
from phimr_nemo.align.dpo.pairs import PairCollate, Pairs, held_out_pairs, load_pairs
from phimr_nemo.align.dpo.reference import reference_identity, stored_reference
from phimr_nemo.align.dpo.validation import PREFIX, validate, validation_batches
from phimr_nemo.align.evaluated import Evaluated
from phimr_nemo.align.lifecycle import BetweenSteps, content_identity, export, frozen_heap, speed_of
from phimr_nemo.align.measuring import Measure, Measuring
from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import DPOConfig, to_dict
from phimr_nemo.config.dpo import StoredReference
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.data.rows.batches import EpochOrder, left_over
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import read_manifest
from phimr_nemo.training import platform
from phimr_nemo.training.checkpoint import CheckpointStore
from phimr_nemo.training.distributed import PreemptionGuard, start_process_group
from phimr_nemo.training.early_stopping import Judge
from phimr_nemo.training.guard import BatchGuard
from phimr_nemo.training.metrics import metrics_of
from phimr_nemo.training.plots import plot_dpo
from phimr_nemo.training.tracking import open_log


def run_dpo(config: DPOConfig) -> dict[str, Any]:
    """Train on preference pairs and export `<run.output>/hf`. Called in every process.

    An unfinished run in `run.output` continues at its newest checkpoint.

    Returns:
        The closing facts.

    Raises:
        UserError: bad input, too few pairs, an impossible layout, or a resumed run whose inputs changed.
        Preempted: the run was told to stop and has saved its state.
    """
    started = time.monotonic()
    read_manifest(config.pairs, "pairs")
    base = HFDirectory(config.base)
    pad_id = base.architecture.pad_token_id
    pairs = load_pairs(config.pairs, load_tokenizer(config.base), config.sequence_length, config.overlong)
    training, validation = held_out_pairs(pairs, config.validation_pairs, config.run.seed)
    order = TrainingOrder(training, config.epochs, config.run.seed)
    steps = _steps(config, len(order))
    not_trained_on = left_over(len(training), config.epochs, steps, config.global_batch, "pairs")

    run = RunDirectory(config.run.output)
    if config.model.deterministic:
        platform.make_deterministic()
    start_process_group(config.parallel, config.run.seed)
    metric = metrics_of("dpo")[config.checkpoint.metric]
    judge = Judge(run.path, metric, config.early_stopping, every=_measured_every(config), last=steps)
    store = CheckpointStore(run.checkpoints, config.checkpoint, judge)
    batch_guard = BatchGuard(run.path, config.guard, lambda step: _batch_rows(config, pairs, order, step))
    with PreemptionGuard() as signals:
        policy = build_policy(config, base, steps, batch_guard)
        identity = content_identity(base, config.pairs)
        if isinstance(config.reference, StoredReference):
            computed = reference_identity(config, identity, pairs)
            reference = stored_reference(
                run.path, config.reference.path, policy, pairs, pad_id, computed, signals.stop_agreed
            )
        else:
            # The policy is still the base here; a checkpoint is loaded after this.
            reference = None
            policy.keep_reference()
        checkpoints = TrainerCheckpoints(store, policy, batch_guard, identity)
        counters = checkpoints.restore()
        with open_log(run.path, config.tracking, to_dict(config), done=counters["step"]) as lines:
            log = DPOLog(lines, policy.optimizer, config.run.log_every, speed_of(policy, config.model))
            asked = (pairs.questions[number] for number in training)
            evaluated = Evaluated(config, run, policy, asked)
            measures = [*evaluated.measures(), *_validation(config, policy, validation, lambda: trainer)]
            measuring = Measuring(measures, run.path, lines, last=steps)
            show_progress_of("dpo")
            trainer = _trainer(
                config,
                policy,
                _loader(config, order, counters["consumed_samples"]),
                collate_fn=PairCollate(
                    pairs,
                    reference,
                    pad_id,
                    rank=parallel_state.get_data_parallel_rank(),
                    ranks=parallel_state.get_data_parallel_world_size(),
                ),
                logger=log,
                ckpt_callback=checkpoints,
                run_timer=BetweenSteps(signals, store, measuring, lambda: trainer),
                steps=steps,
            )
            trainer.load_state_dict(counters)
            batch_guard.attach(policy.optimizer.megatron, lambda: trainer.step + 1)
            with frozen_heap():
                # A run that had converged, and died before its export, does not train on.
                if not judge.has_converged(trainer.step):
                    trainer.fit()
            store.finish_writing(wait=True)
            if trainer.step == steps:
                measuring.after(steps)
            evaluated.close()
    converged = judge.has_converged(trainer.step)
    if trainer.step < steps and not converged:
        raise Preempted(f"dpo stopped at step {trainer.step} of {steps}; run the same command to continue")
    if dist.get_rank() == 0:
        plot_dpo(run.path)
    return {
        "steps": trainer.step,
        "converged": converged,
        "skipped_batches": batch_guard.skipped,
        "pairs": len(training),
        "validation_pairs": len(validation),
        "pairs_not_trained_on": not_trained_on,
        "pairs_too_long": pairs.too_long,
        "pairs_truncated": pairs.truncated,
        "collapsed_at_step": log.collapsed_at,
        "base_weights": identity["base weights"],
        **export(run, policy, config, store, trainer.step),
        "seconds": time.monotonic() - started,
    }


class TrainingOrder:
    """Sample number -> pair number: epochs of the pairs that are trained on.

    Args:
        numbers: of the pairs.
        epochs, seed: see :class:`EpochOrder`.
    """

    def __init__(self, numbers: Sequence[int], epochs: int, seed: int) -> None:
        self._numbers, self._order = numbers, EpochOrder(len(numbers), epochs, seed)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, sample: int) -> int:
        return self._numbers[self._order[sample]]


def _measured_every(config: DPOConfig) -> int:
    """Steps between two values of what the run is judged by."""
    metric = config.checkpoint.metric
    if metric == "pass1" and config.evaluation is not None:
        return config.evaluation.every
    return config.validate_every if metric.startswith(PREFIX) else config.checkpoint.every


def _validation(
    config: DPOConfig, policy: MegatronPolicy, numbers: Sequence[int], trainer: Callable[[], Any]
) -> list[Measure]:
    """The measurement on the validation pairs, if there are any."""
    if not numbers:
        return []
    batches = validation_batches(numbers, config.global_batch)
    return [Measure(config.validate_every, f"{PREFIX}loss", lambda _: validate(trainer(), policy, batches))]


def _batch_rows(config: DPOConfig, pairs: Pairs, order: TrainingOrder, step: int) -> list[dict[str, Any]]:
    """What names the pairs of a step's global batch (steps count from 1)."""
    numbers = [order[sample] for sample in range((step - 1) * config.global_batch, step * config.global_batch)]
    return [{"pair": int(number), "id": pairs.ids[number]} for number in numbers]


def build_policy(config: DPOConfig, base: HFDirectory, steps: int, guard: BatchGuard) -> MegatronPolicy:
    """The policy with the stage's objective, for `steps` optimizer steps; Megatron's groups are up already."""
    objective = DPOObjective(
        config,
        multiple=config.parallel.tensor if config.parallel.sequence else 1,
        pad_id=base.architecture.pad_token_id,
    )
    return MegatronPolicy(
        base=base,
        model=config.model,
        parallel=config.parallel,
        optim=config.optim,
        objective=objective,
        steps=steps,
        sequence_length=config.sequence_length,
        micro_batch=2 * config.micro_batch,
        global_batch=config.global_batch,
        guard=guard,
        lora=config.lora,
    )


def _loader(config: DPOConfig, order: TrainingOrder, consumed: int) -> DataLoader[int]:
    """Global batches of pair numbers; the collate function takes the data-parallel rank's share of each."""
    sampler = MegatronPretrainingBatchSampler(
        total_samples=len(order),
        consumed_samples=consumed,
        micro_batch_size=config.micro_batch,
        global_batch_size=config.global_batch,
        data_parallel_rank=0,
        data_parallel_size=1,
        drop_last=True,
    )
    # The trainer collates by itself, outside the loader.
    return DataLoader(order, batch_sampler=sampler, collate_fn=list, num_workers=0)


def _trainer(config: DPOConfig, policy: MegatronPolicy, loader: DataLoader[int], *, steps: int, **parts: Any) -> Any:
    options = {
        # The order of the data knows its epochs; to the trainer they are one.
        "max_epochs": 1,
        "max_steps": steps,
        "save_interval": config.checkpoint.every,
        "val_check_interval": 0,
        "limit_train_batches": 1.0,
        "limit_val_batches": 0,
        "gradient_clip_val": None,
    }
    return DPOTrainer(
        cfg=OmegaConf.create(options),
        model=policy,
        optimizer=policy.optimizer,
        scheduler=policy.scheduler,
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=None,
        **parts,
    )


def _steps(config: DPOConfig, samples: int) -> int:
    steps = samples // config.global_batch
    if steps == 0:
        raise UserError(
            f"{config.pairs} gives {samples} pairs in {config.epochs} epochs",
            rule=f"at least one global batch of {config.global_batch} pairs",
            remedy="bring more pairs, or lower global_batch",
        )
    return min(steps, config.max_steps) if config.max_steps else steps
