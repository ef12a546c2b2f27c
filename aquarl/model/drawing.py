"""Logits and uniform numbers in, tokens and their log-probabilities out, one of each a row.

Draws by inverting the distribution function: one uniform number a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aquarl.model.gpt import SOFT_CAP
from aquarl.model.head import COLDEST
from aquarl.model.loops import compiled, exp, over_rows, squashed
from aquarl.model.modes import has_loops
from aquarl.records import Sampling

TOKENS_TOGETHER = 32
"""Where a token is drawn from: first among sums over so many, then among these."""


def is_inverted(sampling: Sampling) -> bool:
    """Whether a token is drawn by inverting the distribution of all tokens as they are."""
    is_whole = not sampling.top_k and sampling.top_p == 1.0
    return is_whole and sampling.temperature >= COLDEST


def draw(raw_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return one id a row and its log-probability in the distribution it was drawn from.

    Args:
        raw_BV: (B, V) from `head.squashed_logits`: with s its sigmoid, (2 s - 1) * SOFT_CAP is the
            logit. Overwritten.
        uniforms_B: (B,) in [0, 1).
        sampling: Temperature 0 takes the likeliest token and gives its logprob at temperature 1.
    """
    if not (has_loops(raw_BV) and is_inverted(sampling)):
        return draw_from_any((2 * raw_BV.float().sigmoid() - 1) * SOFT_CAP, uniforms_B, sampling)
    raw_BV = raw_BV.float()
    ids_B = torch.empty(len(raw_BV), dtype=torch.long)
    logprobs_B = torch.empty(len(raw_BV))
    cap = SOFT_CAP / sampling.temperature
    over_rows(_draw, len(raw_BV), raw_BV, uniforms_B, np.float32(cap), ids_B, logprobs_B)
    return ids_B, logprobs_B


@compiled
def _draw(
    first: int, stop: int, raw_BV: Any, uniforms_B: Any, cap: Any, ids_B: Any, logprobs_B: Any
) -> None:
    V = raw_BV.shape[1]
    sums_C = np.empty((V + TOKENS_TOGETHER - 1) // TOKENS_TOGETHER, np.float32)
    two = np.float32(2)
    for b in range(first, stop):
        chances_V = raw_BV[b]
        for v in range(V):
            chances_V[v] = exp(two * cap * squashed(chances_V[v]) - cap)
        total = np.float32(0)
        for c in range(len(sums_C)):
            sums_C[c] = 0
            for v in range(c * TOKENS_TOGETHER, min((c + 1) * TOKENS_TOGETHER, V)):
                sums_C[c] += chances_V[v]
            total += sums_C[c]
        threshold, below, c = uniforms_B[b] * total, np.float32(0), 0
        # Rounding may let the last sum fall short of the threshold.
        while c < len(sums_C) - 1 and below + sums_C[c] <= threshold:
            below += sums_C[c]
            c += 1
        v = c * TOKENS_TOGETHER
        while v < min((c + 1) * TOKENS_TOGETHER, V) - 1 and below + chances_V[v] <= threshold:
            below += chances_V[v]
            v += 1
        ids_B[b], logprobs_B[b] = v, np.log(chances_V[v] / total)


def draw_from_any(
    logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """As `draw`, from logits (B, V) fp32 of any size, at any temperature, `top_k`, then `top_p`."""
    if sampling.temperature > 0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        kth_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if sampling.top_p < 1.0:
        falling_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        chances_BV = falling_BV.softmax(dim=-1)
        is_cut_BV = chances_BV.cumsum(dim=-1) - chances_BV >= sampling.top_p
        is_cut_BV = is_cut_BV.scatter(1, order_BV, is_cut_BV)
        logits_BV = logits_BV.masked_fill(is_cut_BV, float("-inf"))
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    if sampling.temperature > 0:
        cumulative_BV = logprobs_BV.exp().cumsum(dim=-1)
        thresholds_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
        # right=True: never a token of probability 0, whose step in the sum is flat.
        ids_B1 = torch.searchsorted(cumulative_BV, thresholds_B1, right=True)
        ids_B1 = ids_B1.clamp(max=logits_BV.shape[1] - 1)
    else:
        ids_B1 = logprobs_BV.argmax(dim=-1, keepdim=True)
    return ids_B1[:, 0], logprobs_BV.gather(1, ids_B1)[:, 0]
