"""Which step of a recipe is next where several run side by side, and how long all of them take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phimr_nemo.jobs.steps.step import Step


class Order:
    """The order in which steps run: each after those that it reads from, the one with the longest way to go first.

    A step that runs as several processes has a core for each. One that is next in line and has to wait for its cores
    is not kept waiting longer by steps behind it: those that would still be running are held back, as a cluster's
    scheduler fills its gaps.

    Attributes:
        reads: step -> the others that it reads from.
        way: step -> seconds from its start to the end of the last step that depends on it.

    Args:
        steps: all of them.
        at_once: processes that may run side by side.
        seconds: step's name -> what it usually takes of one core; a step that is not named takes none.
    """

    def __init__(self, steps: Sequence[Step], at_once: int, seconds: Mapping[str, float]) -> None:
        self._at_once = at_once
        self._seconds = {step: seconds.get(step.name, 0.0) / self._cores(step) for step in steps}
        self.reads = {step: [other for other in steps if step.reads(other)] for step in steps}
        self.way: dict[Step, float] = {}
        for step in steps:
            self._find_way(step)

    def usual(self, step: Step) -> float:
        """Seconds that a step usually takes, on the cores that it has."""
        return self._seconds[step]

    def next(self, waiting: Sequence[Step], running: Mapping[Step, float]) -> Step | None:
        """The step to start now; None where all have to wait.

        Args:
            waiting: those that have not begun.
            running: those at work, and the seconds that each will go on for.
        """
        room = self._at_once - sum(map(self._cores, running))
        to_come = {*waiting, *running}
        for step in sorted(waiting, key=self.way.__getitem__, reverse=True):
            is_ready = to_come.isdisjoint(self.reads[step])
            if is_ready and self._cores(step) <= room and not self._delays(step, waiting, running):
                return step
        return None

    def makespan(self, waiting: Sequence[Step], running: Mapping[Step, float]) -> float:
        """Seconds until all have ended, if each takes what it usually does.

        Args:
            waiting, running: see :meth:`next`.
        """
        clock, to_begin, at_work = 0.0, list(waiting), dict(running)
        while to_begin or at_work:
            while (step := self.next(to_begin, at_work)) is not None:
                to_begin.remove(step)
                at_work[step] = self._seconds[step]
            soonest = min(at_work.values())
            clock += soonest
            at_work = {step: left - soonest for step, left in at_work.items() if left > soonest}
        return clock

    def _cores(self, step: Step) -> int:
        return min(step.processes, self._at_once)

    def _find_way(self, step: Step) -> float:
        if step not in self.way:
            after = (self._find_way(other) for other, read in self.reads.items() if step in read)
            self.way[step] = self._seconds[step] + max(after, default=0.0)
        return self.way[step]

    def _delays(self, step: Step, waiting: Sequence[Step], running: Mapping[Step, float]) -> bool:
        """Whether a step would take the cores of one that has a longer way to go and could begin before it ends."""

        def until_read(other: Step) -> float:
            """Seconds until all that it reads has been written."""
            before = (
                running[read] if read in running else until_read(read) + self._seconds[read]
                for read in self.reads[other]
                if read in running or read in waiting
            )
            return max(before, default=0.0)

        return any(
            self.way[other] > self.way[step]
            and self._cores(other) + self._cores(step) > self._at_once
            and self._seconds[step] > max(until_read(other), *running.values(), 0.0)
            for other in waiting
        )
