"""How a forward pass is run: its precision, and when DDP exchanges gradients.

`train.loop` and `rl.learner` wrap each microbatch in these.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


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
