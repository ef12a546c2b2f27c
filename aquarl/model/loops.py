"""Loops over rows of numbers, which Numba compiles for the CPU at hand: all of aquarl's.

They stand between two matrix products, where torch's own operations would read and write the same
numbers again and again. `fused_cpu.py` calls them for a learner, `drawing.py` and
`engines/decoder.py` for a sampler.

look                 logits in, log-probabilities, entropies and the logits' slopes out
norm, ..._back       RMSNorm
heads, ..._back      projections in, turned queries and keys of unit length, and values, out
squared_relu, ...    of the MLP's wide side
next_heads, attend   the heads of one position of many rows, and what its queries find
draw                 logits in, a token of each row out

A loop is compiled at its first call, which takes a second or two, and kept on disk, beside this
file if that can be, until this file changes: therefore all of them are in it. No lock of Python's
is held, so that threads can share the rows.

Bit for bit the same, wherever tensors lie: a loop that stores is compiled twice, as vector
instructions and not, and where two arrays lie closely together the second is taken. So only sums,
which store nothing, may be added up in another order than is written.

Shapes: N rows of any kind, U = K / 2 pairs of a head; else see `head.py`, `gpt.py`, `decoder.py`.
"""

# Numba's arrays are any to a checker.
# mypy: ignore-errors

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from filelock import FileLock, Timeout
from numba import types
from numba.core import event
from numba.extending import overload
from torch import Tensor

OPTIONS = {"nogil": True, "error_model": "numpy"}
FAST = {"reassoc", "contract", "nsz"}
"""What may be done to a sum. Infinities and NaNs stay what they are."""

TOGETHER = 32
"""Tokens of a group: one is drawn first among the groups' sums, then within its group."""

NUMBERS_A_THREAD = 1 << 16
"""So many of the largest array, or more, are worth waking a thread for."""

PATIENCE_S = 60.0
"""For another process that compiles."""

LARGEST = np.float32(60)
"""Beyond, a sigmoid does not change any more, and e^x soon leaves fp32."""


