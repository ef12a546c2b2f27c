"""Log-probabilities and advantages in, one loss and what to plot about it out.

Every loss is a sum over the sampled tokens of a microbatch divided by a count of the whole step,
so cutting a batch differently leaves its gradient unchanged. Padding may hold anything.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aquarl.config import RLConfig
from aquarl.records import TrainBatch

Loss = Callable[[Tensor, TrainBatch, RLConfig], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs_BT in nats, batch, settings) -> (scalar loss, sums over tokens / tokens_in_step)"""


def reinforce_loss(
    logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient with a truncated importance weight, 1 where the sampler is up to date.

    Source: arXiv:1802.01561 (V-trace's rho, here per token); the ratio carries no gradient.
    """
    log_ratio_BT = _log_ratio(logprobs_BT, batch)
    weight_BT = log_ratio_BT.detach().exp().clamp(max=config.ratio_cap)
    objective_BT = weight_BT * batch.advantages_B[:, None] * logprobs_BT
    is_cut_BT = log_ratio_BT.exp() > config.ratio_cap
    return _loss(objective_BT, batch), _plots(log_ratio_BT, is_cut_BT, batch)


def ppo_loss(
    logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (arXiv:1707.06347 eq. 7) with separate bounds below and above
    (arXiv:2503.14476 section 3.1)."""
    log_ratio_BT = _log_ratio(logprobs_BT, batch)
    ratio_BT, advantages_B1 = log_ratio_BT.exp(), batch.advantages_B[:, None]
    free_BT = ratio_BT * advantages_B1
    clipped_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages_B1
    objective_BT = torch.minimum(free_BT, clipped_BT)
    return _loss(objective_BT, batch), _plots(log_ratio_BT, clipped_BT < free_BT, batch)


def gspo_loss(
    logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's surrogate on one ratio an answer, the geometric mean of its tokens'
    (arXiv:2507.18071 eq. 5-7). Each answer weighs the same, however long."""
    log_ratio_BT = _log_ratio(logprobs_BT, batch)
    lengths_B = batch.is_sampled_BT.sum(dim=1).clamp(min=1)
    ratio_B = (log_ratio_BT.sum(dim=1) / lengths_B).exp()
    free_B = ratio_B * batch.advantages_B
    clipped_B = ratio_B.clamp(1 - config.clip_low, 1 + config.clip_high) * batch.advantages_B
    loss = -torch.minimum(free_B, clipped_B).sum() / batch.rollouts_in_step
    is_clipped_BT = (clipped_B < free_B)[:, None].expand_as(log_ratio_BT)
    return loss, _plots(log_ratio_BT, is_clipped_BT, batch)


def cispo_loss(
    logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE whose importance weight is clipped on both sides, so that every token keeps its
    gradient (arXiv:2506.13585 eq. 4-5)."""
    log_ratio_BT = _log_ratio(logprobs_BT, batch)
    ratio_BT = log_ratio_BT.detach().exp()
    weight_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective_BT = weight_BT * batch.advantages_B[:, None] * logprobs_BT
    return _loss(objective_BT, batch), _plots(log_ratio_BT, weight_BT != ratio_BT, batch)


LOSSES: dict[str, Loss] = {
    "reinforce": reinforce_loss,
    "ppo": ppo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
}
"""By the name in `rl.loss`."""


def kl_penalty(logprobs_BT: Tensor, reference_logprobs_BT: Tensor, batch: TrainBatch) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) in nats a token, with its gradient.

    Source: joschu.net/blog/kl-approx.html, estimator k3: unbiased and never negative.
    """
    gap_BT = torch.where(batch.is_sampled_BT, reference_logprobs_BT - logprobs_BT, 0.0)
    return (gap_BT.exp() - 1 - gap_BT).sum() / batch.tokens_in_step


def _log_ratio(logprobs_BT: Tensor, batch: TrainBatch) -> Tensor:
    # Choose zeros on padding before any arithmetic: -inf * 0 is nan.
    gap_BT = logprobs_BT - batch.behaviour_logprobs_BT
    return torch.where(batch.is_sampled_BT, gap_BT, 0.0)


def _loss(objective_BT: Tensor, batch: TrainBatch) -> Tensor:
    return -torch.where(batch.is_sampled_BT, objective_BT, 0.0).sum() / batch.tokens_in_step


@torch.no_grad()
def _plots(log_ratio_BT: Tensor, is_clipped_BT: Tensor, batch: TrainBatch) -> dict[str, Tensor]:
    """Return sums over this microbatch; adding those of a step up gives means over its tokens."""
    ratio_BT = log_ratio_BT.exp()
    n = batch.tokens_in_step
    return {
        "policy/kl_from_sampler": (ratio_BT - 1 - log_ratio_BT).sum() / n,
        "policy/clipped_fraction": (is_clipped_BT & batch.is_sampled_BT).sum() / n,
        "policy/logprob_gap": log_ratio_BT.abs().sum() / n,
    }
