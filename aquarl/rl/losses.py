"""Log-probabilities and advantages in, one loss and what to plot about it out.

Every loss is a sum over the sampled tokens of a microbatch divided by a count of the whole step,
so cutting a batch differently leaves its gradient unchanged. Padding may hold anything.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from aquarl.config import RLConfig
from aquarl.records import TrainBatch

Loss = Callable[[Tensor, TrainBatch, RLConfig], tuple[Tensor, Tensor]]
"""(logprobs_BT in nats, batch, settings) -> (scalar loss, which tokens were clipped (B, T))"""


def policy_loss(
    logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss named in `rl.loss` and what to plot about it.

    Args:
        logprobs_BT: (B, T) nats, of the policy being trained; anything where nothing was sampled.

    Returns:
        The loss, and sums over this microbatch; those of a step added up are means over its tokens.
    """
    kept = without_far_answers(logprobs_BT, batch, config.mask_ratio)
    loss, is_clipped_BT = LOSSES[config.loss](logprobs_BT, kept, config)
    return loss, _plots(_log_ratio(logprobs_BT, batch).detach(), is_clipped_BT, kept, batch)


# Corrections for tokens that another policy sampled: staler weights, or the same in other numerics.


def truncated_weights(log_ratio_BT: Tensor, cap: float) -> Tensor:
    """Return min(policy / sampler, cap) a token, without gradient: it scales the gradient only.

    Source: arXiv:1802.01561 sections 4.1 and 4.2 (V-trace's rho); for a sampler that differs in
    numerics, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025),
    truncated importance sampling. With one update a batch it is the decoupled objective of
    arXiv:2505.24298 section 5.2, too: the proximal policy is then the policy itself, so PPO's own
    ratio is 1 and what is left is this weight.
    """
    return log_ratio_BT.detach().exp().clamp(max=cap)


def without_far_answers(logprobs_BT: Tensor, batch: TrainBatch, bound: float) -> TrainBatch:
    """Return the batch without the answers that the policy would hardly give any more.

    An answer's ratio is the geometric mean of its tokens' (arXiv:2507.18071 eq. 7), so that long
    answers are not left out for their length. The counts of the step stay as they are: what is
    left out weighs nothing, and the rest no more than before.

    Args:
        bound: Greater than 1. Answers whose ratio is above it, or below 1 / bound, are left out.
    """
    if bound == math.inf:
        return batch
    mean_B = _answer_log_ratio(_log_ratio(logprobs_BT.detach(), batch), batch)
    is_near_B1 = (mean_B.abs() <= math.log(bound))[:, None]
    return replace(batch, is_sampled_BT=batch.is_sampled_BT & is_near_B1)


# Losses.


def reinforce_loss(
    logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig
) -> tuple[Tensor, Tensor]:
    """Policy gradient; with `correct_staleness` each token has its truncated importance weight,
    which is 1 where the sampler is up to date."""
    log_ratio_BT = _log_ratio(logprobs_BT, batch)
    if not config.correct_staleness:
        objective_BT = batch.advantages_B[:, None] * logprobs_BT
        return _loss(objective_BT, batch), torch.zeros_like(batch.is_sampled_BT)
    weight_BT = truncated_weights(log_ratio_BT, config.ratio_cap)
    objective_BT = weight_BT * batch.advantages_B[:, None] * logprobs_BT
    return _loss(objective_BT, batch), log_ratio_BT.exp() > config.ratio_cap


def ppo_loss(logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv:1707.06347 eq. 7) with separate bounds below and above
    (arXiv:2503.14476 section 3.1)."""
    log_ratio_BT = _log_ratio(logprobs_BT, batch)
    ratio_BT, advantages_B1 = log_ratio_BT.exp(), batch.advantages_B[:, None]
    free_BT = ratio_BT * advantages_B1
    clipped_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages_B1
    return _loss(torch.minimum(free_BT, clipped_BT), batch), clipped_BT < free_BT


def gspo_loss(logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig) -> tuple[Tensor, Tensor]:
    """PPO's surrogate on one ratio an answer, the geometric mean of its tokens'
    (arXiv:2507.18071 eq. 5-7). Each answer weighs the same, however long."""
    log_ratio_BT = _log_ratio(logprobs_BT, batch)
    ratio_B = _answer_log_ratio(log_ratio_BT, batch).exp()
    free_B = ratio_B * batch.advantages_B
    clipped_B = ratio_B.clamp(1 - config.clip_low, 1 + config.clip_high) * batch.advantages_B
    is_kept_B = batch.is_sampled_BT.any(dim=1)
    objective_B = torch.where(is_kept_B, torch.minimum(free_B, clipped_B), 0.0)
    is_clipped_BT = (clipped_B < free_B)[:, None].expand_as(log_ratio_BT)
    return -objective_B.sum() / batch.rollouts_in_step, is_clipped_BT


def cispo_loss(logprobs_BT: Tensor, batch: TrainBatch, config: RLConfig) -> tuple[Tensor, Tensor]:
    """REINFORCE whose importance weight is clipped on both sides, so that every token keeps its
    gradient (arXiv:2506.13585 eq. 4-5)."""
    ratio_BT = _log_ratio(logprobs_BT, batch).detach().exp()
    weight_BT = ratio_BT.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective_BT = weight_BT * batch.advantages_B[:, None] * logprobs_BT
    return _loss(objective_BT, batch), weight_BT != ratio_BT


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


def _answer_log_ratio(log_ratio_BT: Tensor, batch: TrainBatch) -> Tensor:
    """Return the mean of each answer's log-ratios (B,), 0 for one of no tokens."""
    return log_ratio_BT.sum(dim=1) / batch.is_sampled_BT.sum(dim=1).clamp(min=1)


def _loss(objective_BT: Tensor, batch: TrainBatch) -> Tensor:
    return -torch.where(batch.is_sampled_BT, objective_BT, 0.0).sum() / batch.tokens_in_step


@torch.no_grad()
def _plots(
    log_ratio_BT: Tensor, is_clipped_BT: Tensor, kept: TrainBatch, batch: TrainBatch
) -> dict[str, Tensor]:
    """Return sums over this microbatch; adding those of a step up gives means over its tokens.

    `policy/kl_from_sampler` is the mismatch: the k3 estimate of KL(sampler || policy) in nats a
    token. `policy/ratio_square` serves `effective_fraction` below.
    """
    n, ratio_BT = batch.tokens_in_step, log_ratio_BT.exp()
    sampled_ratio_BT = torch.where(batch.is_sampled_BT, ratio_BT, 0.0)
    return {
        "policy/kl_from_sampler": (ratio_BT - 1 - log_ratio_BT).sum() / n,
        "policy/logprob_gap": log_ratio_BT.abs().sum() / n,
        "policy/ratio_mean": sampled_ratio_BT.sum() / n,
        "policy/ratio_square": sampled_ratio_BT.square().sum() / n,
        "policy/clipped_fraction": (is_clipped_BT & kept.is_sampled_BT).sum() / n,
        "policy/masked_fraction": (batch.is_sampled_BT & ~kept.is_sampled_BT).sum() / n,
    }


def effective_fraction(ratio_mean: float, ratio_square: float) -> float:
    """Return how many tokens the weighted ones are worth, as a share of them: Kish's effective
    sample size, (sum w)^2 / (n * sum w^2). 1 on-policy; towards 0 when few tokens weigh all."""
    return ratio_mean**2 / ratio_square if ratio_square else 0.0
