"""Kill parts of a live run at random, and look whether its result is the same to the bit.

`aquarl chaos` runs RL twice from one SFT stage: once in peace, and then with workers, learners and
the stream killed every few seconds, again and again until the minutes are used up. Whom to kill it
asks Ray's state API, as a person could; nothing in the run knows of it. It reads what happened off
the run's own traces: the stream's status, `metrics.jsonl`, the ledger and the checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException
from rich.console import Console
from rich.table import Table

from aquarl.cluster.connection import cluster_address, connected, namespace
from aquarl.cluster.launch import run_stages
from aquarl.cluster.results import STAGES, copy_up_to_sft, put_json, stands
from aquarl.config import Config, build_config
from aquarl.errors import ClusterError, ConfigError
from aquarl.model.checkpoint import checkpoint_folder
from aquarl.observe.machine import cpu_model
from aquarl.storage import put
from aquarl.tasks.catalog import load_problems

LOOK_EVERY_S = 0.2
RECOVERS_WITHIN_S = 60.0
UNLIMITED = 1_000_000

WORKER, LEARNER, STREAM = "RolloutWorker", "RayTrainWorker", "StreamActor"
KINDS = {
    "rollout worker, SIGKILL": WORKER,
    "learner rank, SIGKILL": LEARNER,
    "stream, SIGKILL": STREAM,
    "stream, ray.kill": STREAM,
}
"""What is done, and the class of the actor it is done to."""
WORKER_ALLOWED_S, ALLOWED_S = 10.0, 60.0
"""To recover on two cores: a worker that died alone, and all else."""


@dataclass
class Fault:
    """One kill, and what came of it."""

    kind: str
    at_s: float
    """Since the disturbed run began."""
    recovered_s: float | None = None
    """Until a replacement leased (worker) or the next step was finished (learner, stream)."""
    amid_others: bool = False
    """Of a worker: learner or stream were down as well, without whom nothing is leased."""
    run_ended_first: bool = False
    leases_again: int = 0
    steps_again: int = 0


def chaos(config: Config, *, minutes: float, every_s: float, seed: int) -> dict[str, Any]:
    """Run RL in peace and under fire, compare, and write `chaos.json` and `.md` into `run.dir`.

    Args:
        config: Whose stages up to SFT stand in `run.dir` or are made first.
        minutes: For how long to kill. The run that is under way then goes on to its end.
        every_s: Mean time between two kills.
        seed: Decides what is killed, and after how long.

    Returns:
        What is in chaos.json: "holds", "faults", "runs", the table and the machine.

    Raises:
        ConfigError: The run is not on this machine alone.
    """
    if cluster_address(config) or "://" in config.run.dir:
        raise ConfigError(
            "aquarl chaos kills processes by their ids and compares files, so it needs a Ray and a "
            "folder of its own on this machine. Leave cluster.address and RAY_ADDRESS out, and "
            "name a local run.dir."
        )
    root, rng = Path(config.run.dir) / "chaos", random.Random(seed)
    shutil.rmtree(root, ignore_errors=True)
    faults: list[Fault] = []
    runs: list[dict[str, Any]] = []
    with connected(config):
        run_stages(config, STAGES[: STAGES.index("rl")])
        peace = _run_from_sft(config, root / "undisturbed")
        left_s = 60 * minutes
        while not runs or (left_s > 0 and runs[-1]["holds"]):
            disturbed = _hardened(config, root / f"disturbed_{len(runs) + 1}")
            monkey = Monkey(disturbed, rng, every_s, left_s)
            monkey.start()
            try:
                seconds = _run_from_sft(config, root / f"disturbed_{len(runs) + 1}")
            finally:
                monkey.leave()
            left_s -= max(monkey.at_it_s, every_s)
            faults += monkey.faults
            runs.append({"wall_s": seconds, **compared(config, root, disturbed.run.dir)})
    report = {
        "holds": bool(faults)
        and all(run["holds"] for run in runs)
        and all(fault.recovered_s is not None or fault.run_ended_first for fault in faults),
        "machine": f"{os.cpu_count()} cores of {cpu_model()}",
        "seed": seed,
        "every_s": every_s,
        "steps": config.rl.steps,
        "undisturbed_wall_s": peace,
        "runs": runs,
        "table": table_of(faults),
        "faults": [asdict(fault) for fault in faults],
    }
    put_json(f"{config.run.dir}/chaos.json", report)
    put(f"{config.run.dir}/chaos.md", page(report).encode())
    return report


def _hardened(config: Config, folder: Path) -> Config:
    """Return the settings of a run in this folder that no number of kills ends.

    The budgets tell a fault that comes again from one that does not; here none is the run's own.
    """
    tree = config.model_dump(mode="json")
    tree["run"]["dir"] = str(folder)
    tree["rl"] |= {"max_staleness": 0, "worker_restarts": UNLIMITED, "lease_deaths": UNLIMITED}
    tree["cluster"]["max_failures"] = UNLIMITED
    return build_config(tree)


def _run_from_sft(config: Config, folder: Path) -> float:
    """Run the RL stage in a folder that begins with the finished SFT. Returns its seconds."""
    copy_up_to_sft(Path(config.run.dir), folder)
    began = time.monotonic()
    run_stages(_hardened(config, folder), ("rl",))
    return time.monotonic() - began


# Killing.


class Monkey(threading.Thread):
    """Kills parts of the run in a folder and notes what came of it.

    It begins with the run's first step, and ends with the run or after so many seconds.

    A worker is not killed while the last one has no successor, nor a learner or the stream while
    the run has not come back from the last death of either: so each recovery has a time of its own.
    """

    def __init__(self, config: Config, rng: random.Random, every_s: float, seconds: float) -> None:
        super().__init__(name="chaos", daemon=True)
        self.faults: list[Fault] = []
        self.at_it_s = 0.0
        """For how long it has been killing."""
        self._config, self._rng, self._every_s, self._seconds = config, rng, every_s, seconds
        self._curve = Curve(config.run.dir)
        self._is_over = threading.Event()
        self._failed: BaseException | None = None
        self._watching: list[Iterator[bool]] = []
        self._streams_killed = 0
        self._began = time.monotonic()

    def leave(self) -> None:
        """Stop killing, now that the run is over. Raises: what went wrong in here."""
        self._is_over.set()
        self.join(timeout=60)
        ended = time.monotonic() - self._began
        for fault in self.faults:
            is_open = fault.recovered_s is None
            fault.run_ended_first = is_open and ended - fault.at_s < RECOVERS_WITHIN_S
        if self._failed is not None:
            raise self._failed

    def run(self) -> None:
        try:
            while not self._curve.read() and not self._is_over.wait(LOOK_EVERY_S):
                pass
            first_at = next_at = time.monotonic()
            until = first_at + self._seconds
            while not self._is_over.wait(LOOK_EVERY_S):
                self._curve.read()
                self._watching = [watch for watch in self._watching if not next(watch)]
                if next_at <= time.monotonic() < until and self._kill_something():
                    next_at = time.monotonic() + self._rng.uniform(0.5, 1.5) * self._every_s
                self.at_it_s = min(time.monotonic(), until) - first_at
        except BaseException as error:
            self._failed = error

    def _kill_something(self) -> bool:
        """Kill one part that is up. Returns False if none may be killed now."""
        down = [fault for fault in self.faults if fault.recovered_s is None]
        is_worker_down = any(KINDS[fault.kind] == WORKER for fault in down)
        is_other_down = any(KINDS[fault.kind] != WORKER for fault in down)
        if is_worker_down and is_other_down:
            return False
        if is_worker_down or is_other_down:
            wants_worker = is_other_down
        else:
            wants_worker = self._rng.random() < 0.5
        often = Counter(fault.kind for fault in self.faults)
        kind = min(
            (kind for kind, victim in KINDS.items() if (victim == WORKER) == wants_worker),
            key=lambda kind: (often[kind], self._rng.random()),
        )
        alive, status = _alive(), self._status()
        at_work = status["workers" if wants_worker else "leases"] if status else []
        if status is None or not at_work or not alive[KINDS[kind]]:
            return False
        try:
            if kind == "stream, ray.kill":
                ray.kill(ray.get_actor("stream", namespace(self._config)), no_restart=False)
            else:
                os.kill(self._rng.choice(alive[KINDS[kind]]).pid, signal.SIGKILL)
        except (ProcessLookupError, ValueError):  # it went by itself: the run is over
            return False
        killed_at = time.monotonic()
        fault = Fault(kind, at_s=killed_at - self._began, amid_others=is_other_down)
        for worker in down if not wants_worker else ():
            worker.amid_others = True
        self._streams_killed += KINDS[kind] == STREAM
        self.faults.append(fault)
        if wants_worker:
            watch = self._leased_again(fault, killed_at, status)
        else:
            watch = self._stepped_again(fault, killed_at, {x.pid for x in alive[LEARNER]})
        self._watching.append(watch)
        return True

    def _leased_again(self, fault: Fault, at: float, before: dict[str, Any]) -> Iterator[bool]:
        """Say at each look whether a worker that was not there before has a lease."""
        newest = max(map(_number, before["workers"]))
        streams, reissued = self._streams_killed, before["counts"].get("reissued", 0)
        while True:
            status = self._status() or {"leases": {}}
            is_same_stream = streams == self._streams_killed
            if any(not is_same_stream or _number(name) > newest for name in status["leases"]):
                fault.recovered_s = time.monotonic() - at
                if is_same_stream:
                    fault.leases_again = status["counts"].get("reissued", 0) - reissued
                yield True
            yield False

    def _stepped_again(self, fault: Fault, at: float, learners: set[int]) -> Iterator[bool]:
        """Say at each look whether a group of new learners has finished a step."""
        while not (new := {x.pid for x in _alive()[LEARNER]}) or new & learners:
            yield False
        seen = len(self._curve.steps)  # the old group's last numbers have long come by now
        while len(self._curve.steps) == seen:
            yield False
        fault.recovered_s = time.monotonic() - at
        fault.steps_again = max(self._curve.steps[:seen]) + 1 - self._curve.steps[seen]
        yield True

    def _status(self) -> dict[str, Any] | None:
        try:
            stream = ray.get_actor("stream", namespace(self._config))
            status: dict[str, Any] = ray.get(stream.status.remote(), timeout=10)
        except (RayError, ValueError):  # not there, or not yet again
            return None
        return status if status["step"] is not None else None


class Curve:
    """The training steps of a run in the order in which they were finished, redone ones again."""

    def __init__(self, run_dir: str) -> None:
        self._path, self._at = Path(run_dir) / "metrics.jsonl", 0
        self.steps: list[int] = []

    def read(self) -> bool:
        """Take in what is new. Returns whether there is any step at all."""
        if self._path.is_file():
            with self._path.open("rb") as file:
                file.seek(self._at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._at += len(line)
                    row = json.loads(line)
                    if row["stage"] == "rl" and "tokens/trained" in row:
                        self.steps.append(row["step"])
        return bool(self.steps)


def _alive() -> dict[str, list[Any]]:
    """Return the live actors of each class."""
    found: dict[str, list[Any]] = {WORKER: [], LEARNER: [], STREAM: []}
    gcs = ray.get_runtime_context().gcs_address  # this machine may hold other clusters
    try:
        actors = list_actors(gcs, filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
    except RayStateApiException:  # busy; the next look asks again
        return found
    for actor in actors:
        if actor.class_name in found and actor.pid:
            found[actor.class_name].append(actor)
    return found


def _number(worker: str) -> int:
    """Return how many were hired before this one."""
    return int(worker.rpartition("-")[2])


# Comparing.


def compared(config: Config, root: Path, disturbed: str) -> dict[str, Any]:
    """Return what a disturbed run has in common with the undisturbed one, and whether it holds."""
    peace, steps = str(root / "undisturbed"), config.rl.steps
    mine, other = ledger_of(disturbed), ledger_of(peace)
    problems = len(load_problems(config.data, config.run.seed).train)
    found = {
        "finished": stands(_hardened(config, Path(disturbed)), "rl"),
        "weights_identical": _weights(disturbed, steps) == _weights(peace, steps),
        "ledger_identical": mine == other,
        "each_problem_once_an_epoch": each_once_an_epoch([row["problem"] for row in mine], problems)
        and len(mine) == steps * config.rl.prompts_per_step,
    }
    return {"checks": found, "holds": all(found.values())}


def ledger_of(run_dir: str) -> list[dict[str, Any]]:
    """Return what was trained, without who sampled it, when, and under which lease number."""
    rows = map(json.loads, (Path(run_dir) / "ledger.jsonl").read_text().splitlines())
    other = ("worker", "lease", "sampled", "fetch_s")
    return [{k: v for k, v in row.items() if k not in other} for row in rows]


def each_once_an_epoch(trained: Sequence[str], problems: int) -> bool:
    """Return whether no problem comes twice within any epoch of this many."""
    epochs = [trained[at : at + problems] for at in range(0, len(trained), problems)]
    return all(max(Counter(epoch).values()) == 1 for epoch in epochs)


def _weights(run_dir: str, steps: int) -> bytes:
    return (Path(checkpoint_folder(run_dir, "rl", steps)) / "weights.safetensors").read_bytes()


# Telling.


def table_of(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """Return a row for each kind of fault; workers that died alone and amid others apart."""
    rows = []
    for kind, victim in KINDS.items():
        for amid in (False, True) if victim == WORKER else (None,):
            mine = [f for f in faults if f.kind == kind and amid in (f.amid_others, None)]
            seconds = [f.recovered_s for f in mine if f.recovered_s is not None]
            rows.append(
                {
                    "fault": kind + (", learner or stream down as well" if amid else ""),
                    "injected": len(mine),
                    "recovered": len(seconds),
                    "run_ended_first": sum(fault.run_ended_first for fault in mine),
                    "median_s": statistics.median(seconds) if seconds else None,
                    "max_s": max(seconds, default=None),
                    "allowed_s": WORKER_ALLOWED_S if amid is False else ALLOWED_S,
                    "leases_again": sum(fault.leases_again for fault in mine),
                    "steps_again": sum(fault.steps_again for fault in mine),
                }
            )
    return rows


HEADINGS = ("fault", "injected", "recovered", "median s", "max s", "allowed s", "done again")


def cells(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the table's rows as text, under `HEADINGS`."""
    for row in report["table"]:
        ended = row["run_ended_first"]
        yield (
            row["fault"],
            str(row["injected"]),
            f"{row['recovered']} + {ended} at the end" if ended else str(row["recovered"]),
            *("-" if row[key] is None else f"{row[key]:.1f}" for key in ("median_s", "max_s")),
            f"{row['allowed_s']:.0f}",
            f"{row['leases_again']} leases, {row['steps_again']} steps",
        )


