"""Log-probabilities without logits are those of the logits, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquarl.model import head
from aquarl.model.gpt import GPT
from aquarl.model.head import token_logprobs
from tests.fakes import random_ids, random_model

VOCAB, N = 96, 75


def inputs(dtype: torch.dtype = torch.float64) -> tuple[GPT, Tensor, Tensor]:
    model = random_model(VOCAB).to(dtype)
    with torch.no_grad():
        model.lm_head.weight *= 40  # so that the soft-cap bends
    hidden_ND = 3 * torch.randn(N, model.shape.width, generator=torch.manual_seed(2)).to(dtype)
    return model, hidden_ND.requires_grad_(), random_ids((N,), VOCAB)


def plain(
    model: GPT, hidden_ND: Tensor, ids_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    all_NV = (15 * torch.tanh(model.lm_head(hidden_ND) / 15) / temperature).log_softmax(dim=-1)
    return all_NV.gather(1, ids_N[:, None])[:, 0], -(all_NV.exp() * all_NV).sum(dim=1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 28], ids=["made again", "kept"])
def test_numbers_and_gradients_are_those_of_whole_logits(
    temperature: float, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 0})  # 32 rows at once: 32, 32, 11
    found = []
    for logprobs in (token_logprobs, plain):
        model, hidden_ND, ids_N = inputs()
        logprobs_N, entropy_N = logprobs(model, hidden_ND, ids_N, temperature)
        (logprobs_N * torch.linspace(-1, 2, N)).sum().backward()
        found.append((logprobs_N, entropy_N, hidden_ND.grad, model.lm_head.weight.grad))
    assert found[1][0].min() < -10, "the cap bends"
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_in_bf16_the_numbers_are_near_and_the_gradients_are_bf16() -> None:
    model, hidden_ND, ids_N = inputs(torch.bfloat16)
    exact, _, _ = inputs(torch.bfloat16)
    logprobs_N, _ = token_logprobs(model, hidden_ND, ids_N)
    expected_N, _ = plain(exact.float(), hidden_ND.detach().float(), ids_N, 1.0)
    assert logprobs_N.dtype == torch.float32
    assert (logprobs_N - expected_N).abs().mean() < 0.1
    logprobs_N.sum().backward()
    grads = (hidden_ND.grad, model.lm_head.weight.grad)
    assert all(grad is not None and grad.dtype == torch.bfloat16 for grad in grads)


def test_under_autocast_weights_stay_fp32_and_so_does_their_gradient() -> None:
    """As on a GPU, where the matrices meet in bf16."""
    model, hidden_ND, ids_N = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs_N, _ = token_logprobs(model, hidden_ND, ids_N)
    exact_N, _ = token_logprobs(model, hidden_ND, ids_N)
    assert 0 < (logprobs_N - exact_N).abs().mean() < 0.1
    logprobs_N.sum().backward()
    grad = model.lm_head.weight.grad
    assert grad is not None and grad.dtype == torch.float32 and grad.norm() > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_gpus_kernels_give_what_a_cpus_operations_give(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    from aquarl.model import fused

    monkeypatch.setattr(fused, "WORDS_AT_ONCE", 16)  # so that a row has several parts

    def plain_chunk(
        hidden_CD: Tensor,
        weight_VD: Tensor,
        ids_C: Tensor,
        temperature: float,
        logprobs_C: Tensor | None = None,
        room_CV: Tensor | None = None,
    ) -> head._Chunk:
        return head._Chunk(hidden_CD, weight_VD, ids_C, temperature, room_CV)

    found = []
    for chunk in (head._FusedChunk, plain_chunk):
        monkeypatch.setattr(head, "_chunk", chunk)
        for kept in (1 << 20, 0):
            monkeypatch.setattr(head, "KEPT_BYTES", kept)
            model, hidden_ND, ids_N = inputs(torch.float32)
            few = slice(5)  # an interpreted kernel takes some milliseconds a row
            logprobs_N, entropy_N = token_logprobs(model, hidden_ND[few], ids_N[few], temperature)
            (logprobs_N * torch.arange(1.0, 6.0)).sum().backward()
            grads = hidden_ND.grad, model.lm_head.weight.grad
            found.append((logprobs_N, entropy_N, *grads))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(ours, theirs)
