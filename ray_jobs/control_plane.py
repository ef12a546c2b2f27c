"""Ray job: how much can one stream carry? Simulated rollout workers against the real stream actor.

    python ray_jobs/control_plane.py [--workers 4 16 64 256] [--seconds 10] [--out docs]

The stream actor, its leases, its bookkeeping, Ray's transport and the message sizes are those of a
run; only the sampling is not. Few processes play many workers: each takes a lease, waits as long as
an H100 would sample it, and yields groups of made-up tokens. A simulated learner takes whole steps
and publishes. At last workers that do not wait at all show the capacity, with leases of the usual
size and of a larger one. Writes control_plane.json, .md and .png.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import random
import statistics
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from psutil import Process

from aquarl.cluster.connection import connected
from aquarl.cluster.results import tokenizer_folder
from aquarl.cluster.stream_actor import StreamActor
from aquarl.config import Config, build_config
from aquarl.data.tokenizer import Tokenizer
from aquarl.model.shape import Shape
from aquarl.observe.machine import cpu_model
from aquarl.records import Lease, LeaseResult, Prompt, Rollout, RolloutGroup, Weights

GROUP, LENGTH = 16, 256
"""Answers a prompt, tokens an answer (its limit): as in `ray_jobs/d20.toml`."""
LEASES = 8, 32, 128
"""Prompts a lease; workers with an H100's pace have the smallest."""
PROMPT = 120
"""Tokens of a prompt."""
STEP = 64
"""Prompts a step, at least; more where many workers would otherwise wait for the learner."""
H100_GROUPS_PER_S = 1560 * 16 / (30 * 60) / 8
"""One H100's share of a nanochat-style run on AQuA: 1,560 steps of 16 prompts in 30
minutes on 8 of them. It sampled and learned in turn, so a GPU that only samples does more."""
OWN_GROUPS_PER_S = 131
"""What aquarl's own engine samples on an H200 at depth 8: `ray_jobs/LOG.md`, 2026-11-26."""
H100S, ROOM = 64, 10
"""Workers to be carried, and how many times their pace."""
PATIENCE_S = 600.0
"""For any one answer."""
PLAYERS = 2


class Player:
    """Many rollout workers in one process, none of which computes anything."""

    def __init__(self, stream: Any, lease_s: float, seed: int) -> None:
        self._stream, self._lease_s, self._rng = stream, lease_s, random.Random(seed)
        self._results: dict[int, LeaseResult] = {}
        """Made up, by the prompts they are of: what a worker spends on one is its own."""
        self.lease_ms: list[float] = []

    async def run(self, name: str) -> AsyncIterator[LeaseResult]:
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
            yield self._result(lease, name)

    def _result(self, lease: Lease, name: str) -> LeaseResult:
        if len(lease) not in self._results:
            self._results[len(lease)] = made_up_result(len(lease), self._rng)
        return replace(
            self._results[len(lease)],
            lease_id=lease.id,
            step=lease.step,
            weights_version=lease.weights_version,
            worker=name,
            sample_s=time.time(),
        )

    def seen(self) -> list[float]:
        seen, self.lease_ms = self.lease_ms, []
        return seen


def made_up_result(prompts: int, rng: random.Random) -> LeaseResult:
    """Return the result of a lease whose answers are all of full length."""

    def group(place: int) -> RolloutGroup:
        rollouts = tuple(
            Rollout(
                tuple(rng.randrange(300, 65536) for _ in range(LENGTH)),
                tuple(-rng.random() for _ in range(LENGTH)),
                stopped=True,
                letter="A",
                reward=float(rng.random() < 0.5),
            )
            for _ in range(GROUP)
        )
        ids = tuple(rng.randrange(300, 65536) for _ in range(PROMPT))
        prompt = Prompt(f"train/{rng.randrange(10**5)}", ids, "ABCDE", "A")
        return RolloutGroup(0, place, 0, prompt, rollouts, (0.5,) * GROUP, 0)

    return LeaseResult.of([group(place) for place in range(prompts)])


