"""What a CPU does between a learner's matrix products, one compiled loop each way (`loops.py`).

`fused.py`'s functions, in fp32 and fp64:

look_            logits in, log-probabilities, entropies and the logits' slopes out (`head.py`)
norm, add_norm   RMSNorm, also of a sum, which comes out as well (`gpt.py`, as the others)
turned_heads     the three projections in, turned queries and keys of unit length out, and values
SquaredReLU      of the MLP's wide side

Shapes: see `head.py` and `gpt.py`; C rows of a chunk, N tokens, X columns of q, k and v together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aquarl.model import loops
from aquarl.model.loops import eps_of, over_rows
from aquarl.model.shape import Shape


def look_(raw_CV: Tensor, ids_C: Tensor, cap: float, scale: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, each (C,), and replace `raw_CV` by what each row's
    log-probability gains by it.

    Args:
        raw_CV: From `head.squashed_logits`: with s its sigmoid, (2 s - 1) * cap is the logit.
        scale: By what the slope of the sigmoid is multiplied.
    """
    if len(ids_C) and not 0 <= int(ids_C.min()) <= int(ids_C.max()) < raw_CV.shape[1]:
        raise IndexError(f"a token is none of the vocabulary's {raw_CV.shape[1]}")
    logprobs_C, entropies_C = raw_CV.new_empty(2, len(raw_CV))
    numbers = raw_CV.new_tensor([cap, scale])
    over_rows(loops.look, len(raw_CV), raw_CV, ids_C, numbers, logprobs_C, entropies_C)
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
        over_rows(loops.norm, scales.numel(), _rows(x), eps_of(x), _rows(y), scales.view(-1))
        ctx.save_for_backward(y, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> Tensor:
        return _norm_back(ctx, y_grad)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        total = x + more
        y, scales = torch.empty_like(total), x.new_empty(x.shape[:-1])
        over_rows(loops.norm, scales.numel(), _rows(total), eps_of(x), _rows(y), scales.view(-1))
        ctx.save_for_backward(y, scales)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_grad: Tensor, y_grad: Tensor) -> tuple[Tensor, Tensor]:
        grad = _norm_back(ctx, y_grad).add_(total_grad)
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
        over_rows(loops.heads, B * T, qkv_NhK, turns_Nu2, eps_of(qkv_BTX), *out, scales)
        ctx.save_for_backward(q, k, turns_Nu2, scales)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        q, k, turns_Nu2, scales = ctx.saved_tensors
        B, T, H, K = q.shape
        J = k.shape[2]
        qkv_BTX = q.new_empty(B, T, (H + 2 * J) * K)
        given = [x.reshape(B * T, -1, K).contiguous() for x in (*grads, q, k)]
        over_rows(loops.heads_back, B * T, *given, turns_Nu2, scales, qkv_BTX.view(B * T, -1, K))
        return qkv_BTX, None, None


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        over_rows(loops.squared_relu, len(_rows(x)), _rows(x), _rows(y))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out, grad = torch.empty_like(x), grad.contiguous()
        over_rows(loops.squared_relu_back, len(_rows(x)), _rows(grad), _rows(x), _rows(out))
        return out


def _norm_back(ctx: Any, y_grad: Tensor) -> Tensor:
    y, scales = ctx.saved_tensors
    out, y_grad = torch.empty_like(y), y_grad.contiguous()
    given = _rows(y_grad), _rows(y), scales.view(-1)
    over_rows(loops.norm_back, scales.numel(), *given, _rows(out))
    return out


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
