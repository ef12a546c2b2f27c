"""Rewards in, advantages out: how much better was this answer than its siblings?

Reads `rewards_PG` from `rl.rewards`; `rl.batch` spreads the result over each answer's tokens.
Pure tensor arithmetic: no model, no cluster.

Shapes: P prompts, G rollouts per prompt.
Source: group baseline, arXiv:2402.03300 section 4.1; why not to divide by the spread,
arXiv:2503.20783; leave-one-out, arXiv:2402.14740 section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def mean_advantages(rewards_PG: Tensor) -> Tensor:
    """Return each reward minus the mean reward of its own group.

    Args:
        rewards_PG: (P, G) float32, in reward units. Row p holds the G answers to prompt p.

    Returns:
        (P, G) float32 in reward units. Rows sum to 0 up to rounding. A row whose rewards are all
            equal is exactly 0: it teaches nothing.

    Raises:
        ValueError: `rewards_PG` is not 2-D, or G < 2, so there is no sibling to compare with.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards_PG must be (P, G) with G >= 2, got {tuple(rewards_PG.shape)}")
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    # The mean of equal floats can be off by one rounding; the mask makes "exactly 0" true.
    return torch.where(is_uniform(rewards_PG)[:, None], torch.zeros_like(centred_PG), centred_PG)


def std_advantages(rewards_PG: Tensor) -> Tensor:
    """As `mean_advantages`, divided by the group's standard deviation (GRPO): unitless.

    This weighs nearly-solved and nearly-hopeless problems more than the rest.
    """
    return mean_advantages(rewards_PG) / (rewards_PG.std(dim=1, keepdim=True) + 1e-6)


def rloo_advantages(rewards_PG: Tensor) -> Tensor:
    """Return each reward minus the mean of its siblings, itself left out."""
    centred_PG = mean_advantages(rewards_PG)
    G = rewards_PG.shape[1]
    return centred_PG * (G / (G - 1))


def global_advantages(rewards_PG: Tensor) -> Tensor:
    """As `mean_advantages`, divided by the standard deviation over all groups of the call.

    Here that is a lease, so that a lease's result depends on nothing but the lease
    (arXiv:2501.03262 takes the whole batch).
    """
    centred_PG = mean_advantages(rewards_PG)
    return centred_PG / (centred_PG.std() + 1e-6)


def is_uniform(rewards_PG: Tensor) -> Tensor:
    """Return (P,) bool: all rewards of the group are equal, so it has nothing to teach."""
    return (rewards_PG == rewards_PG[:, :1]).all(dim=1)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean_advantages,
    "std": std_advantages,
    "rloo": rloo_advantages,
    "global": global_advantages,
}
"""By the name in `rl.advantage`."""
