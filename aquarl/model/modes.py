"""How a policy is run on the machine at hand: in which precision, compiled or not, with our own
kernels or without, when DDP exchanges gradients, and what becomes of freed memory.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aquarl.config import Compile
from aquarl.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of <malloc.h>."""

AMPERE = 8, 0
"""Compute capability: what bf16 and FlashAttention need."""


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
    if has_compiler(*(("CC", "gcc") if is_cuda else ("CXX", "g++"))):
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


def has_compiler(variable: str, usual: str) -> bool:
    """Whether there is one: what an environment variable names, if it does, else the usual."""
    names = [os.environ[variable]] if variable in os.environ else [usual, "clang"]
    return any(map(shutil.which, names))


@cache
def has_triton() -> bool:
    """Whether this machine's GPU can run our own Triton kernels; if not, says so once."""
    lacks = None
    if importlib.util.find_spec("triton") is None:
        lacks = "Triton is not installed"
    elif not has_compiler("CC", "gcc"):
        lacks = "there is no C compiler (Debian, Ubuntu: apt-get install gcc)"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacks = "Python's headers are missing (Debian, Ubuntu: apt-get install python3-dev)"
    elif torch.cuda.get_device_capability() < AMPERE:
        lacks = f"{torch.cuda.get_device_name()} is older than NVIDIA's Ampere"
    if lacks:
        logging.getLogger(__name__).warning(
            "The GPU samples and learns several times slower than it could: %s.", lacks
        )
    return lacks is None


def has_loops(x: Tensor) -> bool:
    """Whether our compiled loops are for this tensor: on a CPU, and in what a CPU computes in."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def kernels_for(x: Tensor) -> Any:
    """Return what does a learner's work between products on this tensor's device, `fused.py` or
    `fused_cpu.py`; None where neither can, or where a compiler makes its own."""
    if torch.compiler.is_compiling():
        return None
    if has_loops(x):
        from aquarl.model import fused_cpu

        return fused_cpu
    if not x.is_cuda or not has_triton():
        return None
    from aquarl.model import fused  # imports Triton, which comes with torch for GPUs alone

    return fused


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return it on the device; a GPU fetches it while this goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
