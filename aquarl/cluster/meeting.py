"""How learners become one process group, without torch where nobody needs it.

Ray Train's controller holds this in place of a `TorchConfig`, whose module imports torch: a single
learner needs no group, and its controller starts with 2 s of CPU time less.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


class Meeting(BackendConfig):
    """Has learners meet as `TorchConfig` does, or by way of a file where all are on one machine.

    torch's TCP store listens on every interface, which on one machine serves nobody.

    Args:
        backend: "gloo" or "nccl".
        folder: Where to put that file. None: they may be on several machines.
        within_s: How long that may take.
    """

    def __init__(self, backend: str, folder: str | None, within_s: float) -> None:
        self.backend, self.folder, self.within_s = backend, folder, within_s

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meet

    @property
    def train_func_context(self) -> Any:
        return self.torch_config().train_func_context

    def torch_config(self) -> Any:
        """Return the `TorchConfig` that this stands for."""
        from ray.train.torch import TorchConfig

        return TorchConfig(self.backend)


class _Meet(Backend):
    share_cuda_visible_devices = True  # as Train's own, for NCCL

    def on_start(self, worker_group: Any, backend_config: Meeting) -> None:
        """Join the workers, each time the group starts. One alone needs no group."""
        if (world := len(worker_group)) == 1:
            return
        if backend_config.folder is None:
            config = backend_config.torch_config()
            config.backend_cls().on_start(worker_group, config)
            return
        backend = backend_config.backend
        meeting = f"file://{backend_config.folder}/{time.time_ns()}"

        def join(place: int) -> None:
            import torch.distributed as dist

            dist.init_process_group(backend, meeting, rank=place, world_size=world)

        joining = [worker_group.execute_single_async(i, join, i) for i in range(world)]
        ray.get(joining, timeout=backend_config.within_s)

    def on_shutdown(self, worker_group: Any, backend_config: Meeting) -> None:
        """Leave the group that torch's own way made; a file's needs no goodbye."""
        if len(worker_group) > 1 and backend_config.folder is None:
            config = backend_config.torch_config()
            config.backend_cls().on_shutdown(worker_group, config)
