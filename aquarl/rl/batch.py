"""Rollout groups in, one row of tokens out: what one learner rank trains on in one pass.

A prompt stands once for its G answers, and nothing is padded but what has a number per sampled
token. `is_sampled_BT` and the behaviour log-probabilities come from the record of what was
sampled, never from looking at token values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from aquarl.records import RolloutGroup, TrainBatch


def build_batch(
    groups: Sequence[RolloutGroup], tokens_in_step: int, rollouts_in_step: int
) -> TrainBatch:
    """Return the row of these groups.

    Args:
        groups: P groups of the same G.
        tokens_in_step, rollouts_in_step: Counts over all ranks, by which losses are divided.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    prompt_lengths_P = torch.tensor([len(group.prompt.ids) for group in groups])
    lengths_B = torch.tensor([len(rollout.ids) for rollout in rollouts])
    G = len(groups[0].rollouts)

    # The row: prompt after prompt, each with its answers, each of these without its last token.
    in_row_P1G = torch.cat([prompt_lengths_P[:, None], lengths_B.view(-1, G) - 1], dim=1)
    starts_P1G = (in_row_P1G.flatten().cumsum(0) - in_row_P1G.flatten()).view(in_row_P1G.shape)
    first_P1G = prompt_lengths_P[:, None].repeat(1, G + 1)
    first_P1G[:, 0] = 0
    positions_N = _counted(first_P1G.flatten(), in_row_P1G.flatten())
    # Before an answer's first token stands the prompt's last, before the others their predecessor.
    before_M = _counted(starts_P1G[:, 1:].flatten() - 1, lengths_B)
    before_M[lengths_B.cumsum(0) - lengths_B] = starts_P1G[:, 0].repeat_interleave(G) + (
        prompt_lengths_P.repeat_interleave(G) - 1
    )
    is_sampled_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    logprobs_M = _flat((rollout.logprobs for rollout in rollouts), lengths_B, np.float32)
    in_row = (
        ids
        for group in groups
        for ids in (group.prompt.ids, *(rollout.ids[:-1] for rollout in group.rollouts))
    )
    return TrainBatch(
        ids_N=_flat(in_row, in_row_P1G, np.int64),
        positions_N=positions_N,
        lengths=tuple((int(row[0]), tuple(row[1:])) for row in in_row_P1G.tolist()),
        before_M=before_M,
        sampled_ids_M=_flat((rollout.ids for rollout in rollouts), lengths_B, np.int64),
        is_sampled_BT=is_sampled_BT,
        behaviour_logprobs_BT=torch.zeros(is_sampled_BT.shape).masked_scatter_(
            is_sampled_BT, logprobs_M
        ),
        advantages_B=torch.tensor([value for group in groups for value in group.advantages]),
        tokens_in_step=tokens_in_step,
        rollouts_in_step=rollouts_in_step,
    )


def _flat(rows: Iterable[Iterable[float]], lengths: Tensor, dtype: type[np.generic]) -> Tensor:
    """Return all rows one after the other: through numpy, which reads a list ten times as fast."""
    count = int(lengths.sum())
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), dtype, count))


def _counted(first: Tensor, counts: Tensor) -> Tensor:
    """Return first[0], first[0] + 1, ... and so on, counts[0] numbers, then those of the next."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (first - starts).repeat_interleave(counts)


def microbatches(
    groups: Sequence[RolloutGroup], prompts: int, tokens_in_step: int, rollouts_in_step: int
) -> Iterator[TrainBatch]:
    """Yield batches of at most this many prompts, in order."""
    for start in range(0, len(groups), prompts):
        yield build_batch(groups[start : start + prompts], tokens_in_step, rollouts_in_step)
