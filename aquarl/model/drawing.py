"""Logits and uniform numbers in, tokens and their log-probabilities out, one of each a row.

Draws by inverting the distribution function: one uniform number a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aquarl.model import loops
from aquarl.model.gpt import SOFT_CAP
from aquarl.model.head import COLDEST
from aquarl.model.modes import has_loops
from aquarl.records import Sampling


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
    loops.over_rows(loops.draw, len(raw_BV), raw_BV, uniforms_B, np.float32(cap), ids_B, logprobs_B)
    return ids_B, logprobs_B


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
