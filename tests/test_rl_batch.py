"""Groups become one row as they were recorded."""

from __future__ import annotations

from aquarl.rl.batch import build_batch, microbatches
from tests.fakes import make_group, packed

GROUPS = [
    make_group([5, 6, 7], [[1, 2], [3]], logprob=-0.5),
    make_group([8], [[0, 0, 0, 0], [4, 0]], advantages=[0.25, -0.25]),
]


def test_a_row_holds_each_prompt_once_and_its_answers_without_their_last_token() -> None:
    batch = build_batch(packed(GROUPS), tokens_in_step=90, rollouts_in_step=40)
    assert batch.ids_N.tolist() == [5, 6, 7, 1, 8, 0, 0, 0, 4]
    assert batch.positions_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 1]
    assert batch.lengths == ((3, (1, 0)), (1, (3, 1)))
    assert batch.sampled_ids_M.tolist() == [1, 2, 3, 0, 0, 0, 0, 4, 0]
    assert batch.before_M.tolist() == [2, 3, 2, 4, 5, 6, 7, 4, 8]
    assert batch.advantages_B.tolist() == [0.5, -0.5, 0.25, -0.25]
    assert batch.behaviour_logprobs_BT[0].tolist() == [-0.5, -0.5, 0, 0]
    assert (batch.tokens_in_step, batch.rollouts_in_step) == (90, 40)


def test_what_was_sampled_is_known_from_the_record_not_from_token_values() -> None:
    """Token 0 may be sampled, too."""
    batch = build_batch(packed(GROUPS), 9, 4)
    assert batch.is_sampled_BT.sum(dim=1).tolist() == [2, 1, 4, 2]
    assert batch.is_sampled_BT[2].all()
    assert batch.is_sampled_BT[3].tolist() == [True, True, False, False]


def test_microbatches_hold_each_group_once_and_the_counts_of_the_step() -> None:
    groups = [make_group([i + 1], [[1] * n, [2]]) for i, n in enumerate((5, 2, 9, 1, 4))]
    parts = list(microbatches(packed(groups), prompts=2, tokens_in_step=26, rollouts_in_step=10))
    assert [len(part.lengths) for part in parts] == [2, 2, 1]
    assert [int(part.ids_N[0]) for part in parts] == [1, 3, 5]
    assert {(part.tokens_in_step, part.rollouts_in_step) for part in parts} == {(26, 10)}
