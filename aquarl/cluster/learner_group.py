"""Learners: a function and a configuration in, that function on N Ray Train workers with DDP.

NCCL where there are GPUs, gloo elsewhere. Checkpoints are aquarl's own, in the run directory: a
group that Ray Train restarts finds the newest there and goes on from it, bit for bit.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar, cast

import fsspec
import ray
import torch
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray._raylet import PlacementGroupID
from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    get_context,
)
from ray.train.torch import TorchTrainer, get_device
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_placement_groups
from torch import nn

from aquarl.cluster.connection import cluster_address
from aquarl.cluster.meeting import Meeting
from aquarl.cluster.results import has_saved_since, saved
from aquarl.config import Config, build_config
from aquarl.errors import AquarlError, ClusterError
from aquarl.model.modes import keep_memory
from aquarl.model.products import use_threads
from aquarl.storage import remove

T = TypeVar("T")

ABORT_S = 5.0
NO_PLACE = (WorkerGroupStartupTimeoutError, InsufficientClusterResourcesError)
WAIT, LONGEST_WAIT = timedelta(hours=1), timedelta(days=1)
"""Of learners for one another; and for what one does for a machine: encoding a corpus."""


@dataclass(frozen=True)
class Member:
    """One worker of a group, as the stage's code sees it."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    _meetings: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return the module shared among the group's workers; alone, as it is."""
        if self.world == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def total(self, numbers: dict[str, float]) -> dict[str, float]:
        """Return each number's sum over the group. All ranks have the same names."""
        if self.world == 1:
            return numbers
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return dict(zip(numbers, values.tolist(), strict=True))

    def each(self, work: Callable[[], T], within: timedelta = WAIT) -> T:
        """Return what this makes here, once every worker has done it. No such call within another.

        Raises:
            AquarlError: What the work raised on any of them; on all, so that none waits for one
                that has given up.
        """
        made, fault = None, ""
        try:
            made = work()
        except AquarlError as error:
            fault = str(error)
        for said in self._said_by_all(fault, within):
            if said:
                raise AquarlError(said)
        return cast(T, made)

    def once_a_machine(self, work: Callable[[], None]) -> None:
        """Do this on one worker of each machine while the others wait, for hours if need be.
        Raises: AquarlError, as `each`."""
        self.each(work if self.local_rank == 0 else _nothing, LONGEST_WAIT)

    def once(self, work: Callable[[], None]) -> None:
        """Do this on rank 0 while the others wait. Raises: AquarlError, as `each`."""
        self.each(work if self.rank == 0 else _nothing)

    def _said_by_all(self, word: str, within: timedelta) -> list[str]:
        """Return what each rank says, once all have said it.

        By the group's store: whoever waits in a collective gives up after half an hour at most.
        """
        if self.world == 1:
            return [word]
        store, number = dist.distributed_c10d._get_default_store(), next(self._meetings)
        keys = [f"aquarl/{number}/{rank}" for rank in range(self.world)]
        store.set(keys[self.rank], f":{word}")  # never empty
        store.wait(keys, within)
        said = [store.get(key).decode()[1:] for key in keys]
        if number:  # who is here has read what was said the last time
            store.delete_key(f"aquarl/{number - 1}/{self.rank}")
        return said


def _nothing() -> None:
    pass


def run_group(config: Config, work: Callable[[Config, Member], None]) -> None:
    """Run this on `cluster.learners` workers until all have returned.

    The failures of a group that has saved a result or a checkpoint meanwhile are forgotten once
    they are too many: `cluster.max_failures` ends what no longer gets on.

    Raises:
        AquarlError: What the work itself raised, or that the group could not be kept up.
    """
    cluster = config.cluster
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    is_here = cluster_address(config) is None
    if is_here or cluster.learners.max == 1:
        # What warns of a node that is taken away takes 2 s to start. Several learners may want it:
        # else what the others say of the one that is gone counts against cluster.max_failures.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    meeting = tempfile.mkdtemp(prefix="aquarl_learners_") if is_here else None
    storage = f"{config.run.dir}/ray_train"  # Train's own notes, which nobody reads afterwards
    starts = 1
    try:
        while True:
            before, trainer = saved(config), _trainer(config, work, meeting, storage)
            try:
                returned = trainer.fit().return_value
                break
            except KeyboardInterrupt:
                trainer.abort()
                raise
            except Exception as error:
                if is_early := _failed_to_start(error):
                    _give_places_back()
                is_orderly = isinstance(error, TrainingFailedError) and cluster.max_failures > 0
                if is_orderly and has_saved_since(config, before):
                    starts = 1
                elif is_early and starts <= cluster.max_failures:
                    starts += 1
                else:
                    raise _given_up(config, error) from error
    finally:
        remove(storage)
        if meeting:
            remove(meeting)
    if fault := returned.get("fault"):
        raise AquarlError(fault)


