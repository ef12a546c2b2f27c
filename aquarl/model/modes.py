"""How a forward pass is run: its precision, and when DDP exchanges gradients.

`train.loop` and `rl.learner` wrap each microbatch in these.
"""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of <malloc.h>."""


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on GPUs, fp32 on CPUs (which mostly have to emulate bf16)."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def accumulating(module: nn.Module, *, sync: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged among workers only where `sync`: once a step."""
    if not sync and isinstance(module, nn.parallel.DistributedDataParallel):
        no_sync: AbstractContextManager[Any] = module.no_sync()
        return no_sync
    return nullcontext()


def keep_memory() -> None:
    """Let this process keep what it frees, for its own next use, where the C library is glibc.

    Otherwise every tensor above 32 MiB is asked from the system anew, and each of its pages costs
    a fault: a fifth to a quarter of a step on the CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
