"""Losses by hand, and what all of them promise: parts sum to the step, padding is harmless."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aquarl.config import RLConfig
from aquarl.records import TrainBatch
from aquarl.rl.losses import (
    LOSSES,
    cispo_loss,
    gspo_loss,
    kl_penalty,
    ppo_loss,
    reinforce_loss,
)

CONFIG = RLConfig(clip_low=0.2, clip_high=0.3, ratio_cap=2.0)
EVERY = pytest.mark.parametrize("name", sorted(LOSSES))


NO_IDS = torch.zeros(0, dtype=torch.long)
"""Losses look at log-probabilities, not at tokens."""


def batch_of(
    behaviour_logprobs_BT: Tensor, advantages_B: Tensor, is_sampled_BT: Tensor | None = None
) -> TrainBatch:
    if is_sampled_BT is None:
        is_sampled_BT = torch.ones_like(behaviour_logprobs_BT, dtype=torch.bool)
    return TrainBatch(
        ids_N=NO_IDS,
        positions_N=NO_IDS,
        lengths=(),
        before_M=NO_IDS,
        sampled_ids_M=NO_IDS,
        is_sampled_BT=is_sampled_BT,
        behaviour_logprobs_BT=behaviour_logprobs_BT,
        advantages_B=advantages_B,
        tokens_in_step=int(is_sampled_BT.sum()),
        rollouts_in_step=len(advantages_B),
    )


def random_step() -> tuple[Tensor, TrainBatch]:
    """Logprobs of 4 ragged answers of up to 6 tokens, some far from the sampler's."""
    generator = torch.Generator().manual_seed(0)
    is_sampled_BT = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    behaviour_BT = -2 * torch.rand(4, 6, generator=generator)
    logprobs_BT = behaviour_BT + 0.5 * torch.randn(4, 6, generator=generator)
    advantages_B = torch.tensor([0.75, -0.25, 1.5, -2.0])
    return logprobs_BT, batch_of(behaviour_BT, advantages_B, is_sampled_BT)


def part_of(batch: TrainBatch, rows: slice) -> TrainBatch:
    return replace(
        batch,
        is_sampled_BT=batch.is_sampled_BT[rows],
        behaviour_logprobs_BT=batch.behaviour_logprobs_BT[rows],
        advantages_B=batch.advantages_B[rows],
    )