def _trainer(
    config: Config, work: Callable[[Config, Member], None], meeting: str | None, storage: str
) -> _Trainer:
    """Return what runs this on a group of learners, `cluster.max_failures` times again."""
    cluster, learners = config.cluster, config.cluster.learners
    resources = {"CPU": cluster.learner_cpus}
    if cluster.learner_gpus:
        resources["GPU"] = cluster.learner_gpus
    backend = "nccl" if cluster.learner_gpus else "gloo"
    return _Trainer(
        _Loop(work),
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=Meeting(backend, meeting, cluster.start_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=learners.min
            if learners.min == learners.max
            else (learners.min, learners.max),
            use_gpu=cluster.learner_gpus > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"aquarl-{time.time_ns()}",  # resuming is ours: never reuse Train's own state
            **_train_storage(storage),
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                controller_failure_limit=cluster.max_failures,  # for ever, by default
            ),
        ),
    )


def _failed_to_start(error: Exception) -> bool:
    """Return whether a learner had its place and died, or met no other, before it began, which
    Train gives up at once."""
    tried = (*NO_PLACE, WorkerGroupStartupFailedError)  # by Train, as often
    return isinstance(error, ControllerError) and not isinstance(error.controller_failure, tried)


def _give_places_back() -> None:
    """Remove the placement groups of this job: Train keeps that of a group that failed to start."""
    here = ray.get_runtime_context()
    mine = [("creator_job_id", "=", here.get_job_id()), ("state", "!=", "REMOVED")]
    for group in list_placement_groups(here.gcs_address, filters=mine, limit=1000):
        place = PlacementGroupID(bytes.fromhex(group.placement_group_id))
        remove_placement_group(PlacementGroup(place))


def _given_up(config: Config, error: Exception) -> ClusterError:
    """Return what is said of a group that failed for good."""
    cluster = config.cluster
    if isinstance(error, ControllerError) and not isinstance(error.controller_failure, NO_PLACE):
        return ClusterError(
            f"The learner group could not start, tried {cluster.max_failures + 1} times: "
            f"{_root(error.controller_failure)} What was saved is whole; start the same command "
            "again to resume. If learners do not find one another, their machines must reach each "
            "other on all ports."
        )
    if isinstance(error, ControllerError):
        return ClusterError(
            f"The learner group could not start: {cluster.learners.min} workers, each with "
            f"{cluster.learner_cpus:g} CPUs and {cluster.learner_gpus:g} GPUs, did not all find "
            f"their place within {cluster.start_timeout_s:g} s, tried {cluster.max_failures + 1} "
            "times. Lower cluster.learners, cluster.learner_cpus or cluster.learner_gpus, add "
            "nodes, or raise cluster.start_timeout_s."
        )
    return ClusterError(
        f"The learner group failed {cluster.max_failures + 1} times or more without another "
        f"checkpoint and is given up: {_root(error)}. The last checkpoint is whole; start the same "
        "command again to resume. If a worker ran out of memory, lower micro_rows or "
        "rl.micro_prompts."
    )


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to us: Train's handler ends the process with status 1, and stays for good.

    Does without two of Train's helpers, each a process that takes 2 s of CPU time to start. Nothing
    here uses Ray Data; and a placement group whose controller died goes with its job anyway, while
    the helper that looks after it keeps a group that is done waiting for up to 12 s.
    """

    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, unneeded)]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """Give back what the group holds, also in a cluster that goes on."""
        if self._controller is not None:
            with suppress(RayError):  # it ends itself, which Ray calls an error
                ray.get(self._controller.abort.remote(), timeout=ABORT_S)


class _Loop:
    """What Ray Train runs on each worker. A user's mistake is returned, not retried."""

    def __init__(self, work: Callable[[Config, Member], None]) -> None:
        self.work = work

    def __call__(self, settings: dict[str, Any]) -> dict[str, str]:
        config = build_config(settings["config"])
        context = get_context()
        use_threads(config.cluster.threads)
        keep_memory()
        member = Member(
            context.get_world_rank(),
            context.get_world_size(),
            context.get_local_rank(),
            get_device(),
        )
        try:
            self.work(config, member)
        except AquarlError as error:
            return {"fault": str(error)}
        return {}


def _train_storage(folder: str) -> dict[str, Any]:
    """Return what has Ray Train keep its notes there, by fsspec where that is a bucket.

    pyarrow's own clients, Ray's choice, know other settings and credentials.
    """
    if "://" not in folder:
        return {"storage_path": folder}
    fs, path = fsspec.url_to_fs(folder)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


def _root(error: BaseException) -> str:
    """Return the last line of what a worker really died of."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
