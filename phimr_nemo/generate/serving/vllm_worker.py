"""What runs inside vLLM's workers: weights from safetensors files, through vLLM's own weight-transfer interface.

Stock vLLM on a CPU packs each linear layer's weight when it loads it, and a reload packs all of them again except a
tied output layer, which has no tensor of its own: body new, head old, and no error. Hence the repacking here.
"""

from __future__ import annotations

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

from phimr_nemo.generate.serving.vllm import WEIGHTS_BACKEND


@dataclass
class FileInit(WeightTransferInitInfo):
    """Files need no connection."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """One bucket.

    Attributes:
        path: a safetensors file of named tensors, readable by every worker.
    """

    path: str


class FileEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads buckets of Hugging Face-named tensors from files."""

    init_info_cls, update_info_cls = FileInit, FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Every layer waits for its new weights."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket, and wait for the device where there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load one bucket; a layer whose weights are all there is packed at once."""
        with safe_open(update_info.path, framework="pt", device="cpu") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        """Pack what is left, a tied head included."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu() and self.model.config.tie_word_embeddings:
            repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing to close."""


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


if WEIGHTS_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(WEIGHTS_BACKEND, FileEngine)
