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
    effective_fraction,
    kl_penalty,
    policy_loss,
    truncated_weights,
    without_far_answers,
)

CONFIG = RLConfig(clip_low=0.2, clip_high=0.3, ratio_cap=2.0)
EVERY = pytest.mark.parametrize("name", sorted(LOSSES))


NO_IDS = torch.zeros(0, dtype=torch.long)
"""Losses look at log-probabilities, not at tokens."""


def loss_of(
    name: str, logprobs_BT: Tensor, batch: TrainBatch, **settings: object
) -> tuple[Tensor, dict[str, Tensor]]:
    config = CONFIG.model_copy(update={"loss": name, **settings})
    return policy_loss(logprobs_BT, batch, config)


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


MASKED = pytest.mark.parametrize("mask_ratio", [math.inf, 1.1])


@EVERY
@MASKED
def test_microbatches_sum_to_the_step(name: str, mask_ratio: float) -> None:
    logprobs_BT, batch = random_step()
    whole, plots = loss_of(name, logprobs_BT, batch, mask_ratio=mask_ratio)
    assert (plots["policy/masked_fraction"] > 0) == (mask_ratio == 1.1)
    parts = [
        loss_of(name, logprobs_BT[rows], part_of(batch, rows), mask_ratio=mask_ratio)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for key, value in plots.items():
        torch.testing.assert_close(sum(part[key] for _, part in parts), value)


@EVERY
@MASKED
@pytest.mark.parametrize("junk", [-math.inf, math.inf, math.nan, 1e30])
def test_padding_may_hold_anything(name: str, junk: float, mask_ratio: float) -> None:
    logprobs_BT, batch = random_step()
    clean = logprobs_BT.clone().requires_grad_()
    expected, expected_plots = loss_of(name, clean, batch, mask_ratio=mask_ratio)
    expected.backward()

    is_padding_BT = ~batch.is_sampled_BT
    dirty = logprobs_BT.masked_fill(is_padding_BT, junk).requires_grad_()
    behaviour_BT = batch.behaviour_logprobs_BT.masked_fill(is_padding_BT, junk)
    batch = replace(batch, behaviour_logprobs_BT=behaviour_BT)
    loss, plots = loss_of(name, dirty, batch, mask_ratio=mask_ratio)
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
    loss, plots = loss_of(name, logprobs_BT, batch)
    loss.backward()
    expected = torch.where(batch.is_sampled_BT, -batch.advantages_B[:, None], 0.0)
    if name == "gspo":
        expected = expected / torch.tensor([6, 2, 4, 1])[:, None] / 4
    else:
        expected = expected / 13
    assert logprobs_BT.grad is not None
    torch.testing.assert_close(logprobs_BT.grad, expected)
    assert plots["policy/kl_from_sampler"] == plots["policy/clipped_fraction"] == 0
    assert plots["policy/ratio_mean"] == plots["policy/ratio_square"] == 1


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
    loss, plots = loss_of("ppo", logprobs_BT, batch)
    objectives = [1.3, -1.5, 0.5, -0.8, 2.4, -1.8]
    assert loss.item() == pytest.approx(-sum(objectives) / 6)
    assert plots["policy/clipped_fraction"].item() == pytest.approx(2 / 6)
    loss.backward()
    assert logprobs_BT.grad is not None
    expected = [0, 1.5 / 6, -0.5 / 6, 0, -2.4 / 6, 1.8 / 6]
    assert logprobs_BT.grad[:, 0].tolist() == pytest.approx(expected)


def test_reinforce_weighs_by_a_ratio_that_is_cut_above() -> None:
    logprobs_BT, batch = one_token_each([0.5, 1.5, 4.0], [1.0, -2.0, 3.0])
    loss, plots = loss_of("reinforce", logprobs_BT, batch)
    loss.backward()
    assert logprobs_BT.grad is not None
    weights = [0.5, 1.5, 2.0]
    expected = [-w * a / 3 for w, a in zip(weights, [1.0, -2.0, 3.0], strict=True)]
    assert logprobs_BT.grad[:, 0].tolist() == pytest.approx(expected)
    assert plots["policy/clipped_fraction"].item() == pytest.approx(1 / 3)


def test_cispo_weighs_by_a_ratio_that_is_clipped_on_both_sides() -> None:
    logprobs_BT, batch = one_token_each([0.5, 1.1, 4.0], [1.0, -2.0, 3.0])
    loss, plots = loss_of("cispo", logprobs_BT, batch)
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
    loss, plots = loss_of("gspo", logprobs_BT, batch_of(behaviour_BT, torch.tensor([3.0, 1.0])))
    assert loss.item() == pytest.approx(-(3.0 * 1.0 + 1.3) / 2)
    loss.backward()
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad[0].tolist() == pytest.approx([-3.0 / 2 / 2] * 2)
    assert logprobs_BT.grad[1].count_nonzero() == 0
    assert plots["policy/clipped_fraction"].item() == 0.5


def test_without_correction_every_token_weighs_the_same() -> None:
    logprobs_BT, batch = one_token_each([0.5, 1.5, 4.0], [1.0, -2.0, 3.0])
    loss, plots = loss_of("reinforce", logprobs_BT, batch, correct_staleness=False)
    loss.backward()
    assert logprobs_BT.grad is not None
    assert logprobs_BT.grad[:, 0].tolist() == pytest.approx([-1 / 3, 2 / 3, -1.0])
    assert plots["policy/clipped_fraction"] == 0


def test_the_corrected_gradient_of_stale_tokens_is_the_on_policy_one() -> None:
    """Expectations over a vocabulary of three, summed up exactly in fp64.

    The sampler's chances differ from the policy's; weighing by their ratio gives the policy's own
    gradient, d/dlogits sum(p A) = p (A - sum(p A)), and a cap below the largest ratio does not.
    """
    logits_V = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    sampler_V = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    advantages_V = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def gradient(cap: float) -> Tensor:
        logprobs_V = logits_V.log_softmax(dim=0)
        weights_V = truncated_weights(logprobs_V - sampler_V.log(), cap)
        gain = (sampler_V * weights_V * advantages_V * logprobs_V).sum()
        return torch.autograd.grad(gain, logits_V)[0]

    policy_V = logits_V.detach().softmax(dim=0)
    assert (policy_V / sampler_V).max() == pytest.approx(5.314, abs=1e-3)
    expected = policy_V * (advantages_V - (policy_V * advantages_V).sum())
    torch.testing.assert_close(gradient(math.inf), expected, rtol=1e-12, atol=1e-12)
    assert (gradient(2.0) - expected).abs().max() > 0.05


def test_with_one_update_a_batch_decoupled_ppo_is_this_weight() -> None:
    """arXiv:2505.24298 section 5.2, the proximal policy being the policy before its update."""
    logprobs_BT, batch = random_step()
    ours = logprobs_BT.double().requires_grad_()
    theirs = logprobs_BT.double().requires_grad_()
    loss_of("reinforce", ours, batch, ratio_cap=math.inf)[0].backward()

    proximal_BT, advantages_B1 = theirs.detach(), batch.advantages_B[:, None]
    ratio_BT = (theirs - proximal_BT).exp()
    clipped_BT = ratio_BT.clamp(0.8, 1.3)
    surrogate_BT = torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)
    weighed_BT = (proximal_BT - batch.behaviour_logprobs_BT).exp() * surrogate_BT
    (-weighed_BT[batch.is_sampled_BT].sum() / batch.tokens_in_step).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@EVERY
