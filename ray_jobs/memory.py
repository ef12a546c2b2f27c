"""Ray job: does anything grow while a run goes on? Every process's memory, and the object store.

    python ray_jobs/memory.py [--minutes 30] [--every 10] [--config chaos] rl.steps=100000

Runs RL, after the stages before it where they do not stand, and looks at all processes of its own
Ray: what each holds for itself (resident, without what it shares), and what lies in the object
store. After the minutes it stops the run, as Ctrl-C would, and fits a line to what was seen in the
last two thirds of the time. Prints a table and writes RUN/memory.json and .md.

The error of a slope is that of a line through the means of ten stretches of time, since looks that
follow one another are much alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from psutil import Error, Process
from ray.exceptions import RayError
from ray.util.state import list_objects
from ray.util.state.exception import RayStateApiException

from aquarl.cluster.connection import connected
from aquarl.cluster.launch import run_stages
from aquarl.cluster.results import STAGES
from aquarl.config import load_config, with_absolute_paths
from aquarl.observe.machine import cpu_model
from aquarl.observe.metrics import read_metrics

STRETCHES = 10
MB_PER_HOUR = 20.0
"""What a process may gain and still be called flat: 10 MB in the half hour of `d8`'s RL."""

Series = dict[str, list[tuple[float, float]]]
"""Seconds and megabytes, by process; the object store among them, with objects for megabytes."""
STORE_MB, STORE_OBJECTS = "object store", "objects in the store"


class Looker(threading.Thread):
    """Looks at everything every few seconds from the first step, and interrupts the run in time."""

    def __init__(self, run_dir: str, minutes: float, every_s: float) -> None:
        super().__init__(name="memory", daemon=True)
        self.seen: Series = defaultdict(list)
        self._run_dir, self._seconds, self._every_s = run_dir, 60 * minutes, every_s
        self.is_over = False

    def run(self) -> None:
        while not steps_of(self._run_dir):
            time.sleep(0.5)
        began = time.monotonic()
        while (at := time.monotonic() - began) < self._seconds:
            for name, megabytes in memory_of_all().items():
                self.seen[name].append((at, megabytes))
            time.sleep(self._every_s)
        self.is_over = True
        os.kill(os.getpid(), signal.SIGINT)


def steps_of(run_dir: str) -> int:
    """Return how many RL steps the run's own numbers tell of."""
    return sum("reward/mean" in row for row in read_metrics(run_dir).get("rl", ()))


def memory_of_all() -> dict[str, float]:
    """Return the megabytes of this process and of all it has started, and of the object store."""
    found = {}
    me = Process()
    for process in (me, *me.children(recursive=True)):
        try:
            memory, command = process.memory_info(), process.cmdline()
        except Error:  # it may end while we look
            continue
        name = "driver" if process == me else role(command)
        found[f"{name} {process.pid}"] = (memory.rss - memory.shared) / 1e6
    try:
        gcs = ray.get_runtime_context().gcs_address
        objects = {
            x.object_id: x.object_size
            for x in list_objects(gcs, limit=10_000, raise_on_missing_output=False)
        }
    except (RayError, RayStateApiException):  # busy; the next look asks again
        return found
    found[STORE_MB] = sum(max(size, 0) for size in objects.values()) / 1e6
    found[STORE_OBJECTS] = float(len(objects))
    return found


def role(command: list[str]) -> str:
    """Return what a process of Ray's is called, from its command line."""
    line = " ".join(command)
    if named := re.match(r"ray::(\w+)", line):
        return named[1]
    for part in command[:6]:
        if (stem := Path(part).stem) and re.fullmatch(
            "raylet|gcs_server|[a-z]+_?monitor|dash.*", stem
        ):
            return stem
    return "dashboard module" if "dashboard" in line else Path(command[0]).stem if command else "?"


def slope_of(seen: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the growth of a series and its standard error, per hour, from the means of stretches.

    Raises:
        ValueError: There are fewer looks than stretches.
    """
    if len(seen) < STRETCHES:
        raise ValueError(f"{len(seen)} looks are too few for {STRETCHES} stretches")
    cuts = [i * len(seen) // STRETCHES for i in range(STRETCHES + 1)]
    stretches = [seen[a:b] for a, b in pairwise(cuts)]
    x = [statistics.fmean(at for at, _ in part) / 3600 for part in stretches]
    y = [statistics.fmean(value for _, value in part) for part in stretches]
    slope, start = statistics.linear_regression(x, y)
    left = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    return slope, (left / (STRETCHES - 2) / spread) ** 0.5


def verdict(slope: float, error: float) -> str:
    if slope - 2 * error > MB_PER_HOUR:
        return "grows"
    return "flat" if slope + 2 * error <= MB_PER_HOUR else "undecided"


def judged(seen: Series, ended_s: float) -> list[dict[str, Any]]:
    """Return a row for each process that was there through the last two thirds of the time."""
    rows = []
    for name, series in sorted(seen.items()):
        late = [(at, value) for at, value in series if at >= ended_s / 3]
        is_whole = late and late[0][0] < ended_s * 0.4 and late[-1][0] > ended_s * 0.9
        if not is_whole or len(late) < STRETCHES:
            continue
        slope, error = slope_of(late)
        rows.append(
            {
                "process": name,
                "at_a_third": late[0][1],
                "at_the_end": late[-1][1],
                "most": max(value for _, value in late),
                "per_hour": slope,
                "error": error,
                "verdict": verdict(slope, error),
            }
        )
    return rows


def page(found: dict[str, Any]) -> str:
    """Return memory.md."""
    lines = [
        f"{found['minutes']:g} minutes and {found['steps']} RL steps on {found['machine']}; MB "
        "of each process (the store's objects counted), slopes over the last two thirds with their "
        f"standard errors; flat: surely below {MB_PER_HOUR:g} an hour.",
        "",
        "| process | at a third | at the end | most | an hour | |",
        "|---" * 6 + "|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['process']} | {row['at_a_third']:.1f} | {row['at_the_end']:.1f} "
            f"| {row['most']:.1f} | {row['per_hour']:+.1f} ± {row['error']:.1f} "
            f"| {row['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=10, help="seconds between two looks")
    parser.add_argument("--config", default="chaos")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    config = with_absolute_paths(load_config(args.config, args.overrides))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    with connected(config):
        run_stages(config, STAGES[: STAGES.index("rl")])
        looker = Looker(config.run.dir, args.minutes, args.every)
        looker.start()
        try:
            run_stages(config, ("rl",))
        except KeyboardInterrupt:
            if not looker.is_over:  # a person's
                raise
    steps = steps_of(config.run.dir)
    if not looker.is_over:
        sys.exit(
            f"The run was over after its {steps} steps, before {args.minutes:g} minutes were. "
            "Give it more (rl.steps=100000), and a run.dir of its own."
        )
    found = {
        "machine": f"{os.cpu_count()} cores of {cpu_model()}",
        "minutes": args.minutes, "steps": steps,
        "rows": judged(looker.seen, 60 * args.minutes), "seen": looker.seen,
    }  # fmt: skip
    (Path(config.run.dir) / "memory.json").write_text(json.dumps(found))
    (Path(config.run.dir) / "memory.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
