"""Groups of prompt and answers in one row without padding, and the attention that parts them.

The row holds of each group its prompt, then its answers, each without its last token, which
nothing follows. So a prompt is computed once for all its answers, forward and backward, and every
matrix of the model sees real tokens only. This is the learner's way; `attention.py` has the others.

Queries and keys are normalised, so no score exceeds sqrt(K): its exponential needs no maximum
taken off, and the softmax over prompt and answer is one division by the sum over both. The way
back is FlashAttention's (arXiv:2205.14135 appendix B.2), with the weights kept instead of remade.

On a GPU, in bf16, FlashAttention itself does it: prompts over themselves, answers over themselves,
answers over their prompts, each in one call for all groups. The two softmaxes of an answer become
one by their log-sums; handed the joint result and log-sum, its way back gives each part's share.
There all prompts come first in the row, then all answers, so that neither has to be gathered.

Shapes: N tokens of the row, n of one group, L of its prompt, G answers of at most T tokens, H
heads, J kv heads, K head width; Q tokens of the prompts, M of the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aquarl.model.modes import AMPERE, sent

Lengths = tuple[int, tuple[int, ...]]
"""Of a prompt, and of its answers as they stand in the row: some may be 0."""


class Packed:
    """Attention of groups in one row: prompts over themselves, answers over both.

    Args:
        lengths: Of the groups, one right after the other.
        head_width: K, on which it depends whether FlashAttention takes them.
    """

    def __init__(self, lengths: Sequence[Lengths], device: torch.device, head_width: int) -> None:
        self._lengths, self._device = lengths, device
        self._is_flash = is_for_flash(device, head_width)

    def order_N(self) -> Tensor | None:
        """Return the order in which the row's tokens are wanted, where it is not as they are."""
        return self._spans.order_N if self._is_flash else None

    @cached_property
    def _groups(self) -> list[_Group]:
        groups, start = [], 0
        for prompt, answers in self._lengths:
            end = start + prompt + sum(answers)
            groups.append(_Group(slice(start, end), prompt, _Padding(answers, self._device)))
            start = end
        return groups

    @cached_property
    def _spans(self) -> _Spans:
        return _Spans(self._lengths, self._device)

    def __call__(self, layer: int, q_1HNK: Tensor, k_1JNK: Tensor, v_1JNK: Tensor) -> Tensor:
        R = q_1HNK.shape[1] // k_1JNK.shape[1]
        # Not x[0], whose way back is a tensor of zeros and a copy.
        q_HNK, k_HNK, v_HNK = (x.squeeze(0) for x in (q_1HNK, k_1JNK, v_1JNK))
        if R > 1:
            k_HNK, v_HNK = (x.repeat_interleave(R, dim=0) for x in (k_HNK, v_HNK))
        if self._is_flash:
            rows = (x.transpose(0, 1) for x in (q_HNK, k_HNK, v_HNK))
            y_NHK: Tensor = _FlashAttention.apply(*rows, self._spans)
            return y_NHK.transpose(0, 1)[None]
        y_HNK: Tensor = _PackedAttention.apply(q_HNK, k_HNK, v_HNK, self._groups)
        return y_HNK[None]


def is_for_flash(device: torch.device, head_width: int) -> bool:
    """Whether FlashAttention takes what is computed there now (its own checks)."""
    if device.type != "cuda" or head_width % 8 or head_width > 256:
        return False
    if not torch.is_autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= AMPERE


class _Padding:
    """Answers one after the other <-> answers below one another."""

    def __init__(self, lengths_G: Sequence[int], device: torch.device) -> None:
        self.G, self.T, self.tokens = len(lengths_G), max(lengths_G), sum(lengths_G)
        lengths = torch.tensor(lengths_G, device=device)
        steps_T = torch.arange(self.T, device=device)
        is_real_GT = steps_T < lengths[:, None]
        self.sees_GTT = (is_real_GT[:, :, None] & steps_T[:, None].ge(steps_T)).float()
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


