"""Compiled loops compute what torch does, whoever shares their rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numba
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

from aquarl.model import fused_cpu, gpt, head, loops, modes
from aquarl.model.gpt import GPT
from aquarl.model.head import token_logprobs
from aquarl.model.packed import Packed
from aquarl.model.shape import Shape
from tests.fakes import random_ids, random_model

SHAPES = [  # heads of width 8, of 12, and shared keys
    {"width": 32, "heads": 4, "kv_heads": 4},
    {"width": 24, "heads": 2, "kv_heads": 1},
]


@numba.njit  # not kept on disk, where it would outlive a change of what it calls
def _exponentials(first: int, stop: int, x: Any, found: Any, sigmoids: Any) -> None:
    for i in range(first, stop):
        found[i] = loops.exp(x[i])
        sigmoids[i] = loops.sigmoid(x[i])


@pytest.fixture(params=[1, 3], ids=["one thread", "three"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_exponentials_are_exact_to_rounding() -> None:
    x = torch.linspace(-85, 85, 100_001)
    found, sigmoids = torch.empty_like(x), torch.empty_like(x)
    loops.over_rows(_exponentials, len(x), x, found, sigmoids)
    torch.testing.assert_close(found.double(), x.double().exp(), rtol=2.5e-7, atol=0)
    torch.testing.assert_close(sigmoids.double(), x.double().sigmoid(), rtol=0, atol=1.5e-7)


def test_what_is_no_number_stays_none() -> None:
    """A policy that diverges is to be seen, not mended."""
    x = torch.tensor([float("nan"), float("inf")])
    found, sigmoids = torch.empty_like(x), torch.empty_like(x)
    loops.over_rows(_exponentials, 1, x, found, sigmoids)
    assert found[0].isnan() and sigmoids[0].isnan()


def test_a_loop_is_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def nowhere(*given: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*given, **options)

    monkeypatch.setattr(numba, "njit", nowhere)
    count = torch.zeros(3, 1)
    loops.over_rows(loops.compiled(_count), 3, count)
    assert count.all()


def test_threads_share_all_rows_and_take_none_twice(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "NUMBERS_A_THREAD", 1)
    count = torch.zeros(7, 1)
    loops.over_rows(loops.compiled(_count), 7, count)
    assert count.flatten().tolist() == [1.0] * 7


def _count(first: int, stop: int, count: Any) -> None:
    for n in range(first, stop):
        count[n, 0] += np.float32(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_states_logprobs_and_gradients_are_those_of_torchs_operations(
    shape: dict[str, int], dtype: torch.dtype, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "NUMBERS_A_THREAD", 1)
    model = random_model(**shape).to(dtype)
    with_loops = _taken(model)
    for module in (gpt, head):
        monkeypatch.setattr(module, "kernels_for", lambda x: None)
    monkeypatch.setattr(head, "has_loops", lambda x: False)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-6, 1e-7)
    wanted = _taken(model)
    assert len(wanted) == 3 + 6 * 2 + 2, "two layers' matrices, the embedding, the head"
    for ours, theirs in zip(with_loops, wanted, strict=True):
        assert theirs.any() and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def _taken(model: GPT) -> list[Tensor]:
    """Return hidden states, log-probabilities and entropies of rows of both kinds, and all
    gradients."""
    model.zero_grad()
    packed = Packed([(4, (3, 0)), (1, (2, 2))], torch.device("cpu"), model.shape.head_width)
    ids_1N, places_1N = random_ids((1, 12), seed=1), (torch.arange(12) % 7)[None]
    rows_BTD, packed_1ND = model(random_ids((2, 5))), model(ids_1N, packed, places_1N)
    hidden_ND = torch.cat([rows_BTD.flatten(0, 1), packed_1ND[0]])
    ids_N = random_ids((len(hidden_ND),), seed=2)
    logprobs_N, entropies_N = token_logprobs(model, hidden_ND, ids_N, temperature=0.7)
    weights_N = torch.randn(len(ids_N), generator=torch.manual_seed(1))
    (logprobs_N * weights_N).sum().backward()
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return [hidden_ND.detach(), logprobs_N.detach(), entropies_N, *grads]


def test_loops_are_for_what_a_cpu_computes_in_and_not_while_a_compiler_looks_on() -> None:
    x = torch.empty(2, 3)
    assert modes.has_loops(x) and modes.has_loops(x.double())
    assert not modes.has_loops(x.bfloat16()) and modes.kernels_for(x.bfloat16()) is None
    assert not modes.has_loops(torch.empty(2, 3, device="meta"))
    compiled = torch.compile(gpt.norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(2, 3)), torch.ones(2, 3))


def test_a_process_waits_while_another_one_compiles() -> None:
    """Numba's files have no lock of their own."""
    assert loops.FOLDER is not None
    with FileLock(Path(loops.FOLDER, "loops.lock")):
        thread = Thread(target=_compile_something, daemon=True)
        thread.start()
        thread.join(timeout=1.0)
        assert thread.is_alive()
    thread.join(timeout=60.0)
    assert not thread.is_alive()


def _compile_something() -> None:
    x = torch.zeros(1)
    loops.over_rows(numba.njit(_nothing), 1, x)


def _nothing(first: int, stop: int, x: Any) -> None:
    pass


def test_gradients_may_lie_anyhow_and_tokens_must_be_of_the_vocabulary() -> None:
    raw_CV = torch.randn(4, 8)
    for beyond in (8, -1):
        with pytest.raises(IndexError, match="none of the vocabulary's 8"):
            fused_cpu.look_(raw_CV, torch.tensor([0, 1, 2, beyond]), 15.0, 4.0)
    shape = Shape(vocab=8, layers=1, width=16, heads=2, kv_heads=1, context=4)
    turns = gpt.rotary_turns(5, 8)[:, None].double()
    qkv_BTX = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    slopes = [torch.randn(1, heads, 5, 8, dtype=torch.float64) for heads in (2, 1, 1)]
    found = []
    for way in (lambda x: x, Tensor.contiguous):
        out = fused_cpu.turned_heads(qkv_BTX, turns, shape)
        strided = [way(x.transpose(1, 2)) for x in slopes]
        found.append(torch.autograd.grad(out, qkv_BTX, strided)[0])
    torch.testing.assert_close(found[0], found[1])
    assert torch.autograd.gradcheck(
        lambda x: fused_cpu.turned_heads(x, turns, shape), qkv_BTX, atol=1e-6
    )