def test_an_answer_far_from_the_policy_is_left_out_whole_and_the_rest_weighs_as_before(
    name: str,
) -> None:
    """Geometric means 1.4, 1/1.4, 1 and 1.1 of two tokens each; the bound is 1.3."""
    ratios_BT = torch.tensor([[1.4, 1.4], [0.5, 1 / 0.98], [4.0, 0.25], [1.1, 1.1]]).double()
    behaviour_BT = torch.full((4, 2), -1.0, dtype=torch.float64)
    batch = batch_of(behaviour_BT, torch.tensor([1.0, 2.0, -1.0, 0.5]))
    kept = without_far_answers(behaviour_BT + ratios_BT.log(), batch, 1.3)
    assert kept.is_sampled_BT.tolist() == [[False] * 2, [False] * 2, [True] * 2, [True] * 2]
    assert (kept.tokens_in_step, kept.rollouts_in_step) == (8, 4)

    all_BT = (behaviour_BT + ratios_BT.log()).requires_grad_()
    loss_of(name, all_BT, batch)[0].backward()
    some_BT = all_BT.detach().clone().requires_grad_()
    loss, plots = loss_of(name, some_BT, batch, mask_ratio=1.3)
    loss.backward()
    assert all_BT.grad is not None and some_BT.grad is not None
    assert some_BT.grad[:2].count_nonzero() == 0
    torch.testing.assert_close(some_BT.grad[2:], all_BT.grad[2:])
    assert plots["policy/masked_fraction"] == 0.5
    alone, _ = loss_of(name, some_BT[2:], part_of(batch, slice(2, 4)))
    torch.testing.assert_close(loss, alone)


def test_ratio_statistics_by_hand() -> None:
    """Ratios 1, 2 and 3 (and padding): mean 2, mean square 14/3, effective 36 / 42."""
    behaviour_BT = torch.full((2, 2), -1.0, dtype=torch.float64)
    logprobs_BT = behaviour_BT + torch.tensor([[1.0, 2.0], [3.0, 9.0]]).double().log()
    is_sampled_BT = torch.tensor([[True, True], [True, False]])
    batch = batch_of(behaviour_BT, torch.zeros(2), is_sampled_BT)
    _, plots = loss_of("reinforce", logprobs_BT, batch)
    seen = {name: value.item() for name, value in plots.items()}
    assert seen["policy/ratio_mean"] == pytest.approx(2)
    assert seen["policy/ratio_square"] == pytest.approx(14 / 3)
    assert seen["policy/clipped_fraction"] == pytest.approx(1 / 3)  # above the cap of 2
    assert seen["policy/logprob_gap"] == pytest.approx(math.log(6) / 3)
    assert seen["policy/kl_from_sampler"] == pytest.approx(1 - math.log(6) / 3)
    assert effective_fraction(2, 14 / 3) == pytest.approx(36 / 42)
    assert effective_fraction(1, 1) == 1


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