class _Spans:
    """Where the prompts and answers of a row stand, and FlashAttention's three calls over them."""

    def __init__(self, lengths: Sequence[Lengths], device: torch.device) -> None:
        of_prompts = [prompt for prompt, _ in lengths]
        of_groups = [sum(answers) for _, answers in lengths]
        of_answers = [length for _, answers in lengths for length in answers]
        self.prompt_tokens = sum(of_prompts)
        """Q"""
        is_prompt_N = torch.tensor([True, False]).repeat(len(lengths))
        counts = torch.tensor([of_prompts, of_groups]).T.flatten()
        is_answer_N = ~is_prompt_N.repeat_interleave(counts)
        self.order_N = sent(is_answer_N.to(torch.int8).argsort(stable=True), device)
        prompts, groups, answers = (
            _Sequences(sent(torch.tensor([0, *accumulate(x)], dtype=torch.int32), device), max(x))
            for x in (of_prompts, of_groups, of_answers)
        )
        self.prompts_alone = _Call(prompts, prompts, is_causal=True)
        self.answers_alone = _Call(answers, answers, is_causal=True)
        self.across = _Call(groups, prompts, is_causal=False)


class _Sequences(NamedTuple):
    starts: Tensor
    """(count + 1,) int32"""
    longest: int


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, spans: _Spans) -> Tensor:
        Q = spans.prompt_tokens
        (pq, aq), (pk, ak), (pv, av) = (_parted(x, Q) for x in (q_NHK, k_NHK, v_NHK))
        prompt = spans.prompts_alone.forward(pq, pk, pv)
        own, other = spans.answers_alone.forward(aq, ak, av), spans.across.forward(aq, pk, pv)
        y_NHK = torch.empty_like(q_NHK)
        y_NHK[:Q] = prompt.y
        logsum_HM = torch.logaddexp(own.logsum, other.logsum)
        share_MH1 = (other.logsum - logsum_HM).exp().T[:, :, None]
        torch.lerp(own.y, other.y, share_MH1.to(own.y.dtype), out=y_NHK[Q:])
        ctx.spans = spans
        ctx.save_for_backward(q_NHK, k_NHK, v_NHK, y_NHK, prompt.logsum, logsum_HM, *prompt.state)
        return y_NHK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NHK, k_NHK, v_NHK, y_NHK, logsum_prompt, logsum_HM, *state = ctx.saved_tensors
        spans, Q = ctx.spans, ctx.spans.prompt_tokens
        (pq, aq), (pk, ak), (pv, av) = (_parted(x, Q) for x in (q_NHK, k_NHK, v_NHK))
        (py, ay), (pg, ag) = (_parted(x, Q) for x in (y_NHK, grads[0].contiguous()))
        of_prompt = spans.prompts_alone.backward(pg, pq, pk, pv, py, logsum_prompt, state)
        of_own = spans.answers_alone.backward(ag, aq, ak, av, ay, logsum_HM, state)
        of_other = spans.across.backward(ag, aq, pk, pv, ay, logsum_HM, state)
        whole = [torch.empty_like(x) for x in (q_NHK, k_NHK, v_NHK)]
        for number, grad_NHK in enumerate(whole):
            prompt, own, other = of_prompt[number], of_own[number], of_other[number]
            (own if number == 0 else prompt).add_(other)  # the answers' queries, the prompts' rest
            torch.cat([prompt, own], out=grad_NHK)
        return whole[0], whole[1], whole[2], None


def _parted(x_NHK: Tensor, Q: int) -> tuple[Tensor, Tensor]:
    """Return the prompts' part of a row and the answers'."""
    return x_NHK[:Q], x_NHK[Q:]


class _Found(NamedTuple):
    y: Tensor
    logsum: Tensor
    """(H, rows) fp32"""
    state: tuple[Tensor, Tensor]
    """Of the dropout, of which there is none."""


class _Call(NamedTuple):
    """One of FlashAttention's calls, there and back: queries (rows, H, K) of sequences each over
    the keys of its own."""

    queries: _Sequences
    keys: _Sequences
    is_causal: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> _Found:
        if not len(q):
            nothing = q.new_empty(q.shape[1], 0, dtype=torch.float32)
            return _Found(torch.empty_like(q), nothing, (nothing, nothing))
        y, logsum, *state, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._places(), 0.0, self.is_causal, False
        )
        return _Found(y, logsum, (state[0], state[1]))

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        logsum: Tensor,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not len(q):
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, y, logsum, *self._places(), 0.0, self.is_causal, *state
        )
        return grads

    def _places(self) -> tuple[Tensor, Tensor, int, int]:
        return self.queries.starts, self.keys.starts, self.queries.longest, self.keys.longest
