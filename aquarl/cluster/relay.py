"""What a learner on some machine says, to the person and the files at the driver.

A learner calls and goes on; the driver takes what has come, a few times a second, in a thread of
its own: numbers go to the sinks, and the line of a finished stage is printed after its numbers.
If the relay dies the run goes on, and Ray makes another; what was in it is lost.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from rich.console import Console

from aquarl.cluster.connection import beside_driver
from aquarl.cluster.errors import last_line
from aquarl.cluster.rollout_pool import unused
from aquarl.observe.metrics import Sinks
from aquarl.records import Metrics

POLL_S = 0.25

Said = tuple[str, int, Metrics | str | None]
"""Stage, step, and its numbers, or None where the stage begins, or a line to show."""


class Finished(str):
    """The line to show where a stage ends."""


class MetricsRelay:
    """A mailbox: what has been put in since it was last emptied."""

    def __init__(self) -> None:
        self._waiting: list[Said] = []

    def __repr__(self) -> str:
        return "MetricsRelay"

    def put(self, stage: str, step: int, said: Metrics | str | None) -> None:
        self._waiting.append((stage, step, said))

    def take(self) -> list[Said]:
        taken, self._waiting = self._waiting, []
        return taken


def say_finished(relay: ActorHandle, stage: str, step: int, line: str) -> None:
    """Let the driver show that a stage is finished, surely before this process may end."""
    try:
        ray.get(relay.put.remote(stage, step, Finished(line)), timeout=30)
    except RayError:
        return


@contextmanager
def relay_to(sinks: Sinks) -> Iterator[ActorHandle]:
    """Hire a relay and pass on what comes, until the block is left; then what is left in it."""
    relay: Any = (
        ray.remote(num_cpus=0, max_restarts=-1)(MetricsRelay)
        .options(name=unused("metrics-relay"), scheduling_strategy=beside_driver())
        .remote()
    )
    is_over = threading.Event()
    starting = Console(stderr=True).status(
        "starting workers", refresh_per_second=4
    )  # shows itself on terminals only

    def pass_on() -> None:
        is_last, is_down, taking = False, False, None
        while not is_last:
            is_last = is_over.wait(POLL_S)
            taking = taking or relay.take.remote()
            try:
                taken, is_down = ray.get(taking, timeout=30), False
            except GetTimeoutError:
                continue  # a very busy machine: what it took is not lost
            except RayError as error:  # Ray makes it again
                if not is_down:
                    why = f"The relay of metrics died ({last_line(error)}), so some are lost."
                    print(f"{why} The run goes on.", file=sys.stderr, flush=True)
                taken, is_down = [], True
            taking = None
            for stage, step, said in taken:
                starting.stop()
                if isinstance(said, str):
                    if isinstance(said, Finished):
                        sinks.close()  # each opens again for the next stage
                    print(said, file=sys.stderr, flush=True)
                elif said is None:
                    sinks.begin(stage, step)
                else:
                    sinks.log(stage, step, said)

    thread = threading.Thread(target=pass_on, name="metrics-relay", daemon=True)
    starting.start()
    thread.start()
    try:
        yield relay
    finally:
        is_over.set()
        thread.join(timeout=35)
        starting.stop()
        ray.kill(relay)
