"""What a CPU does between a learner's matrix products, one compiled loop each way: `fused.py`'s
functions, for fp32 and fp64.

torch's own operations would read and write the same numbers again and again:

look_            logits in, log-probabilities, entropies and the logits' slopes out (`head.py`)
norm, add_norm   RMSNorm, also of a sum, which comes out as well (`gpt.py`, as the others)
turned_heads     the three projections in, turned queries and keys of unit length out, and values
SquaredReLU      of the MLP's wide side

Shapes: see `head.py` and `gpt.py`; C rows of a chunk, N tokens, X columns of q, k and v together.
"""

# Numba's arrays are any to a checker.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from aquarl.model.loops import compiled, eps_of, exp, over_rows, part, squashed, unit
from aquarl.model.shape import Shape


def look_(raw_CV: Tensor, ids_C: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, each (C,), and replace `raw_CV` by what each row's
    log-probability gains by it.

    Args:
        raw_CV: From `head.squashed_logits`: with s its sigmoid, (2 s - 1) * cap is the logit.
        scale: By what the slope of the sigmoid is multiplied.
    """
    logprobs_C, entropies_C = raw_CV.new_empty(2, len(raw_CV))
    numbers = raw_CV.new_tensor([cap, scale])
    over_rows(_look, len(raw_CV), raw_CV, ids_C, numbers, logprobs_C, entropies_C)
    return logprobs_C, entropies_C


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without parameters."""
    return _Norm.apply(x)


def add_norm(x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm."""
    return _AddNorm.apply(x, more)


def turned_heads(qkv_BTX: Tensor, turns: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, T, H, K) and keys (B, T, J, K), turned and normalised, and values.

    Args:
        qkv_BTX: Of projections whose heads are `interleaved`.
        turns: (T or B, T, 1, K / 2, 2), see `gpt.rotary_turns`.
    """
    return _TurnedHeads.apply(qkv_BTX, turns, shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, scales = torch.empty_like(x), x.new_empty(x.shape[:-1])
        over_rows(_norm, scales.numel(), _rows(x), eps_of(x), _rows(y), scales.view(-1))
        ctx.save_for_backward(y, scales)
        return y

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> Tensor:
        y, scales = ctx.saved_tensors
        out, y_grad = torch.empty_like(y), y_grad.contiguous()
        given = _rows(y_grad), _rows(y), scales.view(-1)
        over_rows(_norm_back, scales.numel(), *given, _rows(out))
        return out


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        total = x + more
        y, scales = torch.empty_like(total), x.new_empty(x.shape[:-1])
        over_rows(_norm, scales.numel(), _rows(total), eps_of(x), _rows(y), scales.view(-1))
        ctx.save_for_backward(y, scales)
        return total, y

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, y_grad: Tensor) -> tuple[Tensor, Tensor]:
        grad = _Norm.backward(ctx, y_grad).add_(total_grad)
        return grad, grad


class _TurnedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BTX: Tensor, turns: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = qkv_BTX.shape
        H, J, K = shape.heads, shape.kv_heads, shape.head_width
        qkv_NhK = qkv_BTX.reshape(B * T, H + 2 * J, K)
        turns_Nu2 = turns.reshape(-1, K // 2, 2)
        q, k, v = (qkv_BTX.new_empty(B, T, heads, K) for heads in (H, J, J))
        scales = qkv_BTX.new_empty(B * T, H + J)
        out = q.view(B * T, H, K), k.view(B * T, J, K), v.view(B * T, J, K)
        over_rows(_turn, B * T, qkv_NhK, turns_Nu2, eps_of(qkv_BTX), *out, scales)
        ctx.save_for_backward(q, k, turns_Nu2, scales)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        q, k, turns_Nu2, scales = ctx.saved_tensors
        B, T, H, K = q.shape
        J = k.shape[2]
        qkv_BTX = q.new_empty(B, T, (H + 2 * J) * K)
        given = [x.reshape(B * T, -1, K) for x in (*grads, q, k)]
        over_rows(_turn_back, B * T, *given, turns_Nu2, scales, qkv_BTX.view(B * T, -1, K))
        return qkv_BTX, None, None


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        over_rows(_squared_relu, len(_rows(x)), _rows(x), _rows(y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out, grad = torch.empty_like(x), grad.contiguous()
        over_rows(_squared_relu_back, len(_rows(x)), _rows(grad), _rows(x), _rows(out))
        return out


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


@compiled
def _look(first, stop, raw_CV, ids_C, numbers, logprobs_C, entropies_C):
    cap, scale = numbers
    V = raw_CV.shape[1]
    one = raw_CV.dtype.type(1)
    weights_V = np.empty(V, raw_CV.dtype)
    for c in range(first, stop):
        squashed_V = raw_CV[c]
        total, products = one - one, one - one
        for v in range(V):
            squashed_V[v] = squashed(squashed_V[v])
            logit = (squashed_V[v] + squashed_V[v]) * cap - cap
            weights_V[v] = exp(logit)
            total += weights_V[v]
            products += weights_V[v] * logit
        chosen = squashed_V[ids_C[c]]
        logsum = np.log(total)
        logprobs_C[c] = (chosen + chosen) * cap - cap - logsum
        entropies_C[c] = logsum - products / total
        share = scale / total
        for v in range(V):
            squashed_V[v] *= (squashed_V[v] - one) * weights_V[v] * share
        squashed_V[ids_C[c]] += scale * chosen * (one - chosen)


@compiled
def _norm(first, stop, x_ND, eps, y_ND, scales_N):
    for n in range(first, stop):
        scale = unit(x_ND[n], eps)
        scales_N[n] = scale
        for d in range(x_ND.shape[1]):
            y_ND[n, d] = x_ND[n, d] * scale


@compiled
def _norm_back(first, stop, grad_ND, y_ND, scales_N, out_ND):
    D = y_ND.shape[1]
    for n in range(first, stop):
        along = _mean_product(grad_ND[n], y_ND[n])
        for d in range(D):
            out_ND[n, d] = (grad_ND[n, d] - y_ND[n, d] * along) * scales_N[n]


@part
def _mean_product(x_D, y_D):
    total = x_D[0] * y_D[0]
    for d in range(1, len(x_D)):
        total += x_D[d] * y_D[d]
    return total / x_D.dtype.type(len(x_D))


@compiled
def _turn(first, stop, qkv_NXK, turns_NU2, eps, q_NHK, k_NJK, v_NJK, scales_NY):
    H, J, K = q_NHK.shape[1], k_NJK.shape[1], q_NHK.shape[2]
    for n in range(first, stop):
        turns_U2 = turns_NU2[n % len(turns_NU2)]
        for head in range(H + J):
            x_K = qkv_NXK[n, head]
            scale = unit(x_K, eps)
            scales_NY[n, head] = scale
            out_K = q_NHK[n, head] if head < H else k_NJK[n, head - H]
            for u in range(K // 2):
                a, b = x_K[2 * u] * scale, x_K[2 * u + 1] * scale
                cos, sin = turns_U2[u, 0], turns_U2[u, 1]
                out_K[2 * u] = a * cos - b * sin
                out_K[2 * u + 1] = a * sin + b * cos
        for head in range(J):
            for i in range(K):
                v_NJK[n, head, i] = qkv_NXK[n, H + J + head, i]


@compiled
def _turn_back(
    first, stop, q_grad_NHK, k_grad_NJK, v_grad_NJK, q_NHK, k_NJK, turns_NU2, scales_NY, out_NXK
):
    H, J, K = q_NHK.shape[1], k_NJK.shape[1], q_NHK.shape[2]
    for n in range(first, stop):
        turns_U2 = turns_NU2[n % len(turns_NU2)]
        for head in range(H + J):
            grad_K = q_grad_NHK[n, head] if head < H else k_grad_NJK[n, head - H]
            unit_K = q_NHK[n, head] if head < H else k_NJK[n, head - H]
            along = _mean_product(grad_K, unit_K)
            for u in range(K // 2):
                a = (grad_K[2 * u] - unit_K[2 * u] * along) * scales_NY[n, head]
                b = (grad_K[2 * u + 1] - unit_K[2 * u + 1] * along) * scales_NY[n, head]
                cos, sin = turns_U2[u, 0], turns_U2[u, 1]
                out_NXK[n, head, 2 * u] = a * cos + b * sin
                out_NXK[n, head, 2 * u + 1] = b * cos - a * sin
        for head in range(J):
            for i in range(K):
                out_NXK[n, H + J + head, i] = v_grad_NJK[n, head, i]


@compiled
def _squared_relu(first, stop, x_ND, y_ND):
    for n in range(first, stop):
        for d in range(x_ND.shape[1]):
            positive = max(x_ND[n, d], x_ND.dtype.type(0))
            y_ND[n, d] = positive * positive


@compiled
def _squared_relu_back(first, stop, grad_ND, x_ND, out_ND):
    for n in range(first, stop):
        for d in range(x_ND.shape[1]):
            positive = max(x_ND[n, d], x_ND.dtype.type(0))
            out_ND[n, d] = (positive + positive) * grad_ND[n, d]
