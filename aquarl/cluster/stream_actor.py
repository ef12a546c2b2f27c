"""The one Ray actor between rollout workers and learner: `rl.stream` with the waiting added.

It owns the pool of workers (starts and replaces them), consumes each one's generator, owns the
current weights object (so that it outlives the learner that made it), and answers leases and
`next_step`. Every wait has a deadline and ends in a sentence that says why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from aquarl.cluster.errors import last_line, users_mistake
from aquarl.cluster.kinds import for_kind, kinds_of, next_kind
from aquarl.cluster.ray_metrics import StreamMetrics
from aquarl.cluster.results import put_json, tokenizer_folder
from aquarl.cluster.rollout_pool import LEASE_WAIT_S, hire, sampler_maker
from aquarl.cluster.waits import leave_stacks
from aquarl.config import Config
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import CheckpointError, ClusterError, ConfigError, DataError, StorageError
from aquarl.model.shape import Shape
from aquarl.records import Lease, LeaseResult, Metrics, Prompt, Sampling, StepShare, Weights
from aquarl.rl.pool_size import PoolSize
from aquarl.rl.prompts import PromptSource, SharedProblems
from aquarl.rl.stream import RolloutStream, what_is_set_aside
from aquarl.storage import get, remove
from aquarl.tasks.catalog import load_problems

TICK_S = 1.0
STARTS = 2
"""Replacements, for each worker wanted, of those that raise an error as they start. What is not
installed stays so; the memory that a predecessor had on a GPU is soon free."""

logger = logging.getLogger(__name__)

WeightsIdentity = tuple[int, int]
"""Version and checksum. A version alone does not tell: a learner that went back to a checkpoint
makes the same versions again."""


@dataclass(frozen=True)
class Offer:
    """The stream's answer to a worker that asks for work."""

    lease: Lease | None = None
    weights: Any = None
    """An object reference, where the worker's weights are not the newest."""
    identity: WeightsIdentity | None = None
    """Of the newest weights: what the worker has from now on."""
    is_over: bool = False


