"""Rollout groups in, one row of tokens out: what one learner rank trains on in one pass.

A prompt stands once for its G answers, and nothing is padded but what has a number per sampled
token. `is_sampled_BT` and the behaviour log-probabilities come from the record of what was
sampled, never from looking at token values.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from aquarl.records import PackedGroups, TrainBatch


def build_batch(groups: PackedGroups, tokens_in_step: int, rollouts_in_step: int) -> TrainBatch:
    """Return the row of these groups.

    Args:
        tokens_in_step, rollouts_in_step: Counts over all ranks, by which losses are divided.
    """
    prompt_lengths_P = _tensor(groups.prompt_lengths_P, np.int64)
    lengths_B = _tensor(groups.answers_PG["length"], np.int64).flatten()
    ids_M = _tensor(groups.tokens_M["id"], np.int64)
    G = groups.answers_PG.shape[1]

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
    is_last_M = torch.zeros_like(ids_M, dtype=torch.bool)
    is_last_M[lengths_B.cumsum(0) - 1] = True
    ids_N = torch.empty_like(positions_N)
    ids_N[_counted(starts_P1G[:, 0], prompt_lengths_P)] = _tensor(groups.prompt_ids_N, np.int64)
    ids_N[_counted(starts_P1G[:, 1:].flatten(), lengths_B - 1)] = ids_M[~is_last_M]
    return TrainBatch(
        ids_N=ids_N,
        positions_N=positions_N,
        lengths=tuple((int(row[0]), tuple(row[1:])) for row in in_row_P1G.tolist()),
        before_M=before_M,
        sampled_ids_M=ids_M,
        is_sampled_BT=is_sampled_BT,
        behaviour_logprobs_BT=torch.zeros(is_sampled_BT.shape).masked_scatter_(
            is_sampled_BT, _tensor(groups.tokens_M["logprob"], np.float32)
        ),
        advantages_B=_tensor(groups.answers_PG["advantage"], np.float32).flatten(),
        tokens_in_step=tokens_in_step,
        rollouts_in_step=rollouts_in_step,
    )


def _tensor(numbers: np.ndarray, dtype: type[np.generic]) -> Tensor:
    """Return a copy: what came through Ray lies in memory that others share, and is read-only."""
    return torch.from_numpy(numbers.astype(dtype))


def _counted(first: Tensor, counts: Tensor) -> Tensor:
    """Return first[0], first[0] + 1, ... and so on, counts[0] numbers, then those of the next."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (first - starts).repeat_interleave(counts)


def microbatches(
    groups: PackedGroups, prompts: int, tokens_in_step: int, rollouts_in_step: int
) -> Iterator[TrainBatch]:
    """Yield batches of at most this many prompts, in order."""
    for start in range(0, len(groups), prompts):
        some = groups.only(range(start, min(start + prompts, len(groups))))
        yield build_batch(some, tokens_in_step, rollouts_in_step)
