"""What `torch_engine.py`'s loop does, with tensors that keep their shapes and places.

On a GPU a token of a small policy is hundreds of kernels of a few microseconds each, and telling
the GPU of each takes longer than running it. A CUDA graph tells it of all at once, drawing and
noting included, if no shape changes and nothing is decided on the way. So here the number of the
step is a tensor, the cache has its full room from the start, and kernels of our own (`kernels.py`)
read of it what is in use.

The number of prompts and their room are rounded up, so that few recordings do. The same code
runs without recording in Triton's interpreter, on any CPU: that is how it is tested.

Shapes: see `decoder.py`; C groups of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from aquarl.engines import kernels
from aquarl.engines.decoder import Decoder
from aquarl.model.attention import Prefix
from aquarl.model.drawing import draw_from_any, is_inverted
from aquarl.model.gpt import SOFT_CAP
from aquarl.model.modes import sent
from aquarl.records import Sampling

SHORTEST = 64
"""Room for a prompt, at least; more is some power of two."""
WARM_UPS = 2
"""Before recording: libraries set themselves up in their first calls."""


class Form(NamedTuple):
    """What one recording is for."""

    prompts: int
    answers: int
    sampling: Sampling

    @classmethod
    def holding(cls, P: int, G: int, sampling: Sampling) -> Form:
        """Return the smallest form in which so many prompts have room."""
        return cls(power_of_two(P), G, sampling)


def power_of_two(count: int) -> int:
    """Return the least that is not below."""
    return 1 << (count - 1).bit_length()


class StaticBatch:
    """All tensors of a form, and its recording.

    Use: `begin`, put what chance there is to be into `uniforms_TB`, then `token` as often as tokens
    are wanted, `sampling.max_new_tokens` at most.

    Args:
        longest: A prompt that is to have room. Shorter ones take no longer for it.
    """

    def __init__(self, decoder: Decoder, form: Form, longest: int) -> None:
        self.decoder, self.form = decoder, form
        # At most as many as there are positions, which is no power of two.
        self.length = min(max(SHORTEST, power_of_two(longest)), len(decoder.model.turns))
        """Room for each prompt."""
        shape, weight_VD = decoder.shape, decoder.embedding_VD
        P, G, T = form.prompts, form.answers, form.sampling.max_new_tokens
        B, J, K = P * G, shape.kv_heads, shape.head_width
        device = weight_VD.device
        self.prompt_ids_PL = torch.zeros(P, self.length, dtype=torch.long, device=device)
        self.lengths_P = torch.ones(P, dtype=torch.long, device=device)
        self.caches = [
            kernels.Cache(
                *(weight_VD.new_empty(P, J, self.length, K) for _ in range(2)),
                *(weight_VD.new_empty(P, J, G, T, K) for _ in range(2)),
            )
            for _ in decoder.layers
        ]
        self.x_BD = weight_VD.new_zeros(B, shape.width)
        self.found_BD = torch.empty_like(self.x_BD)
        self.logits_BV = weight_VD.new_zeros(B, shape.vocab)
        """The head's product, not capped, with `x_BD`, which is not normalised."""
        self.sums_BC = torch.empty(B, -(-shape.vocab // kernels.TOGETHER), device=device)
        self.uniforms_TB = torch.zeros(T, B, device=device)
        self.ids_TB = torch.zeros(T, B, dtype=torch.long, device=device)
        self.logprobs_TB = torch.zeros(T, B, device=device)
        self.step_B = torch.zeros(B, dtype=torch.long, device=device)
        """Which of its tokens each row is at; -1 before the first."""
        self._compute_prompts: Callable[[], None] = self._prompts
        self._compute_token: Callable[[], None] = self._token
        if device.type == "cuda":
            self._compute_prompts = _recorded(self._prompts)
            self._compute_token = _recorded(self._token, before=lambda: self.step_B.fill_(-1))

    def begin(self, rows: Sequence[Sequence[int]]) -> None:
        """Compute new prompts, as many as the form has, or fewer: then the rest is what it was,
        and nobody hears of it."""
        ids_PL = torch.zeros(len(rows), self.length, dtype=torch.long)
        for ids_L, row in zip(ids_PL, rows, strict=True):
            ids_L[: len(row)] = torch.tensor(row)
        lengths_P = torch.tensor([len(row) for row in rows])
        for whole, part in ((self.prompt_ids_PL, ids_PL), (self.lengths_P, lengths_P)):
            whole[: len(rows)] = sent(part, whole.device)
        self._compute_prompts()

    def token(self) -> None:
        """Draw one more token for every row, note it, and compute what comes after it."""
        self._compute_token()

    def _prompts(self) -> None:
        prefix = Prefix(self.lengths_P)
        hidden_PLD = self.decoder.model(self.prompt_ids_PL, prefix)
        for cache, (keys, values) in zip(self.caches, prefix.keys_values, strict=True):
            cache.prompt_keys.copy_(keys)
            cache.prompt_values.copy_(values)
        last_P11 = (self.lengths_P - 1)[:, None, None]
        last_PGD = hidden_PLD.take_along_dim(last_P11, dim=1).expand(-1, self.form.answers, -1)
        self.x_BD.copy_(last_PGD.flatten(0, 1))
        torch.mm(self.x_BD, self.decoder.model.lm_head.weight.T, out=self.logits_BV)
        self.step_B.fill_(-1)

    def _token(self) -> None:
        if is_inverted(self.form.sampling):
            self._choose()
        else:
            self._choose_from_all()
        decoder, x_BD = self.decoder, self.x_BD
        for layer, cache in zip(decoder.layers, self.caches, strict=True):
            kernels.attend(
                x_BD @ layer.qkv_XD.T,
                x_BD,
                cache,
                self.lengths_P,
                self.step_B,
                decoder.model.turns,
                decoder.shape,
                self.found_BD,
            )
            x_BD.addmm_(self.found_BD, layer.out_DD.T)
            wide_BF = x_BD @ layer.wide_FD.T
            kernels.squared_relu(wide_BF, x_BD)
            x_BD.addmm_(wide_BF, layer.narrow_DF.T)
        torch.mm(x_BD, decoder.model.lm_head.weight.T, out=self.logits_BV)

    def _choose(self) -> None:
        temperature = self.form.sampling.temperature
        kernels.group_sums(self.logits_BV, self.x_BD, temperature, self.sums_BC)
        kernels.choose(
            self.logits_BV,
            self.x_BD,
            self.sums_BC,
            self.uniforms_TB,
            self.step_B,
            temperature,
            self.decoder.embedding_VD,
            self.ids_TB,
            self.logprobs_TB,
        )

    def _choose_from_all(self) -> None:
        """The seldom ways, evaluation's mostly: in torch's own operations."""
        wide_BD = self.x_BD.float()
        eps = torch.finfo(torch.float32).eps
        scale_B1 = wide_BD.square().mean(dim=1, keepdim=True).add_(eps).rsqrt_()
        logits_BV = SOFT_CAP * torch.tanh(self.logits_BV.float() * (scale_B1 / SOFT_CAP))
        step_1 = self.step_B.add_(1)[:1]  # the same for all
        uniforms_B = self.uniforms_TB.index_select(0, step_1)[0]
        ids_B, logprobs_B = draw_from_any(logits_BV, uniforms_B, self.form.sampling)
        self.ids_TB.index_copy_(0, step_1, ids_B[None])
        self.logprobs_TB.index_copy_(0, step_1, logprobs_B[None])
        self.x_BD.copy_(self.decoder.embedding_VD.index_select(0, ids_B))


def _recorded(
    work: Callable[[], None], before: Callable[[], object] = lambda: None
) -> Callable[[], None]:
    """Return what does the same at once. What the warm-ups leave behind is overwritten."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            before()
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
