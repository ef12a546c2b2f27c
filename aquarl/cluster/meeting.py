"""Where the learners of one machine meet: torch's TCP store listens on every interface.

Ray Train's controller imports this, and so starts without torch: 2 s of CPU time less.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


class OneMachine(BackendConfig):
    """In place of a `TorchConfig`: the process group is made by way of a file in this folder."""

    def __init__(self, backend: str, folder: str) -> None:
        self.backend, self.folder = backend, folder

    @property
    def backend_cls(self) -> type[Backend]:
        return _MeetInFile

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch import TorchConfig

        return TorchConfig().train_func_context


class _MeetInFile(Backend):
    share_cuda_visible_devices = True  # as Train's own, for NCCL

    def on_start(self, worker_group: Any, backend_config: OneMachine) -> None:
        """Join the workers, each time the group starts. One alone needs no group."""
        if (world := len(worker_group)) == 1:
            return
        backend = backend_config.backend
        meeting = f"file://{backend_config.folder}/{time.time_ns()}"

        def join(place: int) -> None:
            import torch.distributed as dist

            dist.init_process_group(backend, meeting, rank=place, world_size=world)

        ray.get([worker_group.execute_single_async(i, join, i) for i in range(world)])
