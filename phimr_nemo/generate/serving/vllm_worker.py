"""What runs inside vLLM's workers: weights from safetensors files, or out of a process group with the trainer,
through vLLM's own weight-transfer interface.

Stock vLLM on a CPU packs each linear layer's weight when it loads it, and a reload packs all of them again except a
tied output layer, which has no tensor of its own: body new, head old, and no error. Hence the repacking here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from phimr_nemo.generate.serving.broadcast.group import (
    Described,
    Group,
    GroupBroken,
    Offer,
    empty_bucket,
    join,
    unpacked,
)
from phimr_nemo.generate.serving.vllm import WEIGHTS_BACKEND


@dataclass
class GroupInit(WeightTransferInitInfo):
    """The group to join; files need none.

    Attributes:
        offer: the fields of an :class:`phimr_nemo.generate.serving.broadcast.group.Offer`.
    """

    offer: dict[str, Any]


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket.

    Attributes:
        path: a safetensors file of named tensors, readable by every worker; None = what came through the group.
    """

    path: str | None


class BucketEngine(WeightTransferEngine[GroupInit, BucketUpdate]):
    """Loads buckets of Hugging Face-named tensors."""

    init_info_cls, update_info_cls = GroupInit, BucketUpdate
    _group: Group | None = None
    _held: tuple[torch.Tensor, Sequence[Described]] | None = None

    def init_transfer_engine(self, init_info: GroupInit) -> None:
        """Leave the group of before and join another.

        Raises:
            GroupBroken: it did not form.
        """
        self.shutdown()
        offer = Offer(**init_info.offer)
        self._group = join(offer, offer.first + self.parallel_config.rank, self.device)

    def receive(self, tensors: Sequence[Described]) -> None:
        """Take a bucket out of the group, and keep it until it is loaded.

        Raises:
            GroupBroken: it did not come.
        """
        if self._group is None:
            raise GroupBroken("the worker is in no group")
        flat = empty_bucket(tensors, self.device)
        try:
            self._group.broadcast(flat)
        except GroupBroken:
            self.shutdown()
            raise
        self._held = flat, tensors

    def start_weight_update(self) -> None:
        """Every layer waits for its new weights."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket, and wait for the device where there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        """Load one bucket; a layer whose weights are all there is packed at once."""
        if update_info.path is None:
            self.model.load_weights(self._taken())
            return
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def _taken(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is held, which is then nobody's."""
        assert self._held is not None, "the server asks for a bucket that has come"
        held, self._held = self._held, None
        return unpacked(*held)

    def finish_weight_update(self) -> None:
        """Pack what is left, a tied head included."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu() and self.model.config.tie_word_embeddings:
            repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Leave the group, if there is one."""
        if self._group is not None:
            self._group.leave()
        self._group = self._held = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """Give a tied output layer the embedding's new weight, in the form that the CPU's kernels read."""
    model.lm_head.weight = model.model.embed_tokens.weight
    dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


class Extension:
    """Methods that vLLM adds to its workers; importing this module registers the engine with them."""

    def phimr_abandon_update(self) -> None:
        """End an update that will not be completed, so that another can begin."""
        worker: Any = self
        if worker._weight_update_active:
            worker.finish_weight_update()

    def phimr_join(self, offer: Mapping[str, Any]) -> str:
        """Join a group with the trainer; says what went wrong.

        An exception of one worker would leave the other workers' answers unread in vLLM's queues.
        """
        worker: Any = self
        try:
            worker.init_weight_transfer_engine(init_info={"offer": dict(offer)})
        except GroupBroken as error:
            return str(error)
        return ""

    def phimr_receive(self, tensors: Sequence[Mapping[str, Any]]) -> str:
        """Take one bucket out of the group; says what went wrong."""
        worker: Any = self
        try:
            worker.weight_transfer_engine.receive([Described(**tensor) for tensor in tensors])
        except GroupBroken as error:
            return str(error)
        return ""


if WEIGHTS_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(WEIGHTS_BACKEND, BucketEngine)
