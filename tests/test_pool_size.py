"""The pool follows the learner's need and settles: hand-made sequences of steps."""

from __future__ import annotations

from itertools import pairwise

import pytest

from aquarl.config import RLConfig, Workers
from aquarl.rl.pool_size import (
    FULL,
    GROW_ABOVE,
    SHRINK_BELOW,
    STEPS_TO_FORGET,
    STEPS_TO_GROW,
    STEPS_TO_SHRINK,
    PoolSize,
)

STARVED = {"wait_share": 0.5, "fullness": 0.0}
CONTENT = {"wait_share": (GROW_ABOVE + SHRINK_BELOW) / 2, "fullness": 0.5}
FLOODED = {"wait_share": 0.0, "fullness": 1.0}


def pool(least: int = 1, most: int = 4, **settings: object) -> PoolSize:
    """Two leases a step and a staleness of 3: as many as 8 workers could have work."""
    plan = {"prompts_per_step": 8, "prompts_per_lease": 4, "max_staleness": 3} | settings
    return PoolSize(RLConfig(rollout_workers=Workers(min=least, max=most), **plan))


def after(size: PoolSize, steps: int, seen: dict[str, float]) -> int:
    """Let it see the same for some steps, with all wanted workers up."""
    for _ in range(steps):
        size.observe(**seen, workers=size.wanted)
    return size.wanted


def test_it_begins_with_the_least() -> None:
    assert pool(2).wanted == 2


def test_a_learner_that_waits_gets_one_worker_more_every_few_steps_up_to_the_most() -> None:
    size = pool()
    assert after(size, STEPS_TO_GROW - 1, STARVED) == 1
    assert after(size, 1, STARVED) == 2
    assert after(size, STEPS_TO_GROW, STARVED) == 3
    assert after(size, 100, STARVED) == 4


def test_workers_that_wait_for_the_learner_leave_one_by_one_down_to_the_least() -> None:
    size = pool()
    after(size, 100, STARVED)
    after(size, STEPS_TO_FORGET, CONTENT)
    assert after(size, STEPS_TO_SHRINK - 1, FLOODED) == 4
    assert after(size, 1, FLOODED) == 3
    assert after(size, 100, FLOODED) == 1


@pytest.mark.parametrize(
    "between",
    [
        {"wait_share": GROW_ABOVE, "fullness": 0.0},
        {"wait_share": SHRINK_BELOW, "fullness": 1.0},
        {"wait_share": 0.0, "fullness": FULL - 0.01},
    ],
)
def test_between_the_thresholds_nothing_happens(between: dict[str, float]) -> None:
    size = pool()
    after(size, STEPS_TO_GROW, STARVED)
    assert after(size, 1_000, between) == 2


def test_one_step_of_another_kind_begins_the_count_anew() -> None:
    size = pool()
    for _ in range(50):
        assert after(size, STEPS_TO_GROW - 1, STARVED) == 1
        after(size, 1, CONTENT)


def test_a_size_that_was_too_small_is_not_gone_back_to_at_once() -> None:
    """One worker starves the learner and two flood it: no see-saw."""
    size, sizes = pool(), []
    for _ in range(2 * STEPS_TO_FORGET):
        sizes.append(
            size.observe(**(STARVED if size.wanted == 1 else FLOODED), workers=size.wanted)
        )
    assert changes(sizes) <= 4
    assert sizes.count(2) > 0.9 * len(sizes)


def test_while_a_worker_finds_no_place_no_other_is_wanted() -> None:
    """A cluster with room for two: a third is asked for and waits; the learner goes on waiting."""
    size = pool()
    for _ in range(100):
        size.observe(**STARVED, workers=min(size.wanted, 2))
    assert size.wanted == 3


def test_a_worker_that_never_finds_a_place_is_given_up_when_it_is_missed_no_more() -> None:
    size = pool()
    for seen in (STARVED, FLOODED):
        for _ in range(3 * STEPS_TO_FORGET):
            size.observe(**seen, workers=min(size.wanted, 2))
    assert size.wanted == 1


@pytest.mark.parametrize(("staleness", "useful"), [(0, 2), (1, 4), (3, 8)])
def test_never_more_workers_than_leases_that_may_be_open(staleness: int, useful: int) -> None:
    assert after(pool(1, 100, max_staleness=staleness), 1_000, STARVED) == useful


def test_a_fixed_number_stays() -> None:
    for seen in (STARVED, FLOODED):
        assert after(pool(3, 3), 1_000, seen) == 3


def test_a_pool_settles_where_the_learner_is_just_fed() -> None:
    """A model of the stream: a worker samples 0.4 steps in the second that learning one takes.

    Two workers let the learner wait a fifth of its time, three are enough.
    """
    size, ready, sizes = pool(1, 8), 0.0, []
    for _ in range(300):
        seconds = max(1.0, (1 - ready) / (0.4 * size.wanted))
        ready = min(3.0, ready + 0.4 * size.wanted * seconds - 1)
        wait_share = (seconds - 1) / seconds
        sizes.append(size.observe(wait_share, ready / 3, workers=size.wanted))
    assert sizes[:2] == [1, 1] and set(sizes[20:100]) == {3}
    assert sizes.count(3) > 0.8 * len(sizes), "two are tried again now and then"
    assert changes(sizes) <= 6


@pytest.mark.parametrize("start_steps", [0, 60, 300])
def test_a_pool_settles_where_workers_take_long_to_start(start_steps: int) -> None:
    """Two are enough and one is not; a machine for the second comes after so many steps."""
    size, sizes, up, asked_at = pool(1, 4), [], 1, 0
    for step in range(6_000):
        sizes.append(size.observe(**(STARVED if up < 2 else FLOODED), workers=up))
        if size.wanted <= up:
            up, asked_at = size.wanted, step
        elif step - asked_at >= start_steps:
            up += 1
    assert changes(sizes) <= 14, "one worker is tried again after 100, 200, 400, ... 1,600 steps"
    assert sizes[-STEPS_TO_FORGET:] == [2] * STEPS_TO_FORGET


def changes(sizes: list[int]) -> int:
    return sum(a != b for a, b in pairwise(sizes))
