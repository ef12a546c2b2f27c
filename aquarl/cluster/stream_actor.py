"""The one Ray actor between rollout workers and learner: `rl.stream` with the waiting added.

It owns the pool of workers (starts and replaces them), consumes each one's generator, owns the
current weights object (so that it outlives the learner that made it), and answers leases and
`next_step`. Every wait has a deadline and ends in a sentence that says why.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from aquarl.cluster.errors import last_line, users_mistake
from aquarl.cluster.ray_metrics import StreamMetrics
from aquarl.cluster.results import tokenizer_folder
from aquarl.cluster.rollout_pool import hire, sampler_maker
from aquarl.config import Config
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import ClusterError
from aquarl.model.gpt import Shape
from aquarl.records import Lease, Prompt, RolloutGroup, Sampling, StepShare, Weights
from aquarl.rl.prompts import PromptSource
from aquarl.rl.stream import RolloutStream
from aquarl.tasks.catalog import load_problems

LEASE_WAIT_S = 5.0
"""How long a worker's question stays open before it is told to ask again."""
TICK_S = 1.0

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
        self._rewinds = 0
        self._changed, self._work = asyncio.Condition(), asyncio.Condition()
        """For who waits for groups, and for workers that wait for a lease."""
        self._weights: Any = None
        self._identity: WeightsIdentity | None = None
        self._workers: dict[str, ActorHandle] = {}
        self._wanted, self._hired, self._replaced = config.rl.rollout_workers, 0, 0
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
            splits.train, self._tokenizer, config.run.seed, config.data.permute_options
        )
        self._begun = RolloutStream(source, config.rl)
        self._spawn(self._watch_the_clock())
        await self.scale(self._wanted)

    @property
    def _stream(self) -> RolloutStream:
        assert self._begun is not None, "the learner says begin first"
        return self._begun

    # The pool.

    async def scale(self, workers: int) -> None:
        """Have this many workers from now on. Surplus ones leave after their lease."""
        self._wanted = workers
        while self._begun and len(self._workers) < workers:
            self._hire()
        await self._notify()

    def _hire(self) -> None:
        name = f"rollout-{self._hired}"
        self._hired += 1
        make_sampler = sampler_maker(self._config, self._shape, self._tokenizer)
        me = ray.get_runtime_context().current_actor
        worker = hire(name, self._config, self._tokenizer, make_sampler, me)
        self._workers[name] = worker
        self._spawn(self._consume(name, worker))

    async def _consume(self, name: str, worker: ActorHandle) -> None:
        """Take one worker's groups until it leaves; replace it if it died."""
        try:
            leases = worker.run.options(
                num_returns="streaming", _generator_backpressure_num_objects=2
            ).remote()
            async for groups in leases:
                await self._accept(await groups)
        except RayError as error:
            await self._bury(name, error)
        else:
            self._workers.pop(name, None)
            await self._notify()

    async def _accept(self, groups: Sequence[RolloutGroup]) -> None:
        for group in groups:
            if self._stream.submit(group):
                self._metrics.accepted(group, self._stream.version)
        # Groups make work for others only by refilling; waking hundreds for nothing costs much.
        await self._notify(workers=self._config.rl.refill_uniform_groups)

    async def _bury(self, name: str, error: RayError) -> None:
        """Free a dead worker's lease and hire another, unless too many died already."""
        self._workers.pop(name, None)
        self._stream.lost(name)
        if self._is_over or len(self._workers) >= self._wanted:
            pass
        elif (mistake := users_mistake(error)) is not None:
            self._fault = str(mistake)  # every worker would say the same
        elif not isinstance(error, RayActorError) or self._replaced >= self._limit:
            self._fault = (
                f"Rollout worker {name} died ({last_line(error)}) and {self._replaced} were "
                "replaced before it, so replacing it again would not help. The last checkpoint is "
                "whole. If the log ends in an out-of-memory error, halve "
                "rl.rollouts_per_prompt or rl.prompts_per_lease; then start the same command "
                "again to resume."
            )
        else:
            self._replaced += 1
            await asyncio.sleep(min(0.1 * 2**self._replaced, 5.0))
            if len(self._workers) < self._wanted and not self._is_over:
                self._hire()
        await self._notify()

    @property
    def _limit(self) -> int:
        return self._config.rl.worker_restarts

    # Towards the workers.

    async def lease(self, worker: str, have: WeightsIdentity | None) -> Offer:
        """Return work for a worker, with new weights if it needs them."""
        deadline = time.monotonic() + LEASE_WAIT_S
        while time.monotonic() < deadline:
            if self._is_over or self._is_surplus(worker):
                return Offer(is_over=True)
            if (lease := self._stream.lease(worker, time.monotonic())) is not None:
                is_new = self._identity != have
                return Offer(lease, self._weights if is_new else None, self._identity)
            await self._wait(deadline, self._work)
        return Offer()

    def _is_surplus(self, worker: str) -> bool:
        return worker not in list(self._workers)[: self._wanted]

    # Towards the learner.

    async def publish(self, weights: Weights) -> None:
        """Keep these weights for whoever leases from now on."""
        self._weights = ray.put(weights)  # ours now: it outlives the learner that made it
        self._identity = (weights.version, weights.checksum)
        self._stream.publish(weights.version)
        await self._notify()

    async def rewind(self, step: int, position: int) -> None:
        """Begin at this step, forgetting all leases: what the learner does when it (re)starts."""
        self._stream.rewind(step, position)
        self._rewinds += 1  # who still waits for what was before is told so
        self._fault = None
        await self._notify()

    async def next_step(self, step: int, rank: int, world: int) -> StepShare:
        """Wait for a rank's groups of a step. Raises: ClusterError, saying why they cannot come."""
        share: StepShare = await self._until(
            lambda: self._stream.step_share(step, rank, world), f"the groups of step {step}"
        )
        return share

    async def step_groups(self, step: int) -> list[RolloutGroup]:
        """Return all groups of a step that is complete and not yet followed by another."""
        return self._stream.step_groups(step) or []

    async def evaluate(
        self, name: str, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[RolloutGroup]:
        """Sample one answer a prompt with the newest weights. Raises: ClusterError."""
        self._stream.ask(name, prompts, [(0,)] * len(prompts), sampling)
        await self._notify()
        groups: list[RolloutGroup] = await self._until(
            lambda: self._stream.answers(name), f"the answers of {name}"
        )
        return groups

    async def frontier(self, step: int) -> int:
        return self._stream.frontier(step)

    async def status(self) -> dict[str, Any]:
        """Return what `aquarl status` shows."""
        if self._begun is None:
            return {"step": None, "workers": [], "wanted": self._wanted}
        return {
            "step": self._stream.next_step,
            "weights_version": self._stream.version,
            "depth": self._stream.depth,
            "workers": sorted(self._workers),
            "wanted": self._wanted,
            "replaced": self._replaced,
            "leases": self._stream.holders(),
            "counts": dict(self._stream.counts),
            "refused": self._refused,
        }

    async def close(self) -> None:
        """Send all workers home; those that do not go in time are ended."""
        self._is_over = True
        await self._notify()
        deadline = time.monotonic() + 2 * TICK_S
        while self._workers and time.monotonic() < deadline:
            await self._wait(deadline)
        for worker in self._workers.values():
            ray.kill(worker)

    # Waiting.

    async def _until(self, ready: Any, what: str) -> Any:
        deadline = time.monotonic() + self._config.rl.wait_timeout_s
        rewinds = self._rewinds
        while (result := ready()) is None:
            await self._wait(deadline)
            if self._rewinds != rewinds:  # asking on would drop what the new learner waits for
                raise ClusterError(f"{what} will not come: the learner went back to a checkpoint.")
            if self._fault:
                raise ClusterError(self._fault)
            if time.monotonic() > deadline:
                raise ClusterError(self._why_late(what))
        return result

    def _why_late(self, what: str) -> str:
        seconds = self._config.rl.wait_timeout_s
        if not self._stream.counts["leases"]:
            cluster = self._config.cluster
            return (
                f"No rollout worker has started in {seconds:.0f} s. Each asks Ray for "
                f"{cluster.rollout_cpus:g} CPUs and {cluster.rollout_gpus:g} GPUs, of which "
                f"{ray.available_resources().get('CPU', 0):g} and "
                f"{ray.available_resources().get('GPU', 0):g} are free. Lower rl.rollout_workers, "
                "cluster.rollout_cpus or cluster.rollout_gpus, or add nodes."
            )
        return (
            f"Waited {seconds:.0f} s for {what}, and they did not come: {len(self._workers)} "
            f"workers hold {self._stream.holders()}. Raise rl.wait_timeout_s if this work really "
            "takes so long, or lower rl.prompts_per_lease or rl.max_new_tokens."
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
            stream = self._stream
            if stream.expire(time.monotonic()):
                await self._notify()
            self._metrics.state(
                depth=stream.depth, workers=len(self._workers), version=stream.version
            )

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._tasks.discard)
