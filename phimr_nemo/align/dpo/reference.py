"""DPO's reference log-probabilities: computed once and stored with the hash of their model, or in every step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phimr_nemo.align.dpo.pairs import Pairs
from phimr_nemo.align.policy import MegatronPolicy
from phimr_nemo.config import DPOConfig
from phimr_nemo.data.rows.batches import collate_padded
from phimr_nemo.errors import UserError
from phimr_nemo.store.atomic import atomic_file
from phimr_nemo.store.progress import track
from phimr_nemo.training import platform

REFERENCE_FILE: Final = "reference.safetensors"
SIDES: Final = ("chosen", "rejected")
MICRO_BATCHES_A_CALL: Final = 8
"""Micro-batches between two updates of the progress bar."""


def reference_identity(config: DPOConfig, identity: Mapping[str, str], pairs: Pairs) -> dict[str, str]:
    """What stored log-probabilities depend on, by name.

    Args:
        config: how the model is computed; the longest sequence decides the LongRoPE regime.
        identity: hashes of the reference model's weights and of the data.
        pairs: all pairs.
    """
    computed = f"{config.model.dtype}, {config.model.longrope}, sequence_length={config.sequence_length}"
    return {**identity, "computation": computed, "pairs": f"{len(pairs)}, {pairs.digest()}"}


def stored_reference(
    directory: Path,
    given: Path | None,
    policy: MegatronPolicy,
    pairs: Pairs,
    pad_id: int,
    identity: Mapping[str, str],
) -> Tensor:
    """The stored reference log-probabilities, log ref(response | question) in nats (collective).

    Args:
        directory: the run directory; they are computed with the policy as it is, and stored, if they are not there.
        given: another run's file to read instead, or None.
        policy: holds the reference weights still.
        pairs: all pairs.
        pad_id: token of the padding.
        identity: see :func:`reference_identity`.

    Returns:
        float32 [2, pairs]: chosen, rejected.

    Raises:
        UserError: the given file is absent; stored values belong to another reference model or to other pairs; a
            value is not finite.
    """
    path = given or directory / REFERENCE_FILE
    box = [path.is_file()]
    dist.broadcast_object_list(box, 0)
    if box[0]:
        return _checked(_read(path, identity), str(path))
    if given is not None:
        raise UserError(
            f"reference.path={given} does not exist",
            rule=f"it is the {REFERENCE_FILE} of an earlier run with the same base and pairs",
            remedy="correct the path, or leave reference.path out: the run then computes its own",
        )
    reference = _checked(_compute(policy, pairs, pad_id), "the base model")
    if dist.get_rank() == 0:
        with atomic_file(path) as temporary:
            save_file(dict(zip(SIDES, reference, strict=True)), temporary, metadata=dict(identity))
    return reference


def _read(path: Path, identity: Mapping[str, str]) -> Tensor:
    try:
        with safe_open(str(path), framework="pt") as file:
            stored: dict[str, Any] = file.metadata() or {}
            values = [file.get_tensor(side) for side in SIDES if side in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{path} is not readable ({error})",
            rule="reference log-probabilities are a safetensors file that a run has written",
            remedy="remove the file: the run computes it again",
        ) from error
    changed = [name for name, value in identity.items() if stored.get(name) != value]
    if changed:
        differences = ", ".join(f"{name}: {stored.get(name)} -> {identity[name]}" for name in changed)
        raise UserError(
            f"{path} was computed for another reference ({differences})",
            rule="DPO's reference model and its pairs do not change during a run",
            remedy="restore base= and pairs=, or choose another run.output",
        )
    return torch.stack(values)


def _checked(reference: Tensor, source: str) -> Tensor:
    finite = torch.isfinite(reference).all(dim=0)
    if not finite.all():
        number = int((~finite).nonzero()[0])
        raise UserError(
            f"{source} gives pair {number} the log-probabilities {reference[:, number].tolist()}",
            rule="reference log-probabilities are finite",
            remedy="the base model's weights hold NaN or infinity: use a sound checkpoint as base=",
        )
    return reference


def _compute(policy: MegatronPolicy, pairs: Pairs, pad_id: int) -> Tensor:
    """Sums of log-probabilities of all responses; each data-parallel rank computes a share (collective)."""
    rows = [*pairs.chosen, *pairs.rejected]
    sums = torch.zeros(len(rows), dtype=torch.float64)
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    mine = by_length[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    size = policy.micro_batch * MICRO_BATCHES_A_CALL
    policy.prepare_for_inference()
    starts = range(0, len(mine), size)
    for start in track(starts, title="dpo reference", unit="batch", hidden=dist.get_rank() != 0):
        part = mine[start : start + size]
        batch = collate_padded([rows[i] for i in part], pad_id=pad_id, multiple=1)
        sums[part] = policy.log_probs(batch["tokens"], batch["labels"]).double().sum(dim=1)
    policy.finish_inference()
    shared = sums.to(platform.device())
    dist.all_reduce(shared, group=parallel_state.get_data_parallel_group())
    return shared.float().cpu().view(2, len(pairs))
