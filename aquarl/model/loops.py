"""A loop over rows of numbers in, the same compiled for this CPU out: what `fused_cpu.py`, the
decoder's `kernels_cpu.py` and `drawing.py` are made of.

Numba compiles a loop at its first call, which takes a second or two, and keeps it beside the
source. It may add in any order, so that the loop becomes vector instructions, and it holds no lock
of Python's meanwhile, so that threads can share the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

FAST = {"reassoc", "contract", "arcp", "nsz"}
"""What may be done to sums and products. Infinities and NaNs stay what they are."""
SHARED_BELOW = 2
"""Rows that a thread gets at least."""


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """Return a function of (first row, row after the last, arrays and numbers) compiled."""
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        found: Callable[..., None] = numba.njit(loop, cache=True, **options)
    except RuntimeError:  # neither the source's folder nor the user's own can be written to
        found = numba.njit(loop, **options)
    return found


def over_rows(loop: Callable[..., None], rows: int, *given: Any) -> None:
    """Run a compiled loop over so many rows, by as many threads as torch has.

    Args:
        given: Tensors, which the loop gets as arrays, and numbers.
    """
    arrays = [x.detach().numpy() if isinstance(x, Tensor) else x for x in given]
    threads = min(torch.get_num_threads(), rows // SHARED_BELOW)
    if threads <= 1:
        loop(0, rows, *arrays)
        return
    bounds = [rows * n // threads for n in range(threads + 1)]
    for done in [_pool(threads).submit(loop, *part, *arrays) for part in pairwise(bounds)]:
        done.result()


def eps_of(x: Tensor) -> Any:
    """Return what RMSNorm adds to a mean square, a number of the tensor's own precision."""
    eps = torch.finfo(x.dtype).eps
    return np.float64(eps) if x.dtype == torch.float64 else np.float32(eps)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="loop")


part = numba.njit(nogil=True, fastmath=FAST, error_model="numpy", inline="always")
"""Of a compiled loop."""


@part
def unit(x_D: Any, eps: Any) -> Any:
    """Return by what RMSNorm multiplies a row."""
    one = x_D.dtype.type(1)
    squares = x_D[0] * x_D[0]
    for d in range(1, len(x_D)):
        squares += x_D[d] * x_D[d]
    return one / np.sqrt(squares / x_D.dtype.type(len(x_D)) + eps)


def exp(x: Any) -> Any:
    """In a compiled loop: e^x. In fp32 to 2 units of the last place, for |x| < 87."""
    return math.exp(x)


@overload(exp, inline="always", jit_options={"fastmath": FAST})
def _exp(x: Any) -> Any:
    return _exp_fp32 if x == types.float32 else exp


def _exp_fp32(x: Any) -> Any:
    """Cephes' expf: x = n ln 2 + r, e^r a polynomial, 2^n by its bits: all of it vectorises."""
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    bits = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return (p * r * r + r + np.float32(1.0)) * bits.view(np.float32)


@part
def squashed(raw: Any) -> Any:
    """Return the sigmoid."""
    one = np.float32(1)
    return one / (one + exp(-min(max(raw, -LARGEST), LARGEST)))


LARGEST = np.float32(60)
"""Beyond, the sigmoid does not change any more, and e^x soon leaves fp32."""
