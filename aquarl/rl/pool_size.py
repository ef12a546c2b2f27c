"""How long the learner waited and what lay ready in, how many rollout workers to want out.

A plain class that is told of every step; the stream actor hires it, and hires and dismisses by
what it says. Ray's autoscaler learns of it by the actors that wait for a place: while one does,
no further one is wanted, so a cluster that cannot grow is asked for one worker more, not for many.

Hysteresis, so that a pool settles: between the two thresholds nothing happens; a verdict counts
when it was the same several steps in a row; and a size that was too small is not tried again soon,
later each time that it proves too small again.
"""

from __future__ import annotations

from collections import Counter

from aquarl.config import RLConfig

GROW_ABOVE = 0.1
"""Share of a step that the learner waited for groups."""
SHRINK_BELOW = 0.02
FULL = 0.9
"""Of what `max_staleness` lets lie ready: the workers wait for the learner."""
STEPS_TO_GROW = 3
STEPS_TO_SHRINK = 6
"""More: a worker that is missed later takes its time to start."""
STEPS_TO_FORGET = 100
"""For so long a size that was too small is not gone back to: counted from when the worker that was
missed is up, or missed no more, and twice as long each time, up to `PATIENCE` times."""
PATIENCE = 16


class PoolSize:
    """`wanted` is always within `rl.rollout_workers`, which is the least and the most."""

    def __init__(self, config: RLConfig) -> None:
        self._least = self.wanted = config.rollout_workers.min
        leases = config.prompts_per_step // config.prompts_per_lease * (1 + config.max_staleness)
        # More workers than leases could never all have work.
        self._most = max(self._least, min(config.rollout_workers.max, leases))
        self._streak = 0
        """Steps in a row that said grow (positive) or shrink (negative)."""
        self._steps = 0
        self._closed_until: dict[int, int] = {}
        """For sizes that were too small: the step from which on they may be tried again."""
        self._times_too_small: Counter[int] = Counter()

    def observe(self, wait_share: float, fullness: float, workers: int) -> int:
        """Take what one step showed, and return how many workers are wanted from now on.

        Args:
            wait_share: Of the time since the last step began, how much the learner waited for
                groups; 0 to 1.
            fullness: Groups that lay ready when the learner asked, as a share of those that
                `max_staleness` lets lie ready. 0 on-policy, where none may.
            workers: That are up. Fewer than wanted: the rest has found no place yet.
        """
        self._steps += 1
        is_missed = workers < self.wanted and wait_share >= SHRINK_BELOW
        if is_missed and self.wanted - 1 in self._closed_until:
            self._closed_until[self.wanted - 1] += 1
        if wait_share > GROW_ABOVE and workers >= self.wanted:
            self._streak = max(self._streak, 0) + 1
        elif wait_share < SHRINK_BELOW and fullness >= FULL:
            self._streak = min(self._streak, 0) - 1
        else:
            self._streak = 0
        if self._streak >= STEPS_TO_GROW and self.wanted < self._most:
            times = min(PATIENCE, 2 ** self._times_too_small[self.wanted])
            self._closed_until[self.wanted] = self._steps + STEPS_TO_FORGET * times
            self._times_too_small[self.wanted] += 1
            self._want(self.wanted + 1)
        elif self._streak <= -STEPS_TO_SHRINK and self._may_shrink():
            self._want(self.wanted - 1)
        return self.wanted

    def _may_shrink(self) -> bool:
        opens_at = self._closed_until.get(self.wanted - 1, 0)
        return self.wanted > self._least and self._steps >= opens_at

    def _want(self, workers: int) -> None:
        self.wanted, self._streak = workers, 0
