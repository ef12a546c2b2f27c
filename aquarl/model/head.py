"""Hidden states and the tokens that followed in, log-probabilities out, without keeping logits.

The head and the loss of every learner. Logits of N tokens over V words are made a few rows at a
time and forgotten. Where N * V numbers are few, as small vocabularies have them, their slopes are
kept for the way back, which is then two products; else they are made again. So a vocabulary of
65,536 needs no more room than one of 4,096.

Shapes: N tokens, D width, V vocabulary.
Source: the idea is cut cross-entropy's (arXiv:2411.09009); the soft-cap is the policy's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aquarl.model.gpt import GPT, SOFT_CAP
from aquarl.model.modes import has_loops, has_triton, kernels_for
from aquarl.model.products import is_numpys, mm

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Room for the fp32 logits of one chunk. A product of few rows spends its time on the weights."""

FUSED_ROWS = 4096
"""Of one chunk where a kernel reads its bf16 logits: so many that the products are large ones."""

KEPT_BYTES, KEPT_SHARE = 1 << 28, 8
"""Of slopes, at most, on a CPU; and on a GPU, what part of its memory."""

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
        N, V = len(ids_N), len(weight_VD)
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logprobs_N, entropy_N = (hidden_ND.new_empty(N, dtype=wide) for _ in range(2))
        slopes_NV = hidden_slopes_ND = None
        kept_bytes = N * V * weight_VD.element_size()
        if any(ctx.needs_input_grad) and kept_bytes <= _room_for_slopes(hidden_ND):
            slopes_NV, hidden_slopes_ND = hidden_ND.new_empty(N, V), torch.empty_like(hidden_ND)
        for rows in _chunks(hidden_ND, V):
            room_CV = None if slopes_NV is None else slopes_NV[rows]
            chunk = _chunk(hidden_ND[rows], weight_VD, ids_N[rows], temperature, room_CV=room_CV)
            logprobs_N[rows], entropy_N[rows] = chunk.logprobs_C, chunk.entropy_C()
            if room_CV is not None and hidden_slopes_ND is not None:
                slopes_CV = chunk.slopes_CV()
                if slopes_CV.dtype != room_CV.dtype:  # else it is its room already
                    room_CV.copy_(slopes_CV)
                mm(room_CV, weight_VD, out=hidden_slopes_ND[rows])
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N, logprobs_N, slopes_NV, hidden_slopes_ND)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_ND, weight_VD, ids_N, logprobs_N, slopes_NV, hidden_slopes_ND = ctx.saved_tensors
        grads_N1 = grads[0][:, None]
        scaled_ND = (hidden_ND * grads_N1).to(hidden_ND.dtype)
        if slopes_NV is not None:
            hidden_grad_ND = (hidden_slopes_ND * grads_N1).to(hidden_ND.dtype)
            return hidden_grad_ND, mm(slopes_NV.T, scaled_ND), None, None
        hidden_grad_ND = torch.empty_like(hidden_ND)
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=grads_N1.dtype)
        for rows in _chunks(hidden_ND, len(weight_VD)):
            chunk = _chunk(
                hidden_ND[rows], weight_VD, ids_N[rows], ctx.temperature, logprobs_N[rows]
            )
            slopes_CV = chunk.slopes_CV().to(weight_VD.dtype)
            mm(slopes_CV, weight_VD, out=hidden_grad_ND[rows])
            _add_product(weight_grad_VD, slopes_CV.T, scaled_ND[rows])
        return hidden_grad_ND.mul_(grads_N1), weight_grad_VD.to(weight_VD.dtype), None, None


def _is_fused(hidden_ND: Tensor) -> bool:
    return hidden_ND.is_cuda and hidden_ND.dtype == torch.bfloat16 and has_triton()


def _chunk(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    ids_C: Tensor,
    temperature: float,
    logprobs_C: Tensor | None = None,
    room_CV: Tensor | None = None,
) -> _Chunk | _FusedChunk | _LoopChunk:
    """Return some rows of logits, for the first time or, with their logprobs, for the second.

    Args:
        room_CV: Where the slopes are to be in the end, if they have the width of what is given.
    """
    if _is_fused(hidden_CD):
        return _FusedChunk(hidden_CD, weight_VD, ids_C, temperature, logprobs_C, room_CV)
    if has_loops(hidden_CD):
        return _LoopChunk(hidden_CD, weight_VD, ids_C, temperature, room_CV)
    return _Chunk(hidden_CD, weight_VD, ids_C, temperature, room_CV=room_CV)


