"""A stage of rounds on NeMo-Aligner's ReinforceTrainer, from its inputs to its export; and GRPO, one of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from phimr_nemo.align.checkpoint import TrainerCheckpoints
from phimr_nemo.align.compat import MegatronPretrainingBatchSampler, show_progress_of
from phimr_nemo.align.grpo.log import GRPOLog, RoundsLog
from phimr_nemo.align.grpo.loop import RoundInterrupted, RoundsTrainer
from phimr_nemo.align.grpo.objective import GRPOObjective
from phimr_nemo.align.grpo.responses import KeptResponses
from phimr_nemo.align.grpo.rollouts import PromptSet, load_prompts
from phimr_nemo.align.grpo.rounds import Rounds, pending_directory
from phimr_nemo.align.grpo.samplers import free_gpus, lead_of, open_sampler, turns_of
from phimr_nemo.align.grpo.trainer import GRPOTrainer
from phimr_nemo.align.lifecycle import BetweenSteps, content_identity, export, frozen_heap, speed_of
from phimr_nemo.align.measuring import Measure, Measuring
from phimr_nemo.align.policy import MegatronPolicy, Objective
from phimr_nemo.config import GRPOConfig, RoundsConfig, to_dict
from phimr_nemo.data.chat import load_tokenizer
from phimr_nemo.data.rows.batches import EpochOrder
from phimr_nemo.errors import Preempted
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.store.responses import drop_later
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.store.shards import read_manifest
from phimr_nemo.training import platform
from phimr_nemo.training.checkpoint import CheckpointStore
from phimr_nemo.training.distributed import PreemptionGuard, start_process_group, wait_for_all
from phimr_nemo.training.early_stopping import Judge
from phimr_nemo.training.guard import BatchGuard
from phimr_nemo.training.metrics import Stage, metrics_of
from phimr_nemo.training.tracking import open_log
from phimr_nemo.verify import Grader


@dataclass(frozen=True)
class Learning:
    """What a stage learns from its rounds.

    Attributes:
        stage: its name.
        objective: makes what is optimised, when Megatron's groups are up (collective).
        trainer: what becomes of a round's responses.
        log: what is drawn of it.
        identity: by name, what a resumed run must find unchanged besides base and prompts (collective).
        keeps_reference: the base's weights are needed beside the policy's.
    """

    stage: Stage
    objective: Callable[[HFDirectory], Objective]
    trainer: type[RoundsTrainer]
    log: type[RoundsLog]
    identity: Callable[[], Mapping[str, str]] = dict
    keeps_reference: bool = False


def run_grpo(config: GRPOConfig) -> dict[str, Any]:
    """Improve the base by its own graded rollouts and export `<run.output>/hf`. Called in every process.

    An unfinished run in `run.output` continues at its newest checkpoint.

    Returns:
        The closing facts.

    Raises:
        UserError: bad input, no usable prompt, an impossible layout, or a resumed run whose inputs changed.
        Preempted: the run was told to stop and has saved its state.
    """
    learning = Learning(
        "grpo",
        lambda base: GRPOObjective(config, **layout_of(config, base)),
        GRPOTrainer,
        GRPOLog,
        keeps_reference=config.kl > 0,
    )
    return run_rounds(config, learning)


def layout_of(config: RoundsConfig, base: HFDirectory) -> dict[str, int]:
    """What an objective must know of layout and model."""
    multiple = config.parallel.tensor if config.parallel.sequence else 1
    return {"multiple": multiple, "pad_id": base.architecture.pad_token_id}


def run_rounds(config: RoundsConfig, learning: Learning) -> dict[str, Any]:
    """Train the base by rounds of its own responses and export `<run.output>/hf`. Called in every process.

    Args:
        config: of the stage.
        learning: what it learns.

    Returns, raises:
        As :func:`run_grpo`.
    """
    started = time.monotonic()
    read_manifest(config.prompts, "prompts")
    base = HFDirectory(config.base)
    tokenizer = load_tokenizer(config.base)
    prompts = load_prompts(config.prompts, tokenizer, config)

    run = RunDirectory(config.run.output)
    if config.model.deterministic:
        platform.make_deterministic()
    start_process_group(config.parallel, config.run.seed)
    metric = metrics_of(learning.stage)[config.checkpoint.metric]
    judge = Judge(run.path, metric, config.early_stopping, every=_measured_every(config), last=config.steps)
    store = CheckpointStore(run.checkpoints, config.checkpoint, judge)
    batch_guard = BatchGuard(run.path, config.guard, lambda _: trainer.prompts_of_the_round())
    with PreemptionGuard() as signals, _grader(config) as grader:
        free_gpus(config)
        policy = build_policy(config, base, batch_guard, learning.objective(base))
        if learning.keeps_reference:
            policy.keep_reference()
        identity = {**content_identity(base, config.prompts), **learning.identity()}
        checkpoints = TrainerCheckpoints(store, policy, batch_guard, identity)
        counters = checkpoints.restore()
        sampler = open_sampler(config, policy, identity["base weights"])
        turns = turns_of(config, sampler, policy)
        made = Rounds(sampler, policy.weights, pending_directory(run), turns, lead_of(config))
        # Whatever ends the run, nobody waits for what is sampled ahead of it.
        with (
            contextlib.closing(made) as rounds,
            open_log(run.path, config.tracking, to_dict(config), done=counters["step"]) as lines,
        ):
            sinks = lines, policy.optimizer, config.run.log_every, speed_of(policy, config.model)
            log = learning.log(*sinks, monitor=config.monitor, directory=run.path)
            drop_later(run.path, counters["step"])
            measuring = Measuring(_measures(config, run, rounds, prompts), run.path, lines, last=config.steps)
            show_progress_of(learning.stage)
            trainer = learning.trainer(
                config=config,
                prompts=prompts,
                rounds=rounds,
                grader=grader,
                tokenizer=tokenizer,
                kept_responses=KeptResponses(run.path, config.monitor, lines),
                cfg=_trainer_options(config),
                model=policy,
                optimizer=policy.optimizer,
                scheduler=policy.scheduler,
                train_dataloader_builder=lambda consumed_samples: _slots(
                    config, len(prompts.epoch), consumed_samples
                ),
                logger=log,
                ckpt_callback=checkpoints,
                run_timer=BetweenSteps(signals, store, measuring, lambda: trainer),
            )
            trainer.load_state_dict(counters)
            trainer.pass_rates = checkpoints.memory
            batch_guard.attach(policy.optimizer.megatron, lambda: trainer.reinforce_optimization_step + 1)
            trainer.take_up()
            _fit(trainer, judge)
            store.finish_writing(wait=True)
            if trainer.step == config.steps:
                measuring.after(config.steps)
            log.draw()
        sampler.close()
    converged = judge.has_converged(trainer.step)
    if trainer.step < config.steps and not converged:
        raise Preempted(
            f"{learning.stage} stopped at step {trainer.step} of {config.steps}; run the same command to continue"
        )
    log.warn_of_idleness(trainer.step)
    return {
        "steps": trainer.step,
        "converged": converged,
        "skipped_batches": batch_guard.skipped,
        "prompts": len(prompts.prompts),
        "prompts_uneven": prompts.dropped_uneven,
        "prompts_too_long": prompts.dropped_long,
        "collapses": log.watch.found,
        "rounds_without_gradient": log.idle_rounds,
        **{name.replace(" ", "_"): value for name, value in identity.items() if name != "data"},
        **export(run, policy, config, store, trainer.step),
        "seconds": time.monotonic() - started,
    }


def _grader(config: RoundsConfig) -> Any:
    """What grades, to be entered; None where nothing is graded."""
    if not config.verify_workers:
        return contextlib.nullcontext()
    return Grader(workers=config.verify_workers, function=config.grader)


def _fit(trainer: RoundsTrainer, judge: Judge) -> None:
    try:
        with frozen_heap():
            # A run that had converged, and died before its export, does not train on.
            if not judge.has_converged(trainer.step):
                trainer.fit()
    except RoundInterrupted:
        trainer.save()


def _measured_every(config: RoundsConfig) -> int:
    """Steps between two values of what the run is judged by."""
    if config.checkpoint.metric == "pass1" and config.evaluation is not None:
        return config.evaluation.every
    return config.checkpoint.every


def _measures(config: RoundsConfig, run: RunDirectory, rounds: Rounds, prompts: PromptSet) -> list[Measure]:
    """pass@1 on held-out questions, sampled by the engine of the rounds in all processes."""
    if config.evaluation is None:
        return []
    # What grades is loaded where it is used.
    from phimr_nemo.evaluate.held_out import HeldOut, lost_answers

    held_out = HeldOut(
        run.path, config.evaluation, base=config.base, seed=config.run.seed, sequence_length=config.sequence_length
    )
    held_out.check_apart((prompt.question for prompt in prompts.prompts), config.prompts)

    def pass1(step: int) -> dict[str, float]:
        completions = rounds.ask(step, held_out.requests, held_out.params)
        if len(completions) < len(held_out.requests):
            raise lost_answers(len(held_out.requests) - len(completions), step)
        found = held_out.score(completions, step) if dist.get_rank() == 0 else {}
        wait_for_all(f"answers are graded at step {step}")
        return found

    return [Measure(config.evaluation.every, "pass1", pass1)]


def build_policy(config: RoundsConfig, base: HFDirectory, guard: BatchGuard, objective: Objective) -> MegatronPolicy:
    """The policy with the stage's objective; Megatron's groups are up already."""
    return MegatronPolicy(
        base=base,
        model=config.model,
        parallel=config.parallel,
        optim=config.optim,
        objective=objective,
        steps=config.steps * config.updates,
        sequence_length=config.sequence_length,
        micro_batch=config.micro_batch,
        global_batch=config.prompts_per_step,
        guard=guard,
        lora=config.lora,
    )


def _slots(config: RoundsConfig, epoch: int, consumed_samples: int) -> DataLoader[int]:
    """The stream of prompts: epochs of prompts, each in its own order, without a gap between them.

    It has all the prompts that the run may take, and begins with those of the next round.
    """
    rounds = config.steps * config.prompts_per_step * (1 + config.refills)
    sampler = MegatronPretrainingBatchSampler(
        total_samples=rounds,
        consumed_samples=consumed_samples,
        micro_batch_size=config.prompts_per_step,
        global_batch_size=config.prompts_per_step,
        # Every process sees the whole round and takes its own part of it.
        data_parallel_rank=0,
        data_parallel_size=1,
        drop_last=True,
    )
    return DataLoader(EpochOrder(epoch, -(-rounds // epoch), config.run.seed), batch_sampler=sampler)


def _trainer_options(config: RoundsConfig) -> Any:
    return OmegaConf.create(
        {
            # The stream of prompts knows its epochs; to the trainer they are one.
            "max_epochs": 1,
            "max_steps": config.steps,
            "save_interval": config.checkpoint.every,
            "val_check_interval": 0,
            "gradient_clip_val": None,
            # A penalty is a part of the loss here.
            "initial_policy_kl_penalty": 0.0,
            "rollout_batch_seq_length": None,
            "num_rollouts_per_prompt": config.group_size,
            "model_gbs": config.prompts_per_step * config.group_size // config.inner_batches,
        }
    )