def comparisons(report: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence on each disturbed run."""
    for number, run in enumerate(report["runs"], start=1):
        said = ", ".join(
            f"{name.replace('_', ' ')}: {'yes' if holds else 'NO'}"
            for name, holds in run["checks"].items()
        )
        yield (
            f"Disturbed run {number} took {run['wall_s']:.0f} s, in peace "
            f"{report['undisturbed_wall_s']:.0f} s. {said}."
        )


def show(report: dict[str, Any]) -> None:
    """Print the table and what was compared."""
    table, console = Table(*HEADINGS), Console()
    for row in cells(report):
        table.add_row(*row)
    console.print(f"Seconds to recover on {report['machine']}:")
    console.print(table)
    for sentence in comparisons(report):
        console.print(sentence)


def page(report: dict[str, Any]) -> str:
    """Return chaos.md: the same for a page."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *cells(report)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    budgets = (
        "The disturbed runs had no budgets (rl.worker_restarts, rl.lease_deaths, "
        "cluster.max_failures): a run with its own ends once nothing gets on.\n\n"
    )
    return f"{table}\n{budgets}" + "".join(f"{sentence}\n" for sentence in comparisons(report))


def require(report: dict[str, Any], run_dir: str) -> None:
    """Raise ClusterError if something did not hold."""
    if not report["holds"]:
        raise ClusterError(
            f"The disturbed run is not what the undisturbed one is; {run_dir}/chaos.json says "
            f"where, and both are in {run_dir}/chaos. This is a bug in aquarl, not in what you "
            f"typed: report it with seed {report['seed']}."
        )
