"""Groups in one row are computed as if each answer stood alone behind its own prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquarl.model.gpt import GPT
from aquarl.model.packed import Packed
from tests.fakes import random_ids, random_model

HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
EVEN = ((5, (4, 4, 4)), (1, (4, 4, 4)))
RAGGED = ((5, (3, 0, 6)), (1, (1, 1, 1)), (7, (2, 5, 1)), (3, (0, 0, 0)))
SHAPES = pytest.mark.parametrize("lengths", [EVEN, RAGGED])

Groups = list[tuple[Tensor, list[Tensor]]]


def groups_of(lengths: tuple[tuple[int, tuple[int, ...]], ...]) -> Groups:
    return [
        (random_ids((L,), seed=L), [random_ids((n,), seed=90 * L + g) for g, n in enumerate(ns)])
        for L, ns in lengths
    ]


def alone(model: GPT, groups: Groups) -> Tensor:
    """Hidden states of all tokens in the packed order, each answer computed with its prompt."""
    parts = []
    for prompt, answers in groups:
        parts.append(model(prompt[None])[0])
        parts += [model(torch.cat([prompt, a])[None])[0, len(prompt) :] for a in answers]
    return torch.cat(parts)


def packed(model: GPT, groups: Groups) -> Tensor:
    lengths = [(len(prompt), tuple(map(len, answers))) for prompt, answers in groups]
    ids = torch.cat([torch.cat([prompt, *answers]) for prompt, answers in groups])
    places = [
        torch.cat(
            [torch.arange(len(prompt)), *(len(prompt) + torch.arange(len(a)) for a in answers)]
        )
        for prompt, answers in groups
    ]
    return model(ids[None], Packed(lengths, ids.device), torch.cat(places)[None])[0]


@HEADS
@SHAPES
def test_hidden_states_and_gradients_are_those_of_plain_rows(
    lengths: tuple[tuple[int, tuple[int, ...]], ...], heads: int, kv_heads: int
) -> None:
    groups = groups_of(lengths)
    found = []
    for hidden_of in (packed, alone):
        model = random_model(heads=heads, kv_heads=kv_heads).double()
        hidden_ND = hidden_of(model, groups)
        weights_ND = torch.randn(hidden_ND.shape, generator=torch.manual_seed(1)).double()
        (hidden_ND * weights_ND).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert "transformer.wte.weight" in grads
        found.append((hidden_ND, grads))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@SHAPES
def test_in_bf16_it_is_near(lengths: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
    groups = groups_of(lengths)
    rounded, exact = (
        packed(random_model().in_precision(torch.bfloat16), groups),
        packed(random_model(), groups),
    )
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.05
    rounded.float().sum().backward()
