"""What a GPU does between a decoder's matrix products, one Triton kernel each: `graphs.py` calls
them.

A token of a small policy is many small operations, and a GPU spends two microseconds on each that
it is told of, however little there is to do. So all that stands between two products is one kernel:

attend          queries, keys and values as the product gave them in, what the queries find out
squared_relu    the wide side of the MLP
group_sums      logits in, the chances of so many tokens together out
choose          one of those, one token of it, and its embedding

None of them needs x normalised before a product: RMSNorm without parameters multiplies a row by one
number, so it may as well be done after the product, by whoever reads it.

Read at their own pace: `attend` reads the keys and values that are in use, no others, and the
prompt's once for all answers where the GPU's cache holds them.

Shapes: see `decoder.py`; C groups of `TOGETHER` tokens.
Source: softmax without a maximum as in `model/packed.py`; inverting the distribution in two steps
as in `model/loops.py`.
"""

# Triton's types are its own, and its functions are no Python that a checker could follow.
# mypy: ignore-errors

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aquarl.model.gpt import SOFT_CAP
from aquarl.model.loops import TOGETHER
from aquarl.model.shape import Shape

KEYS_AT_ONCE, GROUPS_AT_ONCE, WIDE_AT_ONCE = 16, 64, 1024
WARPS = 2
"""Of `attend`: with 16 keys at once the fastest of seven on an H200 (`ray_jobs/LOG.md`)."""
part = (lambda function: function) if triton.knobs.runtime.interpret else triton.jit
"""Of a kernel. The interpreter reads the whole language anew for each that is a kernel itself."""
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
CAP = tl.constexpr(SOFT_CAP)


