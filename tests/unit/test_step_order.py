"""Which step is next: checked on random recipes by following every start and end, and on small ones by hand."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from phimr_nemo.jobs.quickstart import SECONDS, seed_steps
from phimr_nemo.jobs.steps.order import Order
from phimr_nemo.jobs.steps.step import Step


def step(name: str, *reads: str, processes: int = 1) -> Step:
    arguments = ("some", *(f"from={Path('/runs') / other}" for other in reads))
    return Step(name, arguments, Path("/runs") / name, processes=processes)


def random_recipe(rng: random.Random) -> tuple[list[Step], dict[str, float]]:
    names = [f"s{number}" for number in range(rng.randint(1, 12))]
    steps = [
        step(name, *rng.sample(names[:number], rng.randint(0, min(number, 3))), processes=rng.choice((1, 1, 1, 2, 3)))
        for number, name in enumerate(names)
    ]
    return steps, {name: float(rng.choice((0, 1, 2, 3, 5, 8, 13))) for name in names}


def follow(order: Order, steps: list[Step], at_once: int) -> tuple[float, dict[Step, float]]:
    """Start and end every step as the order says; when the last ended, and when each began.

    Every step must begin after those that it reads have ended, and no more processes may run than there are cores.
    """
    waiting, running, ended = list(steps), dict[Step, float](), set[Step]()
    began, clock = dict[Step, float](), 0.0
    while waiting or running:
        while (found := order.next(waiting, running)) is not None:
            waiting.remove(found)
            assert ended.issuperset(order.reads[found])
            began[found], running[found] = clock, order.usual(found)
            assert sum(min(one.processes, at_once) for one in running) <= at_once
        assert running, f"nothing begins: {[one.name for one in waiting]}"
        first = min(running, key=running.__getitem__)
        passed = running.pop(first)
        clock += passed
        running = {one: left - passed for one, left in running.items()}
        ended.add(first)
    return clock, began


@pytest.mark.parametrize("seed", range(60))
def test_every_recipe_ends_within_what_any_order_can_and_must_take(seed: int) -> None:
    rng = random.Random(seed)
    steps, seconds = random_recipe(rng)
    at_once = rng.choice((1, 2, 2, 3))
    order = Order(steps, at_once, seconds)
    took, began = follow(order, steps, at_once)
    assert order.makespan(steps, {}) == pytest.approx(took)
    assert len(began) == len(steps)
    # The longest chain, and all cores busy all the time, are the least; one after the other is the most.
    work = [order.usual(one) * min(one.processes, at_once) for one in steps]
    assert took >= max(*order.way.values(), sum(work) / at_once) - 1e-9
    assert took <= sum(order.usual(one) for one in steps) + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_the_way_to_go_is_the_longest_chain(seed: int) -> None:
    """By brute force over every chain of steps in which each reads the one before."""
    steps, seconds = random_recipe(random.Random(seed))
    order = Order(steps[:7], 1, seconds)
    for first in steps[:7]:
        chains = [
            chain
            for length in range(1, len(steps[:7]) + 1)
            for chain in itertools.permutations(steps[:7], length)
            if chain[0] == first and all(b.reads(a) for a, b in itertools.pairwise(chain))
        ]
        assert order.way[first] == max(sum(seconds[one.name] for one in chain) for chain in chains)


def test_a_step_of_two_cores_is_not_kept_waiting_by_one_behind_it() -> None:
    """`wide` can begin in 3 s: what takes 2 s fills the gap, what takes 90 s waits until `wide` has its cores."""
    data, wide, last = step("data"), step("wide", "data", processes=2), step("last", "wide")
    long, short = step("long"), step("short")
    seconds = {"data": 3.0, "wide": 100.0, "last": 100.0, "long": 90.0, "short": 2.0}
    steps = [data, long, short, wide, last]
    order = Order(steps, 2, seconds)
    _, began = follow(order, steps, 2)
    assert began == {data: 0.0, short: 0.0, wide: 3.0, last: 53.0, long: 53.0}
    # With one core it is a step like any other.
    assert Order(steps, 1, seconds).makespan(steps, {}) == sum(seconds.values())


def test_in_the_quickstart_both_cores_train_while_everything_waits_for_it(tmp_path: Path) -> None:
    from phimr_nemo.config import QuickstartConfig, load_config

    config = load_config(QuickstartConfig, Path("conf/quickstart/tiny.yaml"), [])
    steps = seed_steps(config, 0, tmp_path, ranks=2)
    order = Order(steps, 2, SECONDS)
    took, began = follow(order, steps, 2)
    at = {one.name: when for one, when in began.items()}
    for name in ("midtrain", "sft"):
        end = at[name] + order.usual(next(one for one in steps if one.name == name))
        assert not [one for one, when in at.items() if at[name] < when < end]
    assert at["sft-without-midtrain"] > at["sft"]
    # Two ranks are worth it.
    assert took < Order(seed_steps(config, 0, tmp_path), 2, SECONDS).makespan(seed_steps(config, 0, tmp_path), {})
