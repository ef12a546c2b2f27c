"""What a CPU does between a decoder's matrix products, one compiled loop each: `decoder.py` calls
them.

turned_heads    queries, keys and values as the product gave them in, turned and of unit length out
attend          what the queries find among the answers' keys, added to what they found in prompts
norm            RMSNorm
squared_relu_   the wide side of the MLP

The answers' cache is read at the pace of memory: position after position, the rows of each in the
order in which they lie there, and what they add up to stays in the core's own cache.

Shapes: see `decoder.py`; U = K / 2 pairs of a head.
"""

# Numba's arrays are any to a checker.
# mypy: ignore-errors

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from aquarl.model.loops import compiled, eps_of, exp, over_rows, part, unit


def turned_heads(
    qkv_BX: Tensor, turns_PU2: Tensor, q_PJGRK: Tensor, q_ARK: Tensor, k_AK: Tensor, v_AK: Tensor
) -> None:
    """Write each row's queries, keys and values to their places, queries to two.

    Args:
        turns_PU2: By what each prompt's rows are turned: cosines and sines.
        q_PJGRK: For the prompts: queries that read the same keys stand together.
        q_ARK: For the answers.
    """
    P, _, G, _, _ = q_PJGRK.shape
    eps, qkv_PGX = eps_of(qkv_BX), qkv_BX.view(P, G, -1)
    over_rows(_turned_heads, P, qkv_PGX, turns_PU2, eps, q_PJGRK, q_ARK, k_AK, v_AK)


def attend(q_ARK: Tensor, k_TAK: Tensor, v_TAK: Tensor, found_PJGRW: Tensor, y_ARK: Tensor) -> None:
    """Write what queries find among their prompt's keys and their own to `y_ARK`.

    Args:
        k_TAK: The positions that are in use.
        found_PJGRW: What they found in the prompts: the sum, and that of the weights.
    """
    A, R, K = q_ARK.shape
    over_rows(_attend(R, K), A, q_ARK, k_TAK, v_TAK, found_PJGRW, y_ARK)


def norm(x_BD: Tensor) -> Tensor:
    y_BD = torch.empty_like(x_BD)
    over_rows(_norm, len(x_BD), x_BD, eps_of(x_BD), y_BD)
    return y_BD


def squared_relu_(x_BD: Tensor) -> Tensor:
    over_rows(_squared_relu, len(x_BD), x_BD)
    return x_BD


@compiled
def _turned_heads(first, stop, qkv_PGX, turns_PU2, eps, q_PJGRK, q_ARK, k_AK, v_AK):
    _, J, G, R, K = q_PJGRK.shape
    one = qkv_PGX.dtype.type(1)
    shrink = one / np.sqrt(one * K)
    for p in range(first, stop):
        for g in range(G):
            heads_XK = qkv_PGX[p, g].reshape(J * (R + 2), K)
            for j in range(J):
                a = (p * G + g) * J + j
                for r in range(R):
                    _turn(heads_XK[j * R + r], turns_PU2[p], eps, shrink, q_ARK[a, r])
                    for i in range(K):
                        q_PJGRK[p, j, g, r, i] = q_ARK[a, r, i]
                _turn(heads_XK[J * R + j], turns_PU2[p], eps, one, k_AK[a])
                for i in range(K):
                    v_AK[a, i] = heads_XK[J * (R + 1) + j, i]


@part
def _turn(x_K, turns_U2, eps, length, out_K):
    """Write a head, turned and of the length that RMSNorm gives it times another, to `out_K`."""
    scale = length * unit(x_K, eps)
    for u in range(len(turns_U2)):
        a, b = x_K[2 * u] * scale, x_K[2 * u + 1] * scale
        cos, sin = turns_U2[u, 0], turns_U2[u, 1]
        out_K[2 * u] = a * cos - b * sin
        out_K[2 * u + 1] = a * sin + b * cos


@cache
def _attend(R, K):
    """Return the loop over rows of the cache for heads of one shape: known beforehand, they make it
    a fifth faster."""

    @compiled
    def attend(first, stop, q_ARK, k_TAK, v_TAK, found_PJGRW, y_ARK):
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
                    score = q_ARK.dtype.type(0)
                    for i in range(K):
                        score += q_ARK[first + n, r, i] * k_TAK[t, first + n, i]
                    weights_NR[n, r] = score
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

    return attend


@compiled
def _norm(first, stop, x_BD, eps, y_BD):
    for b in range(first, stop):
        scale = unit(x_BD[b], eps)
        for d in range(x_BD.shape[1]):
            y_BD[b, d] = x_BD[b, d] * scale


@compiled
def _squared_relu(first, stop, x_BD):
    for b in range(first, stop):
        for d in range(x_BD.shape[1]):
            positive = max(x_BD[b, d], x_BD.dtype.type(0))
            x_BD[b, d] = positive * positive
