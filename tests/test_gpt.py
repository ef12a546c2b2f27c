"""The model is nanochat's: its init, its rotation, its cap, its names."""

from __future__ import annotations

import math

import torch

from aquarl.config import ModelConfig
from aquarl.model.gpt import GPT, SOFT_CAP, interleaved, norm, rotary_turns, rotate
from aquarl.model.shape import Shape
from tests.fakes import random_ids, random_model


def nanochat_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """nanochat/gpt.py, `apply_rotary_emb`, October 2025."""
    d = x.shape[3] // 2
    x1, x2 = x[..., :d], x[..., d:]
    y1 = x1 * cos + x2 * sin
    y2 = x1 * (-sin) + x2 * cos
    return torch.cat([y1, y2], 3)


def test_rotation_is_nanochats() -> None:
    x_BHTK = torch.randn(2, 3, 5, 8, generator=torch.manual_seed(0))
    turns = rotary_turns(5, 8)
    expected = nanochat_rotary(x_BHTK, turns[..., 0], -turns[..., 1])
    found = rotate(pairs_of(x_BHTK), torch.view_as_complex(turns))
    torch.testing.assert_close(found, pairs_of(expected))


def pairs_of(x: torch.Tensor) -> torch.Tensor:
    """Interleave the halves of each head."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def test_interleaved_rows_give_interleaved_heads() -> None:
    generator = torch.manual_seed(0)
    x, weight_XD = torch.randn(3, 6, generator=generator), torch.randn(16, 6, generator=generator)
    heads = (x @ weight_XD.T).view(3, 2, 8)
    found = (x @ interleaved(weight_XD, 8).T).view(3, 2, 8)
    torch.testing.assert_close(found, pairs_of(heads))


def test_rotation_turns_by_minus_theta() -> None:
    """By hand: the first pair of a head of 4 at position 1 turns by one radian, clockwise."""
    turns = torch.view_as_complex(rotary_turns(2, 4))
    unit = torch.zeros(1, 1, 2, 4)
    unit[..., 0] = 1.0
    turned = rotate(unit, turns)[0, 0]
    assert turned[0].tolist() == [1, 0, 0, 0]
    expected = torch.tensor([math.cos(1.0), -math.sin(1.0), 0.0, 0.0])
    torch.testing.assert_close(turned[1], expected)


def test_frequencies_fall_from_1_to_almost_a_ten_thousandth() -> None:
    angles = rotary_turns(2, 8)[1, :, 0].acos()
    torch.testing.assert_close(angles, torch.tensor([1.0, 0.1, 0.01, 0.001]), rtol=1e-2, atol=1e-4)


def test_logits_are_capped_softly_at_15() -> None:
    model = random_model()
    hidden = torch.randn(4, 32, generator=torch.manual_seed(0)) * 1_000
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= SOFT_CAP == 15.0
    small = model.logits(hidden * 1e-6)
    torch.testing.assert_close(small, model.lm_head(hidden * 1e-6), rtol=1e-4, atol=1e-7)


def test_norm_has_no_parameters_and_gives_unit_mean_square() -> None:
    x = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(norm(x), x / math.sqrt(12.5))


def test_fresh_weights_follow_nanochats_rules() -> None:
    model = GPT(Shape(512, layers=2, width=128, heads=4, kv_heads=2, context=16)).init_weights(0)
    state = model.state_dict()
    assert state["lm_head.weight"].count_nonzero() == 0
    for name, weight in state.items():
        if name.endswith("c_proj.weight"):
            assert weight.count_nonzero() == 0, name
    # std = min(1, sqrt(out / in)) / sqrt(in), by hand for each kind of matrix
    expected = {
        "transformer.wte.weight": 1.0,
        "transformer.h.0.attn.c_q.weight": 1 / math.sqrt(128),
        "transformer.h.1.attn.c_k.weight": math.sqrt(64 / 128) / math.sqrt(128),
        "transformer.h.1.mlp.c_fc.weight": 1 / math.sqrt(128),
    }
    for name, std in expected.items():
        assert abs(state[name].std() / std - 1) < 0.03, name
        assert abs(state[name].mean()) < 0.03 * std * 5, name


def test_the_seed_alone_decides_fresh_weights() -> None:
    shape = Shape(64, layers=1, width=32, heads=2, kv_heads=2, context=8)
    torch.manual_seed(1)
    first = GPT(shape).init_weights(5).state_dict()
    torch.manual_seed(2)
    torch.testing.assert_close(GPT(shape).init_weights(5).state_dict(), first, rtol=0, atol=0)
    other = GPT(shape).init_weights(6).state_dict()
    assert not torch.equal(other["transformer.wte.weight"], first["transformer.wte.weight"])


def test_a_fresh_model_finds_every_token_equally_likely() -> None:
    model = GPT(Shape(64, layers=2, width=32, heads=2, kv_heads=2, context=8)).init_weights(0)
    logprobs = model.logits(model(random_ids((2, 5)))).log_softmax(dim=-1)
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(64)))


def test_parameter_names_are_nanochats() -> None:
    names = set(random_model(layers=1).state_dict())
    block = "transformer.h.0"
    assert names == {
        "transformer.wte.weight",
        *(f"{block}.attn.{m}.weight" for m in ("c_q", "c_k", "c_v", "c_proj")),
        *(f"{block}.mlp.{m}.weight" for m in ("c_fc", "c_proj")),
        "lm_head.weight",
    }


def test_positions_given_equal_positions_counted() -> None:
    model, ids_BT = random_model(), random_ids((2, 6))
    positions_BT = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(model(ids_BT), model(ids_BT, positions_BT=positions_BT))


def test_only_distances_between_positions_matter() -> None:
    model, ids_BT = random_model().double(), random_ids((1, 6))
    near, far = (model(ids_BT, positions_BT=torch.arange(6)[None] + start) for start in (0, 37))
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)  # the tables are fp32


def test_parameters_and_flops_are_counted_as_by_hand() -> None:
    shape = Shape.of(ModelConfig(depth=2, width=128, heads=1, context=256), vocab=512)
    counts = GPT(shape).count()
    matrices = 2 * (4 * 128 * 128 + 8 * 128 * 128) + 512 * 128
    assert counts["parameters"] == matrices + 512 * 128
    assert counts["flops_per_token"] == 6 * matrices + 12 * 2 * 128 * 256
    assert counts["head_flops_per_token"] == 6 * 512 * 128
