"""Rollout groups in, padded rows out: what one learner rank trains on in one step.

The prompt stands once for its G answers. `is_sampled_BT` and the behaviour log-probabilities come
from the record of what was sampled, never from looking at token values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aquarl.records import RolloutGroup, TrainBatch


def build_batch(
    groups: Sequence[RolloutGroup], tokens_in_step: int, rollouts_in_step: int
) -> TrainBatch:
    """Return the rows of these groups, all of the same G.

    Args:
        groups: P groups, those of this rank.
        tokens_in_step, rollouts_in_step: Counts over all ranks, by which losses are divided.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    advantages = [value for group in groups for value in group.advantages]
    answer_lengths_B = torch.tensor([len(rollout.ids) for rollout in rollouts])
    T = int(answer_lengths_B.max())
    return TrainBatch(
        prompt_ids_PT=_padded([group.prompt.ids for group in groups], torch.long),
        prompt_lengths_P=torch.tensor([len(group.prompt.ids) for group in groups]),
        answer_ids_BT=_padded([rollout.ids for rollout in rollouts], torch.long),
        is_sampled_BT=torch.arange(T) < answer_lengths_B[:, None],
        behaviour_logprobs_BT=_padded([r.logprobs for r in rollouts], torch.float32),
        advantages_B=torch.tensor(advantages, dtype=torch.float32),
        tokens_in_step=tokens_in_step,
        rollouts_in_step=rollouts_in_step,
    )


def microbatches(
    groups: Sequence[RolloutGroup], prompts: int, tokens_in_step: int, rollouts_in_step: int
) -> Iterator[TrainBatch]:
    """Yield batches of at most this many prompts; answers of like length go together."""
    ordered = sorted(groups, key=lambda group: max(len(r.ids) for r in group.rollouts))
    for start in range(0, len(ordered), prompts):
        yield build_batch(ordered[start : start + prompts], tokens_in_step, rollouts_in_step)


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return padded
