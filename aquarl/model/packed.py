"""Groups of prompt and answers in one row without padding, and the attention that parts them.

The row holds of each group its prompt, then its answers, each without its last token, which
nothing follows. So a prompt is computed once for all its answers, forward and backward, and every
matrix of the model sees real tokens only. This is the learner's way; `attention.py` has the others.

Queries and keys are normalised, so no score exceeds sqrt(K): its exponential needs no maximum
taken off, and the softmax over prompt and answer is one division by the sum over both. The way
back is FlashAttention's (arXiv:2205.14135 appendix B.2), with the weights kept instead of remade.

Shapes: N tokens of the row, n of one group, L of its prompt, G answers of at most T tokens, H
heads, J kv heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Lengths = tuple[int, tuple[int, ...]]
"""Of a prompt, and of its answers as they stand in the row: some may be 0."""


class Packed:
    """Attention of groups in one row: prompts over themselves, answers over both.

    Args:
        lengths: Of the groups, one right after the other.
    """

    def __init__(self, lengths: Sequence[Lengths], device: torch.device) -> None:
        self._groups = []
        start = 0
        for prompt, answers in lengths:
            end = start + prompt + sum(answers)
            self._groups.append(_Group(slice(start, end), prompt, _Padding(answers, device)))
            start = end

    def __call__(self, layer: int, q_1HNK: Tensor, k_1JNK: Tensor, v_1JNK: Tensor) -> Tensor:
        R = q_1HNK.shape[1] // k_1JNK.shape[1]
        k_HNK, v_HNK = k_1JNK[0], v_1JNK[0]
        if R > 1:
            k_HNK, v_HNK = (x.repeat_interleave(R, dim=0) for x in (k_HNK, v_HNK))
        y_HNK: Tensor = _PackedAttention.apply(q_1HNK[0], k_HNK, v_HNK, self._groups)
        return y_HNK[None]


class _Padding:
    """Answers one after the other <-> answers below one another."""

    def __init__(self, lengths_G: Sequence[int], device: torch.device) -> None:
        self.G, self.T, self.tokens = len(lengths_G), max(lengths_G), sum(lengths_G)
        lengths = torch.tensor(lengths_G, device=device)
        steps_T = torch.arange(self.T, device=device)
        is_real_GT = steps_T < lengths[:, None]
        self.sees_GTT = (is_real_GT[:, :, None] & torch.ones(self.T, self.T).tril().bool()).float()
        self.is_even = self.tokens == self.G * self.T
        """No answer is shorter than another: there is nothing to pad."""
        first_G1 = (lengths.cumsum(0) - lengths)[:, None]
        # What stands on the padding is seen by nobody, so it may be any token's.
        self.source = (first_G1 + steps_T).clamp(max=self.tokens - 1).flatten()
        self.places = is_real_GT.flatten().nonzero()[:, 0]

    def add(self, x_HnX: Tensor) -> Tensor:
        """(H, n, X) -> (H * G, T, X)"""
        H, _, X = x_HnX.shape
        padded = x_HnX if self.is_even else x_HnX.index_select(1, self.source)
        return padded.reshape(H * self.G, self.T, X)

    def remove(self, x_BTX: Tensor) -> Tensor:
        """(H * G, T, X) -> (H, n, X)"""
        padded = x_BTX.view(-1, self.G * self.T, x_BTX.shape[2])
        return padded if self.is_even else padded.index_select(1, self.places)

    def causal_(self, weights_BTT: Tensor) -> Tensor:
        """Take away what is in the future, and what is padding."""
        weights_BTT.view(-1, *self.sees_GTT.shape).mul_(self.sees_GTT)
        return weights_BTT


class _Group(NamedTuple):
    rows: slice
    prompt: int
    """L"""
    padding: _Padding


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_HNK: Tensor,
        k_HNK: Tensor,
        v_HNK: Tensor,
        groups: Sequence[_Group],
    ) -> Tensor:
        ctx.scale = q_HNK.shape[2] ** -0.5
        q_HNK = q_HNK * ctx.scale
        y_HNK = torch.empty_like(v_HNK)
        kept: list[Tensor] = []
        for rows, L, padding in groups:
            q, k, v, y = (x[:, rows] for x in (q_HNK, k_HNK, v_HNK, y_HNK))
            on_prompt_HnL = _exponentials(q, k[:, :L])
            on_prompt_HnL[:, :L].tril_()
            sums_Hn1 = on_prompt_HnL.sum(dim=2, keepdim=True)
            on_prompt_HnL = on_prompt_HnL.to(v.dtype)
            sum_HnK = on_prompt_HnL @ v[:, :L]
            if padding.tokens:
                q_BTK, k_BTK, v_BTK = (padding.add(x[:, L:]) for x in (q, k, v))
                on_answer_BTT = padding.causal_(_exponentials(q_BTK, k_BTK))
                sums_Hn1[:, L:] += padding.remove(on_answer_BTT.sum(dim=2, keepdim=True))
                on_answer_BTT = on_answer_BTT.to(v.dtype)
                sum_HnK[:, L:] += padding.remove(on_answer_BTT @ v_BTK)
                kept.append(on_answer_BTT)
            torch.div(sum_HnK, sums_Hn1, out=y)
            kept += [on_prompt_HnL, sums_Hn1]
        ctx.groups = groups
        ctx.save_for_backward(q_HNK, k_HNK, v_HNK, y_HNK, *kept)
        return y_HNK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_HNK, k_HNK, v_HNK, y_HNK, *kept = ctx.saved_tensors
        all_of_row = (q_HNK, k_HNK, v_HNK, y_HNK, grads[0])
        out = torch.empty_like(q_HNK), torch.empty_like(k_HNK), torch.empty_like(v_HNK)
        saved = iter(kept)
        for rows, L, padding in ctx.groups:
            q, k, v, y, grad = (x[:, rows] for x in all_of_row)
            q_grad, k_grad, v_grad = (x[:, rows] for x in out)
            on_answer_BTT = next(saved) if padding.tokens else None
            on_prompt_HnL, sums_Hn1 = next(saved), next(saved)
            grad = (grad / sums_Hn1).to(v.dtype)
            shared_Hn1 = (grad * y).sum(dim=2, keepdim=True)
            parts = _way_back(grad, shared_Hn1, on_prompt_HnL, q, k[:, :L], v[:, :L])
            q_grad[:], k_grad[:, :L], v_grad[:, :L] = parts
            if on_answer_BTT is not None:
                grad, shared_BT1, *qkv = (
                    padding.add(x[:, L:]) for x in (grad, shared_Hn1, q, k, v)
                )
                parts = _way_back(grad, shared_BT1, on_answer_BTT, *qkv)
                q_part, k_grad[:, L:], v_grad[:, L:] = map(padding.remove, parts)
                q_grad[:, L:] += q_part
        out[0].mul_(ctx.scale)
        return *out, None


def _exponentials(q: Tensor, k: Tensor) -> Tensor:
    """exp(q k^T), in fp32 at least."""
    scores = q @ k.transpose(1, 2)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).exp_()


def _way_back(
    grad: Tensor, shared: Tensor, weights: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through one of a row's two sets of weights.

    Args:
        grad: Of the output, divided by the sum of all weights of its row.
        shared: (..., 1) its product with the output.
        weights: Exponentials, not divided by their sum.
    """
    v_grad = weights.transpose(1, 2) @ grad
    scores_grad = (grad @ v.transpose(1, 2)).sub_(shared).mul_(weights)
    return scores_grad @ k, scores_grad.transpose(1, 2) @ q, v_grad
