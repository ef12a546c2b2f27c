"""Groups become rows as they were recorded."""

from __future__ import annotations

import torch

from aquarl.rl.batch import build_batch, microbatches
from tests.fakes import make_group

GROUPS = [
    make_group([5, 6, 7], [[1, 2], [3]], logprob=-0.5),
    make_group([8], [[0, 0, 0, 0], [4, 0]], advantages=[0.25, -0.25]),
]


def test_rows_hold_what_was_sampled_prompt_by_prompt() -> None:
    batch = build_batch(GROUPS, tokens_in_step=90, rollouts_in_step=40)
    assert batch.prompt_ids_PT.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.prompt_lengths_P.tolist() == [3, 1]
    assert batch.answer_ids_BT.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]]
    assert batch.advantages_B.tolist() == [0.5, -0.5, 0.25, -0.25]
    assert batch.behaviour_logprobs_BT[0].tolist() == [-0.5, -0.5, 0, 0]
    assert (batch.tokens_in_step, batch.rollouts_in_step) == (90, 40)


def test_what_was_sampled_is_known_from_the_record_not_from_token_values() -> None:
    """Token 0 may be sampled, and pads as well."""
    batch = build_batch(GROUPS, 9, 4)
    assert batch.is_sampled_BT.sum(dim=1).tolist() == [2, 1, 4, 2]
    assert batch.is_sampled_BT[2].all()
    assert batch.is_sampled_BT[3].tolist() == [True, True, False, False]


def test_microbatches_hold_each_group_once_and_the_counts_of_the_step() -> None:
    groups = [make_group([i + 1], [[1] * n, [2]]) for i, n in enumerate((5, 2, 9, 1, 4))]
    parts = list(microbatches(groups, prompts=2, tokens_in_step=26, rollouts_in_step=10))
    assert [part.prompt_ids_PT.shape[0] for part in parts] == [2, 2, 1]
    assert [part.answer_ids_BT.shape[1] for part in parts] == [2, 5, 9], "like lengths together"
    held = torch.cat([part.prompt_ids_PT[:, 0] for part in parts]).tolist()
    assert sorted(held) == [1, 2, 3, 4, 5]
    assert {(part.tokens_in_step, part.rollouts_in_step) for part in parts} == {(26, 10)}
