"""Tensors that keep their shapes give the tokens of those that do not."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from aquarl.engines import kernels
from aquarl.engines.graphs import Form
from aquarl.engines.torch_engine import TorchSampler
from aquarl.model.flat_weights import flatten
from aquarl.records import Rollout, Sampling, Weights
from tests.fakes import random_model
from tests.test_torch_engine import STOP, VOCAB, assert_same, policy, prompts, seeds

NEW = 5
"""Few: an interpreted kernel takes a CPU some 30 ms a row, token, head and layer."""
FEW_HEADS = {"heads": 2, "kv_heads": 1}
SAMPLINGS: list[tuple[Sampling, dict[str, int]]] = [
    (Sampling(NEW), {}),
    (Sampling(NEW, temperature=0.0), {"layers": 1, **FEW_HEADS}),
    (Sampling(NEW, 0.7, top_k=5), {"layers": 1, **FEW_HEADS}),
]


def assert_all_same(ours: list[list[Rollout]], theirs: list[list[Rollout]]) -> None:
    for row, expected in zip(ours, theirs, strict=True):
        assert_same(row, expected)


@pytest.mark.parametrize(("sampling", "shape"), SAMPLINGS, ids=["sampled", "greedy", "top k"])
def test_static_tensors_give_the_same_tokens(
    sampling: Sampling, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "KEYS_AT_ONCE", 4)  # so that there are several times to look
    static, usual = (TorchSampler(policy(**shape), STOP, is_static=x) for x in (True, False))
    for lengths in ((4,), (1, 9), (3,)):  # the third into the places of the first
        asked, drawn = prompts(lengths), seeds(len(lengths), 2)
        found = static.sample(asked, drawn, sampling)
        assert_all_same(found, usual.sample(asked, drawn, sampling))
    assert static.sample(asked, drawn, sampling) == found, "nothing is left behind"


def test_new_weights_come_into_the_places_of_the_old_ones() -> None:
    samplers = [TorchSampler(policy(**FEW_HEADS), STOP, is_static=x) for x in (True, False)]
    asked, drawn = prompts((4,)), seeds(1, 2)
    before, after = [], []
    for sampler in samplers:
        before.append(sampler.sample(asked, drawn, Sampling(NEW)))
        sampler.load_weights(flatten(policy(seed=1, **FEW_HEADS), version=1))
        after.append(sampler.sample(asked, drawn, Sampling(NEW)))
    assert before[0] != after[0]
    assert_all_same(*after)


def test_heads_of_any_even_width_and_shared_keys_are_the_same() -> None:
    model = random_model(VOCAB, width=24, heads=2, kv_heads=1, context=16)
    static, usual = (TorchSampler(deepcopy(model), STOP, is_static=x) for x in (True, False))
    asked, drawn = prompts((4, 9)), seeds(2, 2)
    expected = usual.sample(asked, drawn, Sampling(NEW))
    assert_all_same(static.sample(asked, drawn, Sampling(NEW)), expected)


def test_a_prompt_may_be_as_long_as_the_positions_go() -> None:
    """Ten contexts of 16, which is no power of two; a shorter one beside it is not harmed."""
    model = random_model(VOCAB, layers=1, width=16, heads=1, kv_heads=1, context=16)
    static, usual = (TorchSampler(deepcopy(model), STOP, is_static=x) for x in (True, False))
    asked, drawn = prompts((159, 3)), seeds(2, 1)
    expected = usual.sample(asked, drawn, Sampling(1))
    assert_all_same(static.sample(asked, drawn, Sampling(1)), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_weights_may_change_inside_a_generation(temperature: float) -> None:
    found, newest = [], flatten(policy(seed=1, **FEW_HEADS), version=1)
    for is_static in (True, False):
        sampler = TorchSampler(policy(**FEW_HEADS), STOP, is_static=is_static)
        asked: list[int] = []

        def newer(asked: list[int] = asked) -> Weights | None:
            asked.append(1)
            return newest if len(asked) == 3 else None

        sampler.newer_weights = newer
        found.append(sampler.sample(prompts((4, 9)), seeds(2, 2), Sampling(NEW, temperature)))
    assert any(rollout.versions for row in found[0] for rollout in row)
    assert_all_same(*found)
    assert [[r.versions for r in row] for row in found[0]] == [
        [r.versions for r in row] for row in found[1]
    ]


def test_forms_are_few() -> None:
    """Prompts to a power of two, and one recording for prompts of all lengths."""
    assert Form.holding(5, 3, Sampling(7)) == (8, 3, Sampling(7))
    assert Form.holding(1, 3, Sampling(7)) == (1, 3, Sampling(7))
    sampler = TorchSampler(policy(), STOP, is_static=True)
    seen = []
    for length in (4, 9, 70, 4):
        sampler.sample(prompts((length,)), seeds(1, 1), Sampling(1))
        [static] = sampler._static.values()
        seen.append((static.length, static))
    assert [length for length, _ in seen] == [64, 64, 128, 128]
    assert seen[0][1] is seen[1][1] and seen[2][1] is seen[3][1]


@pytest.mark.gpu
def test_what_is_recorded_gives_what_is_computed_anew() -> None:
    sampler = TorchSampler(policy(), STOP, "cuda", torch.float32)
    usual = TorchSampler(policy(), STOP, "cuda", torch.float32, is_static=False)
    for seed in (0, 1):
        weights = flatten(policy(seed=seed), version=seed)
        for each in (sampler, usual):
            each.load_weights(weights)
        found = sampler.sample(prompts(), seeds(), Sampling(NEW))
        assert_all_same(found, usual.sample(prompts(), seeds(), Sampling(NEW)))