class Cache(NamedTuple):
    """A layer's keys and values: of the prompts (P, J, L, K), of the answers (P, J, G, T, K)."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


def attend(
    qkv_BX: Tensor,
    x_BD: Tensor,
    cache: Cache,
    lengths_P: Tensor,
    step_B: Tensor,
    turns: Tensor,
    shape: Shape,
    out_BD: Tensor,
) -> None:
    """Put the position's keys and values into the cache, and what its queries find into `out_BD`.

    Args:
        qkv_BX: x_BD times the three projections, heads `interleaved`.
        x_BD: What stood before the product, not normalised.
        lengths_P: int64, what is real of the prompts.
        step_B: int64, positions of the answers that are in the cache already.
        turns: (positions, K / 2, 2) fp32, see `gpt.rotary_turns`.
    """
    G, T = cache.keys.shape[2:4]
    H, K = shape.heads, shape.head_width
    _attend[(len(x_BD), H)](
        qkv_BX,
        x_BD,
        *cache,
        lengths_P,
        step_B,
        turns,
        out_BD,
        G,
        T,
        cache.prompt_keys.shape[2],
        HEADS=H,
        KV_HEADS=shape.kv_heads,
        K=K,
        K_ROOM=triton.next_power_of_2(K),
        D=shape.width,
        D_ROOM=triton.next_power_of_2(shape.width),
        KEYS=KEYS_AT_ONCE,
        num_warps=WARPS,
    )


def squared_relu(wide_BF: Tensor, x_BD: Tensor) -> None:
    """Replace a product of x_BD by its ReLU squared, as if x_BD had been normalised before."""
    B, F = wide_BF.shape
    D = x_BD.shape[1]
    grid = (B, triton.cdiv(F, WIDE_AT_ONCE))
    _squared_relu[grid](
        wide_BF, x_BD, F, D=D, D_ROOM=triton.next_power_of_2(D), AT_ONCE=WIDE_AT_ONCE
    )


def group_sums(logits_BV: Tensor, x_BD: Tensor, temperature: float, sums_BC: Tensor) -> None:
    """Sum up the chances of each group's tokens, in fp32.

    Args:
        logits_BV: The head's product with x_BD, which was not normalised; not capped.
    """
    B, V = logits_BV.shape
    C, D = sums_BC.shape[1], x_BD.shape[1]
    _group_sums[(B, triton.cdiv(C, GROUPS_AT_ONCE))](
        logits_BV,
        x_BD,
        sums_BC,
        V,
        C,
        SOFT_CAP / temperature,
        D=D,
        D_ROOM=triton.next_power_of_2(D),
        GROUPS=GROUPS_AT_ONCE,
        TOGETHER=TOGETHER,
    )


def choose(
    logits_BV: Tensor,
    x_BD: Tensor,
    sums_BC: Tensor,
    uniforms_TB: Tensor,
    step_B: Tensor,
    temperature: float,
    embedding_VD: Tensor,
    ids_TB: Tensor,
    logprobs_TB: Tensor,
) -> None:
    """Go a step on: draw a token for each row, note it and its log-probability, and put its
    embedding to x_BD."""
    B, V = logits_BV.shape
    C, D = sums_BC.shape[1], x_BD.shape[1]
    _choose[(B,)](
        logits_BV,
        x_BD,
        sums_BC,
        uniforms_TB,
        step_B,
        embedding_VD,
        ids_TB,
        logprobs_TB,
        B,
        V,
        C,
        SOFT_CAP / temperature,
        C_ROOM=triton.next_power_of_2(C),
        D=D,
        D_ROOM=triton.next_power_of_2(D),
        TOGETHER=TOGETHER,
    )


@part
def _scale(x, row, D: tl.constexpr, D_ROOM: tl.constexpr):
    """Return by what RMSNorm multiplies a row."""
    d = tl.arange(0, D_ROOM)
    values = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(values * values) / D + EPS)


@part
def _turned_unit(head, scale, turns, K: tl.constexpr, K_ROOM: tl.constexpr):
    """Return the two dimensions of each pair of a head, normalised and turned."""
    pair = tl.arange(0, K_ROOM // 2)
    is_real = pair < K // 2
    a = tl.load(head + 2 * pair, mask=is_real, other=0.0).to(tl.float32) * scale
    b = tl.load(head + 2 * pair + 1, mask=is_real, other=0.0).to(tl.float32) * scale
    unit = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / K + EPS)
    cos = tl.load(turns + 2 * pair, mask=is_real, other=0.0)
    sin = tl.load(turns + 2 * pair + 1, mask=is_real, other=0.0)
    return (a * cos - b * sin) * unit, (a * sin + b * cos) * unit


@part
def _look(
    q, keys, values, count, totals, found, K: tl.constexpr, K_ROOM: tl.constexpr, KEYS: tl.constexpr
):
    """Add what a query finds among so many keys to `found` (KEYS, K), the weights to `totals`.

    Each place of a tile adds up for itself, so no warp waits for another before the end.
    """
    k = tl.arange(0, K_ROOM)
    for start in range(0, count, KEYS):
        s = start + tl.arange(0, KEYS)
        is_real = s < count
        places, is_there = s[:, None] * K + k[None, :], is_real[:, None] & (k < K)[None, :]
        key = tl.load(keys + places, mask=is_there, other=0.0)
        value = tl.load(values + places, mask=is_there, other=0.0)
        scores = tl.sum(key.to(tl.float32) * q[None, :], axis=1)
        weight = tl.where(is_real, tl.exp(scores), 0.0)
        totals += weight
        found += value.to(tl.float32) * weight[:, None]
    return totals, found


@triton.jit
def _attend(
    qkv,
    x,
    prompt_keys,
    prompt_values,
    keys,
    values,
    lengths,
    step,
    turns,
    out,
    G,
    T,
    L,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K: tl.constexpr,
    K_ROOM: tl.constexpr,
    D: tl.constexpr,
    D_ROOM: tl.constexpr,
    KEYS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    prompt, answer = row // G, row % G
    kv_head = head // (HEADS // KV_HEADS)
    t = tl.load(step + row)
    length = tl.load(lengths + prompt)
    scale = _scale(x, row, D, D_ROOM)
    qkv += row * ((HEADS + 2 * KV_HEADS) * K)
    turns += (length + t) * K
    pair, k = tl.arange(0, K_ROOM // 2), tl.arange(0, K_ROOM)
    is_pair, is_k = pair < K // 2, k < K

    query = _turned_unit(qkv + head * K, scale, turns, K, K_ROOM)
    key = _turned_unit(qkv + (HEADS + kv_head) * K, scale, turns, K, K_ROOM)
    of_value = qkv + (HEADS + KV_HEADS + kv_head) * K
    value = tl.load(of_value + k, mask=is_k, other=0.0).to(tl.float32) * scale
    cached = ((prompt * KV_HEADS + kv_head) * G + answer).to(tl.int64) * T * K
    keys += cached
    values += cached
    if head % (HEADS // KV_HEADS) == 0:
        tl.store(keys + t * K + 2 * pair, key[0].to(keys.dtype.element_ty), mask=is_pair)
        tl.store(keys + t * K + 2 * pair + 1, key[1].to(keys.dtype.element_ty), mask=is_pair)
        tl.store(values + t * K + k, value.to(values.dtype.element_ty), mask=is_k)

    root = tl.sqrt(tl.full((), K, tl.float32))
    own = tl.exp((tl.sum(query[0] * key[0]) + tl.sum(query[1] * key[1])) / root)
    q = tl.interleave(query[0], query[1]) / root
    totals, found = tl.zeros((KEYS,), tl.float32), tl.zeros((KEYS, K_ROOM), tl.float32)
    of_prompt = (prompt * KV_HEADS + kv_head).to(tl.int64) * L * K
    prompt_keys += of_prompt
    prompt_values += of_prompt
    totals, found = _look(q, keys, values, t, totals, found, K, K_ROOM, KEYS)
    totals, found = _look(q, prompt_keys, prompt_values, length, totals, found, K, K_ROOM, KEYS)
    result = (tl.sum(found, axis=0) + value * own) / (tl.sum(totals) + own)
    out += row * (HEADS * K) + head * K
    tl.store(out + k, result.to(out.dtype.element_ty), mask=is_k)


@triton.jit
def _squared_relu(wide, x, F, D: tl.constexpr, D_ROOM: tl.constexpr, AT_ONCE: tl.constexpr):
    row = tl.program_id(0)
    f = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    positive = tl.load(wide + row * F + f, mask=f < F, other=0.0).to(tl.float32)
    positive = tl.maximum(positive, 0.0) * _scale(x, row, D, D_ROOM)
    tl.store(wide + row * F + f, (positive * positive).to(wide.dtype.element_ty), mask=f < F)


@part
def _chances(logits, scale, cap):
    """exp of the capped logits, of which none is above `cap`."""
    squashed = tl.sigmoid(logits.to(tl.float32) * scale * (2.0 / CAP))
    return tl.exp(2.0 * cap * squashed - cap)


@triton.jit
def _group_sums(
    logits,
    x,
    sums,
    V,
    C,
    cap,
    D: tl.constexpr,
    D_ROOM: tl.constexpr,
    GROUPS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row = tl.program_id(0)
    c = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    v = c[:, None] * TOGETHER + tl.arange(0, TOGETHER)[None, :]
    of_row = logits + row.to(tl.int64) * V
    chances = _chances(tl.load(of_row + v, mask=v < V, other=0.0), _scale(x, row, D, D_ROOM), cap)
    tl.store(sums + row * C + c, tl.sum(tl.where(v < V, chances, 0.0), axis=1), mask=c < C)


@triton.jit
def _choose(
    logits,
    x,
    sums,
    uniforms,
    step,
    embedding,
    ids,
    logprobs,
    B,
    V,
    C,
    cap,
    C_ROOM: tl.constexpr,
    D: tl.constexpr,
    D_ROOM: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row = tl.program_id(0)
    t = tl.load(step + row) + 1
    c, i, d = tl.arange(0, C_ROOM), tl.arange(0, TOGETHER), tl.arange(0, D_ROOM)
    upto = tl.cumsum(tl.load(sums + row * C + c, mask=c < C, other=0.0))
    total = tl.max(upto)
    threshold = tl.load(uniforms + t * B + row) * total
    # Rounding may let the last sum fall short of the threshold.
    group = tl.minimum(tl.sum((upto <= threshold).to(tl.int32)), C - 1)
    before = tl.sum(tl.where(c == group - 1, upto, 0.0))

    v = group * TOGETHER + i
    of_row = logits + row.to(tl.int64) * V
    scale = _scale(x, row, D, D_ROOM)
    chances = _chances(tl.load(of_row + v, mask=v < V, other=0.0), scale, cap)
    chances = tl.where(v < V, chances, 0.0)
    within = tl.sum((tl.cumsum(chances) <= threshold - before).to(tl.int32))
    chosen = tl.minimum(group * TOGETHER + tl.minimum(within, TOGETHER - 1), V - 1)
    chance = tl.sum(tl.where(v == chosen, chances, 0.0))
    tl.store(step + row, t)
    tl.store(ids + t * B + row, chosen.to(tl.int64))
    tl.store(logprobs + t * B + row, tl.log(chance / total))
    word = tl.load(embedding + chosen.to(tl.int64) * D + d, mask=d < D)
    tl.store(x + row * D + d, word, mask=d < D)
