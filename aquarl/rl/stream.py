"""Leases out, groups in, whole steps out: the book-keeping between samplers and learner.

A plain class that never waits; `cluster/stream_actor.py` hires it and does the waiting. Time is
given to it, so a test can play hours in a moment.

- A lease is issued once, and again (same prompts, same seeds) if its worker died or was silent
  for too long. A group is accepted once, by lease and place; repeats are counted and dropped.
- Leases for step s exist only once weights s - max_staleness do, so no group can be too stale.
- A step is complete when all its groups are in; they come in the order of their leases, whoever
  sampled them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from aquarl.config import RLConfig
from aquarl.records import Lease, Metrics, Prompt, RolloutGroup, Sampling, StepShare
from aquarl.rl.prompts import PromptSource

REFILLS_AT_MOST = 3
"""Times the size of a step that refilling may add to it."""


@dataclass
class _Open:
    """A lease that is not finished: who holds it, since when, what has come."""

    lease: Lease
    worker: str | None = None
    since_s: float = 0.0
    groups: dict[int, RolloutGroup] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return len(self.groups) == len(self.lease.prompts)


class RolloutStream:
    """See above. `version` is the newest published; `next_position` the next prompt to lease."""

    def __init__(self, source: PromptSource, config: RLConfig) -> None:
        self.source, self.config = source, config
        self.counts: Counter[str] = Counter()
        """"late", "reissued", "leases", "groups": over the life of the stream."""
        self._ids = 0
        self.rewind(step=0, position=0)

    def rewind(self, step: int, position: int) -> None:
        """Begin anew at this step, whose first prompt is at this position.

        No lease is given before weights are published again: those of before may be newer than
        the step, from updates that a failure undid.
        """
        self.version = -1
        self.next_step, self.next_position = step, position
        self._asked_step = step
        self._open: dict[int, _Open] = {}
        self._leases_of_step: dict[int, list[int]] = {}
        self._start_of_step: dict[int, int] = {}
        self._evaluations: dict[str, list[int]] = {}

    # Towards the samplers.

    def lease(self, worker: str, now_s: float) -> Lease | None:
        """Return the next lease for this worker, or None if there is nothing to do now."""
        free = next((entry for entry in self._open.values() if self._is_free(entry)), None)
        if free is None and self._may_open_step():
            self._open_step()
            free = next(entry for entry in self._open.values() if self._is_free(entry))
        if free is None:
            return None
        free.worker, free.since_s = worker, now_s
        free.lease = replace(free.lease, weights_version=self.version)
        self.counts["leases"] += 1
        return free.lease

    def submit(self, group: RolloutGroup) -> bool:
        """Take a finished group. False: it was late or a repeat, and is dropped."""
        entry = self._open.get(group.lease_id)
        if entry is None or group.index in entry.groups:
            self.counts["late"] += 1
            return False
        entry.groups[group.index] = group
        self.counts["groups"] += 1
        if entry.is_finished and entry.lease.purpose == "train":
            self._refill(entry.lease.step)
        return True

    def lost(self, worker: str) -> int:
        """Free the unfinished leases of a dead worker. Returns how many."""
        return self._free(e for e in self._open.values() if e.worker == worker)

    def expire(self, now_s: float) -> int:
        """Free leases that were not finished in time. Returns how many."""
        oldest = now_s - self.config.lease_timeout_s
        return self._free(e for e in self._open.values() if e.worker and e.since_s < oldest)

    # Towards the learner.

    def publish(self, version: int) -> None:
        """Weights of this version exist now: `version` updates have been made."""
        self.version = version

    def step_share(self, step: int, rank: int, world: int) -> StepShare | None:
        """Return a rank's groups of a step, or None while some are still missing.

        Asking for a step tells that the one before it is trained. It is kept once more, for
        ranks that are still looking at it; those before that one are forgotten.
        """
        self._asked_step = max(step, self._asked_step)
        self._forget_before(step - 1)
        groups = self.step_groups(step)
        if groups is None:
            return None
        trained = groups
        if self.config.refill_uniform_groups:
            useful = [group for group in groups if not is_uniform(group)]
            trained = useful if len(useful) >= world else groups  # each rank needs a group
        return StepShare(
            groups=tuple(trained[rank::world]),
            tokens_in_step=sum(len(r.ids) for group in trained for r in group.rollouts),
            rollouts_in_step=sum(len(group.rollouts) for group in trained),
            metrics=describe(groups, step),
        )

    def step_groups(self, step: int) -> list[RolloutGroup] | None:
        """Return all groups of a step in the order of their leases, or None if not complete."""
        return self._collected(self._leases_of_step.get(step))

    def frontier(self, step: int) -> int:
        """Return the position of the first prompt of a step: where to resume it."""
        return self._start_of_step.get(step, self.next_position)

    # Evaluations go through the same samplers, before anything else.

    def ask(
        self,
        name: str,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> None:
        """Queue an evaluation; `answers(name)` has its groups when they are in."""
        size = self.config.prompts_per_lease
        self._evaluations[name] = [
            self._new_lease(
                self.next_step,
                tuple(prompts[at : at + size]),
                tuple(tuple(row) for row in seeds[at : at + size]),
                sampling,
                name,
            )
            for at in range(0, len(prompts), size)
        ]

    def answers(self, name: str) -> list[RolloutGroup] | None:
        """Return an evaluation's groups in the order of its prompts, once; None until then."""
        groups = self._collected(self._evaluations.get(name))
        if groups is not None:
            for lease_id in self._evaluations.pop(name):
                del self._open[lease_id]
        return groups

    @property
    def depth(self) -> int:
        """Groups that are in and not yet trained."""
        entries = self._open.values()
        return sum(len(e.groups) for e in entries if e.lease.step >= self._asked_step)

    def holders(self) -> dict[str, int]:
        """Return which worker holds how many unfinished leases."""
        busy = [e.worker for e in self._open.values() if e.worker and not e.is_finished]
        return dict(Counter(busy))

    def _is_free(self, entry: _Open) -> bool:
        return entry.worker is None and not entry.is_finished

    def _free(self, entries: object) -> int:
        freed = [e for e in entries if not e.is_finished]  # type: ignore[attr-defined]
        for entry in freed:
            entry.worker = None
            entry.lease = replace(entry.lease, attempt=entry.lease.attempt + 1)
        self.counts["reissued"] += len(freed)
        return len(freed)

    def _may_open_step(self) -> bool:
        config = self.config
        if self.version < 0 or self.next_step >= config.steps:
            return False
        if config.refill_uniform_groups and not self._is_complete(self.next_step - 1):
            return False  # which prompts refill a step must not depend on timing
        return self.next_step - self.version <= config.max_staleness

    def _is_complete(self, step: int) -> bool:
        return step not in self._leases_of_step or self.step_groups(step) is not None

    def _open_step(self) -> None:
        step, config = self.next_step, self.config
        self._start_of_step[step] = self.next_position
        self._leases_of_step[step] = []
        for _ in range(config.prompts_per_step // config.prompts_per_lease):
            self._lease_next_prompts(step)
        self.next_step += 1

    def _lease_next_prompts(self, step: int) -> None:
        config = self.config
        positions = range(self.next_position, self.next_position + config.prompts_per_lease)
        self.next_position = positions.stop
        sampling = Sampling(config.max_new_tokens, config.temperature)
        prompts = tuple(self.source.prompt(position) for position in positions)
        seeds = tuple(self.source.seeds(p, config.rollouts_per_prompt) for p in positions)
        self._leases_of_step[step].append(self._new_lease(step, prompts, seeds, sampling, "train"))

    def _new_lease(
        self,
        step: int,
        prompts: tuple[Prompt, ...],
        seeds: tuple[tuple[int, ...], ...],
        sampling: Sampling,
        purpose: str,
    ) -> int:
        lease = Lease(self._ids, step, prompts, seeds, sampling, self.version, purpose)
        if purpose == "train":
            self._open[lease.id] = _Open(lease)
        else:  # evaluations go first: the learner waits for them
            self._open = {lease.id: _Open(lease)} | self._open
        self._ids += 1
        return lease.id

    def _refill(self, step: int) -> None:
        """Lease further prompts for a complete step in place of groups that teach nothing."""
        config = self.config
        groups = self.step_groups(step)
        if not config.refill_uniform_groups or groups is None:
            return
        useful = sum(not is_uniform(group) for group in groups)
        missing = config.prompts_per_step - useful
        room = (1 + REFILLS_AT_MOST) * config.prompts_per_step - len(groups)
        for _ in range(0, min(missing, room), config.prompts_per_lease):
            self._lease_next_prompts(step)

    def _collected(self, lease_ids: Sequence[int] | None) -> list[RolloutGroup] | None:
        if lease_ids is None or not all(self._open[i].is_finished for i in lease_ids):
            return None
        return [group for i in lease_ids for _, group in sorted(self._open[i].groups.items())]

    def _forget_before(self, step: int) -> None:
        for old in [s for s in self._leases_of_step if s < step]:
            for lease_id in self._leases_of_step.pop(old):
                del self._open[lease_id]
            del self._start_of_step[old]


def is_uniform(group: RolloutGroup) -> bool:
    """Return whether all rewards of a group are equal: it has nothing to teach."""
    return len({rollout.reward for rollout in group.rollouts}) == 1


def describe(groups: Sequence[RolloutGroup], step: int) -> Metrics:
    """Return what to plot about a step's groups."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    n, lengths = len(rollouts), [len(rollout.ids) for rollout in rollouts]
    right = sum(r.letter == g.prompt.answer_letter for g in groups for r in g.rollouts)
    staleness = [step - group.weights_version for group in groups]
    return {
        "reward/mean": sum(rollout.reward for rollout in rollouts) / n,
        "reward/accuracy": right / n,
        "reward/committed_fraction": sum(r.letter is not None for r in rollouts) / n,
        "reward/uniform_groups": sum(map(is_uniform, groups)),
        "reward/groups": len(groups),
        "rollout/length_mean": sum(lengths) / n,
        "rollout/cut_fraction": sum(not rollout.stopped for rollout in rollouts) / n,
        "rollout/staleness_mean": sum(staleness) / len(staleness),
        "rollout/staleness_max": max(staleness),
        "time/sample_s": sum(group.sample_s for group in groups),
    }
