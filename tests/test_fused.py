"""A GPU's kernels between the products, interpreted, give what a CPU's operations give."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from aquarl.model import fused, gpt
from aquarl.model.packed import Packed
from tests.fakes import random_ids, random_model

SHAPES = [  # heads of width 8, of 12 where a power of two has more room, and shared keys
    {"width": 32, "heads": 4, "kv_heads": 4},
    {"width": 24, "heads": 2, "kv_heads": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_and_gradients_are_the_same(
    shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "AT_ONCE", 64)  # so that there are several programs, the last ragged

    def found(kernels: ModuleType | None, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setattr(gpt, "kernels_for", lambda x: kernels)
        model = random_model(**shape)
        ids_BT = random_ids((2, 5))
        packed = Packed([(4, (3, 0)), (1, (2, 2))], ids_BT.device, model.shape.head_width)
        ids_1N, places_1N = random_ids((1, 12), seed=1), (torch.arange(12) % 7)[None]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            rows_BTD = model(ids_BT)
            packed_1ND = model(ids_1N, packed, places_1N)
        hidden_ND = torch.cat([rows_BTD.flatten(0, 1), packed_1ND[0]]).float()
        weights_ND = torch.randn(hidden_ND.shape, generator=torch.manual_seed(1))
        (hidden_ND * weights_ND).sum().backward()
        grads = [p.grad for p in model.transformer.parameters() if p.grad is not None]
        return [hidden_ND.detach(), *grads]

    exact = found(None, torch.float32)
    assert len(exact) == 1 + 6 * 2 + 1, "of two layers' matrices and the embedding"
    torch.testing.assert_close(found(fused, torch.float32), exact, rtol=1e-4, atol=1e-5)
    rounded = zip(found(fused, torch.bfloat16), found(None, torch.bfloat16), exact, strict=True)
    for ours, usual, theirs in rounded:
        off, usually_off = ((x - theirs).norm() / theirs.norm() for x in (ours, usual))
        assert off < 1.5 * usually_off, "in bf16 they are as near the truth as others are"
