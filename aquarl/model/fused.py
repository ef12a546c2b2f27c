"""What a GPU does to the logits of some rows, in one pass each way: `head.py` calls it.

torch's own operations would write (rows x vocabulary) numbers in fp32 a dozen times; here bf16 is
read once on the way there, and read and replaced once on the way back.

Shapes: see `head.py`; C rows of a chunk.
"""

# Triton's types are its own, and its functions are no Python that a checker could follow.
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS_AT_ONCE = 4096
WARPS = 8


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
