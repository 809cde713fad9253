"""The responses of GRPO's rounds: new weights first, requests again that were lost, and rounds ahead.

With `ahead` n up to n rounds are sampled, in a thread, while steps train: a round is begun with the weights of a step
at most n before the one that trains on it, so no token is older than n steps (what `correction` accounts for). New
weights wait until the rounds that were begun are taken, or interrupt what is under way, which is continued with them.
Rounds that are under way when the run is saved are saved with it, so a resumed run trains on the same responses.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from phimr_nemo.errors import UserError
from phimr_nemo.generate.ahead import (
    NOTHING_AHEAD,
    Ahead,
    Continued,
    Lead,
    Round,
    WaitedFor,
    by_step,
    filled,
    read_rows,
    rows_of,
    sampled,
    slot_of,
    to_parquet,
)
from phimr_nemo.generate.sampler import Completion, InterruptibleSampler, Request, Sampler, SamplingParams
from phimr_nemo.store.atomic import atomic_write_bytes
from phimr_nemo.training import platform
from phimr_nemo.training.distributed import wait_for_all

if TYPE_CHECKING:
    from phimr_nemo.align.grpo.samplers import Turns
    from phimr_nemo.store.runs import RunDirectory

ATTEMPTS: Final = 3
"""How often a round asks for its lost responses again, each time after the weights were sent again."""
FILE: Final = "round-{step:08d}.parquet"
"""The rounds from this step on, as they were when its checkpoint was written."""
DIRECTORY: Final = "pending"
_LOGGER: Final = logging.getLogger(__name__)


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
        sampler: of this process; where new weights interrupt, an :class:`InterruptibleSampler`.
        weights: the policy's current weights, tensor by tensor (collective).
        directory: where rounds ahead are saved.
        turns: who computes on the trainer's GPUs.
        lead: how far rounds may be ahead.
    """

    def __init__(
        self,
        sampler: Sampler,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        directory: Path,
        turns: Turns,
        lead: Lead = NOTHING_AHEAD,
    ) -> None:
        self._sampler, self._weights, self._directory, self._lead = sampler, weights, directory, lead
        self.turns = turns
        if lead.at_most is None:
            self._ahead: Ahead = WaitedFor(sampler)
        else:
            assert isinstance(sampler, InterruptibleSampler), (
                "the configuration names an engine that can be interrupted"
            )
            self._ahead = Continued(sampler, lead.at_most)
        # A run that is stopped before it trains on a round that was sampled ahead saves it as well.
        self._taken: dict[int, Round] = {}
        self.lost_groups = 0

    @property
    def steps_ahead(self) -> Sequence[int]:
        """The steps whose rounds were begun and not taken."""
        return list(self._ahead.rounds)

    def is_ahead(self, step: int) -> bool:
        """Whether round `step` was begun already."""
        return step in self._ahead.rounds

    def prompts_of(self, step: int) -> Mapping[int, int] | None:
        """This process's slots of a round that was begun, with their prompts' numbers; None of any other."""
        begun = self._ahead.rounds.get(step)
        return None if begun is None else begun.prompt_of

    def metrics(self, step: int, versions: Iterable[Sequence[int]]) -> dict[str, float]:
        """What is logged of a round besides its rollouts' own figures (collective).

        Args:
            step: the round.
            versions: of each response, of the weights that sampled each token.

        Returns:
            staleness, staleness_max: mean over the tokens, and the largest, of steps between the weights that sampled
            and those that are trained; stale_tokens: share of tokens that older weights sampled; partial_rollouts:
            responses of more than one version; lost_groups of the round; and what the sampler counts, since the
            start, of all processes: a server that dies may be missed by one of them alone.
        """
        counted = [Counter(of_one) for of_one in versions]
        ages = sum(counted, Counter[int]())
        tokens = max(ages.total(), 1)
        return {
            "staleness": sum((step - version) * count for version, count in ages.items()) / tokens,
            "staleness_max": max((step - version for version in ages), default=0),
            "stale_tokens": sum(count for version, count in ages.items() if version < step) / tokens,
            "partial_rollouts": sum(len(of_one) > 1 for of_one in counted),
            "lost_groups": self.lost_groups,
            **{f"sampler_{name}": _total(count) for name, count in self._sampler.counts.items()},
        }

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nothing is sampled ahead meanwhile, in any process."""
        if self._lead.steps:
            self._ahead.settle()
            wait_for_all("what is sampled ahead rests")
        yield
        self._ahead.resume()

    def sync(self, step: int) -> None:
        """Give the sampler the weights that step `step` starts from, unless it has them."""
        if self._sampler.version != step:
            with self._alone():
                self._send(step)

    def _send(self, step: int) -> None:
        self.turns.begin_sampling()
        self._sampler.update_weights(self._weights(), step)
        # Nobody asks a server before the one process that sends weights has sent them.
        wait_for_all(f"the weights of step {step} are sent")

    def _sampled_now(self, step: int, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        with self._alone():
            if self._sampler.version != step:
                self._send(step)
            return sampled(self._sampler, requests, params)

    @_then_training
    def sample(self, step: int, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """This process's responses of a round, by new weights or those that were sampled ahead.

        A request that no server could answer, or whose response is too old, is made again with the current weights,
        `ATTEMPTS` times.

        Returns:
            Completions in the order of the requests; of whole groups only, if some were lost for good.

        Raises:
            UserError: every group of the round was lost.
        """
        if self.is_ahead(step):
            begun = self._ahead.take(step)
            self._taken = {step: begun}
            found = [completion for completion in begun.responses() if self._is_fresh(completion, step)]
        else:
            found = self._sampled_now(step, requests, params)
        return self._whole_groups(requests, self._completed(step, requests, params, found))

    def _is_fresh(self, completion: Completion, step: int) -> bool:
        oldest = completion.version
        return oldest is None or step - oldest <= self._lead.steps or self._lead.stale == "keep"

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
            with self._alone():
                self._send(step)
                done |= {c.request_id: c for c in sampled(self._sampler, missing, params)}
        wait_for_all(f"round {step} is sampled")
        return done

    @_then_training
    def ask(self, step: int, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Responses that nothing is trained on, by the weights that step `step` starts from, on all processes.

        Rounds ahead are waited for, or interrupted, as by any new weights.

        Args:
            step: steps done.
            requests: the same on all processes, which share them.
            params: how tokens are drawn.

        Returns:
            Completions in the order of the requests; fewer if servers lost some for good.
        """
        mine = requests[dist.get_rank() :: dist.get_world_size()]
        done = self._completed(step, mine, params, self._sampled_now(step, mine, params))
        parts: list[dict[str, Completion]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, done)
        found = {name: completion for part in parts for name, completion in part.items()}
        return [found[request.id] for request in requests if request.id in found]

    def _whole_groups(self, requests: Sequence[Request], done: Mapping[str, Completion]) -> list[Completion]:
        broken = {slot_of(request.id) for request in requests if request.id not in done}
        kept = [done[request.id] for request in requests if slot_of(request.id) not in broken]
        self.lost_groups = _total(len(broken))
        if not _total(len(kept)):
            raise UserError(
                f"none of the round's {_total(len(requests))} responses could be sampled, {ATTEMPTS + 1} times",
                rule="a round needs at least one whole group of responses",
                remedy="look at the rollout servers and raise engine.recovery_seconds, request_seconds or attempts; "
                "the same command continues at the newest checkpoint",
            )
        return kept

    # ---- rounds ahead --------------------------------------------------------------------------------------

    def begin(self, step: int, steps: int, new: Callable[[int], Round]) -> None:
        """Begin as many rounds as may be ahead of `step`, with the weights that it starts from.

        Where new weights wait for whole rounds, so many are begun when none is left; where they interrupt, there is
        one more with every step.

        Args:
            step: the step under way.
            steps: of the run.
            new: makes the round of a step; called in the order of steps.
        """
        begun = self.steps_ahead
        later = range(step + 1 + len(begun), min(step + self._lead.steps, steps - 1) + 1)
        if (begun and self._lead.at_most is None) or not (begun or later):
            return
        with self._alone():
            if self._sampler.version != step:
                self._send(step)
            for number in later:
                self._ahead.rounds[number] = new(number)

    def save(self, step: int) -> None:
        """Write the rounds from `step` on for a run that is resumed there: whole, or with what there is of them."""
        if not self._lead.steps:
            return
        with self._alone():
            mine = {begun: found for begun, found in {**self._taken, **self._ahead.rounds}.items() if begun >= step}
            parts: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, rows_of(mine))
            rows = [row for part in parts for row in part]
            if rows and dist.get_rank() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                atomic_write_bytes(self._directory / FILE.format(step=step), to_parquet(rows))
            wait_for_all(f"the rounds from {step} on are written")

    def restore(self, step: int, renew: Callable[[Mapping[int, int], int], Round]) -> None:
        """Take over the rounds that were saved with the checkpoint of `step`, if there are such.

        Damaged ones are sampled again, by the current weights. The slots may be dealt to the processes in another way
        than when the rounds were saved.

        Args:
            step: where the run goes on.
            renew: makes a round of fresh requests from slots with their prompts' numbers, and its step.
        """
        file = self._directory / FILE.format(step=step)
        if not file.is_file():
            return
        saved, problem = None, ""
        try:
            saved = read_rows(file)
        except (pa.ArrowException, OSError) as error:
            problem = str(error)
        if _total(int(saved is None)) or saved is None:
            if dist.get_rank() == 0:
                _LOGGER.warning(
                    "%s is damaged (%s): what was sampled ahead is sampled again, by the weights of step %d",
                    *(file, problem, step),
                )
            return
        for begun, rows in by_step(saved):
            prompt_of = {slot_of(row["request_id"]): row["prompt"] for row in rows}
            mine = sorted(prompt_of)[dist.get_rank() :: dist.get_world_size()]
            fresh = renew({slot: prompt_of[slot] for slot in mine}, begun)
            self._ahead.restore(begun, filled(fresh, (row for row in rows if slot_of(row["request_id"]) in mine)))
        if self._lead.at_most is not None:
            self.sync(step)
            self._ahead.resume()

    def forget(self, keep: Iterable[int]) -> None:
        """Remove the saved rounds of other checkpoints than those of these steps, on process 0."""
        names = {FILE.format(step=step) for step in keep}
        if dist.get_rank() == 0 and self._directory.is_dir():
            for file in self._directory.glob("round-*.parquet"):
                if file.name not in names:
                    file.unlink()

    def close(self) -> None:
        """Wait for the thread."""
        self._ahead.close()


def pending_directory(run: RunDirectory) -> Path:
    """Where a run keeps the rounds that it sampled ahead."""
    return run.path / DIRECTORY


def _total(number: int) -> int:
    total = torch.tensor([number], device=platform.device())
    dist.all_reduce(total)
    return int(total)
