"""Loss and accuracy on pairs that DPO is not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.training.metrics import metrics_of

PREFIX: Final = "val_"
MEASURED: Final = tuple(name.removeprefix(PREFIX) for name in metrics_of("dpo") if name.startswith(PREFIX))


def validation_batches(numbers: Sequence[int], global_batch: int) -> list[list[int]]:
    """The validation pairs in batches of nearly equal size, `global_batch` at least where there are so many."""
    parts = max(1, len(numbers) // global_batch)
    return [part.tolist() for part in np.array_split(np.asarray(numbers), parts)]


@torch.no_grad()
def validate(trainer: Any, policy: MegatronPolicy, batches: Sequence[Sequence[int]]) -> dict[str, float]:
    """Means over the validation pairs, by the weights as they are (collective).

    Args:
        trainer: adds the reference's log-probabilities.
        policy: what is trained.
        batches: of :func:`validation_batches`.

    Returns:
        val_loss (nats), val_accuracy, val_margin (nats).
    """
    policy.prepare_for_inference()
    pairs, sums = 0, dict.fromkeys(MEASURED, 0.0)
    for numbers, batch in zip(batches, trainer.augment_dataloader(batches), strict=True):
        loss, metrics = policy.get_loss_and_metrics(batch, forward_only=True)
        found: Mapping[str, float] = {**metrics, "loss": loss}
        pairs += len(numbers)
        for name in MEASURED:
            sums[name] += len(numbers) * found[name]
    policy.finish_inference()
    return {f"{PREFIX}{name}": total / pairs for name, total in sums.items()}
