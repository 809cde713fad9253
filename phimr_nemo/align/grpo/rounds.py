"""The responses of GRPO's rounds: new weights first, requests again that were lost, and one round ahead.

With `ahead` 1 the responses of round k+1 are sampled, in a thread, while step k trains: with the weights that step k
starts from, so they are one step old when they are trained on (what `correction` accounts for). A round that is under
way when the run is saved is waited for and saved with it, so a resumed run trains on the same responses.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.generate.sampler import Completion, Request, Sampler, SamplingParams, Unfinished
from phimr_nemo.store.atomic import atomic_write_bytes
from phimr_nemo.training import platform
from phimr_nemo.training.distributed import wait_for_all

if TYPE_CHECKING:
    from phimr_nemo.align.grpo.samplers import Turns
    from phimr_nemo.store.runs import RunDirectory

ATTEMPTS: Final = 3
"""How often a round asks for its lost responses again, each time after the weights were sent again."""
FILE: Final = "round-{step:08d}.parquet"
DIRECTORY: Final = "pending"
_LOGGER: Final = logging.getLogger(__name__)
SCHEMA: Final = pa.schema(
    [
        ("request_id", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("finish_reason", pa.string()),
        ("version", pa.int64()),
    ]
)


Sampled = TypeVar("Sampled", bound=Callable[..., list[Completion]])


def _then_training(method: Sampled) -> Sampled:
    """A method of :class:`Rounds` that samples: however it ends, the GPUs are the trainer's then."""

    @functools.wraps(method)
    def sampled(self: Rounds, *arguments: Any) -> list[Completion]:
        try:
            found = method(self, *arguments)
        except BaseException:
            self.turns.abandon()
            raise
        self.turns.begin_training()
        return found

    return cast("Sampled", sampled)