@EVERY
def test_microbatches_sum_to_the_step(name: str) -> None:
    logprobs_BT, batch = random_step()
    whole, plots = LOSSES[name](logprobs_BT, batch, CONFIG)
    parts = [
        LOSSES[name](logprobs_BT[rows], part_of(batch, rows), CONFIG)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for key, value in plots.items():
        torch.testing.assert_close(sum(part[key] for _, part in parts), value)


@EVERY
@pytest.mark.parametrize("junk", [-math.inf, math.inf, math.nan, 1e30])
def test_padding_may_hold_anything(name: str, junk: float) -> None:
    logprobs_BT, batch = random_step()
    clean = logprobs_BT.clone().requires_grad_()
    expected, expected_plots = LOSSES[name](clean, batch, CONFIG)
    expected.backward()

    is_padding_BT = ~batch.is_sampled_BT
    dirty = logprobs_BT.masked_fill(is_padding_BT, junk).requires_grad_()
    behaviour_BT = batch.behaviour_logprobs_BT.masked_fill(is_padding_BT, junk)
    loss, plots = LOSSES[name](dirty, replace(batch, behaviour_logprobs_BT=behaviour_BT), CONFIG)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(plots, expected_plots)
    assert clean.grad is not None and dirty.grad is not None
    torch.testing.assert_close(dirty.grad, clean.grad)
    assert dirty.grad[is_padding_BT].count_nonzero() == 0


@EVERY
def test_on_policy_every_gradient_is_minus_advantage_a_token(name: str) -> None:
    """d loss / d logprob = -A / tokens; GSPO divides by answers and by their length instead."""
    logprobs_BT, batch = random_step()
    batch = replace(batch, behaviour_logprobs_BT=logprobs_BT.clone())
    logprobs_BT.requires_grad_()
    loss, plots = LOSSES[name](logprobs_BT, batch, CONFIG)
    loss.backward()
    expected = torch.where(batch.is_sampled_BT, -batch.advantages_B[:, None], 0.0)
    if name == "gspo":
        expected = expected / torch.tensor([6, 2, 4, 1])[:, None] / 4
    else:
        expected = expected / 13
    assert logprobs_BT.grad is not None
    torch.testing.assert_close(logprobs_BT.grad, expected)
    assert plots["policy/kl_from_sampler"] == plots["policy/clipped_fraction"] == 0


def one_token_each(ratios: list[float], advantages: list[float]) -> tuple[Tensor, TrainBatch]:
    """Answers of one token, each with this ratio of the policy's chance to the sampler's."""
    behaviour_BT = torch.full((len(ratios), 1), -1.0)
    logprobs_BT = behaviour_BT + torch.tensor(ratios).log()[:, None]
    return logprobs_BT.requires_grad_(), batch_of(behaviour_BT, torch.tensor(advantages))


def test_ppo_clips_as_by_hand() -> None:
    """Bounds 0.8 and 1.3: a gain is cut where the ratio has moved far enough its way."""
    ratios = [1.5, 1.5, 0.5, 0.5, 1.2, 0.9]
    advantages = [1.0, -1.0, 1.0, -1.0, 2.0, -2.0]
    logprobs_BT, batch = one_token_each(ratios, advantages)
    loss, plots = ppo_loss(logprobs_BT, batch, CONFIG)
    objectives = [1.3, -1.5, 0.5, -0.8, 2.4, -1.8]
    assert loss.item() == pytest.approx(-sum(objectives) / 6)
    assert plots["policy/clipped_fraction"].item() == pytest.approx(2 / 6)
    loss.backward()
    assert logprobs_BT.grad is not None
    expected = [0, 1.5 / 6, -0.5 / 6, 0, -2.4 / 6, 1.8 / 6]
    assert logprobs_BT.grad[:, 0].tolist() == pytest.approx(expected)


def test_reinforce_weighs_by_a_ratio_that_is_cut_above() -> None:
    logprobs_BT, batch = one_token_each([0.5, 1.5, 4.0], [1.0, -2.0, 3.0])
    loss, plots = reinforce_loss(logprobs_BT, batch, CONFIG)
    loss.backward()
    assert logprobs_BT.grad is not None
    weights = [0.5, 1.5, 2.0]
    expected = [-w * a / 3 for w, a in zip(weights, [1.0, -2.0, 3.0], strict=True)]
    assert logprobs_BT.grad[:, 0].tolist() == pytest.approx(expected)
    assert plots["policy/clipped_fraction"].item() == pytest.approx(1 / 3)


def test_cispo_weighs_by_a_ratio_that_is_clipped_on_both_sides() -> None:
    logprobs_BT, batch = one_token_each([0.5, 1.1, 4.0], [1.0, -2.0, 3.0])
    loss, plots = cispo_loss(logprobs_BT, batch, CONFIG)
    loss.backward()
    assert logprobs_BT.grad is not None
    expected = [-0.8 / 3, 1.1 * 2 / 3, -1.3 * 3 / 3]
    assert logprobs_BT.grad[:, 0].tolist() == pytest.approx(expected)
    assert plots["policy/clipped_fraction"].item() == pytest.approx(2 / 3)


def test_gspo_has_one_ratio_an_answer_the_geometric_mean_of_its_tokens() -> None:
    """Ratios 2 and 0.5 of one answer cancel; 1.5 and 1.5 are clipped to 1.3."""
    behaviour_BT = torch.full((2, 2), -1.0)
    ratios_BT = torch.tensor([[2.0, 0.5], [1.5, 1.5]])
    logprobs_BT = (behaviour_BT + ratios_BT.log()).requires_grad_()
    loss, plots = gspo_loss(logprobs_BT, batch_of(behaviour_BT, torch.tensor([3.0, 1.0])), CONFIG)
    assert loss.item() == pytest.approx(-(3.0 * 1.0 + 1.3) / 2)
    loss.backward()
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad[0].tolist() == pytest.approx([-3.0 / 2 / 2] * 2)
    assert logprobs_BT.grad[1].count_nonzero() == 0
    assert plots["policy/clipped_fraction"].item() == 0.5


def test_kl_is_never_negative_and_0_where_the_policies_agree() -> None:
    logprobs_BT, batch = random_step()
    assert kl_penalty(logprobs_BT, logprobs_BT.clone(), batch) == 0
    for shift in (-1.0, -0.01, 0.01, 1.0):
        assert kl_penalty(logprobs_BT, logprobs_BT + shift, batch) > 0
    junk_BT = logprobs_BT.masked_fill(~batch.is_sampled_BT, -math.inf)
    assert kl_penalty(logprobs_BT, junk_BT, batch) == 0


def test_kl_as_by_hand_and_its_gradient_pulls_towards_the_reference() -> None:
    logprobs_BT, batch = one_token_each([1.0], [0.0])
    penalty = kl_penalty(logprobs_BT, torch.tensor([[-1.0 + math.log(2)]]), batch)
    assert penalty.item() == pytest.approx(2 - 1 - math.log(2))
    penalty.backward()
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad.item() == pytest.approx(1 - 2)  # d/dx (e^(r-x) - 1 - r + x)


def test_kl_estimated_from_samples_is_the_true_one() -> None:
    """k3 is unbiased when the tokens come from the policy itself."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    ids = torch.multinomial(policy, 40_000, replacement=True, generator=torch.manual_seed(0))
    logprobs_BT = policy.log()[ids][None]
    estimate = kl_penalty(
        logprobs_BT, reference.log()[ids][None], batch_of(logprobs_BT, torch.zeros(1))
    )
    exact = float((policy * (policy / reference).log()).sum())
    assert estimate.item() == pytest.approx(exact, rel=0.03)