class PlayedStream(StreamActor):
    """The stream actor with played workers, which notes how late groups come to it."""

    def __init__(self, config: Config, lease_s: float) -> None:
        super().__init__(config)
        self.submit_ms: list[float] = []
        me = ray.get_runtime_context().current_actor
        hired = ray.remote(num_cpus=0, max_concurrency=1000)(Player)
        self._players = [hired.remote(me, lease_s, seed) for seed in range(PLAYERS)]

    def _hire(self) -> str:
        name = f"rollout-{self._hired}"
        worker = _Played(self._players[self._hired % PLAYERS], name)
        self._hired += 1
        self._workers[name] = worker
        self._spawn(self._consume(name, worker))
        return name

    async def _accept(self, result: LeaseResult) -> None:
        self.submit_ms.append(1000 * (time.time() - result.sample_s))
        await super()._accept(result)

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
        me = ray.get(self._stream.rewind.remote(0, 0, {}), timeout=PATIENCE_S)
        for step in range(steps):
            weights = Weights(step, step + 1, buffer)
            ray.get(self._stream.publish.remote(me, weights), timeout=PATIENCE_S)
            ray.get(self._stream.next_step.remote(me, step, 0, 1), timeout=PATIENCE_S)


def measure(
    workers: int, pace: float, prompts: int, seconds: float, run_dir: str
) -> dict[str, Any]:
    """Return what one stream does with this many workers.

    Args:
        pace: Groups/s of each; 0 for as fast as they can.
        prompts: Of a lease.
    """
    lease_s = prompts / pace if pace else 0.0
    step = max(STEP, workers * prompts // 2)  # so that the bound on staleness holds up nobody
    config = build_config(
        {
            "run": {"dir": run_dir},
            "data": {"train_problems": 2000},
            "rl": {
                "steps": 10**6, "prompts_per_step": step, "prompts_per_lease": prompts,
                "rollouts_per_prompt": GROUP, "max_new_tokens": LENGTH, "max_staleness": 8,
                "rollout_workers": workers,
            },
        }
    )  # fmt: skip
    stream: Any = ray.remote(num_cpus=0)(PlayedStream).remote(config, lease_s)
    ray.get(stream.begin.remote(Shape(512, 1, 64, 1, 1, 64)), timeout=PATIENCE_S)
    learner: Any = ray.remote(num_cpus=0)(Learner).remote(stream)
    learner.run.remote(10**6)

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = ray.get(stream.seen.remote(), timeout=PATIENCE_S)
        return found

    while seen()["groups"] < workers * prompts:  # until all have had a lease
        time.sleep(0.5)
    first = seen()
    time.sleep(seconds)
    last = seen()
    for actor in (learner, stream):
        ray.kill(actor)
    wall_s, groups = last["at"] - first["at"], last["groups"] - first["groups"]
    cpu_s = last["cpu_s"] - first["cpu_s"]
    return {
        "workers": workers,
        "prompts_per_lease": prompts,
        "offered_per_s": workers * pace or None,
        "groups_per_s": groups / wall_s,
        "mb_per_s": groups * group_mb() / wall_s,
        "lease_ms": percentiles(last["lease_ms"]),
        "submit_ms": percentiles(last["submit_ms"]),
        "stream_cores": cpu_s / wall_s,
        "groups_per_cpu_s": groups / cpu_s,
        "memory_mb": last["memory_mb"],
        "late": last["late"],
    }


def group_mb() -> float:
    """Return the size of a group on its way."""
    return len(pickle.dumps(made_up_result(LEASES[0], random.Random(0)))) / LEASES[0] / 1e6


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p50", "p95", "p99"), float("nan"))
    cuts = statistics.quantiles(values, n=100)
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


# Telling.


def page(found: dict[str, Any]) -> str:
    """Return control_plane.md."""
    rows, goal = found["rows"], H100S * ROOM * H100_GROUPS_PER_S
    free = [row for row in rows if row["offered_per_s"] is None]
    best = [
        max((x for x in free if x["prompts_per_lease"] == size), key=lambda x: x["groups_per_s"])
        for size in LEASES
    ]
    paragraphs = [
        f"Simulated on {found['machine']}, {found['when']}, load {found['load']:.1f} when it "
        "began, by `python ray_jobs/control_plane.py`: the real stream actor and Ray's transport, "
        f"with workers that sleep instead of sampling, a learner that takes steps of at least "
        f"{STEP} prompts, and all of them on the same cores. A group is {GROUP} answers of "
        f"{LENGTH} tokens with log-probabilities, and its prompt: "
        f"{1000 * found['group_mb']:.0f} kB.",
        f"**Wanted:** {H100S} H100s at {ROOM} times the pace. A nanochat-style run on AQuA "
        "made 1,560 steps of 16 prompts in 30 minutes on 8 of them, "
        f"{H100_GROUPS_PER_S:.2f} groups/s each, so {goal:,.0f} groups/s. It sampled and learned "
        f"in turn; a GPU that only samples is faster, and the factor of {ROOM} covers engines of "
        "up to "
        f"{ROOM * H100_GROUPS_PER_S * GROUP * LENGTH:,.0f} tokens/s "
        "on each GPU.",
        f"**Measured:** {'; '.join(carried(row, goal) for row in best)}. {saturated(free)}",
    ]
    lines = [
        "# What one stream carries",
        *(line for text in paragraphs for line in ("", *textwrap.wrap(text, 100))),
        "",
        "| workers | prompts a lease | offered groups/s | carried | MB/s "
        "| lease ms p50 / p95 / p99 | submit ms p50 / p95 / p99 | stream cores "
        "| groups per stream CPU s | memory MB |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        offered = "all they can" if row["offered_per_s"] is None else f"{row['offered_per_s']:.0f}"
        cells = [
            str(row["workers"]),
            str(row["prompts_per_lease"]),
            offered,
            f"{row['groups_per_s']:,.0f}",
            f"{row['mb_per_s']:.1f}",
            " / ".join(f"{row['lease_ms'][p]:.0f}" for p in ("p50", "p95", "p99")),
            " / ".join(f"{row['submit_ms'][p]:.0f}" for p in ("p50", "p95", "p99")),
            f"{row['stream_cores']:.2f}",
            f"{row['groups_per_cpu_s']:,.0f}",
            f"{row['memory_mb']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    told = BEYOND, "\n".join(textwrap.wrap(today(best), 100)), SHARDS
    picture = "![the same as a plot](control_plane.png)"
    return "\n".join([*lines, "", picture, *(line for text in told for line in ("", text)), ""])


def carried(row: dict[str, Any], goal: float) -> str:
    """Return what a stream carried whose workers did not wait, in words."""
    return (
        f"with {row['prompts_per_lease']} prompts a lease {row['groups_per_s']:,.0f} groups/s "
        f"({row['groups_per_s'] / goal:.1f} x what is wanted) from {row['workers']} workers that "
        f"do not wait, for which the stream used {row['stream_cores']:.2f} cores: "
        f"{row['groups_per_cpu_s']:,.0f} for each second of its CPU time "
        f"({row['groups_per_cpu_s'] / goal:.1f} x)"
    )


def saturated(free: Sequence[dict[str, Any]]) -> str:
    """Return what was full first."""
    most = max(row["stream_cores"] for row in free)
    if most > 0.9:
        return "There the stream is full: it is one event loop, so about a core."
    return (
        f"The machine was full before the stream was, which used {most:.2f} cores at most: "
        "simulated workers, learner and Ray shared its cores, so the rate for each second of CPU "
        "time is what a stream on a core of its own comes to."
    )


BEYOND = """\
Lease: from a worker's question to its work, waiting for the step to open included. Submit: from
the moment a lease's result is yielded until the stream has booked it. Where workers do not wait,
both are queueing, up to two leases a worker.

The answers of a lease travel as a few arrays: the stream reads rewards, letters and lengths, Ray
passes the rest on without a copy, and the learner opens it. They lie in the object store of the
stream's machine until the step after theirs is trained, so at most `rl.max_staleness` + 2 steps do.
Prompts are made by who samples them. What is left is Ray's price of a lease, a call and a streamed
item: some 5 ms of the stream's CPU time over all its threads, beside 0.03 ms a prompt. Hence larger
leases: `rl.prompts_per_lease`."""


def today(best: Sequence[dict[str, Any]]) -> str:
    """Return what aquarl's own engine would ask of a stream."""
    held = ", ".join(
        f"{row['groups_per_s'] / OWN_GROUPS_PER_S:.0f} with {row['prompts_per_lease']}"
        for row in best
    )
    theirs = H100S * OWN_GROUPS_PER_S
    times = theirs * ROOM / best[-1]["groups_per_s"]
    return (
        f"**What one GPU gives since.** aquarl's own engine samples {OWN_GROUPS_PER_S} such "
        "groups a second on an H200 at depth 8 and 117 on an H100, and its learner takes as many "
        "(`ray_jobs/LOG.md`, 2026-11-26). So many H200s that do nothing but sample fill a stream "
        f"of this machine: {held} prompts a lease. {H100S} of them give {theirs:,.0f} groups/s, "
        f"{theirs * group_mb():.0f} MB/s; {ROOM} times that, room as wide as was wanted at first, "
        f"takes {times:.1f} such streams with the largest leases here."
    )


SHARDS = """\
**Beyond that: sharded streams.** Nothing but the position of the next prompt and the published
version is shared among leases, so a run can have S stream actors, each with the workers and the
learner ranks of its own: shard s gives prompts s, s + S, s + 2S, ... of each step, and rank r asks
shard r mod S. The first rank publishes to all of them, one object reference each, and saves one
frontier, which is the same position for all. What is lost is that a fast shard helps a slow one;
`aquarl scale` would even that out by moving workers. This is a plan: it is wanted where a hundred
of such GPUs do nothing but sample."""


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what was carried and how long it took, over the number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    paced = [row for row in rows if row["offered_per_s"] is not None]
    free = [row for row in rows if row["offered_per_s"] is None]
    for chosen, label in (
        (paced, "at an H100's pace"),
        *(
            ([x for x in free if x["prompts_per_lease"] == size], f"unpaced, {size} a lease")
            for size in LEASES
        ),
    ):
        workers = [row["workers"] for row in chosen]
        left.plot(workers, [row["groups_per_s"] for row in chosen], marker="o", label=label)
    workers = [row["workers"] for row in paced]
    left.plot(workers, [row["offered_per_s"] for row in paced], "k:", label="offered at that pace")
    goal = H100S * ROOM * H100_GROUPS_PER_S
    left.axhline(goal, color="grey", linestyle="--", label=f"{ROOM} x the pace of {H100S} H100s")
    for name, colour in (("lease_ms", "C0"), ("submit_ms", "C1")):
        for p, style in (("p50", "-"), ("p95", "--"), ("p99", ":")):
            label = f"{name.removesuffix('_ms')} {p}"
            right.plot(workers, [row[name][p] for row in paced], colour + style, label=label)
    left.set(ylabel="groups/s", title="carried by one stream")
    right.set(ylabel="ms", title="latencies at an H100's pace")
    for axes in (left, right):
        axes.set(xlabel="rollout workers", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", nargs="+", type=int, default=[4, 16, 64, 256])
    parser.add_argument("--unpaced", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument(
        "--pace", type=float, default=H100_GROUPS_PER_S, help="groups/s of one simulated worker"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args(argv)
    out, load = args.out.resolve(), os.getloadavg()[0]
    when, rows = time.strftime("%Y-%m-%d %H:%M"), []
    with tempfile.TemporaryDirectory() as run_dir:
        config = build_config({"run": {"dir": run_dir}})
        Tokenizer.train(["1 + 2 = 3"], 265).save(tokenizer_folder(config))
        with connected(config):
            for pace, prompts, counts in (
                (args.pace, LEASES[0], args.workers),
                *((0.0, size, args.unpaced) for size in LEASES),
            ):
                for workers in counts:
                    rows.append(measure(workers, pace, prompts, args.seconds, run_dir))
                    print(json.dumps(rows[-1]), flush=True)
    found = {
        "machine": f"{os.cpu_count()} cores of {cpu_model()}", "when": when, "load": load,
        "group_mb": group_mb(), "rows": rows,
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    (out / "control_plane.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "control_plane.md").write_text(page(found))
    plot(rows, out / "control_plane.png")


if __name__ == "__main__":
    main()
