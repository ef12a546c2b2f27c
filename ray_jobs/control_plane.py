"""How much can one stream carry? Simulated rollout workers against the real stream actor.

    python ray_jobs/control_plane.py [--workers 4 16 64 256] [--seconds 15] [--out docs]

The stream actor, its leases, its bookkeeping, Ray's transport and the message sizes are those of a
run; only the sampling is not. Few processes play many workers: each takes a lease, waits as long as
an H100 would sample it, and yields groups of made-up tokens. A simulated learner takes whole steps
and publishes. Writes control_plane.json, .md and .png. Ends with the measured capacity beside what
64 H100 workers produce.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from psutil import Process

from aquarl.cluster.own_ray import alone
from aquarl.cluster.results import tokenizer_folder
from aquarl.cluster.stream_actor import StreamActor
from aquarl.config import Config, build_config
from aquarl.data.tokenizer import Tokenizer
from aquarl.model.gpt import Shape
from aquarl.records import Lease, Rollout, RolloutGroup, Weights

GROUP, LENGTH, LEASE, STEP = 16, 256, 8, 64
"""Answers a prompt, tokens an answer, prompts a lease (`ray_jobs/d8.toml`); prompts a step."""
H100_GROUPS_PER_S = 1.74
"""One H100's share of the reference run: 1,560 steps of 16 prompts in 30 minutes on 8 of them."""
GOAL = 64 * H100_GROUPS_PER_S
PLAYERS = 2
Group = RolloutGroup


class Player:
    """Many rollout workers in one process, none of which computes anything."""

    def __init__(self, stream: Any, lease_s: float, seed: int) -> None:
        self._stream, self._lease_s, self._rng = stream, lease_s, random.Random(seed)
        self._answers = [self._answer() for _ in range(4 * GROUP)]
        self.lease_ms: list[float] = []

    def _answer(self) -> Rollout:
        ids = tuple(self._rng.randrange(300, 65536) for _ in range(LENGTH))
        logprobs = tuple(-self._rng.random() for _ in range(LENGTH))
        text = "".join(self._rng.choice("abcdefghij ") for _ in range(3 * LENGTH))
        reward = float(self._rng.random() < 0.5)
        return Rollout(
            ids, logprobs, stopped=True, text=text, letter="A", reward=reward, formatted=True
        )

    async def run(self, name: str) -> AsyncIterator[list[Group]]:
        await asyncio.sleep(self._rng.random() * self._lease_s)  # they do not start as one
        have = None
        while True:
            asked = time.perf_counter()
            offer = await self._stream.lease.remote(name, have)
            if offer.is_over:
                return
            if (lease := offer.lease) is None:
                continue
            self.lease_ms.append(1000 * (time.perf_counter() - asked))
            have = offer.identity
            if lease.purpose == "train" and self._lease_s:
                await asyncio.sleep(self._lease_s * self._rng.uniform(0.8, 1.2))
            yield [self._group(lease, place, name) for place in range(len(lease.prompts))]

    def _group(self, lease: Lease, place: int, name: str) -> Group:
        first = self._rng.randrange(3 * GROUP)
        answers = tuple(self._answers[first : first + GROUP])
        return Group(
            lease.id, place, lease.step, lease.prompts[place], answers, (0.5,) * GROUP,
            lease.weights_version, name, time.time(),
        )  # fmt: skip

    def seen(self) -> list[float]:
        seen, self.lease_ms = self.lease_ms, []
        return seen


class PlayedStream(StreamActor):
    """The stream actor with played workers, which notes how late groups come to it."""

    def __init__(self, config: Config, lease_s: float) -> None:
        super().__init__(config)
        self.submit_ms: list[float] = []
        me = ray.get_runtime_context().current_actor
        hired = ray.remote(num_cpus=0, max_concurrency=1000)(Player)
        self._players = [hired.remote(me, lease_s, seed) for seed in range(PLAYERS)]

    def _hire(self) -> None:
        name = f"rollout-{self._hired}"
        worker = _Played(self._players[self._hired % PLAYERS], name)
        self._hired += 1
        self._workers[name] = worker
        self._spawn(self._consume(name, worker))

    async def _accept(self, groups: Sequence[Group]) -> None:
        self.submit_ms.append(1000 * (time.time() - groups[0].sample_s))
        await super()._accept(groups)

    async def seen(self) -> dict[str, Any]:
        """Return what has been measured since it was asked last."""
        times = Process().cpu_times()
        submit_ms, self.submit_ms = self.submit_ms, []
        lease_ms = [ms for player in self._players for ms in await player.seen.remote()]
        return {
            "groups": self._stream.counts["groups"],
            "late": self._stream.counts["late"] + self._stream.counts["reissued"],
            "cpu_s": times.user + times.system,
            "memory_mb": Process().memory_info().rss / 1e6,
            "at": time.perf_counter(),
            "submit_ms": submit_ms,
            "lease_ms": lease_ms,
        }


