"""Leases out, groups in, whole steps out: the book-keeping between samplers and learner.

A plain class that never waits; `cluster/stream_actor.py` hires it and does the waiting. Time is
given to it, so a test can play hours in a moment.

- A lease is issued once, and again (same prompts, same seeds) if its worker died or was silent
  for too long. Its result is accepted once; repeats are counted and dropped.
- Leases for step s exist only once weights s - max_staleness do, so no group can be too stale.
- A step is complete when all its leases are finished; its groups come in their order, whoever
  sampled them.
- A lease over which `lease_deaths` workers died is set aside for good: its step is trained without
  it, and again so when a learner goes back over that step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import groupby
from typing import NamedTuple

import numpy as np

from aquarl.config import RLConfig
from aquarl.records import Lease, LeaseResult, Metrics, Prompt, Sampling, StepShare
from aquarl.rl.prompts import PromptSource

EVALUATION_LEASES = 8
"""That an evaluation is dealt out in, at least."""
REFILLS_AT_MOST = 3
"""Times the size of a step that refilling may add to it."""


@dataclass
class _Open:
    """A lease that is not forgotten: who holds it, since when, what has come of it."""

    lease: Lease
    worker: str | None = None
    since_s: float = 0.0
    result: LeaseResult | None = None
    is_set_aside: bool = False

    @property
    def is_finished(self) -> bool:
        return self.is_set_aside or self.result is not None


class RolloutStream:
    """See above. `version` is the newest published; `next_position` the next prompt to lease."""

    def __init__(self, source: PromptSource, config: RLConfig) -> None:
        self.source, self.config = source, config
        self.counts: Counter[str] = Counter()
        """"late", "reissued", "set_aside", "leases", "groups", "workers_replaced": over the life of
        the run, as far as its checkpoints tell."""
        self._ids = 0
        self._busy: dict[str, float] = {}
        """Since when each worker is over the lease it was given last, on whichever side of a
        rewind: who hangs over one of before is no more use after it."""
        self._bad: dict[Hashable, int] = {}
        """Leases to set aside, by `_signature`, and the deaths over each."""
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
        self._waiting: list[tuple[bool, int]] = []
        """A heap of leases to give: evaluations first, as the learner waits for them, then the
        oldest. Those that need not be given any more are dropped when they come to the top."""
        self._leases_of_step: dict[int, list[int]] = {}
        self._start_of_step: dict[int, int] = {}
        self._evaluations: dict[str, list[int]] = {}

    # Towards the samplers.

    def lease(self, worker: str, now_s: float) -> Lease | None:
        """Return the next lease for this worker, or None if there is nothing to do now."""
        self._busy.pop(worker, None)
        while (free := self._first_free()) is None and self._may_open_step():
            self._open_step()
        if free is None:
            return None
        free.worker, free.since_s = worker, now_s
        self._busy[worker] = now_s
        free.lease = replace(free.lease, weights_version=self.version)
        self.counts["leases"] += 1
        return free.lease

    def submit(self, result: LeaseResult) -> bool:
        """Take the result of a lease. False: it was late or a repeat, and is dropped.

        Raises: ValueError, where groups are missing; the lease is still open then.
        """
        entry = self._open.get(result.lease_id)
        if entry is None or entry.is_finished:
            self.counts["late"] += len(result)
            return False
        if len(result) != len(entry.lease):
            raise ValueError(f"{len(result)} groups came for {len(entry.lease)} prompts.")
        entry.result = result
        self.counts["groups"] += len(result)
        self._when_finished(entry)
        return True

    def is_of_training(self, result: LeaseResult) -> bool:
        """Return whether a result that was taken is to be trained: not of an evaluation."""
        return self._open[result.lease_id].lease.purpose == "train"

    def is_complete_with(self, result: LeaseResult) -> bool:
        """Return whether the step, or the evaluation, of a result has all its groups now."""
        lease = self._open[result.lease_id].lease
        if self.is_of_training(result):
            leases = self._leases_of_step.get(lease.step, [])
        else:
            leases = self._evaluations.get(lease.purpose, [])
        return all(self._open[lease_id].is_finished for lease_id in leases)

    def lost(self, worker: str) -> list[Lease]:
        """Free the unfinished leases of a dead worker, or set them aside. Returns them.

        Those with `config.lease_deaths` deaths are the ones set aside.
        """
        self._busy.pop(worker, None)
        freed = self._free(e for e in self._open.values() if e.worker == worker)
        for entry in freed:
            entry.lease = replace(entry.lease, deaths=entry.lease.deaths + 1)
            if entry.lease.deaths >= self.config.lease_deaths:
                self._set_aside(entry)
        return [entry.lease for entry in freed]

    def overdue(self, now_s: float) -> set[str]:
        """Return the workers that have had a lease for longer than `lease_timeout_s`."""
        oldest = now_s - self.config.lease_timeout_s
        late = {worker for worker, since_s in self._busy.items() if since_s < oldest}
        for entry in self._open.values():
            if entry.worker and not entry.is_finished and entry.since_s < oldest:
                late.add(entry.worker)
        return late

    # Towards the learner.

    def publish(self, version: int) -> None:
        """Weights of this version exist now: `version` updates have been made."""
        self.version = version

    def step_share(self, step: int, rank: int, world: int) -> StepShare | None:
        """Return a rank's groups of a step, or None while some are still missing.

        Asking for a step tells that the one before it is trained. It is kept once more, for
        ranks that are still looking at it; those before that one are forgotten.

        A step that has fewer groups than ranks, because leases were set aside, is set aside whole:
        its share is empty on every rank.
        """
        self._asked_step = max(step, self._asked_step)
        self._forget_before(step - 1)
        results = self.step_results(step)
        if results is None:
            return None
        if 0 < sum(map(len, results)) < world:
            for lease_id in self._leases_of_step[step]:
                self._set_aside(self._open[lease_id])
            results = []
        groups = [
            _Group(result, place, is_uniform, tokens)
            for result in results
            for place, (is_uniform, tokens) in enumerate(_uniform_and_tokens(result))
        ]
        counted, others = groups, []
        if self.config.refill_uniform_groups:
            counted = [group for group in groups if not group.is_uniform] or groups
            others = [group for group in groups if group.is_uniform]
        # Each rank needs a group. One that is there for that alone is not counted: the same step
        # has the same gradient whatever the number of ranks.
        trained = counted + others[: max(0, world - len(counted))]
        aside = [self._open[lease_id].lease for lease_id in self._set_aside_of(step)]
        return StepShare(
            results=_results(trained[rank::world]),
            tokens_in_step=sum(group.tokens for group in counted),
            rollouts_in_step=sum(group.result.packed.answers_PG.shape[1] for group in counted),
            metrics=describe(results, step) | {"reward/groups_set_aside": sum(map(len, aside))},
            is_padding=rank >= len(counted) > 0,
        )

    def step_results(self, step: int) -> list[LeaseResult] | None:
        """Return all results of a step in the order of their leases, or None if not complete."""
        return self._collected(self._leases_of_step.get(step))

    def set_aside(self, step: int) -> list[Lease]:
        """Return the leases of a step that it is trained without, with their prompts."""
        return [self.filled(self._open[lease_id].lease) for lease_id in self._set_aside_of(step)]

    def _set_aside_of(self, step: int) -> list[int]:
        return [i for i in self._leases_of_step.get(step, ()) if self._open[i].is_set_aside]

    def filled(self, lease: Lease) -> Lease:
        """Return a lease with its prompts and seeds."""
        return self.source.filled(lease, self.config.rollouts_per_prompt)

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
        """Queue an evaluation; `answers(name)` has its results when they are in."""
        size = self._prompts_of_a_question(seeds)
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

    def _prompts_of_a_question(self, seeds: Sequence[Sequence[int]]) -> int:
        """Return how many prompts of an evaluation a lease holds: at most as many answers as one of
        the training, and an eighth of all, for several workers. How many there are must not tell:
        it would change the rounding."""
        config = self.config
        answers = config.prompts_per_lease * config.rollouts_per_prompt
        room = answers // max(map(len, seeds), default=1)
        return max(config.prompts_per_lease, min(room, -(-len(seeds) // EVALUATION_LEASES)))

    def answers(self, name: str) -> list[LeaseResult] | None:
        """Return an evaluation's results in the order of its prompts, once; None until then."""
        results = self._collected(self._evaluations.get(name))
        if results is not None:
            for lease_id in self._evaluations.pop(name):
                del self._open[lease_id]
        return results

    @property
    def has_work(self) -> bool:
        """Whether there is a lease to give."""
        return self._first_free() is not None

    @property
    def depth(self) -> int:
        """Groups that are in and not yet trained."""
        return self._ready_for(self._asked_step)

    def fullness(self, step: int) -> float:
        """Return what lies ready for a step and later, as a share of what `max_staleness` allows.

        Of a step that is asked for the first time: on-policy nothing is.
        """
        allowed = self.config.prompts_per_step * max(1, self.config.max_staleness)
        return self._ready_for(step) / allowed

    def _ready_for(self, step: int) -> int:
        entries = [entry for entry in self._open.values() if entry.lease.step >= step]
        return sum(len(entry.result) for entry in entries if entry.result is not None)

    def holders(self) -> dict[str, int]:
        """Return which worker holds how many unfinished leases."""
        busy = [e.worker for e in self._open.values() if e.worker and not e.is_finished]
        return dict(Counter(busy))

    def _first_free(self) -> _Open | None:
        while self._waiting:
            entry = self._open.get(self._waiting[0][1])
            if entry is not None and entry.worker is None and not entry.is_finished:
                return entry
            heappop(self._waiting)
        return None

    def _queue(self, lease: Lease) -> None:
        heappush(self._waiting, (lease.purpose == "train", lease.id))

    def _free(self, entries: Iterable[_Open]) -> list[_Open]:
        freed = [entry for entry in entries if not entry.is_finished]
        for entry in freed:
            entry.worker = None
            entry.lease = replace(entry.lease, attempt=entry.lease.attempt + 1)
            self._queue(entry.lease)
        self.counts["reissued"] += len(freed)
        return freed

    def _set_aside(self, entry: _Open) -> None:
        entry.is_set_aside, entry.result = True, None
        self.counts["set_aside"] += 1
        self._bad[_signature(entry.lease)] = entry.lease.deaths
        self._when_finished(entry)

    def _when_finished(self, entry: _Open) -> None:
        if entry.is_finished and entry.lease.purpose == "train":
            self._refill(entry.lease.step)

    def _may_open_step(self) -> bool:
        config = self.config
        if self.version < 0 or self.next_step >= config.steps:
            return False
        if config.refill_uniform_groups and not self._is_complete(self.next_step - 1):
            return False  # which prompts refill a step must not depend on timing
        return self.next_step - self.version <= config.max_staleness

    def _is_complete(self, step: int) -> bool:
        return step not in self._leases_of_step or self.step_results(step) is not None

    def _open_step(self) -> None:
        step, config = self.next_step, self.config
        self._start_of_step[step] = self.next_position
        self._leases_of_step[step] = []
        for _ in range(config.prompts_per_step // config.prompts_per_lease):
            self._lease_next_prompts(step)
        self._refill(step)  # where all of them were set aside before
        self.next_step += 1

    def _lease_next_prompts(self, step: int) -> None:
        config = self.config
        positions = range(self.next_position, self.next_position + config.prompts_per_lease)
        self.next_position = positions.stop
        sampling = Sampling(config.max_new_tokens, config.temperature)
        self._leases_of_step[step].append(
            self._new_lease(step, (), (), sampling, "train", positions)
        )

    def _new_lease(
        self,
        step: int,
        prompts: tuple[Prompt, ...],
        seeds: tuple[tuple[int, ...], ...],
        sampling: Sampling,
        purpose: str,
        positions: range = range(0),
    ) -> int:
        lease = Lease(
            self._ids, step, prompts, seeds, sampling, self.version, purpose, positions=positions
        )
        deaths = self._bad.get(_signature(lease))
        self._open[lease.id] = _Open(
            replace(lease, deaths=deaths or 0), is_set_aside=deaths is not None
        )
        self._queue(lease)
        self._ids += 1
        return lease.id

    def _refill(self, step: int) -> None:
        """Lease further prompts for a complete step in place of groups that teach nothing."""
        config = self.config
        while config.refill_uniform_groups and (results := self.step_results(step)) is not None:
            useful = sum(int((~result.packed.is_uniform_P).sum()) for result in results)
            missing = config.prompts_per_step - useful
            room = (1 + REFILLS_AT_MOST) * config.prompts_per_step - sum(map(len, results))
            if min(missing, room) <= 0:
                return
            for _ in range(0, min(missing, room), config.prompts_per_lease):
                self._lease_next_prompts(step)

    def _collected(self, lease_ids: Sequence[int] | None) -> list[LeaseResult] | None:
        if lease_ids is None or not all(self._open[i].is_finished for i in lease_ids):
            return None
        return [result for i in lease_ids if (result := self._open[i].result) is not None]

    def _forget_before(self, step: int) -> None:
        for old in [s for s in self._leases_of_step if s < step]:
            for lease_id in self._leases_of_step.pop(old):
                del self._open[lease_id]
            del self._start_of_step[old]


class _Group(NamedTuple):
    """Where a group of a step is."""

    result: LeaseResult
    place: int
    is_uniform: bool
    tokens: int


def _uniform_and_tokens(result: LeaseResult) -> Iterator[tuple[bool, int]]:
    packed = result.packed
    return zip(packed.is_uniform_P.tolist(), packed.tokens_P.tolist(), strict=True)


def _results(groups: Iterable[_Group]) -> tuple[LeaseResult, ...]:
    """Return these groups as results, in their order."""
    parts = (list(part) for _, part in groupby(groups, key=lambda group: group.result.lease_id))
    return tuple(part[0].result.only([group.place for group in part]) for part in parts)


def _signature(lease: Lease) -> Hashable:
    """Return what a lease is whenever it is made: ids are new after a rewind."""
    problems = tuple(prompt.problem_id for prompt in lease.prompts)
    return lease.step, lease.purpose, lease.positions, problems


def what_is_set_aside(lease: Lease, deaths_allowed: int) -> str:
    """Return the sentence for the person and the log."""
    problems = ", ".join(prompt.problem_id for prompt in lease.prompts)
    if lease.deaths < deaths_allowed:
        return (
            f"Lease {lease.id} ({lease.purpose}, step {lease.step}) is set aside with its whole "
            "step: what others of it were set aside for leaves fewer groups than there are "
            f"learners. The run goes on without its problems: {problems}."
        )
    return (
        f"{lease.deaths} rollout workers died over lease {lease.id} ({lease.purpose}, step "
        f"{lease.step}), so it is set aside and the run goes on without its problems: {problems}."
    )


def describe(results: Sequence[LeaseResult], step: int) -> Metrics:
    """Return what to plot about a step's groups; of none, that there are none."""
    if not results:
        return {"reward/groups": 0}
    answers_B = np.concatenate([result.packed.answers_PG.flatten() for result in results])
    right_P = [right for result in results for _, _, right in result.asked_P]
    right_B = np.repeat(right_P, len(answers_B) // len(right_P))
    groups_R = np.array([len(result) for result in results])
    staleness_R = np.array([step - result.weights_version for result in results])
    sample_s = sum(result.sample_s * len(result) for result in results)
    ages: Counter[int] = Counter()  # of tokens, in versions before the step's own
    for result, staleness in zip(results, staleness_R.tolist(), strict=True):
        tokens = len(result.packed.tokens_M)
        for newer, count in enumerate(np.bincount(result.newer_M).tolist() or [tokens]):
            ages[staleness - newer] += count
    return {
        "reward/mean": float(answers_B["reward"].mean()),
        "reward/accuracy": float((answers_B["letter"] == right_B).mean()),
        "reward/committed_fraction": float((answers_B["letter"] != "").mean()),
        "reward/uniform_groups": sum(int(x.packed.is_uniform_P.sum()) for x in results),
        "reward/groups": len(right_P),
        "rollout/length_mean": float(answers_B["length"].mean()),
        "rollout/cut_fraction": float((~answers_B["stopped"]).mean()),
        "rollout/staleness_mean": float(staleness_R @ groups_R) / len(right_P),
        "rollout/staleness_max": int(staleness_R.max()),
        "time/sample_s": sample_s,
        "time/sample_per_worker_s": sample_s / len({result.worker for result in results}),
        "time/fetch_s": sum(result.fetch_s * len(result) for result in results),
    } | {f"rollout/staleness_{age}": ages[age] / ages.total() for age in sorted(+ages)}
