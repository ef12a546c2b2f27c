"""Rollout groups in, one row of tokens out: what one learner rank trains on in one pass.

A prompt stands once for its G answers, and nothing is padded but what has a number per sampled
token. `is_sampled_BT` and the behaviour log-probabilities come from the record of what was
sampled, never from looking at token values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from aquarl.records import RolloutGroup, TrainBatch


def build_batch(
    groups: Sequence[RolloutGroup], tokens_in_step: int, rollouts_in_step: int
) -> TrainBatch:
    """Return the row of these groups.

    Args:
        groups: P groups of the same G.
        tokens_in_step, rollouts_in_step: Counts over all ranks, by which losses are divided.
    """
    ids: list[int] = []
    positions: list[int] = []
    before: list[int] = []
    for group in groups:
        L = len(group.prompt.ids)
        end_of_prompt = len(ids) + L - 1
        ids += group.prompt.ids
        positions += range(L)
        for rollout in group.rollouts:
            before += [end_of_prompt, *range(len(ids), len(ids) + len(rollout.ids) - 1)]
            ids += rollout.ids[:-1]
            positions += range(L, L + len(rollout.ids) - 1)

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths_B = torch.tensor([len(rollout.ids) for rollout in rollouts])
    return TrainBatch(
        ids_N=torch.tensor(ids),
        positions_N=torch.tensor(positions),
        lengths=tuple(
            (len(group.prompt.ids), tuple(len(r.ids) - 1 for r in group.rollouts))
            for group in groups
        ),
        before_M=torch.tensor(before),
        sampled_ids_M=torch.tensor([i for rollout in rollouts for i in rollout.ids]),
        is_sampled_BT=torch.arange(int(lengths_B.max())) < lengths_B[:, None],
        behaviour_logprobs_BT=pad_sequence(
            [torch.tensor(rollout.logprobs) for rollout in rollouts], batch_first=True
        ),
        advantages_B=torch.tensor([value for group in groups for value in group.advantages]),
        tokens_in_step=tokens_in_step,
        rollouts_in_step=rollouts_in_step,
    )


def microbatches(
    groups: Sequence[RolloutGroup], prompts: int, tokens_in_step: int, rollouts_in_step: int
) -> Iterator[TrainBatch]:
    """Yield batches of at most this many prompts, in order."""
    for start in range(0, len(groups), prompts):
        yield build_batch(groups[start : start + prompts], tokens_in_step, rollouts_in_step)
