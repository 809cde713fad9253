"""DPO's reference log-probabilities: computed once and stored with the hash of their model, or in every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from phimr_nemo.errors import Preempted, UserError
from phimr_nemo.store.atomic import atomic_file
from phimr_nemo.store.progress import track
from phimr_nemo.training import platform
from phimr_nemo.training.distributed import wait_for_all

REFERENCE_FILE: Final = "reference.safetensors"
PARTIAL_FILE: Final = "reference-partial.safetensors"
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
    stop_agreed: Callable[[], bool],
) -> Tensor:
    """The stored reference log-probabilities, log ref(response | question) in nats (collective).

    Args:
        directory: the run directory; they are computed with the policy as it is, and stored, if they are not there.
        given: another run's file to read instead, or None.
        policy: holds the reference weights still.
        pairs: all pairs.
        pad_id: token of the padding.
        identity: see :func:`reference_identity`.
        stop_agreed: whether a process was told to stop (collective); asked between batches.

    Returns:
        float32 [2, pairs]: chosen, rejected.

    Raises:
        UserError: the given file is absent; stored values belong to another reference model or to other pairs; a
            value is not finite.
        Preempted: the run was told to stop; what was computed is kept.
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
    partial = Partial(directory / PARTIAL_FILE, identity, 2 * len(pairs))
    reference = _checked(_compute(policy, pairs, pad_id, partial, stop_agreed), "the base model")
    if dist.get_rank() == 0:
        partial.path.unlink(missing_ok=True)
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


class Partial:
    """What was computed when a run was told to stop: sums of log-probabilities by response, and which are done.

    Args:
        path: the file; one of another reference, or that cannot be read, counts as absent.
        identity: see :func:`reference_identity`.
        responses: how many there are.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], responses: int) -> None:
        self.path, self._identity = path, dict(identity)
        self.sums = torch.zeros(responses, dtype=torch.float64)
        self.done = torch.zeros(responses, dtype=torch.bool)
        if not path.is_file():
            return
        try:
            with safe_open(str(path), framework="pt") as file:
                if file.metadata() == self._identity:
                    self.sums, self.done = file.get_tensor("sums"), file.get_tensor("done").bool()
        except SafetensorError:
            return

    def keep(self, sums: Tensor, done: Tensor) -> None:
        """Write what is done by now, on process 0."""
        if dist.get_rank() == 0:
            with atomic_file(self.path) as temporary:
                save_file({"sums": sums, "done": done.to(torch.uint8)}, temporary, metadata=self._identity)
        wait_for_all(f"{self.path} is written")


def _compute(
    policy: MegatronPolicy, pairs: Pairs, pad_id: int, partial: Partial, stop_agreed: Callable[[], bool]
) -> Tensor:
    """Sums of log-probabilities of all responses; each data-parallel rank computes a share (collective)."""
    rows = [*pairs.chosen, *pairs.rejected]
    sums, done = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int32)
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    ranks = parallel_state.get_data_parallel_world_size()
    mine = by_length[parallel_state.get_data_parallel_rank() :: ranks]
    size = policy.micro_batch * MICRO_BATCHES_A_CALL
    # As many on every rank: they ask together whether to stop.
    batches = math.ceil(math.ceil(len(rows) / ranks) / size)
    policy.prepare_for_inference()
    for batch in track(range(batches), title="dpo reference", unit="batch", hidden=dist.get_rank() != 0):
        if stop_agreed():
            known = _shared(sums, done, partial)
            partial.keep(*known)
            raise Preempted(
                f"dpo stopped in its reference pass: {int(known[1].sum())} of {len(rows)} responses are done; run "
                "the same command to continue"
            )
        part = mine[batch * size : (batch + 1) * size]
        if part and not bool(partial.done[part].all()):
            collated = collate_padded([rows[i] for i in part], pad_id=pad_id, multiple=1)
            sums[part] = policy.log_probs(collated["tokens"], collated["labels"]).double().sum(dim=1)
            done[part] = 1
    policy.finish_inference()
    return _shared(sums, done, partial)[0].float().view(2, len(pairs))


def _shared(sums: Tensor, done: Tensor, partial: Partial) -> tuple[Tensor, Tensor]:
    """All ranks' sums, with those of an earlier run where none has computed them; and which are known."""
    shared, known = sums.to(platform.device()), done.to(platform.device())
    for tensor in (shared, known):
        dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())
    new = known.cpu() > 0
    return torch.where(new, shared.cpu(), partial.sums), new | partial.done