class StreamActor:
    """See above. All methods run in one event loop, so none needs a lock."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._begun: RolloutStream | None = None
        self._refused: dict[str, int] = {}
        self._learner = ""
        """Which group of learners is heard: the one that went back to a checkpoint last."""
        self._changed, self._work = asyncio.Condition(), asyncio.Condition()
        """For who waits for groups, and for workers that wait for a lease."""
        self._weights: Any = None
        self._identity: WeightsIdentity | None = None
        self._workers: dict[str, ActorHandle] = {}
        self._kinds: dict[str, int] = {}
        self._dismissed: set[str] = set()
        """Workers that were not up when they became too many: their end is no death."""
        self._overdue: set[str] = set()
        """Workers that are ended because they took too long over a lease."""
        self._up: set[str] = set()
        """Workers that have asked for work; the others start, or wait for a place."""
        self._size: PoolSize | None = PoolSize(config.rl)
        """Decides on the size of the pool, until a person does."""
        self._wanted, self._hired, self._replaced = self._size.wanted, 0, 0
        self._scaled = f"{config.run.dir}/scaled.json"
        """What a person decided, for the next stream of this run, should this one die."""
        self._recall()
        self._gave_at: float | None = None
        """When the learner got its last step."""
        self._wait_share = 0.0
        self._deaths_in_a_row = 0
        """Of workers, since a group came in. Of those that die without raising an error only the
        ones hired in place of another count, and several that one lease kills once: a machine that
        goes takes many at a time."""
        self._successors: set[str] = set()
        """Who was hired in place of another since a group came in."""
        self._failed_starts = 0
        """Of workers, since a group came in: an error was raised before they asked for work."""
        self._booked_at = 0.0
        """When a group came in last."""
        self._fault: str | None = None
        self._is_over = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._metrics = StreamMetrics(config.run.dir)

    def __repr__(self) -> str:
        return f"RolloutStream({self._config.run.dir})"  # Ray asks once, when it is made

    async def begin(self, shape: Shape) -> None:
        """Read what is asked and hire the workers, unless that is done.

        Args:
            shape: Of the policy that the workers are to hold.

        Raises:
            AquarlError: The tokenizer or the problems cannot be used.
        """
        if self._begun is not None:
            return
        config = self._config
        self._tokenizer, self._shape = Tokenizer.load(tokenizer_folder(config)), shape
        splits = load_problems(config.data, config.run.seed)
        self._refused = dict(splits.refused)
        source = PromptSource(
            SharedProblems(splits.train),
            self._tokenizer,
            config.run.seed,
            config.data.permute_options,
        )
        self._begun, self._source = RolloutStream(source, config.rl), ray.put(source)
        self._spawn(self._watch_the_clock())
        await self._resize(self._wanted)

    @property
    def _stream(self) -> RolloutStream:
        assert self._begun is not None, "the learner says begin first"
        return self._begun

    # The pool.

    async def scale(self, workers: int) -> None:
        """Have this many workers from now on: a person's word, which ends deciding by itself.

        Raises:
            StorageError: It cannot be kept for a stream that comes after this one.
        """
        await asyncio.to_thread(put_json, self._scaled, {"workers": workers})
        self._size = None
        await self._resize(workers)

    def _recall(self) -> None:
        """Take up what a person decided while the stream lived that this one follows."""
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            remove(self._scaled)  # of a run that was killed
            return
        with suppress(FileNotFoundError, StorageError):
            self._wanted, self._size = json.loads(get(self._scaled))["workers"], None

    async def _resize(self, workers: int) -> None:
        """Hire what is missing. Surplus workers leave after their lease, or at once if not up."""
        self._wanted = workers
        while self._begun and not self._is_over and len(self._workers) < workers:
            self._hire()
        for name in self._surplus() - self._up:
            self._dismissed.add(name)
            ray.kill(self._workers[name])
        await self._notify()

    def _hire(self) -> str:
        name = f"rollout-{self._hired}"
        self._hired += 1
        kinds = kinds_of(self._config)
        place = next_kind(kinds, Counter(self._kinds[held] for held in self._workers))
        config = for_kind(self._config, kinds[place])
        make_sampler = sampler_maker(config, self._shape, self._tokenizer)
        me = ray.get_runtime_context().current_actor
        worker = hire(name, config, self._source, make_sampler, me)
        self._workers[name], self._kinds[name] = worker, place
        self._spawn(self._consume(name, worker))
        return name

    def _surplus(self) -> set[str]:
        """Return who is to leave: the newest, and first those that are not up."""
        by_merit = sorted(self._workers, key=lambda name: name not in self._up)
        return set(by_merit[self._wanted :])

    def _workers_up(self) -> int:
        return len(self._up & self._workers.keys())

    async def _observe(self, asked_at: float, fullness: float) -> None:
        """Note how long the learner waited for a step, and let the pool follow from it."""
        now, gave_at = time.monotonic(), self._gave_at
        self._gave_at = now
        if gave_at is None:  # the first one, or an evaluation came between
            return
        self._wait_share = (now - asked_at) / max(now - gave_at, 1e-9)
        if self._size is None:
            return
        wanted = self._size.observe(self._wait_share, fullness, self._workers_up())
        if wanted != self._wanted:
            await self._resize(wanted)

    def _pool_metrics(self) -> Metrics:
        return {
            "pool/wanted": self._wanted,
            "pool/workers": self._workers_up(),
            "pool/wait_share": self._wait_share,
        }

    async def _consume(self, name: str, worker: ActorHandle) -> None:
        """Take one worker's results until it leaves; replace it if it died."""
        try:
            results = worker.run.options(
                num_returns="streaming", _generator_backpressure_num_objects=2
            ).remote()
            async for result in results:
                await self._accept(await result)
        except Exception as error:  # of Ray, mostly; whatever it is, its lease is given again
            if not isinstance(error, RayError):
                logger.exception("What rollout worker %s sent could not be booked.", name)
            await self._bury(name, error)
        else:
            self._workers.pop(name, None)
            await self._resize(self._wanted)  # more may be wanted since it was told to leave

    async def _accept(self, result: LeaseResult) -> None:
        if not self._stream.submit(result):
            return
        self._deaths_in_a_row = self._failed_starts = 0
        self._successors.clear()
        self._booked_at = time.monotonic()
        if self._stream.is_of_training(result):
            self._metrics.accepted(result, self._stream.version)
        # Waking those who wait costs more than booking a lease, so it is done where it helps: the
        # learner when all it waits for is in, workers where refilling has made work for them.
        is_refilled = self._config.rl.refill_uniform_groups and self._stream.has_work
        if is_refilled or self._stream.is_complete_with(result):
            await self._notify(workers=self._config.rl.refill_uniform_groups)

    async def _bury(self, name: str, error: Exception) -> None:
        """Free a dead worker's lease and hire another, unless too many died already.

        One that failed is ended, whatever it failed of: an error of its engine, memory that ran
        out, a group that was lost with its node.
        """
        if (worker := self._workers.pop(name, None)) is not None:
            ray.kill(worker)
        leases = self._stream.lost(name)
        if name in self._dismissed:
            await self._resize(self._wanted)
            return
        why = last_line(error)
        if name in self._overdue:
            why = f"it took longer than rl.lease_timeout_s={self._config.rl.lease_timeout_s:g} s"
            logger.warning("Rollout worker %s is replaced: %s over a lease.", name, why)
        set_aside = [x for x in leases if x.deaths >= self._config.rl.lease_deaths]
        self._metrics.lost(set_aside)
        for lease in set_aside:
            said = what_is_set_aside(self._stream.filled(lease), self._config.rl.lease_deaths)
            logger.error("%s The last one: %s", said, why)
        has_started = not (isinstance(error, ActorDiedError) and error.actor_init_failed)
        # An error is as likely to be the engine's as the lease's, so each counts.
        is_an_error = isinstance(error, RayTaskError) or not has_started
        is_in_vain = name in self._successors and not any(lease.deaths > 1 for lease in leases)
        if is_an_error or is_in_vain:
            self._deaths_in_a_row += 1
        if not has_started:
            self._failed_starts += 1
            logger.warning("Rollout worker %s could not start: %s", name, why)
        if self._is_over or len(self._workers) >= self._wanted:
            pass
        elif isinstance(mistake := users_mistake(error), (ConfigError, DataError, CheckpointError)):
            self._fault = str(mistake)  # every worker would say the same
        elif self._deaths_in_a_row > self._limit or self._failed_starts > STARTS * self._wanted:
            self._fault = (
                f"Rollout worker {name} {'died' if has_started else 'could not start'} "
                f"({why}) and {self._replaced} were replaced before it, so replacing "
                "it again would not help. The last checkpoint is whole. If the log ends in an "
                "out-of-memory error, halve rl.prompts_per_lease; then start the same command "
                "again to resume."
            )
        else:
            self._replaced += 1
            self._stream.counts["workers_replaced"] += 1
            await asyncio.sleep(min(0.05 * 2**self._deaths_in_a_row, 5.0))
            if len(self._workers) < self._wanted and not self._is_over:
                self._successors.add(self._hire())
        await self._notify()

    @property
    def _limit(self) -> int:
        return self._config.rl.worker_restarts

    # Towards the workers.

    async def lease(self, worker: str, have: WeightsIdentity | None) -> Offer:
        """Return work for a worker, with new weights if it needs them."""
        deadline = time.monotonic() + LEASE_WAIT_S
        self._up.add(worker)
        while time.monotonic() < deadline:
            if self._is_over or worker not in self._workers or worker in self._surplus():
                return Offer(is_over=True)
            if (lease := self._stream.lease(worker, time.monotonic())) is not None:
                is_new = self._identity != have
                return Offer(lease, self._weights if is_new else None, self._identity)
            await self._wait(deadline, self._work)
        return Offer()

    async def newer(self, have: WeightsIdentity | None) -> Offer:
        """Return the newest weights once they are others than these; none after some seconds."""
        deadline = time.monotonic() + LEASE_WAIT_S
        while self._identity == have and time.monotonic() < deadline:
            await self._wait(deadline)
        is_new = self._identity != have
        return Offer(weights=self._weights if is_new else None, identity=self._identity)

    # Towards the learner.

    async def publish(self, learner: str, weights: Weights) -> None:
        """Keep these weights for whoever leases from now on."""
        self._require(learner)
        self._weights = ray.put(weights)  # ours now: it outlives the learner that made it
        self._identity = (weights.version, weights.checksum)
        self._stream.publish(weights.version)
        await self._notify()

    async def rewind(self, step: int, position: int, counts: dict[str, int]) -> str:
        """Begin at this step, forgetting all leases: what the learner does when it (re)starts.

        Args:
            counts: Of the run up to there, as `counts` gave them: a stream that is new goes on
                from them.

        Returns:
            What its group calls itself from now on. Whoever still is of a group before it, or waits
            for what was before, is told so: its steps would drop what the new one waits for.
        """
        if not self._learner:
            self._stream.counts.update(counts)
        self._stream.rewind(step, position)
        self._gave_at = None
        self._learner = learner = secrets.token_hex(8)
        if self._workers:  # else nobody is left, and why still holds
            self._fault = None
        await self._notify()
        return learner

    async def learner(self) -> str:
        """Return what the group of learners calls itself, for its other ranks."""
        return self._learner

    def _require(self, learner: str) -> None:
        if learner != self._learner:  # no mistake of the user's: its group is to start again
            raise RuntimeError("Another group of learners, or none, has begun here since.")

    async def next_step(self, learner: str, step: int, rank: int, world: int) -> StepShare:
        """Wait for a rank's groups of a step. Raises: ClusterError, saying why they cannot come."""
        self._require(learner)
        asked_at, fullness = time.monotonic(), self._stream.fullness(step)
        share: StepShare = await self._until(
            lambda: self._stream.step_share(step, rank, world), f"the groups of step {step}"
        )
        if rank == 0:
            await self._observe(asked_at, fullness)
        return replace(share, metrics=share.metrics | self._pool_metrics())

    async def step_results(self, learner: str, step: int) -> tuple[list[LeaseResult], list[Lease]]:
        """Return all results of a step that is complete and not yet followed by another, and the
        leases that it goes without."""
        self._require(learner)
        return self._stream.step_results(step) or [], self._stream.set_aside(step)

    async def evaluate(
        self, learner: str, name: str, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[LeaseResult]:
        """Sample one answer a prompt with the newest weights. Raises: ClusterError."""
        self._require(learner)
        self._stream.ask(name, prompts, [(0,)] * len(prompts), sampling)
        await self._notify()
        results: list[LeaseResult] = await self._until(
            lambda: self._stream.answers(name), f"the answers of {name}"
        )
        self._gave_at = None
        return results

    async def frontier(self, learner: str, step: int) -> int:
        self._require(learner)
        return self._stream.frontier(step)

    async def status(self) -> dict[str, Any]:
        """Return what `aquarl status` shows."""
        if self._begun is None:
            return {"step": None, "workers": [], "waiting": [], "wanted": self._wanted}
        return {
            "step": self._stream.next_step,
            "weights_version": self._stream.version,
            "depth": self._stream.depth,
            "workers": sorted(self._up & self._workers.keys()),
            "waiting": sorted(self._workers.keys() - self._up),
            "wanted": self._wanted,
            "wait_share": round(self._wait_share, 3),
            "leases": self._stream.holders(),
            "counts": dict(self._stream.counts),
            "refused": self._refused,
        }

    async def close(self) -> None:
        """Send all workers home; those that are not up, or do not go in time, are ended."""
        self._is_over = True
        await self._resize(0)
        deadline = time.monotonic() + 2 * TICK_S
        while self._workers and time.monotonic() < deadline:
            await self._wait(deadline)
        for worker in self._workers.values():
            ray.kill(worker)
        remove(self._scaled)
        if self._begun:
            self._tell_state()

    # Waiting.

    async def _until(self, ready: Any, what: str) -> Any:
        """Return what is ready in the end. Raises: ClusterError, when no group has come for long,
        saying why."""
        began, learner = time.monotonic(), self._learner

        def deadline() -> float:
            return max(began, self._booked_at) + self._config.rl.wait_timeout_s

        while (result := ready()) is None:
            await self._wait(deadline())
            self._require(learner)
            if self._fault:
                raise ClusterError(self._fault)
            if time.monotonic() > deadline():
                why = self._why_late(what)
                where = leave_stacks(self._config.run.dir, why, await self.status())
                raise ClusterError(f"{why} {where}")
        return result

    def _why_late(self, what: str) -> str:
        seconds = self._config.rl.wait_timeout_s
        if not self._workers_up():
            kind = kinds_of(self._config)[0]
            return (
                f"No rollout worker has come up in {seconds:.0f} s. Each asks Ray for "
                f"{kind.cpus:g} CPUs and {kind.gpus:g} GPUs, of which "
                f"{ray.available_resources().get('CPU', 0):g} and "
                f"{ray.available_resources().get('GPU', 0):g} are free. Lower rl.rollout_workers, "
                "cluster.rollout_cpus or cluster.rollout_gpus, add nodes, or raise "
                "rl.wait_timeout_s where nodes take longer to come."
            )
        replaced = f", {len(self._overdue)} were replaced for their slowness" * bool(self._overdue)
        return (
            f"Waited for {what}, and for {seconds:.0f} s nothing came: {len(self._workers)} "
            f"workers hold {self._stream.holders()}{replaced}. If a lease really takes so long, "
            "lower rl.prompts_per_lease, or raise rl.lease_timeout_s and, beyond it, "
            "rl.wait_timeout_s."
        )

    async def _wait(self, deadline: float, change: asyncio.Condition | None = None) -> None:
        """Sleep until something changes, for a second at most."""
        change = change or self._changed
        timeout = min(TICK_S, max(0.0, deadline - time.monotonic()))
        async with change:
            try:
                await asyncio.wait_for(change.wait(), timeout)
            except TimeoutError:
                return

    async def _notify(self, workers: bool = True) -> None:
        for change in (self._changed, self._work) if workers else (self._changed,):
            async with change:
                change.notify_all()

    async def _watch_the_clock(self) -> None:
        while not self._is_over:
            await asyncio.sleep(TICK_S)
            for name in self._stream.overdue(time.monotonic() - TICK_S) & self._workers.keys():
                self._overdue.add(name)
                ray.kill(self._workers[name])  # then its lease is given again, as after any death
            try:
                self._tell_state()
            except Exception:  # who watches does not steer
                logger.exception("Ray took no metrics of the stream.")

    def _tell_state(self) -> None:
        self._metrics.state(
            depth=self._stream.depth,
            workers=self._workers_up(),
            wanted=self._wanted,
            wait_share=self._wait_share,
            version=self._stream.version,
        )

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("The stream ends: a task of it failed.", exc_info=error)
            os._exit(1)  # as any death of it: Ray starts another, and the learners with it
