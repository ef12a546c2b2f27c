"""Updates are torch's own within rounding, and rates are what a hand would compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aquarl.config import OptimConfig
from aquarl.errors import DivergedError
from aquarl.model.optim import Muon, Optimizer, clip_gradients, finite, lr_at, orthogonalise
from tests.fakes import random_ids, random_model

SHAPES = ((32, 32), (32, 32), (128, 32), (32, 128), (16, 32))


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_muon_updates_as_torchs_muon_within_bf16_rounding() -> None:
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, lr=0.02)
    torchs = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):  # the momentum counts from the second step on
        before = [p.detach().clone() for p in ours]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
        for a, b, start in zip(ours, theirs, before, strict=True):
            update = (a - start).norm()
            assert update > 0.02
            assert (a - b).norm() < 0.03 * update, a.shape
            b.data.copy_(a.data)  # judge each step by itself


def test_orthogonalised_matrices_have_singular_values_near_1() -> None:
    for shape in ((8, 8), (32, 8), (8, 32)):
        x = torch.randn(2, *shape, generator=torch.manual_seed(3))
        values = torch.linalg.svdvals(orthogonalise(x))
        assert values.shape == (2, 8)
        assert values.min() > 0.4 and values.max() < 1.3, shape


def test_orthogonalising_keeps_the_singular_directions() -> None:
    x = torch.randn(1, 6, 10, generator=torch.manual_seed(4))
    u, _, vh = torch.linalg.svd(x[0], full_matrices=False)
    inner = u.T @ orthogonalise(x)[0] @ vh.T
    torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=1e-4)
    assert (inner.diag() > 0).all()


def test_a_matrix_without_gradient_stays() -> None:
    still, moving = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moving.grad = torch.eye(4)
    Muon([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(4, 4))
    assert not torch.equal(moving, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (79, 1.0), (80, 1.0), (90, 0.6), (99, 0.24)],
)
def test_the_rate_rises_stays_and_falls_as_by_hand(step: int, expected: float) -> None:
    """100 steps, 10 rising, 20 falling from 1 to 0.2: at 90 half is left, 0.5 + 0.5 * 0.2."""
    config = OptimConfig(warmup=0.1, warmdown=0.2, final_lr=0.2)
    assert lr_at(step, 100, config) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 30, 101])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("warmdown", [0.0, 0.2, 1.0])
def test_the_rate_is_never_0_and_never_above_its_peak(
    steps: int, warmup: float, warmdown: float
) -> None:
    config = OptimConfig(warmup=warmup, warmdown=warmdown)
    rates = [lr_at(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates), rates


def peaks(optimizer: Optimizer) -> list[float]:
    return [g["peak_lr"] for o in optimizer._all for g in o.param_groups]


def test_rates_are_scaled_by_width_as_in_nanochat() -> None:
    config = OptimConfig(unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02, lr_scale=0.5)
    model = random_model(width=192, heads=2, kv_heads=2)
    # (192 / 768)^-1/2 = 2, then lr_scale on everything; the matrices' rate knows no width.
    assert peaks(Optimizer(model, config)) == pytest.approx([0.004, 0.2, 0.01])
    adamw = config.model_copy(update={"optimizer": "adamw"})
    assert peaks(Optimizer(model, adamw)) == pytest.approx([0.004, 0.2, 0.01])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_weight_is_in_exactly_one_group(kind: str) -> None:
    model = random_model()
    optimizer = Optimizer(model, OptimConfig(optimizer=kind))
    held = [id(p) for o in optimizer._all for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_a_step_uses_the_fraction_of_the_peak_and_forgets_the_gradients() -> None:
    """AdamW's first step moves every weight with a gradient by its rate, whatever the gradient."""
    model = random_model(width=192, heads=2, kv_heads=2)
    optimizer = Optimizer(model, OptimConfig(unembedding_lr=0.004))
    before = model.lm_head.weight.detach().clone()
    model.logits(model(random_ids((2, 8)))).square().sum().backward()
    optimizer.step(lr=0.25, step=0)
    moved = (model.lm_head.weight - before).abs()
    torch.testing.assert_close(
        moved, torch.full_like(moved, 0.25 * 0.004 * 2), rtol=0.01, atol=1e-6
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.85), (150, 0.90), (300, 0.95), (999, 0.95)])
def test_muons_momentum_rises_over_300_steps(step: int, momentum: float) -> None:
    model = random_model()
    optimizer = Optimizer(model, OptimConfig())
    model(random_ids((1, 4))).sum().backward()
    optimizer.step(lr=1.0, step=step)
    assert optimizer.muon is not None
    assert optimizer.muon.param_groups[0]["momentum"] == pytest.approx(momentum)


def test_clipping_scales_the_joint_norm_and_tells_what_it_was() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(clip_gradients(layer, max_norm=1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert float(clip_gradients(layer, max_norm=10.0)) == pytest.approx(1.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_a_gradient_that_is_no_number_ends_training() -> None:
    assert finite(torch.tensor(0.5), 3) == 0.5
    for norm in (float("nan"), float("inf")):
        with pytest.raises(DivergedError, match=r"step 3 is (nan|inf).*halve the stage's lr_scale"):
            finite(torch.tensor(norm), 3)