def over_rows(loop: Callable[..., None], rows: int, *given: Any) -> None:
    """Run a loop over so many rows, in as many threads as torch has.

    Args:
        loop: Takes the first row, the row after the last, and what is given.
        given: Tensors, which the loop gets as arrays, and numbers.
    """
    arrays = [x.detach().numpy() if isinstance(x, Tensor) else x for x in given]
    threads = min(torch.get_num_threads(), rows)
    if threads > 1:
        threads = min(threads, 1 + max(x.size for x in arrays) // NUMBERS_A_THREAD)
    if threads <= 1:
        loop(0, rows, *arrays)
        return
    bounds = [rows * n // threads for n in range(threads + 1)]
    for done in [_pool(threads).submit(loop, *part, *arrays) for part in pairwise(bounds)]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="loop")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads


def eps_of(x: Tensor) -> Any:
    """Return what RMSNorm adds to a mean square, a number of the tensor's own precision."""
    eps = torch.finfo(x.dtype).eps
    return np.float64(eps) if x.dtype == torch.float64 else np.float32(eps)


def compiled(loop: Callable[..., None]) -> Callable[..., None]:
    try:
        return numba.njit(loop, cache=True, **OPTIONS)
    except RuntimeError:  # neither this file's folder nor the user's own can be written to
        return numba.njit(loop, **OPTIONS)


part = numba.njit(inline="always", **OPTIONS)
"""Of a loop."""
total = numba.njit(fastmath=FAST, **OPTIONS)
"""Adds up, and stores nothing."""


class _OneProcess(event.Listener):
    """Let one process at a time compile, or look for what was compiled. Numba locks none of its
    files: of two that write at once, one's code would be found under the other's name."""

    def __init__(self, folder: str) -> None:
        self._lock = FileLock(Path(folder, "loops.lock"))

    def on_start(self, event: Any) -> None:
        with suppress(Timeout, OSError):
            self._lock.acquire(timeout=PATIENCE_S)

    def on_end(self, event: Any) -> None:
        self._lock.release()


def exp(x: Any) -> Any:
    """In a loop: e^x. In fp32 to 2 units of the last place, for |x| < 87."""
    return math.exp(x)


@overload(exp, inline="always")
def _exp(x: Any) -> Any:
    return _exp_fp32 if x == types.float32 else exp


def _exp_fp32(x: Any) -> Any:
    """Cephes' expf: x = n ln 2 + r, e^r by a polynomial, 2^n by its bits: all of it vectorises."""
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
def sigmoid(x):
    one = np.float32(1)
    return one / (one + exp(-min(max(x, -LARGEST), LARGEST)))


@total
def _sum(x_D):
    found = x_D[0]
    for d in range(1, len(x_D)):
        found += x_D[d]
    return found


@total
def _product(x_D, y_D):
    found = x_D[0] * y_D[0]
    for d in range(1, len(x_D)):
        found += x_D[d] * y_D[d]
    return found


@part
def _mean_product(x_D, y_D):
    return _product(x_D, y_D) / x_D.dtype.type(len(x_D))


@part
def _scale(x_D, eps):
    """Return by what RMSNorm multiplies a row."""
    return x_D.dtype.type(1) / np.sqrt(_mean_product(x_D, x_D) + eps)


@part
def _turn(x_K, scale, turns_U2, out_K):
    for u in range(len(turns_U2)):
        a, b = x_K[2 * u] * scale, x_K[2 * u + 1] * scale
        cos, sin = turns_U2[u, 0], turns_U2[u, 1]
        out_K[2 * u] = a * cos - b * sin
        out_K[2 * u + 1] = a * sin + b * cos


@compiled
def look(first, stop, raw_CV, ids_C, numbers, logprobs_C, entropies_C):
    cap, scale = numbers
    V = raw_CV.shape[1]
    one = raw_CV.dtype.type(1)
    weights_V = np.empty(V, raw_CV.dtype)
    for c in range(first, stop):
        squashed_V = raw_CV[c]
        for v in range(V):
            squashed_V[v] = sigmoid(squashed_V[v])
            weights_V[v] = exp((squashed_V[v] + squashed_V[v]) * cap - cap)
        total, products = _sum(weights_V), _product(weights_V, squashed_V)
        chosen = squashed_V[ids_C[c]]
        logsum = np.log(total)
        logprobs_C[c] = (chosen + chosen) * cap - cap - logsum
        entropies_C[c] = logsum - ((products + products) / total - one) * cap
        share = scale / total
        for v in range(V):
            squashed_V[v] *= (squashed_V[v] - one) * weights_V[v] * share
        squashed_V[ids_C[c]] += scale * chosen * (one - chosen)


@compiled
def norm(first, stop, x_ND, eps, y_ND, scales_N):
    for n in range(first, stop):
        scale = _scale(x_ND[n], eps)
        scales_N[n] = scale
        for d in range(x_ND.shape[1]):
            y_ND[n, d] = x_ND[n, d] * scale


@compiled
def norm_back(first, stop, grad_ND, y_ND, scales_N, out_ND):
    for n in range(first, stop):
        along = _mean_product(grad_ND[n], y_ND[n])
        for d in range(y_ND.shape[1]):
            out_ND[n, d] = (grad_ND[n, d] - y_ND[n, d] * along) * scales_N[n]


@compiled
def heads(first, stop, qkv_NXK, turns_NU2, eps, q_NHK, k_NJK, v_NJK, scales_NY):
    H, J, K = q_NHK.shape[1], k_NJK.shape[1], q_NHK.shape[2]
    for n in range(first, stop):
        turns_U2 = turns_NU2[n % len(turns_NU2)]
        for head in range(H + J):
            scale = _scale(qkv_NXK[n, head], eps)
            scales_NY[n, head] = scale
            out_K = q_NHK[n, head] if head < H else k_NJK[n, head - H]
            _turn(qkv_NXK[n, head], scale, turns_U2, out_K)
        for j in range(J):
            for i in range(K):
                v_NJK[n, j, i] = qkv_NXK[n, H + J + j, i]


@compiled
def heads_back(
    first, stop, q_grad_NHK, k_grad_NJK, v_grad_NJK, q_NHK, k_NJK, turns_NU2, scales_NY, out_NXK
):
    H, J, K = q_NHK.shape[1], k_NJK.shape[1], q_NHK.shape[2]
    for n in range(first, stop):
        turns_U2 = turns_NU2[n % len(turns_NU2)]
        for head in range(H + J):
            grad_K = q_grad_NHK[n, head] if head < H else k_grad_NJK[n, head - H]
            unit_K = q_NHK[n, head] if head < H else k_NJK[n, head - H]
            along = _mean_product(grad_K, unit_K)
            for u in range(K // 2):
                a = (grad_K[2 * u] - unit_K[2 * u] * along) * scales_NY[n, head]
                b = (grad_K[2 * u + 1] - unit_K[2 * u + 1] * along) * scales_NY[n, head]
                cos, sin = turns_U2[u, 0], turns_U2[u, 1]
                out_NXK[n, head, 2 * u] = a * cos + b * sin
                out_NXK[n, head, 2 * u + 1] = b * cos - a * sin
        for j in range(J):
            for i in range(K):
                out_NXK[n, H + J + j, i] = v_grad_NJK[n, j, i]


@compiled
def squared_relu(first, stop, x_ND, y_ND):
    for n in range(first, stop):
        for d in range(x_ND.shape[1]):
            positive = max(x_ND[n, d], x_ND.dtype.type(0))
            y_ND[n, d] = positive * positive


@compiled
def squared_relu_back(first, stop, grad_ND, x_ND, out_ND):
    for n in range(first, stop):
        for d in range(x_ND.shape[1]):
            positive = max(x_ND[n, d], x_ND.dtype.type(0))
            out_ND[n, d] = (positive + positive) * grad_ND[n, d]


@compiled
def next_heads(first, stop, qkv_PGXK, turns_PU2, eps, q_PJGRK, q_ARK, k_AK, v_AK):
    """Over prompts. Queries, divided by K^1/2 as scores are, go to two places: to those that read
    the same prompt, and to those of their own row."""
    _, J, G, R, K = q_PJGRK.shape
    one = qkv_PGXK.dtype.type(1)
    shrink = one / np.sqrt(qkv_PGXK.dtype.type(K))
    for p in range(first, stop):
        for g in range(G):
            for j in range(J):
                a = (p * G + g) * J + j
                for r in range(R):
                    query_K = qkv_PGXK[p, g, j * R + r]
                    _turn(query_K, shrink * _scale(query_K, eps), turns_PU2[p], q_ARK[a, r])
                    for i in range(K):
                        q_PJGRK[p, j, g, r, i] = q_ARK[a, r, i]
                key_K = qkv_PGXK[p, g, J * R + j]
                _turn(key_K, _scale(key_K, eps), turns_PU2[p], k_AK[a])
                for i in range(K):
                    v_AK[a, i] = qkv_PGXK[p, g, J * (R + 1) + j, i]


@cache
def attend(R: int, K: int) -> Callable[..., None]:
    """Return the loop over rows of the answers' cache for heads of one shape, which makes it a
    fifth faster. What queries find there is added to `found_PJGRW`, what they found in prompts.

    It reads at memory's pace: position after position, the rows of each as they lie there, and
    what they add up to stays in the core's own cache.
    """

    @compiled
    def loop(first, stop, q_ARK, k_TAK, v_TAK, found_PJGRW, y_ARK):
        _, J, G, _, _ = found_PJGRW.shape
        weights_NR = np.empty((stop - first, R), q_ARK.dtype)
        sums_NR = np.empty_like(weights_NR)
        for n in range(stop - first):
            a = first + n
            found_RW = found_PJGRW[a // (G * J), a % J, a // J % G]
            for r in range(R):
                for i in range(K):
                    y_ARK[a, r, i] = found_RW[r, i]
                sums_NR[n, r] = found_RW[r, K]
        for t in range(len(k_TAK)):
            for n in range(stop - first):
                for r in range(R):
                    weights_NR[n, r] = _product(q_ARK[first + n, r], k_TAK[t, first + n])
            for n in range(stop - first):
                for r in range(R):
                    weights_NR[n, r] = exp(weights_NR[n, r])
                    sums_NR[n, r] += weights_NR[n, r]
            for n in range(stop - first):
                for r in range(R):
                    for i in range(K):
                        y_ARK[first + n, r, i] += weights_NR[n, r] * v_TAK[t, first + n, i]
        for n in range(stop - first):
            for r in range(R):
                for i in range(K):
                    y_ARK[first + n, r, i] /= sums_NR[n, r]

    return loop


@compiled
def draw(first, stop, raw_BV, uniforms_B, cap, ids_B, logprobs_B):
    V = raw_BV.shape[1]
    sums_C = np.empty((V + TOGETHER - 1) // TOGETHER, np.float32)
    for b in range(first, stop):
        chances_V = raw_BV[b]
        for v in range(V):
            squashed = sigmoid(chances_V[v])
            chances_V[v] = exp((squashed + squashed) * cap - cap)
        total = np.float32(0)
        for c in range(len(sums_C)):
            sums_C[c] = _sum(chances_V[c * TOGETHER : min((c + 1) * TOGETHER, V)])
            total += sums_C[c]
        # Rounding may let the last sum fall short of the threshold: then it is the last token.
        threshold, below, c = uniforms_B[b] * total, np.float32(0), 0
        while c < len(sums_C) - 1 and below + sums_C[c] <= threshold:
            below += sums_C[c]
            c += 1
        v, last = c * TOGETHER, min((c + 1) * TOGETHER, V) - 1
        while v < last and below + chances_V[v] <= threshold:
            below += chances_V[v]
            v += 1
        ids_B[b], logprobs_B[b] = v, np.log(chances_V[v] / total)


FOLDER = draw.stats.cache_path
"""Where loops are kept; None for nowhere."""
if FOLDER is not None:
    event.register("numba:compiler_lock", _OneProcess(FOLDER))