class Rounds:
    """Samples rounds. All processes call the same methods in the same order (collective), but for the thread inside.

    Args:
        sampler: of this process.
        weights: the policy's current weights, tensor by tensor (collective).
        directory: where a round ahead is saved.
        turns: who computes on the trainer's GPUs.
    """

    def __init__(
        self,
        sampler: Sampler,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        directory: Path,
        turns: Turns,
    ) -> None:
        self._sampler, self._weights, self._directory, self.turns = sampler, weights, directory, turns
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: tuple[int, Future[list[Completion]]] | None = None
        # A run that is stopped before it trains on a round that was sampled ahead saves it as well.
        self._taken: tuple[int, list[Completion]] | None = None
        self.lost_groups = 0

    def is_ahead(self, step: int) -> bool:
        """Whether round `step` was begun already."""
        return self._pending is not None and self._pending[0] == step

    def metrics(self, step: int, versions: Iterable[int | None]) -> dict[str, float]:
        """What is logged of a round besides its rollouts' own figures (collective).

        Args:
            step: the round.
            versions: of the weights that made its responses.

        Returns:
            staleness: mean of steps between the weights that sampled and those that are trained; lost_groups of
            the round; and what the sampler counts, since the start, of all processes: a server that dies may be
            missed by one of them alone.
        """
        ages = [step - version for version in versions if version is not None]
        return {
            "staleness": sum(ages) / len(ages) if ages else 0.0,
            "lost_groups": self.lost_groups,
            **{f"sampler_{name}": _total(count) for name, count in self._sampler.counts.items()},
        }

    def sync(self, step: int) -> None:
        """Give the sampler the weights that step `step` starts from, unless it has them."""
        if self._sampler.version != step:
            self._send(step)

    def _send(self, step: int) -> None:
        self.turns.begin_sampling()
        self._sampler.update_weights(self._weights(), step)
        # Nobody asks a server before the one process that sends weights has sent them.
        wait_for_all(f"the weights of step {step} are sent")

    @_then_training
    def sample(self, step: int, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """This process's responses of a round, by new weights or those that were sampled ahead.

        A request that no server could answer is made again with the current weights, `ATTEMPTS` times.

        Returns:
            Completions in the order of the requests; of whole groups only, if some were lost for good.

        Raises:
            UserError: every group of the round was lost.
        """
        ahead = self._take(step)
        if ahead is None:
            self.sync(step)
            found = _sampled(self._sampler, requests, params)
        else:
            found = ahead
        return self._whole_groups(requests, self._completed(step, requests, params, found))

    def _completed(
        self, step: int, requests: Sequence[Request], params: SamplingParams, found: Sequence[Completion]
    ) -> dict[str, Completion]:
        """What was found, and what a lost server's requests give when they are made again."""
        done = {completion.request_id: completion for completion in found}
        for _ in range(ATTEMPTS):
            missing = [request for request in requests if request.id not in done]
            wait_for_all(f"round {step} is sampled")
            if not _total(len(missing)):
                break
            self._send(step)
            done |= {c.request_id: c for c in _sampled(self._sampler, missing, params)}
        wait_for_all(f"round {step} is sampled")
        return done

    @_then_training
    def ask(self, step: int, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Responses that nothing is trained on, by the weights that step `step` starts from, on all processes.

        A round ahead is waited for: its responses keep their weights.

        Args:
            step: steps done.
            requests: the same on all processes, which share them.
            params: how tokens are drawn.

        Returns:
            Completions in the order of the requests; fewer if servers lost some for good.
        """
        if self._pending is not None:
            self._pending[1].result()
        self.sync(step)
        mine = requests[dist.get_rank() :: dist.get_world_size()]
        done = self._completed(step, mine, params, _sampled(self._sampler, mine, params))
        parts: list[dict[str, Completion]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, done)
        found = {name: completion for part in parts for name, completion in part.items()}
        return [found[request.id] for request in requests if request.id in found]

    def _whole_groups(self, requests: Sequence[Request], done: Mapping[str, Completion]) -> list[Completion]:
        broken = {group_of(request.id) for request in requests if request.id not in done}
        kept = [done[request.id] for request in requests if group_of(request.id) not in broken]
        self.lost_groups = _total(len(broken))
        if not _total(len(kept)):
            raise UserError(
                f"none of the round's {_total(len(requests))} responses could be sampled, {ATTEMPTS + 1} times",
                rule="a round needs at least one whole group of responses",
                remedy="look at the rollout servers and raise engine.recovery_seconds, request_seconds or attempts; "
                "the same command continues at the newest checkpoint",
            )
        return kept

    # ---- one round ahead -----------------------------------------------------------------------------------

    def start(self, step: int, requests: Sequence[Request], params: SamplingParams) -> None:
        """Begin to sample round `step` with the weights that the sampler has."""
        self._pending = (step, self._thread.submit(_sampled, self._sampler, requests, params))

    def _take(self, step: int) -> list[Completion] | None:
        pending, self._pending = self._pending, None
        if pending is None or pending[0] != step:
            return None
        self._taken = (step, pending[1].result())
        return self._taken[1]

    def save(self, step: int) -> None:
        """Wait for the round of `step`, if it was begun, and write it for a run that is resumed there."""
        mine: list[Completion] = []
        is_begun = True
        if self._pending is not None and self._pending[0] == step:
            mine = self._pending[1].result()
        elif self._taken is not None and self._taken[0] == step:
            mine = self._taken[1]
        else:
            is_begun = False
        wait_for_all(f"round {step} is sampled")
        if not _total(int(is_begun)):
            return
        parts: list[list[Completion]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, mine)
        if dist.get_rank() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(
                self._directory / FILE.format(step=step),
                _to_parquet([completion for part in parts for completion in part]),
            )
        wait_for_all(f"round {step} is written")

    def restore(self, step: int, requests: Sequence[Request]) -> None:
        """Take over the round ahead that was saved with the checkpoint of `step`, if there is one.

        A damaged one is sampled again, by the current weights. The requests may be dealt to the processes in another
        way than when the round was saved.
        """
        file = self._directory / FILE.format(step=step)
        if not file.is_file():
            return
        saved, problem = None, ""
        try:
            saved = _from_parquet(file)
        except (pa.ArrowException, OSError) as error:
            problem = str(error)
        if _total(int(saved is None)) or saved is None:
            if dist.get_rank() == 0:
                _LOGGER.warning(
                    "%s is damaged (%s): the round sampled ahead is sampled again, by the weights of step %d",
                    *(file, problem, step),
                )
            return
        wanted = {request.id for request in requests}
        future: Future[list[Completion]] = Future()
        future.set_result([completion for completion in saved if completion.request_id in wanted])
        self._pending = (step, future)

    def forget(self, keep: Iterable[int]) -> None:
        """Remove the saved rounds of other steps than these, on process 0."""
        names = {FILE.format(step=step) for step in keep}
        if dist.get_rank() == 0 and self._directory.is_dir():
            for file in self._directory.glob("round-*.parquet"):
                if file.name not in names:
                    file.unlink()

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()


def group_of(request_id: str) -> str:
    """The slot in a request's name "slot/sample"."""
    return request_id.partition("/")[0]


def pending_directory(run: RunDirectory) -> Path:
    """Where a run keeps the rounds that it sampled ahead."""
    return run.path / DIRECTORY


def _sampled(sampler: Sampler, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
    """Completions with their versions; fewer than requests if servers were lost."""
    if not requests:
        return []
    version = sampler.version
    try:
        completions = sampler.sample(requests, params)
    except Unfinished as unfinished:
        completions = unfinished.completed
    return [
        Completion(
            c.request_id, c.token_ids, c.logprobs, c.finish_reason, version if c.version is None else c.version
        )
        for c in completions
    ]


def _total(number: int) -> int:
    total = torch.tensor([number], device=platform.device())
    dist.all_reduce(total)
    return int(total)


def _to_parquet(completions: Sequence[Completion]) -> bytes:
    rows = [{name: getattr(completion, name) for name in SCHEMA.names} for completion in completions]
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), stream, compression="zstd", write_page_checksum=True)
    return stream.getvalue()


def _from_parquet(file: Path) -> list[Completion]:
    rows = pq.read_table(file, schema=SCHEMA, page_checksum_verification=True).to_pylist()
    return [
        Completion(
            row["request_id"], tuple(row["token_ids"]), tuple(row["logprobs"]), row["finish_reason"], row["version"]
        )
        for row in rows
    ]
