"""Groups in one row are computed as if each answer stood alone behind its own prompt."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import aquarl.model.packed as packing
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
    packed = Packed(lengths, ids.device, model.shape.head_width)
    order = packed.order_N()
    order = torch.arange(len(ids)) if order is None else order
    hidden_1ND = model(ids[None, order], packed, torch.cat(places)[None, order])
    return hidden_1ND[0, order.argsort()]


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


def flash_forward(  # what the operator of this name is to compute, which CPUs do not have
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    y, logsum = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for here, there in spans(q_starts, k_starts):
        scores = masked(torch.einsum("nhk,mhk->hnm", q[here], k[there]) * scale(q), rest[3])
        logsum[:, here] = scores.logsumexp(dim=2)
        y[here] = torch.einsum("hnm,mhk->nhk", scores.softmax(dim=2), v[there])
    nothing = q.new_empty(0)
    return y, logsum, nothing, nothing, nothing


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsum: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for here, there in spans(rest[0], rest[1]):
        scores = masked(torch.einsum("nhk,mhk->hnm", q[here], k[there]) * scale(q), rest[5])
        weights = (scores - logsum[:, here, None]).exp()
        shared = (grad[here] * y[here]).sum(dim=2).T[:, :, None]
        slopes = torch.einsum("nhk,mhk->hnm", grad[here], v[there]).sub(shared).mul(weights)
        grads[0][here] += torch.einsum("hnm,mhk->nhk", slopes, k[there]) * scale(q)
        grads[1][there] += torch.einsum("hnm,nhk->mhk", slopes, q[here]) * scale(q)
        grads[2][there] += torch.einsum("hnm,nhk->mhk", weights, grad[here])
    return tuple(grads)


def spans(q_starts: Tensor, k_starts: Tensor) -> list[tuple[slice, slice]]:
    ends = [[slice(*pair) for pair in pairwise(x.tolist())] for x in (q_starts, k_starts)]
    return [(a, b) for a, b in zip(*ends, strict=True) if a.stop > a.start]


def masked(scores: Tensor, is_causal: bool) -> Tensor:
    future = torch.ones(scores.shape[1:]).triu(1).bool()
    return scores.masked_fill(future, float("-inf")) if is_causal else scores


def scale(q: Tensor) -> float:
    return float(q.shape[2] ** -0.5)


@HEADS
@SHAPES
def test_flash_attention_in_three_parts_is_the_same(
    lengths: tuple[tuple[int, tuple[int, ...]], ...],
    heads: int,
    kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's way, on a CPU: the operator is replaced by what it is defined to be. That the real
    one does so is for `gpu_check.py`."""
    groups = groups_of(lengths)
    found = []
    with torch.library._scoped_library("aten", "IMPL") as operators:
        operators.impl("_flash_attention_forward", flash_forward, "CPU")
        operators.impl("_flash_attention_backward", flash_backward, "CPU")
        for is_flash in (True, False):
            monkeypatch.setattr(packing, "is_for_flash", lambda *_, is_flash=is_flash: is_flash)
            model = random_model(heads=heads, kv_heads=kv_heads).double()
            hidden_ND = packed(model, groups)
            weights_ND = torch.randn(hidden_ND.shape, generator=torch.manual_seed(1)).double()
            (hidden_ND * weights_ND).sum().backward()
            found.append([hidden_ND, *(p.grad for p in model.transformer.parameters())])
    for flash, usual in zip(*found, strict=True):
        torch.testing.assert_close(flash, usual)
