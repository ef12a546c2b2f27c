"""How a forward pass is run: its precision, and when DDP exchanges gradients.

`train.loop` and `rl.learner` wrap each microbatch in these.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn

from aquarl.config import Compile
from aquarl.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of <malloc.h>."""


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on GPUs, fp32 on CPUs (which mostly have to emulate bf16)."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def compile_policy(model: nn.Module, wanted: Compile) -> None:
    """Have a module's forward pass compiled, at its first call for each shape of rows, if wanted.

    Raises:
        ConfigError: "on", but there is no compiler of C++ to build what comes of it.
    """
    is_cuda = next(model.parameters()).is_cuda
    if wanted == "off" or (wanted == "auto" and not is_cuda):
        return
    names = (os.environ.get("CC" if is_cuda else "CXX"), *(("cc", "gcc") if is_cuda else ("g++",)))
    if any(name and shutil.which(name) for name in (*names, "clang")):
        model.compile(dynamic=False)
    elif wanted == "on":
        raise ConfigError(
            "cluster.compile=on needs a C++ compiler on each learner's machine, and there is none. "
            "Install one (Debian, Ubuntu: apt-get install g++), or set cluster.compile=auto."
        )
    else:
        logging.getLogger(__name__).warning(
            "There is no C compiler, so the policy is not compiled and trains slower. "
            "Install one (Debian, Ubuntu: apt-get install gcc)."
        )


@cache
def has_triton() -> bool:
    """Whether kernels can be made of our own Triton functions: it is there, and a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    return any(name and shutil.which(name) for name in (os.environ.get("CC"), "cc", "gcc", "clang"))


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
