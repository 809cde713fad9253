"""The Megatron-Core model behind NeMo-Aligner's interfaces: one policy for DPO and GRPO.

What a stage optimises is its `Objective`: how a batch becomes micro-batches, and the loss as sums. Losses are
divided once, by the global count over all micro-batches and data-parallel ranks, so no layout changes the
gradient (Megatron's `calculate_per_token_loss`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from phimr_nemo.align.collectives import broadcast_from_last_stage, global_sums
from phimr_nemo.align.compat import AlignableGenerativeInterface
from phimr_nemo.align.microbatch import (
    MicroBatch,
    by_sequence,
    chunks_by_length,
    cut,
    sequence_sums,
    trimmed_width,
    used_lengths,
    work_of,
)
from phimr_nemo.config import ModelConfig, OptimConfig, ParallelConfig
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.model import Architecture, build_model, transformer_config
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.configuration import recompute_fields
from phimr_nemo.model.megatron.convert import export_tensors, load_tensors
from phimr_nemo.training import platform
from phimr_nemo.training.guard import BatchGuard
from phimr_nemo.training.optimizer import build_optimizer
from phimr_nemo.training.throughput import WorkCounter

LossSums = tuple[Tensor, Tensor, dict[str, Tensor]]
"""(sum of the loss with gradient, count to divide it by, sums to log)."""


class Objective(Protocol):
    """What a stage optimises."""

    def micro_batches(self, batch: Mapping[str, Tensor]) -> list[MicroBatch]:
        """Split this rank's batch; at least one, and the same on all ranks of a model replica."""
        ...

    def loss(self, logprobs: Tensor, micro: MicroBatch) -> LossSums:
        """The loss of one micro-batch from the log-probabilities [b, s] (nats, 0 where there is no label)."""
        ...

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to log, from the global sums; `loss` and `count` are among them."""
        ...


class MegatronPolicy(AlignableGenerativeInterface):
    """One model replica's part on this process, with its optimizer and schedule.

    Args:
        base: Hugging Face directory with the starting weights.
        model: how the model is computed.
        parallel: the layout; Megatron's groups are up already.
        optim: optimizer and schedule.
        objective: what is optimised.
        steps: optimizer steps of the whole run.
        sequence_length: the longest sequence (tokens).
        micro_batch: sequences a forward pass without gradient.
        global_batch: what NeMo-Aligner counts as one step's samples.
        guard: told of every training batch's loss.

    Raises:
        UserError: the layout cannot hold the model, or the base does not fit its config.json.
    """

    def __init__(
        self,
        *,
        base: HFDirectory,
        model: ModelConfig,
        parallel: ParallelConfig,
        optim: OptimConfig,
        objective: Objective,
        steps: int,
        sequence_length: int,
        micro_batch: int,
        global_batch: int,
        guard: BatchGuard,
    ) -> None:
        self.guard, self.work = guard, WorkCounter(chunks=1)
        self.architecture: Architecture = base.architecture
        self.objective, self.parallel, self.micro_batch = objective, parallel, micro_batch
        self.temperature = 1.0
        self.cfg: DictConfig = OmegaConf.create(
            {
                "global_batch_size": global_batch,
                "tensor_model_parallel_size": parallel.tensor,
                "sequence_parallel": parallel.sequence,
                "context_parallel_size": 1,
            }
        )
        self.model = _build(base, model, parallel, optim, sequence_length)
        self.optimizer, self.scheduler = build_optimizer(
            optim, [self.model], steps=steps, dtype=torch_dtype(model.dtype)
        )
        self._is_distributed = optim.distributed
        self._reference: list[Tensor] = []

    # ---- forward passes ------------------------------------------------------------------------------------

    @property
    def length_multiple(self) -> int:
        """Sequence lengths are multiples of this."""
        return self.parallel.tensor if self.parallel.sequence else 1

    def _forward(
        self,
        micros: Sequence[MicroBatch],
        head: Callable[[MicroBatch, Tensor], Any],
        *,
        forward_only: bool,
        collect: bool = False,
    ) -> list[Any]:
        """Run the pipeline schedule; `head` sees the log-probabilities on the last stage, whose results return."""

        def step(micro_batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            micro = next(micro_batches)
            tokens = micro.tokens.to(platform.device())
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            labels = micro.labels.to(tokens.device)
            output = model(
                tokens,
                positions,
                None,
                labels=labels,
                packed_seq_params=packed_parameters(micro.documents) if micro.documents else None,
                temperature=self.temperature,
            )
            return output, partial(_on_last_stage, head, micro)

        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(micros),
            model=self.model,
            num_microbatches=len(micros),
            seq_length=micros[0].tokens.shape[1],
            micro_batch_size=micros[0].tokens.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )
        return results

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities of the labels at the current temperature, computed in micro-batches of like length.

        Args:
            tokens: int64 [n, s].
            labels: int64 [n, s], -100 where none.

        Returns:
            float32 [n, s] on the CPU, 0 where there is no label; the same on all ranks of the replica.
        """
        if not len(tokens):
            return torch.zeros(labels.shape, dtype=torch.float32)
        lengths = used_lengths(labels)
        micros = []
        for rows in chunks_by_length(lengths, self.micro_batch):
            width = trimmed_width(lengths[rows], labels.shape[1], self.length_multiple)
            padded = cut(tokens[rows], width, 0), cut(labels[rows], width, IGNORED_LABEL)
            micros.append(MicroBatch(*padded, {"rows": rows}))
        return self._row_log_probs(micros, labels)

    @torch.no_grad()
    def batch_log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`log_probs`, for a batch with `labels`, in the micro-batches of the training step.

        They bring the numbers of their sequences in the batch as `extras["rows"]`.
        """
        return self._row_log_probs(self.objective.micro_batches(batch), batch["labels"])

    def _row_log_probs(self, micros: Sequence[MicroBatch], labels: Tensor) -> Tensor:
        result = torch.zeros(labels.shape, dtype=torch.float32)
        outputs = self._forward(micros, lambda _, logprobs: logprobs.cpu(), forward_only=True, collect=True)
        for micro, output in zip(micros, outputs, strict=False):  # only last pipeline stages have outputs
            rows = micro.extras["rows"]
            values = by_sequence(output, micro, len(rows))
            width = min(values.shape[1], result.shape[1])
            result[rows, :width] = values[:, :width]
        return broadcast_from_last_stage(result)

    # ---- NeMo-Aligner: SupervisedInterface -----------------------------------------------------------------

    def prepare_for_training_step(self) -> None:
        """Training mode, gradients zero."""
        self.model.train()
        self.model.zero_grad_buffer()

    def finish_training_step(self) -> None:
        """Nothing: Megatron's schedule has reduced the gradients already."""

    def get_loss_and_metrics(self, batch: Mapping[str, Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Forward, and backward unless `forward_only`; the global mean loss and metrics, equal on all ranks."""

        def head(micro: MicroBatch, logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, count, sums = self.objective.loss(logprobs, micro)
            # A copy, because Megatron scales the loss it is given in place.
            logged = {"loss": loss.detach().clone(), "count": count, **sums}
            return loss, count.to(torch.int), logged

        micros = self.objective.micro_batches(batch)
        results = self._forward(micros, head, forward_only=forward_only)
        summary = self.objective.summary(global_sums(results))
        loss = summary.pop("loss")
        if not forward_only:
            self.guard.note_loss(loss)
            for micro in micros:
                self.work.add_counts(work_of(micro))
        return loss, summary

    # ---- NeMo-Aligner: Inferrable and AlignableGenerativeInterface -----------------------------------------

    def prepare_for_inference(self) -> None:
        """Evaluation mode."""
        self.model.eval()

    def finish_inference(self) -> None:
        """Back to training mode."""
        self.model.train()

    def infer(self, *_: Any, **__: Any) -> None:
        """Not used: responses come from a `generate.sampler.Sampler` that holds this policy's weights."""
        raise NotImplementedError("rollouts are sampled by a Sampler, see phimr_nemo.align.grpo.rollouts")

    def prepare_for_training(self) -> None:
        """Nothing to bring back: the optimizer's state stays where it is."""

    def finish_training(self) -> None:
        """Nothing to put away."""

    def get_ref_policy_logprobs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """DPO's reference log-probabilities [2 b], chosen then rejected.

        The batch brings the stored ones as `reference` [2, b]; without them they are computed here, with the weights
        of :meth:`keep_reference` and in the micro-batches of the training step.
        """
        if "reference" in batch:
            return batch["reference"].flatten()
        micros = self.objective.micro_batches(batch)
        self.prepare_for_inference()
        with torch.no_grad(), self.as_reference():
            sums = self._forward(
                micros, lambda micro, logprobs: sequence_sums(logprobs, micro).cpu(), forward_only=True, collect=True
            )
        self.finish_inference()
        reference = torch.zeros(2, len(batch["chosen"]))
        for micro, values in zip(micros, sums, strict=False):  # only last pipeline stages have sums
            pairs = micro.extras["pairs"]
            reference[:, pairs] = values[: 2 * len(pairs)].view(2, -1)
        return broadcast_from_last_stage(reference).flatten()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights under their Hugging Face names, whole, on every rank (collective)."""
        return export_tensors([self.model], self.architecture)

    # ---- the reference policy of the KL penalty ------------------------------------------------------------

    def keep_reference(self) -> None:
        """Remember the current weights as the reference policy."""
        self._reference = [parameter.detach().clone() for parameter in self.model.parameters()]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model has the weights of :meth:`keep_reference`."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap weights and reference, one parameter at a time: a third copy of the model is never there."""
        for parameter, other in zip(self.model.parameters(), self._reference, strict=True):
            current = parameter.clone()
            parameter.copy_(other)
            other.copy_(current)

    # ---- native checkpoints --------------------------------------------------------------------------------

    def sharded_state_dict(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Model, optimizer and schedule in Megatron's sharded form, readable in any layout."""
        state: dict[str, Any] = {"model": self.model.module.sharded_state_dict()}
        options: dict[str, Any] = {"is_loading": is_loading}
        if self._is_distributed:
            options["metadata"] = {"distrib_optim_sharding_type": "fully_sharded_model_space"}
        state["optimizer"] = self.optimizer.megatron.sharded_state_dict(state, **options)
        return {**state, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`sharded_state_dict` saved."""
        self.model.module.load_state_dict(state["model"])
        self.optimizer.megatron.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def _build(
    base: HFDirectory, model: ModelConfig, parallel: ParallelConfig, optim: OptimConfig, sequence_length: int
) -> DistributedDataParallel:
    """This rank's part of the model with the base's weights, inside Megatron's DistributedDataParallel."""
    overrides: dict[str, Any] = {}
    if parallel.pipeline > 1:
        # Micro-batches are padded to their own longest row. Megatron refuses that together with its default way
        # of routing tokens to experts, of which there are none here.
        overrides |= {"variable_seq_lengths": True, "moe_token_dispatcher_type": "alltoall"}
    overrides |= recompute_fields(model.recompute)
    config = transformer_config(
        base.architecture,
        parallel,
        dtype=torch_dtype(model.dtype),
        deterministic_mode=model.deterministic,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        **overrides,
    )
    chunk = build_model(
        base.architecture,
        config,
        max_length=sequence_length,
        longrope_policy=model.longrope,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).to(platform.device())
    load_tensors([chunk], base.architecture, base)
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.distributed,
        # Loss and gradient norm are checked instead, on all ranks alike and with a message.
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallel(config, options, chunk)


def packed_parameters(documents: Sequence[int]) -> PackedSeqParams:
    """Megatron's description of a packed row from the lengths of its documents."""
    boundaries = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device=platform.device())
    longest = max(documents)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _on_last_stage(
    head: Callable[[MicroBatch, Tensor], Any],
    micro: MicroBatch,
    output: Tensor,
    non_loss_data: bool = False,  # noqa: ARG001  Megatron's schedule passes it
) -> Any:
    return head(micro, -output)
