"""Rollouts of a lease in, scored groups with advantages out.

The reward is 1 for the right letter on the answer line, else 0 (`tasks.grading` holds the rule),
plus `rl.format_bonus` for a line of the right form: 0 by default, and not in `reward/accuracy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from aquarl.config import RLConfig
from aquarl.data.tokenizer import Tokenizer
from aquarl.records import Lease, Prompt, Rollout, RolloutGroup
from aquarl.rl.advantages import ADVANTAGES
from aquarl.tasks.grading import grade


def score(rollout: Rollout, prompt: Prompt, tokenizer: Tokenizer, config: RLConfig) -> Rollout:
    """Return the rollout with its letter and reward."""
    judged = grade(tokenizer.decode_answer(rollout.ids), prompt.answer_letter, prompt.letters)
    bonus = config.format_bonus if judged.letter is not None else 0.0
    return replace(rollout, letter=judged.letter, reward=judged.reward + bonus)


def scored_groups(
    lease: Lease,
    rollouts_PG: Sequence[Sequence[Rollout]],
    tokenizer: Tokenizer,
    config: RLConfig,
    *,
    weights_version: int,
    worker: str = "",
    sample_s: float = 0.0,
    fetch_s: float = 0.0,
    sampled_from: float = 0.0,
) -> list[RolloutGroup]:
    """Return one group a prompt of the lease. Evaluation leases have all advantages 0.

    Args:
        sample_s, fetch_s: Wall seconds of the whole lease.
        sampled_from: Unix seconds at which the sampling began.
    """
    scored_PG = [
        tuple(score(rollout, prompt, tokenizer, config) for rollout in row)
        for prompt, row in zip(lease.prompts, rollouts_PG, strict=True)
    ]
    rewards_PG = torch.tensor([[rollout.reward for rollout in row] for row in scored_PG])
    if lease.purpose == "train":
        advantages_PG = ADVANTAGES[config.advantage](rewards_PG)
    else:
        advantages_PG = torch.zeros_like(rewards_PG)
    return [
        RolloutGroup(
            lease_id=lease.id,
            index=p,
            step=lease.step,
            prompt=prompt,
            rollouts=scored_PG[p],
            advantages=tuple(advantages_PG[p].tolist()),
            weights_version=weights_version,
            worker=worker,
            sample_s=sample_s / len(lease.prompts),
            fetch_s=fetch_s / len(lease.prompts),
            sampled=(sampled_from, sampled_from + sample_s),
        )
        for p, prompt in enumerate(lease.prompts)
    ]