class _FusedChunk:
    """`_Chunk` in a kernel there and one back. The logits are kept in bf16, as long as this is."""

    def __init__(
        self,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        ids_C: Tensor,
        temperature: float,
        logprobs_C: Tensor | None = None,
        room_CV: Tensor | None = None,
    ):
        from aquarl.model import fused

        self._fused, self.ids_C, self.temperature = fused, ids_C, temperature
        self._raw_CV = squashed_logits(hidden_CD, weight_VD, room_CV)
        self._cap = SOFT_CAP / temperature
        if logprobs_C is None:
            logprobs_C, self._entropy_C = fused.look(self._raw_CV, ids_C, self._cap)
        self.logprobs_C = logprobs_C

    def entropy_C(self) -> Tensor:
        return self._entropy_C

    def slopes_CV(self) -> Tensor:
        """See `_Chunk.slopes_CV`. Once only: the logits are gone then."""
        scale = 4 / self.temperature
        return self._fused.slopes_(self._raw_CV, self.ids_C, self.logprobs_C, self._cap, scale)


class _LoopChunk:
    """`_Chunk` in one loop of the CPU, which makes the slopes of the logits at once."""

    def __init__(
        self,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        ids_C: Tensor,
        temperature: float,
        room_CV: Tensor | None = None,
    ):
        self._slopes_CV = squashed_logits(hidden_CD, weight_VD, room_CV)
        self.logprobs_C, self._entropy_C = kernels_for(self._slopes_CV).look_(
            self._slopes_CV, ids_C, SOFT_CAP / temperature, 4 / temperature
        )

    def entropy_C(self) -> Tensor:
        return self._entropy_C

    def slopes_CV(self) -> Tensor:
        return self._slopes_CV


class _Chunk:
    """Some rows of logits, in fp32 at least."""

    def __init__(
        self,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        ids_C: Tensor,
        temperature: float,
        room_CV: Tensor | None = None,
    ):
        self.ids_C1, self.temperature = ids_C[:, None], temperature
        wide = torch.promote_types(hidden_CD.dtype, torch.float32)
        # tanh(x) is 2 sigmoid(2 x) - 1, and the sigmoid's slope is at hand.
        self.squashed_CV = squashed_logits(hidden_CD, weight_VD, room_CV).to(wide).sigmoid_()
        cap = SOFT_CAP / temperature
        self.logits_CV = torch.add(
            self.squashed_CV.new_tensor(-cap), self.squashed_CV, alpha=2 * cap
        )
        # Capped as they are, no maximum has to be taken off before.
        self.weights_CV = self.logits_CV.exp()
        self.sums_C1 = self.weights_CV.sum(dim=1, keepdim=True)
        self.logsums_C1 = self.sums_C1.log()
        self.logprobs_C = (self.logits_CV.gather(1, self.ids_C1) - self.logsums_C1)[:, 0]

    def entropy_C(self) -> Tensor:
        products_C11 = torch.bmm(self.weights_CV[:, None], self.logits_CV[:, :, None])
        return (self.logsums_C1 - products_C11[:, 0] / self.sums_C1)[:, 0]

    def slopes_CV(self) -> Tensor:
        """Return what a logprob gains by each of its row's logits before the cap.

        By the capped logit it is [is this token] - probability; the cap is a sigmoid's slope.
        """
        slopes_CV = self.squashed_CV.addcmul_(self.squashed_CV, self.squashed_CV, value=-1)
        scale = 4 / self.temperature
        chosen_C1 = slopes_CV.gather(1, self.ids_C1) * scale
        slopes_CV.mul_(self.weights_CV).mul_(-scale / self.sums_C1)
        return slopes_CV.scatter_add_(1, self.ids_C1, chosen_C1)


def squashed_logits(hidden_BD: Tensor, weight_VD: Tensor, out: Tensor | None = None) -> Tensor:
    """Return (B, V) numbers whose sigmoid s stands for the capped logit (2 s - 1) * SOFT_CAP."""
    if is_numpys(hidden_BD, len(weight_VD)):
        return mm(hidden_BD * (2 / SOFT_CAP), weight_VD.T, out=out)
    nothing = hidden_BD.new_empty(1)
    return torch.addmm(nothing, hidden_BD, weight_VD.T, beta=0, alpha=2 / SOFT_CAP, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be wider than both."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _room_for_slopes(x: Tensor) -> int:
    if x.is_cuda:
        return int(torch.cuda.get_device_properties(x.device).total_memory) // KEPT_SHARE
    return KEPT_BYTES


def _chunks(hidden_ND: Tensor, V: int) -> Iterator[slice]:
    room = CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cpu"])
    rows = FUSED_ROWS if _is_fused(hidden_ND) else max(32, room // (4 * V))
    return (slice(start, start + rows) for start in range(0, len(hidden_ND), rows))
