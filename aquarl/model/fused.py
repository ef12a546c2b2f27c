"""What a GPU does between a learner's matrix products, one Triton kernel each way.

torch's own operations would read and write the same numbers again and again, in fp32 mostly:

look, slopes_    logits in, log-probabilities and entropies out; and their slopes (`head.py`)
norm, add_norm   RMSNorm, also of a sum, which comes out as well (`gpt.py`, as the others)
turned_heads     the three projections in, turned queries and keys of unit length out, and values
SquaredReLU      of the MLP's wide side

All compute in fp32 and keep what they are given to keep, bf16 mostly.

Shapes: see `head.py` and `gpt.py`; C rows of a chunk, N tokens, X columns of q, k and v together.
"""

# Triton's types are its own, and its functions are no Python that a checker could follow.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquarl.model.shape import Shape

WORDS_AT_ONCE = 4096
WARPS = 8
"""Of the two that read logits."""
AT_ONCE = 2048
"""Numbers that one program of the others works on, or a row."""
EPS = tl.constexpr(torch.finfo(torch.float32).eps)


def look(raw_CV: Tensor, ids_C: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, each (C,) fp32.

    Args:
        raw_CV: From `head.squashed_logits`: with s its sigmoid, (2 s - 1) * cap is the logit.
    """
    C, V = raw_CV.shape
    logprobs_C, entropies_C = (torch.empty(C, device=raw_CV.device) for _ in range(2))
    _look[(C,)](
        raw_CV, ids_C, logprobs_C, entropies_C, V, cap, WORDS=WORDS_AT_ONCE, num_warps=WARPS
    )
    return logprobs_C, entropies_C


def slopes_(raw_CV: Tensor, ids_C: Tensor, logprobs_C: Tensor, cap: float, scale: float) -> Tensor:
    """Replace `raw_CV` by what each row's logprob gains by it, and return it.

    Args:
        logprobs_C: As `look` found them.
        scale: By what the slope of the sigmoid is multiplied.
    """
    C, V = raw_CV.shape
    chosen_C = raw_CV.gather(1, ids_C[:, None])[:, 0].float().sigmoid()
    logsums_C = 2 * cap * chosen_C - cap - logprobs_C
    grid = (C, triton.cdiv(V, WORDS_AT_ONCE))
    _slopes[grid](raw_CV, ids_C, logsums_C, V, cap, scale, WORDS=WORDS_AT_ONCE, num_warps=WARPS)
    return raw_CV


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without parameters."""
    return _Norm.apply(x)


def add_norm(x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum, rounded as x is, and its norm."""
    return _AddNorm.apply(x, more)


def turned_heads(qkv_BTX: Tensor, turns: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, T, H, K) and keys (B, T, J, K), turned and normalised, and values.

    Args:
        qkv_BTX: Of projections whose heads are `interleaved`.
        turns: (T or B, T, 1, K / 2, 2) fp32, see `gpt.rotary_turns`.
    """
    return _TurnedHeads.apply(qkv_BTX.contiguous(), turns.contiguous(), shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, scales = torch.empty_like(x), _for_each_row(x)
        _run_norm(x, None, None, y, scales)
        ctx.save_for_backward(y, scales)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _norm_back(None, grad, *ctx.saved_tensors)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        total, y, scales = torch.empty_like(x), torch.empty_like(x), _for_each_row(x)
        _run_norm(x, more, total, y, scales)
        ctx.save_for_backward(y, scales)
        return total, y

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, y_grad: Tensor) -> tuple[Tensor, Tensor]:
        grad = _norm_back(total_grad, y_grad, *ctx.saved_tensors)
        return grad, grad


class _TurnedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BTX: Tensor, turns: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = qkv_BTX.shape
        H, J, K = shape.heads, shape.kv_heads, shape.head_width
        q, k, v = (qkv_BTX.new_empty(B, T, heads, K) for heads in (H, J, J))
        scales = torch.empty(B * T, H + J, device=qkv_BTX.device)
        grid, sizes = _heads_at_once(B * T, turns, shape)
        _turn[grid](qkv_BTX, turns, q, k, v, scales, B * T, **sizes)
        ctx.shape = shape
        ctx.save_for_backward(q, k, turns, scales)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        q, k, turns, scales = ctx.saved_tensors
        B, T, H, K = q.shape
        qkv_BTX = q.new_empty(B, T, (H + 2 * k.shape[2]) * K)
        grid, sizes = _heads_at_once(B * T, turns, ctx.shape)
        grads = [grad.contiguous() for grad in grads]
        _turn_back[grid](*grads, q, k, turns, scales, qkv_BTX, B * T, **sizes)
        return qkv_BTX, None, None


class SquaredReLU(torch.autograd.Function):
    """max(x, 0)^2"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, count = torch.empty_like(x), x.numel()
        _squared_relu[(triton.cdiv(count, AT_ONCE),)](x, y, count, AT_ONCE=AT_ONCE)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, out, count = grad.contiguous(), torch.empty_like(x), x.numel()
        _squared_relu_back[(triton.cdiv(count, AT_ONCE),)](grad, x, out, count, AT_ONCE=AT_ONCE)
        return out


def _for_each_row(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], device=x.device)


def _rows_at_once(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    N, D = x.numel() // x.shape[-1], x.shape[-1]
    D_room = triton.next_power_of_2(D)
    rows = max(1, AT_ONCE // D_room)
    return (triton.cdiv(N, rows),), {"N": N, "D": D, "D_ROOM": D_room, "ROWS": rows}


def _run_norm(
    x: Tensor, more: Tensor | None, total: Tensor | None, y: Tensor, scales: Tensor
) -> None:
    grid, sizes = _rows_at_once(x)
    x, more = x.contiguous(), None if more is None else more.contiguous()
    _norm_forward[grid](x, more, total, y, scales, **sizes)


def _norm_back(total_grad: Tensor | None, y_grad: Tensor, y: Tensor, scales: Tensor) -> Tensor:
    grid, sizes = _rows_at_once(y)
    out = torch.empty_like(y)
    total_grad = None if total_grad is None else total_grad.contiguous()
    _norm_backward[grid](total_grad, y_grad.contiguous(), y, scales, out, **sizes)
    return out


def _heads_at_once(N: int, turns: Tensor, shape: Shape) -> tuple[tuple[int], dict[str, int]]:
    """Each program has one head of some tokens; neighbours have the same tokens' turns."""
    K_room = triton.next_power_of_2(shape.head_width)
    tokens = max(1, AT_ONCE // K_room)
    grid = (triton.cdiv(N, tokens) * (shape.heads + 2 * shape.kv_heads),)
    sizes = {"TURNS": turns.numel() // shape.head_width, "TOKENS": tokens, "K_ROOM": K_room}
    return grid, sizes | {"H": shape.heads, "J": shape.kv_heads, "K": shape.head_width}


@triton.jit
def _norm_forward(
    x,
    more,
    total,
    y,
    scales,
    N,
    D: tl.constexpr,
    D_ROOM: tl.constexpr,
    ROWS: tl.constexpr,
):
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D_ROOM)
    is_there = (n < N)[:, None] & (d < D)[None, :]
    places = n.to(tl.int64)[:, None] * D + d[None, :]
    values = tl.load(x + places, mask=is_there, other=0.0).to(tl.float32)
    if more is not None:
        values += tl.load(more + places, mask=is_there, other=0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
        tl.store(total + places, values, mask=is_there)
        values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / D + EPS)
    tl.store(scales + n, scale, mask=n < N)
    tl.store(y + places, (values * scale[:, None]).to(y.dtype.element_ty), mask=is_there)


@triton.jit
def _norm_backward(
    total_grad,
    y_grad,
    y,
    scales,
    out,
    N,
    D: tl.constexpr,
    D_ROOM: tl.constexpr,
    ROWS: tl.constexpr,
):
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D_ROOM)
    is_there = (n < N)[:, None] & (d < D)[None, :]
    places = n.to(tl.int64)[:, None] * D + d[None, :]
    grad = tl.load(y_grad + places, mask=is_there, other=0.0).to(tl.float32)
    unit = tl.load(y + places, mask=is_there, other=0.0).to(tl.float32)
    along = tl.sum(grad * unit, axis=1) / D
    slope = (grad - unit * along[:, None]) * tl.load(scales + n, mask=n < N)[:, None]
    if total_grad is not None:
        slope += tl.load(total_grad + places, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + places, slope.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _turn(
    qkv,
    turns,
    q,
    k,
    v,
    scales,
    N,
    TURNS,
    TOKENS: tl.constexpr,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    K_ROOM: tl.constexpr,
):
    head = tl.program_id(0) % (H + 2 * J)
    n = (tl.program_id(0) // (H + 2 * J)).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, K_ROOM)[None, :]
    is_there = (n < N)[:, None] & (i < K)
    values = tl.load(
        qkv + (n * ((H + 2 * J) * K) + head * K)[:, None] + i, mask=is_there, other=0.0
    )
    if head < H + J:
        turn = tl.load(turns + (n % TURNS * K)[:, None] + i, mask=is_there, other=0.0)
        a, b = tl.split(values.to(tl.float32).reshape(TOKENS, K_ROOM // 2, 2))
        cos, sin = tl.split(turn.reshape(TOKENS, K_ROOM // 2, 2))
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / K + EPS)
        turned = tl.interleave(a * cos - b * sin, a * sin + b * cos) * scale[:, None]
        tl.store(scales + n * (H + J) + head, scale, mask=n < N)
        if head < H:
            out = q + (n * (H * K) + head * K)[:, None] + i
        else:
            out = k + (n * (J * K) + (head - H) * K)[:, None] + i
        tl.store(out, turned.to(q.dtype.element_ty), mask=is_there)
    else:
        tl.store(v + (n * (J * K) + (head - H - J) * K)[:, None] + i, values, mask=is_there)


@triton.jit
def _turn_back(
    q_grad,
    k_grad,
    v_grad,
    q,
    k,
    turns,
    scales,
    qkv_grad,
    N,
    TURNS,
    TOKENS: tl.constexpr,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    K_ROOM: tl.constexpr,
):
    head = tl.program_id(0) % (H + 2 * J)
    n = (tl.program_id(0) // (H + 2 * J)).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, K_ROOM)[None, :]
    is_there = (n < N)[:, None] & (i < K)
    out = qkv_grad + (n * ((H + 2 * J) * K) + head * K)[:, None] + i
    if head < H + J:
        if head < H:
            places = (n * (H * K) + head * K)[:, None] + i
            grad = tl.load(q_grad + places, mask=is_there, other=0.0).to(tl.float32)
            unit = tl.load(q + places, mask=is_there, other=0.0).to(tl.float32)
        else:
            places = (n * (J * K) + (head - H) * K)[:, None] + i
            grad = tl.load(k_grad + places, mask=is_there, other=0.0).to(tl.float32)
            unit = tl.load(k + places, mask=is_there, other=0.0).to(tl.float32)
        along = tl.sum(grad * unit, axis=1) / K
        scale = tl.load(scales + n * (H + J) + head, mask=n < N, other=0.0)
        slope = (grad - unit * along[:, None]) * scale[:, None]
        turn = tl.load(turns + (n % TURNS * K)[:, None] + i, mask=is_there, other=0.0)
        a, b = tl.split(slope.reshape(TOKENS, K_ROOM // 2, 2))
        cos, sin = tl.split(turn.reshape(TOKENS, K_ROOM // 2, 2))
        back = tl.interleave(a * cos + b * sin, b * cos - a * sin)
        tl.store(out, back.to(qkv_grad.dtype.element_ty), mask=is_there)
    else:
        places = (n * (J * K) + (head - H - J) * K)[:, None] + i
        tl.store(out, tl.load(v_grad + places, mask=is_there), mask=is_there)


@triton.jit
def _squared_relu(x, y, count, AT_ONCE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    positive = tl.maximum(tl.load(x + i, mask=i < count, other=0.0).to(tl.float32), 0.0)
    tl.store(y + i, (positive * positive).to(y.dtype.element_ty), mask=i < count)


@triton.jit
def _squared_relu_back(grad, x, out, count, AT_ONCE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    positive = tl.maximum(tl.load(x + i, mask=i < count, other=0.0).to(tl.float32), 0.0)
    slope = 2.0 * positive * tl.load(grad + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, slope.to(out.dtype.element_ty), mask=i < count)


@triton.jit
def _look(raw, ids, logprobs, entropies, V, cap, WORDS: tl.constexpr):
    row = tl.program_id(0)
    raw += row.to(tl.int64) * V
    weights = tl.zeros((WORDS,), tl.float32)
    products = tl.zeros((WORDS,), tl.float32)
    for start in range(0, V, WORDS):
        v = start + tl.arange(0, WORDS)
        squashed = tl.sigmoid(tl.load(raw + v, mask=v < V, other=0.0).to(tl.float32))
        logits = 2.0 * cap * squashed - cap
        weight = tl.where(v < V, tl.exp(logits), 0.0)
        weights += weight
        products += weight * logits
    total = tl.sum(weights)
    chosen = tl.sigmoid(tl.load(raw + tl.load(ids + row)).to(tl.float32))
    tl.store(logprobs + row, 2.0 * cap * chosen - cap - tl.log(total))
    tl.store(entropies + row, tl.log(total) - tl.sum(products) / total)


@triton.jit
def _slopes(raw, ids, logsums, V, cap, scale, WORDS: tl.constexpr):
    row = tl.program_id(0)
    v = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    raw += row.to(tl.int64) * V
    squashed = tl.sigmoid(tl.load(raw + v, mask=v < V, other=0.0).to(tl.float32))
    chance = tl.exp(2.0 * cap * squashed - cap - tl.load(logsums + row))
    is_chosen = (v == tl.load(ids + row)).to(tl.float32)
    slope = scale * squashed * (1.0 - squashed) * (is_chosen - chance)
    tl.store(raw + v, slope.to(raw.dtype.element_ty), mask=v < V)
