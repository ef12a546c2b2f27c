"""NumPy's products are torch's, there and back, wherever they take their place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from aquarl.model import products
from aquarl.model.gpt import GPT
from aquarl.model.head import token_logprobs
from aquarl.model.shape import Shape


@pytest.fixture()
def numpys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the processor and however small a product, NumPy is to make it."""
    monkeypatch.setattr(products, "_is_numpy_faster", lambda: True)
    monkeypatch.setattr(products, "LARGE", 0)
    threads = torch.get_num_threads()
    products.use_threads(1)
    yield
    products.use_threads(threads)


def test_a_product_and_both_gradients_are_torchs(numpys: None) -> None:
    x = torch.randn(2, 5, 16, requires_grad=True)
    weight = torch.randn(24, 16, requires_grad=True)
    slopes = torch.randn(2, 5, 24)
    assert products.is_numpys(x, 24)
    found = torch.autograd.grad(products.linear(x, weight), (x, weight), slopes)
    wanted = torch.autograd.grad(F.linear(x, weight), (x, weight), slopes)
    torch.testing.assert_close(products.linear(x, weight), F.linear(x, weight))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_product_goes_where_it_is_wanted(numpys: None) -> None:
    a, b = torch.randn(8, 3), torch.randn(5, 3).T
    out = torch.zeros(4, 8, 5)
    products.mm(a, b, out=out[1])
    torch.testing.assert_close(out[1], a @ b)
    assert not out[0].any() and not out[2:].any()


def test_a_policys_logprobs_and_gradients_are_the_same_by_both(
    numpys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(Shape(layers=2, width=32, heads=2, kv_heads=1, vocab=50, context=16))
    model.init_weights(0)
    torch.nn.init.normal_(model.lm_head.weight)
    for name, weight in model.named_parameters():
        if name.endswith("c_proj.weight"):
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.randint(50, (3, 17), generator=torch.Generator().manual_seed(0))

    def taken() -> list[torch.Tensor]:
        model.zero_grad()
        hidden = model(ids[:, :-1]).reshape(-1, 32)
        logprobs, entropies = token_logprobs(model, hidden, ids[:, 1:].flatten())
        logprobs.mean().backward()
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        return [logprobs.detach(), entropies, *grads]

    by_numpy = taken()
    monkeypatch.setattr(products, "_is_numpy_faster", lambda: False)
    for one, other in zip(by_numpy, taken(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_compiler_sees_torchs_product_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> bool:
        raise AssertionError("it would be compiled in")

    monkeypatch.setattr(products, "_is_numpy_faster", never)
    monkeypatch.setattr(products, "LARGE", 0)
    compiled = torch.compile(products.linear, backend="eager", fullgraph=True)
    x, weight = torch.randn(5, 16), torch.randn(24, 16)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))


def test_what_numpy_is_not_for_stays_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_numpy_faster", lambda: True)
    threads = torch.get_num_threads()
    try:
        products.use_threads(1)
        x = torch.empty(1 << 10, 1 << 8)
        assert products.is_numpys(x, 1 << 8)
        assert not products.is_numpys(x, 1 << 7), "too small"
        assert not products.is_numpys(x.double(), 1 << 8)
        products.use_threads(2)
        assert not products.is_numpys(x, 1 << 8), "the threads of two libraries"
    finally:
        products.use_threads(threads)
