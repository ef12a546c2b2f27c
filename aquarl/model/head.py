"""Hidden states and the tokens that followed in, log-probabilities out, without keeping logits.

The head and the loss of every learner. Logits of N tokens over V words are made a few rows at a
time and forgotten; the backward pass makes them again, which is cheaper than N * V numbers through
memory. So a vocabulary of 65,536 needs no more room than one of 512.

Shapes: N tokens, D width, V vocabulary.
Source: the idea is cut cross-entropy's (arXiv:2411.09009); the soft-cap is the policy's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aquarl.model.gpt import GPT, SOFT_CAP

CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Room for the fp32 logits of one chunk: about what a core's own cache holds."""

COLDEST = 0.2
"""Below, the exponential of a capped logit would leave fp32."""


def token_logprobs(
    model: GPT, hidden_ND: Tensor, ids_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return how likely each token was, and how undecided the policy.

    Args:
        hidden_ND: (N, D) normalised hidden states before each token.
        ids_N: (N,) int64.
        temperature: Divides the capped logits. `COLDEST` or more.

    Returns:
        (N,) fp32 log-probabilities in nats, and (N,) fp32 entropies in nats, without gradient.
    """
    assert temperature >= COLDEST
    device = hidden_ND.device.type
    dtype = hidden_ND.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        logprobs_N, entropy_N = _TokenLogprobs.apply(
            hidden_ND.to(dtype), model.lm_head.weight.to(dtype), ids_N, temperature
        )
    return logprobs_N, entropy_N


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        N = len(ids_N)
        logprobs_N, entropy_N, logsums_N = (hidden_ND.new_empty(N, dtype=wide) for _ in range(3))
        for rows in _chunks(N, weight_VD):
            logits_CV = _squashed(hidden_ND[rows], weight_VD).mul_(SOFT_CAP / temperature)
            logprobs_N[rows] = logits_CV.gather(1, ids_N[rows, None])[:, 0]
            # Capped as they are, no maximum has to be taken off before.
            weights_CV = logits_CV.exp()
            sums_C = weights_CV.sum(dim=1)
            logsums_N[rows] = sums_C.log()
            mean_C = weights_CV.mul_(logits_CV).sum(dim=1) / sums_C
            entropy_N[rows] = logsums_N[rows] - mean_C
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N, logsums_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N.sub_(logsums_N), entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_ND, weight_VD, ids_N, logsums_N = ctx.saved_tensors
        grads_N, temperature = grads[0], ctx.temperature
        hidden_grad_ND = torch.empty_like(hidden_ND)
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=logsums_N.dtype)
        one = logsums_N.new_ones(())
        for rows in _chunks(len(ids_N), weight_VD):
            squashed_CV = _squashed(hidden_ND[rows], weight_VD)
            # d logprob / d logit = [is this token] - probability, through cap and temperature.
            slope_CV = torch.addcmul(one, squashed_CV, squashed_CV, value=-1)
            grad_CV = squashed_CV.mul_(SOFT_CAP / temperature).sub_(logsums_N[rows, None]).exp_()
            chosen_N = torch.arange(len(grad_CV), device=ids_N.device), ids_N[rows]
            grad_CV[chosen_N] -= 1
            grad_CV.mul_(slope_CV).mul_((grads_N[rows] / -temperature)[:, None])
            grad_CV = grad_CV.to(weight_VD.dtype)
            torch.mm(grad_CV, weight_VD, out=hidden_grad_ND[rows])
            _add_product(weight_grad_VD, grad_CV.T, hidden_ND[rows])
        return hidden_grad_ND, weight_grad_VD.to(weight_VD.dtype), None, None


def _squashed(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits between -1 and 1, before the cap widens them; in fp32 at least."""
    logits_CV = hidden_CD @ weight_VD.T
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    return logits_CV.to(wide).div_(SOFT_CAP).tanh_()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be wider than both."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunks(N: int, weight_VD: Tensor) -> Iterator[slice]:
    room = CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES["cpu"])
    rows = max(32, room // (4 * len(weight_VD)))
    return (slice(start, start + rows) for start in range(0, N, rows))
