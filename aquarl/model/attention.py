"""Four ways for a block's queries to meet keys and values; `gpt.py` is handed one of them.

causal            a row sees itself up to here: training on whole rows
WithinDocuments   the same, but never across the documents packed into a row
Prefix            causal, and remembers every layer's keys and values: the prompts
Continuation      rows that go on from a shared prefix: answers, token by token, of `serve.chat`
                  and of GPUs without kernels (else `engines.decoder`)

The G answers of a prompt share its keys and values without a copy: their queries are folded into
one long row per prompt (bifurcated attention, arXiv:2403.08845 section 4). The learner, which has
whole answers of unequal length, does the same by `packed.py`.

Shapes: see `records`; S keys seen, J kv heads, R query heads per kv head (H = J * R).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q_BHTK, k_BJTK, v_BJTK) -> y_BHTK"""


def causal(layer: int, q_BHTK: Tensor, k_BJTK: Tensor, v_BJTK: Tensor) -> Tensor:
    """Return attention of each position over itself and those before it."""
    is_grouped = q_BHTK.shape[1] != k_BJTK.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTK, k_BJTK, v_BJTK, is_causal=True, enable_gqa=is_grouped
    )


class WithinDocuments:
    """Causal attention that stops at document borders.

    Args:
        documents_BT: (B, T) int, the number of the document each position belongs to.
    """

    def __init__(self, documents_BT: Tensor) -> None:
        is_same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
        self.mask_B1TS = is_same_BTS.tril()[:, None]

    def __call__(self, layer: int, q_BHTK: Tensor, k_BJTK: Tensor, v_BJTK: Tensor) -> Tensor:
        is_grouped = q_BHTK.shape[1] != k_BJTK.shape[1]
        return F.scaled_dot_product_attention(
            q_BHTK, k_BJTK, v_BJTK, attn_mask=self.mask_B1TS, enable_gqa=is_grouped
        )


class Prefix:
    """Causal attention over right-padded prompts, kept for those who continue them.

    Args:
        lengths_P: (P,) int, how many positions of each row are real.
    """

    def __init__(self, lengths_P: Tensor) -> None:
        self.lengths_P = lengths_P
        self.keys_values: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, q_PHTK: Tensor, k_PJTK: Tensor, v_PJTK: Tensor) -> Tensor:
        assert layer == len(self.keys_values), "a prefix is computed once, layer by layer"
        self.keys_values.append((k_PJTK, v_PJTK))
        return causal(layer, q_PHTK, k_PJTK, v_PJTK)

    def kept(self, prompts: Tensor) -> Prefix:
        """Return these prompts of it."""
        kept = Prefix(self.lengths_P[prompts])
        kept.keys_values = [(keys[prompts], values[prompts]) for keys, values in self.keys_values]
        return kept

    @property
    def mask_PT(self) -> Tensor:
        """(P, T) float: 0 where the prompt is real, -inf on its padding."""
        positions_T = torch.arange(self.keys_values[0][0].shape[2], device=self.lengths_P.device)
        is_real_PT = positions_T < self.lengths_P[:, None]
        return torch.zeros_like(is_real_PT, dtype=torch.float32).masked_fill(
            ~is_real_PT, float("-inf")
        )


class Continuation:
    """Attention of answers over their prompt and over themselves, some positions a call.

    Keys and values are kept from call to call in a cache that is allocated once.

    Args:
        prefix: The P prompts, already computed.
        answers_per_prompt: G. Rows are ordered prompt by prompt: B = P * G.
        room: Positions to allocate for each answer.
    """

    def __init__(self, prefix: Prefix, answers_per_prompt: int, room: int) -> None:
        self.prefix, self.G, self.room = prefix, answers_per_prompt, room
        self.P = len(prefix.lengths_P)
        self.length = 0
        """Positions of the answers that are in the cache already."""
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._prompt_mask_PT = prefix.mask_PT

    def positions_BT(self, new_positions: int) -> Tensor:
        """(B, T): where in its sequence each of the next positions stands."""
        starts_B = self.prefix.lengths_P.repeat_interleave(self.G) + self.length
        steps_T = torch.arange(new_positions, device=starts_B.device)
        return starts_B[:, None] + steps_T

    def advance(self, new_positions: int) -> None:
        self.length += new_positions

    def keep(self, prompts: Tensor, answers_PG: Tensor) -> None:
        """Drop all rows but these answers of these prompts, in the old numbering."""
        rows_B = (prompts[:, None] * self.G + answers_PG).flatten()
        self._cache = [(keys[rows_B], values[rows_B]) for keys, values in self._cache]
        self.prefix = self.prefix.kept(prompts)
        self._prompt_mask_PT = self._prompt_mask_PT[prompts]
        self.P, self.G = answers_PG.shape

    def __call__(self, layer: int, q_BHTK: Tensor, k_BJTK: Tensor, v_BJTK: Tensor) -> Tensor:
        B, H, T, K = q_BHTK.shape
        J = k_BJTK.shape[1]
        P, G, R = B // self.G, self.G, H // J
        k_BJSK, v_BJSK = self._remember(layer, k_BJTK, v_BJTK)
        S = k_BJSK.shape[2]
        prompt_k_PJTK, prompt_v_PJTK = self.prefix.keys_values[layer]
        prompt_length = prompt_k_PJTK.shape[2]

        # All answers of a prompt, and all query heads of a kv head, become rows of one matrix.
        q_BJRTK = (q_BHTK * K**-0.5).reshape(B, J, R * T, K)
        q_PJ_K = q_BJRTK.view(P, G, J, R * T, K).transpose(1, 2).reshape(P, J, G * R * T, K)
        to_prompt = q_PJ_K @ prompt_k_PJTK.transpose(2, 3) + self._prompt_mask_PT[:, None, None]
        to_prompt = to_prompt.view(P, J, G, R * T, prompt_length).transpose(1, 2)
        to_answer = q_BJRTK @ k_BJSK.transpose(2, 3)
        if T > 1:
            is_future_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).triu(S - T + 1)
            to_answer = to_answer.masked_fill(is_future_TS.repeat(R, 1), float("-inf"))

        scores = torch.cat([to_prompt.reshape(B, J, R * T, prompt_length), to_answer], dim=-1)
        # The mask is fp32 and widens the scores of a bf16 model; the values are not.
        weights = scores.softmax(dim=-1).to(v_BJSK.dtype)
        on_prompt, on_answer = weights.split([prompt_length, S], dim=-1)
        on_prompt = on_prompt.reshape(P, G, J, R * T, prompt_length).transpose(1, 2)
        y = on_prompt.reshape(P, J, G * R * T, prompt_length) @ prompt_v_PJTK
        y = y.view(P, J, G, R * T, K).transpose(1, 2).reshape(B, J, R * T, K) + on_answer @ v_BJSK
        return y.reshape(B, H, T, K)

    def _remember(self, layer: int, k_BJTK: Tensor, v_BJTK: Tensor) -> tuple[Tensor, Tensor]:
        B, J, T, K = k_BJTK.shape
        if layer == len(self._cache):
            shape = (B, J, self.room, K)
            self._cache.append((k_BJTK.new_empty(shape), v_BJTK.new_empty(shape)))
        keys, values = self._cache[layer]
        end = self.length + T
        keys[:, :, self.length : end] = k_BJTK
        values[:, :, self.length : end] = v_BJTK
        return keys[:, :, :end], values[:, :, :end]
