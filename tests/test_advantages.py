"""Advantages by hand: an answer against its siblings."""

from __future__ import annotations

import pytest
import torch

from aquarl.rl.advantages import (
    ADVANTAGES,
    global_advantages,
    is_uniform,
    mean_advantages,
    rloo_advantages,
    std_advantages,
)

REWARDS_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])

EVERY = pytest.mark.parametrize("name", sorted(ADVANTAGES))


def test_mean_takes_the_groups_mean_away() -> None:
    expected = [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 0]]
    assert mean_advantages(REWARDS_PG).tolist() == expected


def test_leave_one_out_compares_with_the_siblings_alone() -> None:
    """First row: 1 - 0 for the winner, 0 - 1/3 for the others."""
    advantages = rloo_advantages(REWARDS_PG)
    torch.testing.assert_close(advantages[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    torch.testing.assert_close(advantages[1], torch.tensor([2 / 3, 2 / 3, -2 / 3, -2 / 3]))


def test_std_divides_by_the_groups_spread() -> None:
    """First row: variance (0.75^2 + 3 * 0.25^2) / 3 = 1/4, so the spread is 1/2."""
    expected = torch.tensor([1.5, -0.5, -0.5, -0.5])
    torch.testing.assert_close(std_advantages(REWARDS_PG)[0], expected, rtol=1e-5, atol=0)


def test_global_divides_by_one_spread_for_all() -> None:
    """Squares sum to 0.75 + 1; over 11 degrees of freedom."""
    spread = (1.75 / 11) ** 0.5
    expected = mean_advantages(REWARDS_PG) / spread
    torch.testing.assert_close(global_advantages(REWARDS_PG), expected, rtol=1e-5, atol=0)


@EVERY
def test_rows_sum_to_0(name: str) -> None:
    rewards_PG = torch.rand(50, 7, generator=torch.manual_seed(0))
    sums = ADVANTAGES[name](rewards_PG).sum(dim=1)
    torch.testing.assert_close(sums, torch.zeros(50), rtol=0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1.1, 1 / 3])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_a_group_of_equal_rewards_teaches_exactly_nothing(
    name: str, reward: float, size: int
) -> None:
    """0.1 seven times has a mean that is not 0.1; "exactly 0" must not depend on that."""
    rewards_PG = torch.full((3, size), reward)
    rewards_PG[0, 0] += 1
    advantages = ADVANTAGES[name](rewards_PG)
    assert advantages[1:].count_nonzero() == 0
    assert advantages[0, 0] > 0


@EVERY
def test_a_step_in_which_all_groups_are_uniform_is_all_0(name: str) -> None:
    assert ADVANTAGES[name](torch.ones(4, 5)).count_nonzero() == 0


def test_uniform_rows_are_told_from_others() -> None:
    assert is_uniform(REWARDS_PG).tolist() == [False, False, True]


@EVERY
@pytest.mark.parametrize("shape", [(3, 1), (3,), (2, 2, 2)])
def test_without_siblings_there_is_nothing_to_compare(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be \\(P, G\\) with G >= 2"):
        ADVANTAGES[name](torch.zeros(shape))