class _Played:
    """The handle of one played worker: `worker.run.options(...).remote()`, as of an actor."""

    def __init__(self, player: Any, name: str) -> None:
        self._player, self._name, self.run = player, name, self
        self._options: dict[str, Any] = {}

    def options(self, **options: Any) -> _Played:
        self._options = options
        return self

    def remote(self) -> Any:
        return self._player.run.options(**self._options).remote(self._name)


class Learner:
    """Takes step after step, and publishes, as fast as they come."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def run(self, steps: int) -> None:
        buffer = np.zeros(1 << 20, dtype=np.uint8)
        for step in range(steps):
            ray.get(self._stream.publish.remote(Weights(step, step + 1, buffer)))
            ray.get(self._stream.next_step.remote(step, 0, 1))


def measure(workers: int, lease_s: float, seconds: float, run_dir: str) -> dict[str, Any]:
    """Return what one stream does with this many workers, each `lease_s` seconds on a lease."""
    step = max(STEP, workers * LEASE // 2)  # nobody waits for the bound: it is not measured
    config = build_config(
        {
            "run": {"dir": run_dir},
            "data": {"train_problems": 2000},
            "rl": {
                "steps": 10**6, "prompts_per_step": step, "prompts_per_lease": LEASE,
                "rollouts_per_prompt": GROUP, "max_new_tokens": LENGTH,
                "max_staleness": 8, "rollout_workers": workers,
            },
        }
    )  # fmt: skip
    stream: Any = ray.remote(num_cpus=0)(PlayedStream).remote(config, lease_s)
    ray.get(stream.begin.remote(Shape(512, 1, 64, 1, 1, 64)))
    learner: Any = ray.remote(num_cpus=0)(Learner).remote(stream)
    learner.run.remote(10**6)
    time.sleep(2 * lease_s + 3)  # until all have taken a lease
    first = ray.get(stream.seen.remote())
    time.sleep(seconds)
    last = ray.get(stream.seen.remote())
    for actor in (learner, stream):
        ray.kill(actor)
    wall_s, groups = last["at"] - first["at"], last["groups"] - first["groups"]
    cpu_s = last["cpu_s"] - first["cpu_s"]
    return {
        "workers": workers,
        "offered_per_s": workers * LEASE / lease_s if lease_s else None,
        "groups_per_s": groups / wall_s,
        "mb_per_s": groups * group_mb() / wall_s,
        "lease_ms": percentiles(last["lease_ms"]),
        "submit_ms": percentiles(last["submit_ms"]),
        "cpu_ms_per_group": 1000 * cpu_s / max(groups, 1),
        "stream_cores": cpu_s / wall_s,
        "memory_mb": last["memory_mb"],
        "late": last["late"],
    }


def group_mb() -> float:
    """Return the size of a group on its way."""
    from ray import cloudpickle

    player = Player(None, 0, 0)
    group = Group(0, 0, 0, None, tuple(player._answers[:GROUP]), (0.5,) * GROUP, 0)  # type: ignore[arg-type]
    return len(cloudpickle.dumps(replace(group))) / 1e6


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"p50": 0.0, "p95": 0.0, "p99": 0.0}
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as run_dir, alone():
        config = build_config({"run": {"dir": run_dir}})
        Tokenizer.train(["1 + 2 = 3"], 265).save(tokenizer_folder(config))
        ray.init(address="local", log_to_driver=False, logging_level="error", num_cpus=8)
        try:
            for lease_s in (LEASE / H100_GROUPS_PER_S, 0.0):
                for workers in args.workers:
                    results.append(measure(workers, lease_s, args.seconds, run_dir))
                    print(json.dumps(results[-1]), flush=True)
        finally:
            ray.shutdown()
    args.out.mkdir(exist_ok=True)
    (args.out / "control_plane.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
