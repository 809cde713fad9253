"""The Megatron-Core model behind NeMo-Aligner's interfaces: one policy for DPO and GRPO.

What a stage optimises is its `Objective`: how a batch becomes micro-batches, and the loss as sums. Losses are
divided once, by the global count over all micro-batches and data-parallel ranks, so no layout changes the
gradient (Megatron's `calculate_per_token_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from phimr_nemo.align.collectives import broadcast_from_last_stage, global_sums
from phimr_nemo.align.compat import AlignableGenerativeInterface
from phimr_nemo.align.forward import build_part, row_log_probs, run_micro_batches
from phimr_nemo.align.microbatch import (
    MicroBatch,
    chunks_by_length,
    cut,
    sequence_sums,
    trimmed_width,
    used_lengths,
    work_of,
)
from phimr_nemo.align.offload import HostMemory, gradient_tensors, optimizer_tensors
from phimr_nemo.config import LoRAConfig, ModelConfig, OptimConfig, ParallelConfig
from phimr_nemo.losses import IGNORED_LABEL
from phimr_nemo.model import Architecture
from phimr_nemo.model.dtypes import torch_dtype
from phimr_nemo.model.files.hf import HFDirectory
from phimr_nemo.model.megatron.configuration import adds_to_main_gradient, recompute_fields
from phimr_nemo.model.megatron.convert import export_tensors
from phimr_nemo.training.adapters.modules import add_adapters
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

    @property
    def wants_entropy(self) -> bool:
        """Whether the loss is also one of the entropies of the distributions at the labels."""
        ...

    def loss(self, logprobs: Tensor, micro: MicroBatch, besides: Tensor | None = None, /) -> LossSums:
        """The loss of one micro-batch from the log-probabilities [b, s] (nats, 0 where there is no label).

        With them come [b, s] (nats) the entropies, where they are wanted, or the divergences from the teacher that
        the micro-batch brings.
        """
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
        lora: adapters to be trained in the place of the weights; None = all weights.

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
        lora: LoRAConfig | None = None,
    ) -> None:
        self.guard, self.work, self.temperature = guard, WorkCounter(chunks=1), 1.0
        self.architecture: Architecture = base.architecture
        self.objective, self.parallel, self.micro_batch = objective, parallel, micro_batch
        self.cfg: DictConfig = OmegaConf.create(
            {
                "global_batch_size": global_batch,
                "tensor_model_parallel_size": parallel.tensor,
                "sequence_parallel": parallel.sequence,
                "context_parallel_size": 1,
            }
        )
        self.model = _build(base, model, parallel, optim, sequence_length, lora)
        self.optimizer, self.scheduler = build_optimizer(
            optim, [self.model], steps=steps, dtype=torch_dtype(model.dtype)
        )
        if model.dtype == "fp16":
            # Megatron's schedule scales the loss before the backward pass.
            self.model.module.config.grad_scale_func = self.optimizer.megatron.scale_loss
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
        with_entropy: bool = False,
    ) -> list[Any]:
        """Run the pipeline schedule; `head` sees the log-probabilities on the last stage, whose results return."""
        options = {"temperature": self.temperature, "with_entropy": with_entropy}
        return run_micro_batches(
            self.model, micros, head, forward_only=forward_only, collect=collect, options=options
        )

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
        return row_log_probs(self.model, micros, labels, self.temperature)

    @torch.no_grad()
    def batch_log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As :meth:`log_probs`, for a batch with `labels`, in the micro-batches of the training step.

        They bring the numbers of their sequences in the batch as `extras["rows"]`.
        """
        micros = self.objective.micro_batches(batch)
        return row_log_probs(self.model, micros, batch["labels"], self.temperature)

    # ---- NeMo-Aligner: SupervisedInterface -----------------------------------------------------------------

    def prepare_for_training_step(self) -> None:
        """Training mode, gradients zero."""
        self.model.train()
        self.model.zero_grad_buffer()

    def finish_training_step(self) -> None:
        """Nothing: Megatron's schedule has reduced the gradients already."""

    def get_loss_and_metrics(self, batch: Mapping[str, Tensor], forward_only: bool) -> tuple[float, dict[str, float]]:
        """Forward, and backward unless `forward_only`; the global mean loss and metrics, equal on all ranks."""

        with_entropy = self.objective.wants_entropy

        def head(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            values = output.unbind(-1) if output.ndim > micro.labels.ndim else (output,)
            loss, count, sums = self.objective.loss(values[0], micro, *values[1:])
            # A copy, because Megatron scales the loss it is given in place.
            logged = {"loss": loss.detach().clone(), "count": count, **sums}
            return loss, count.to(torch.int), logged

        micros = self.objective.micro_batches(batch)
        results = self._forward(micros, head, forward_only=forward_only, with_entropy=with_entropy)
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
                micros, lambda micro, logprobs: sequence_sums(logprobs, micro), forward_only=True, collect=True
            )
        self.finish_inference()
        reference = torch.zeros(2, len(batch["chosen"]))
        for micro, values in zip(micros, sums, strict=False):  # only last pipeline stages have sums
            pairs = micro.extras["pairs"]
            reference[:, pairs] = values[: 2 * len(pairs)].view(2, -1).cpu()
        return broadcast_from_last_stage(reference).flatten()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights under their Hugging Face names, whole, on every rank (collective)."""
        return export_tensors([self.model], self.architecture)

    def update_memory(self) -> HostMemory:
        """What is not needed between updates: the optimizer's state, gradients, and the reference policy's weights.

        Every update begins with gradients of zero (`prepare_for_training_step`), so they are not kept.
        """
        return HostMemory(
            lambda: (*optimizer_tensors(self.optimizer.megatron, self.model), *self._reference),
            lambda: gradient_tensors(self.model),
        )

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
    base: HFDirectory,
    model: ModelConfig,
    parallel: ParallelConfig,
    optim: OptimConfig,
    sequence_length: int,
    lora: LoRAConfig | None,
) -> DistributedDataParallel:
    """This rank's part of the model with the base's weights, inside Megatron's DistributedDataParallel."""
    chunk = build_part(
        base,
        model,
        parallel,
        sequence_length,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        gradient_accumulation_fusion=adds_to_main_gradient(frozen=lora is not None),
        **recompute_fields(model.recompute),
    )
    if lora is not None:
        add_adapters(chunk, lora)
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optim.distributed,
        # Loss and gradient norm are checked instead, on all ranks alike and with a message.
        check_for_nan_in_grad=False,
    )
    return DistributedDataParallel(chunk.config, options, chunk)
