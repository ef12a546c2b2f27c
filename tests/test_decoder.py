"""Decoding computes what the model computes over whole rows, in fp64 where little can hide.

To 1e-6: the model normalises after turning, decoding before, and cos^2 + sin^2 of the fp32 tables
is 1 to 1e-7 only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aquarl.engines.decoder import Answers, Decoder, Decoding, PlainDecoding, begin
from aquarl.model.attention import Prefix
from aquarl.model.gpt import GPT
from tests.fakes import random_ids, random_model

HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
G, T = 3, 21
TOGETHER = ((5, 1), (7, 7, 2))
"""Lengths of the prompts of two prefixes."""


def prompts() -> list[Tensor]:
    return [random_ids((n,), seed=10 * i + n) for i, ns in enumerate(TOGETHER) for n in ns]


Way = Callable[..., Answers]
WAYS = pytest.mark.parametrize("way", [Decoding, PlainDecoding])


def begun(model: GPT, way: Way) -> Answers:
    prefixes, rest = [], prompts()
    for lengths in TOGETHER:
        ids_PT = torch.full((len(lengths), max(lengths)), 63)  # what stands on padding is nothing
        for row, n in zip(ids_PT, lengths, strict=True):
            row[:n] = rest.pop(0)
        prefixes.append(Prefix(torch.tensor(lengths)))
        model(ids_PT, prefixes[-1])
    return way(Decoder(model), prefixes, G, room=T)


def whole_rows(model: GPT, answers_BT: Tensor) -> Tensor:
    """Hidden states (B, T, D) of the answers, each row computed alone with its own prompt."""
    found = prompts()
    rows = [torch.cat([found[b // G], answer]) for b, answer in enumerate(answers_BT)]
    return torch.stack([model(row[None])[0, -T:] for row in rows])


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@HEADS
@WAYS
@torch.inference_mode()
def test_a_step_is_the_model_over_whole_rows(heads: int, kv_heads: int, way: Way) -> None:
    model = random_model(heads=heads, kv_heads=kv_heads).double()
    answers_BT = random_ids((5 * G, T), seed=99)
    answers = begun(model, way)
    steps = torch.stack([answers.step(ids_B) for ids_B in answers_BT.T], dim=1)
    assert_near(steps, whole_rows(model, answers_BT))


@WAYS
@torch.inference_mode()
def test_dropping_rows_leaves_those_that_stay_as_they_were(way: Way) -> None:
    model = random_model(heads=4, kv_heads=2).double()
    answers_BT = random_ids((5 * G, T), seed=99)
    expected, answers = whole_rows(model, answers_BT), begun(model, way)
    for ids_B in answers_BT.T[:4]:
        answers.step(ids_B)
    # Of the first prefix one prompt stays, of the second two; then the first goes as a whole.
    answers.keep(torch.tensor([1, 2, 4]), torch.tensor([[2, 0], [0, 1], [1, 2]]))
    rows = torch.tensor([5, 3, 6, 7, 13, 14])
    assert_near(answers.step(answers_BT[rows, 4]), expected[rows, 4])
    answers.keep(torch.tensor([1, 2]), torch.tensor([[1], [0]]))
    rows = torch.tensor([7, 13])
    for t in range(5, T):
        found = answers.step(answers_BT[rows, t])
        assert_near(found, expected[rows, t])


@torch.inference_mode()
def test_a_policy_in_bf16_decodes_in_bf16() -> None:
    ids_B = random_ids((5 * G,), seed=1)
    policies = random_model().in_precision(torch.bfloat16), random_model()
    assert isinstance(begun(policies[1], begin), Decoding)
    rounded, exact = (begun(policy, begin).step(ids_B) for policy in policies)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.05
