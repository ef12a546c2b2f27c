"""The same tokens as `torch_engine.py`'s loop, from tensors that keep their shapes and places.

On a GPU a token of a small policy is hundreds of kernels of a few microseconds each, and telling
the GPU of each takes longer than running it. A CUDA graph tells it of all at once, drawing and
recording included, if no shape changes and nothing is decided on the way. So here the number of the
step is a tensor, the cache has its full room from the start, and what is not written yet has
values, and ones, of zero, which add nothing to any sum.

Sizes are rounded up, to few different ones, each recorded once. The very same code runs without
recording on a CPU, where it is slower than the usual way: that is how it is tested.

Shapes: see `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aquarl.engines.decoder import Decoder, Decoding, KeysValues, SharedPrompts, turn
from aquarl.engines.drawing import draw
from aquarl.model.attention import Prefix
from aquarl.records import Sampling

PROMPT_STEP, SPAN_STEP = 64, 64
"""Lengths of prompts, and of what is read of the answers' cache, are multiples of these."""
WARM_UPS = 2
"""Before recording: libraries set themselves up in their first calls."""


class Form(NamedTuple):
    """What one recording is for."""

    prompts: int
    answers: int
    length: int
    """Of the longest prompt."""
    sampling: Sampling

    @classmethod
    def holding(cls, rows: Sequence[Sequence[int]], G: int, sampling: Sampling) -> Form:
        """Return the smallest form in which these prompts have room."""
        longest = max(map(len, rows))
        return cls(
            prompts=1 << (len(rows) - 1).bit_length(),
            answers=G,
            length=-(-longest // PROMPT_STEP) * PROMPT_STEP,
            sampling=sampling,
        )


class StaticDecoding(Decoding):
    """A `Decoding` whose step changes numbers, and no shape or place."""

    def __init__(self, decoder: Decoder, prefix: Prefix, G: int, room: int) -> None:
        super().__init__(decoder, [prefix], G, room)
        self.cache = [[self._empty(room)] for _ in decoder.layers]
        self.step_1 = torch.zeros(1, dtype=torch.long, device=prefix.lengths_P.device)
        """Positions of the answers that are in the cache already."""
        self.span = room
        """Positions of the cache that are read: those written, or some more."""

    def restart(self, prefix: Prefix) -> None:
        """Begin anew behind other prompts, in the places of the old ones."""
        self.turns_TPK.copy_(self.decoder.turns_after(prefix.lengths_P, self.room))
        (old,), new = self.prompts, SharedPrompts(prefix)
        for to, source in zip(old.keys + old.values, new.keys + new.values, strict=True):
            to.copy_(source)
        self.clear()

    def clear(self) -> None:
        self.step_1.zero_()
        for blocks in self.cache:
            for keys, values in blocks:
                keys.zero_()
                values.zero_()

    def _make_room(self) -> None:
        pass

    def _turns_PK(self) -> Tensor:
        return self.turns_TPK.index_select(0, self.step_1)[0]

    def _remember(
        self, number: int, k_PGJK: Tensor, v_PGJK: Tensor, turns_P11K: Tensor
    ) -> list[KeysValues]:
        [(keys, values)] = self.cache[number]
        k_PJG1K = torch.empty_like(keys[:, :, :, :1])
        v_PJG1W = torch.ones_like(values[:, :, :, :1])
        turn(k_PGJK, turns_P11K, k_PJG1K[:, :, :, 0].transpose(1, 2))
        v_PJG1W[:, :, :, 0, :-1] = v_PGJK.transpose(1, 2)
        keys.index_copy_(3, self.step_1, k_PJG1K)
        values.index_copy_(3, self.step_1, v_PJG1W)
        return [(keys.flatten(0, 2)[:, : self.span], values.flatten(0, 2)[:, : self.span])]


class StaticBatch:
    """All tensors of a form, and its recordings: one for each span of the cache.

    Use: `begin`, then `token` as often as tokens are wanted, `sampling.max_new_tokens` at most.
    """

    def __init__(self, decoder: Decoder, form: Form, prefix: Prefix) -> None:
        self.decoder, self.form = decoder, form
        B, T = form.prompts * form.answers, form.sampling.max_new_tokens
        device = prefix.lengths_P.device
        self.answers = StaticDecoding(decoder, prefix, form.answers, room=T)
        self.uniforms_TB = torch.zeros(T, B, device=device)
        self.ids_TB = torch.zeros(T, B, dtype=torch.long, device=device)
        self.logprobs_TB = torch.zeros(T, B, device=device)
        self.squashed_BV = torch.full((B, decoder.shape.vocab), 0.5, device=device)
        self.made = 0
        """Tokens of each row so far."""
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            for span in range(SPAN_STEP, T + SPAN_STEP, SPAN_STEP):
                self._record(min(span, T))

    def begin(self, prefix: Prefix, last_hidden_PD: Tensor, uniforms_TB: Tensor) -> None:
        """Take new prompts, as many as the form has, and what chance there is to be."""
        self.answers.restart(prefix)
        squashed_PV = self.decoder.squashed(last_hidden_PD)
        self.squashed_BV.copy_(squashed_PV.repeat_interleave(self.form.answers, dim=0))
        self.uniforms_TB.copy_(uniforms_TB)
        self.made = 0

    def token(self) -> None:
        """Draw one more token for every row, note it, and compute what comes after it."""
        T = self.form.sampling.max_new_tokens
        span = min(-(-(self.made + 1) // SPAN_STEP) * SPAN_STEP, T)
        if span in self._graphs:
            self._graphs[span].replay()
        else:
            self._token(span)
        self.made += 1

    def _token(self, span: int) -> None:
        step_1, self.answers.span = self.answers.step_1, span
        uniforms_B = self.uniforms_TB.index_select(0, step_1)[0]
        ids_B, logprobs_B = draw(self.squashed_BV, uniforms_B, self.form.sampling)
        self.ids_TB.index_copy_(0, step_1, ids_B[None])
        self.logprobs_TB.index_copy_(0, step_1, logprobs_B[None])
        self.squashed_BV.copy_(self.decoder.squashed(self.answers.step(ids_B)))
        step_1.add_(1)

    def _record(self, span: int) -> None:
        """Record a token. What the warm-ups leave behind, `begin` clears."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.answers.clear()
                self._token(span)
        torch.cuda.current_stream().wait_stream(side)
        self.answers.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._token(span)
        self._graphs[span] = graph


def padded(rows: Sequence[Sequence[int]], form: Form) -> list[list[int]]:
    """Return as many rows as the form has, by repeating the last."""
    return [list(row) for row in rows] + [list(rows[-1])] * (form.prompts - len(rows))
