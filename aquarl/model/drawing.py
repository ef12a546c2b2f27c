"""Logits and uniform numbers in, tokens and their log-probabilities out, one of each a row.

Draws by inverting the distribution function: one uniform number a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aquarl.model.gpt import SOFT_CAP
from aquarl.model.head import COLDEST
from aquarl.records import Sampling

TOKENS_TOGETHER = 32
"""Where a token is drawn from: first among sums over so many, then among these."""


def is_inverted(sampling: Sampling) -> bool:
    """Whether a token is drawn by inverting the distribution of all tokens as they are."""
    is_whole = not sampling.top_k and sampling.top_p == 1.0
    return is_whole and sampling.temperature >= COLDEST


def draw(squashed_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return one id a row and its log-probability in the distribution it was drawn from.

    Args:
        squashed_BV: (B, V) fp32 in [0, 1], from `Decoder.squashed`: the logits before the cap
            widens them. Overwritten.
        uniforms_B: (B,) in [0, 1).
        sampling: Temperature 0 takes the likeliest token and gives its logprob at temperature 1.
    """
    if not is_inverted(sampling):
        return draw_from_any((2 * squashed_BV - 1) * SOFT_CAP, uniforms_B, sampling)
    # Capped as they are, no maximum has to be taken off the logits before.
    cap = SOFT_CAP / sampling.temperature
    chances_BV = squashed_BV.mul_(2 * cap).sub_(cap).exp_()
    B, V = chances_BV.shape
    if missing := -V % TOKENS_TOGETHER:
        chances_BV = F.pad(chances_BV, (0, missing))
    chances_BCX = chances_BV.view(B, -1, TOKENS_TOGETHER)
    sums_BC = chances_BCX.sum(dim=2).cumsum(dim=1)
    thresholds_B1 = uniforms_B[:, None] * sums_BC[:, -1:]
    places_B1 = torch.searchsorted(sums_BC, thresholds_B1, right=True)
    places_B1.clamp_(max=sums_BC.shape[1] - 1)
    before_B1 = F.pad(sums_BC, (1, 0)).gather(1, places_B1)
    chances_BX = chances_BCX[torch.arange(B, device=places_B1.device), places_B1[:, 0]]
    within_B1 = torch.searchsorted(chances_BX.cumsum(dim=1), thresholds_B1 - before_B1, right=True)
    # Rounding may let the last sum fall short of the threshold.
    within_B1.clamp_(max=TOKENS_TOGETHER - 1)
    ids_B1 = (places_B1 * TOKENS_TOGETHER + within_B1).clamp_(max=V - 1)
    chosen_B1 = chances_BV.gather(1, ids_B1)
    return ids_B1[:, 0], (chosen_B1 / sums_BC[:, -1:]).log_()[:, 0]


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
