"""Stage 3: rollout DPO with NeMo-Aligner's own DPOTrainer over the Megatron-Core policy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from phimr_nemo.align.checkpoint import CheckpointStore
from phimr_nemo.align.compat import DPOTrainer, MegatronPretrainingBatchSampler
from phimr_nemo.align.lifecycle import StopTimer, check_checkpointing, content_identity, export, frozen_heap
from phimr_nemo.align.metrics import DPOLog, metrics_writer
from phimr_nemo.align.microbatch import MicroBatch, chunks_by_length, cut, trimmed_width, used_lengths
from phimr_nemo.align.pairs import PairCollate, load_pairs, stored_reference
from phimr_nemo.align.policy import LossSums, MegatronPolicy
from phimr_nemo.config import DPOConfig
from phimr_nemo.data.batches import EpochOrder
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.losses import IGNORED_LABEL, dpo_loss
from phimr_nemo.model.hf import HFDirectory
from phimr_nemo.runs import RunDirectory
from phimr_nemo.store import read_manifest
from phimr_nemo.train.distributed import PreemptionGuard, start_process_group


class DPOObjective:
    """Sigmoid DPO (paper, stage 3): the mean of -log sigma(beta (r_w - r_l)) over the pairs of the global batch.

    Args:
        beta: strength of the tie to the reference.
        micro_batch: pairs a micro-batch.
        multiple: sequence lengths are multiples of this.
        pad_id: token of the padding.
    """

    def __init__(self, beta: float, *, micro_batch: int, multiple: int, pad_id: int) -> None:
        self._beta, self._size, self._multiple, self._pad_id = beta, micro_batch, multiple, pad_id

    def micro_batches(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """Pairs of like length together; each micro-batch holds the chosen sides, then the rejected ones."""
        width = batch["chosen"].shape[1]
        longer = torch.maximum(used_lengths(batch["chosen_labels"]), used_lengths(batch["rejected_labels"]))
        micros = []
        for pairs in chunks_by_length(longer, self._size):
            columns = trimmed_width(longer[pairs], width, self._multiple)
            tokens = torch.cat([batch["chosen"][pairs], batch["rejected"][pairs]])
            labels = torch.cat([batch["chosen_labels"][pairs], batch["rejected_labels"][pairs]])
            reference = torch.cat(
                [batch["ref_policy_log_probs_chosen"][pairs], batch["ref_policy_log_probs_rejected"][pairs]]
            )
            micros.append(
                MicroBatch(
                    cut(tokens, columns, self._pad_id), cut(labels, columns, IGNORED_LABEL), {"reference": reference}
                )
            )
        return micros

    def loss(self, logprobs: Tensor, micro: MicroBatch) -> LossSums:
        """Loss and metrics summed over the micro-batch's pairs."""
        chosen, rejected = logprobs.sum(dim=1).chunk(2)
        reference_chosen, reference_rejected = micro.extras["reference"].to(logprobs.device).chunk(2)
        loss, metrics = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, self._beta)
        return loss, metrics.pop("pairs"), metrics

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over the pairs."""
        return {name: value / sums["count"] for name, value in sums.items() if name != "count"}


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
    check_checkpointing(config.checkpoint)
    base = HFDirectory(config.base)
    pad_id = base.architecture.pad_token_id
    pairs = load_pairs(config.pairs, load_tokenizer(config.base), config.sequence_length)
    order = EpochOrder(len(pairs), config.epochs, config.run.seed)
    steps = _steps(config, len(order))

    run = RunDirectory(config.run.output)
    start_process_group(config.parallel, config.run.seed)
    with PreemptionGuard() as guard:
        policy = _policy(config, base, steps)
        identity = content_identity(base, config.pairs)
        reference = stored_reference(run.path, policy, pairs, pad_id, identity)
        checkpoints = CheckpointStore(run.checkpoints, policy, keep=config.checkpoint.keep, identity=identity)
        counters = checkpoints.restore()
        with metrics_writer(run.path, counters["step"]) as writer:
            trainer = _trainer(
                config,
                policy,
                _loader(config, order, counters["consumed_samples"]),
                collate_fn=PairCollate(pairs, reference, pad_id),
                logger=DPOLog(writer, policy.optimizer, config.run.log_every),
                ckpt_callback=checkpoints,
                run_timer=StopTimer(guard),
                steps=steps,
            )
            trainer.load_state_dict(counters)
            with frozen_heap():
                trainer.fit()
    if trainer.step < steps:
        raise Preempted(f"dpo stopped at step {trainer.step} of {steps}; run the same command to continue")
    return {
        "steps": steps,
        "pairs": len(pairs),
        "pairs_too_long": pairs.dropped,
        "base_weights": identity["base weights"],
        "hf": export(run, policy, config.base),
        "seconds": time.monotonic() - started,
    }


def _policy(config: DPOConfig, base: HFDirectory, steps: int) -> MegatronPolicy:
    objective = DPOObjective(
        config.beta,
        micro_batch=config.micro_batch,
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
    )


def _loader(config: DPOConfig, order: EpochOrder, consumed: int) -> DataLoader[int]:
    """Batches of pair numbers; a data-parallel rank gets every n-th of the global batch, whatever the layout."""
    sampler = MegatronPretrainingBatchSampler(
        total_samples=len(order),
        consumed_samples=consumed,
        micro_batch_size=config.micro_batch,
        global_batch_size=config.global_batch,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
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
