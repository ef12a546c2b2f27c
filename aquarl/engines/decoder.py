"""A policy and computed prompts in, what comes after one more token of every row out, again and
again: `torch_engine.py` draws from it.

It is what `GPT` computes with `attention.Continuation`, arranged for one position a call, where a
CPU spends its time on many small kernels and on reading caches, and a GPU on being told to:

- Queries, keys and values come from one product, residuals are added by a product, the embedding
  is normalised beforehand, and turning a head is one complex product (`gpt.interleaved`).
- Scores are bounded, so their exponentials need no maximum (`model/packed.py`). A column of ones
  beside the values adds them up. What is not to be seen has values, and a one, of zero: so there
  is no mask and no second sum.
- Prompts of like length stand together (`Prefix`es of a few), so that little is padded.
- The answers' cache is made of blocks: what is in use lies together, and is read twice as fast.

Shapes: see `records`; J kv heads, R query heads per kv head, A = P * J * G caches, S their keys,
L positions of a prompt, W = K + 1 columns of values and one, X columns of q, k and v together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from aquarl.model.attention import Prefix
from aquarl.model.gpt import GPT, Block, interleaved, norm
from aquarl.model.head import squashed_logits

BLOCK = 16
"""Positions of the answers in a block of their cache."""


KeysValues = tuple[Tensor, Tensor]


class _Layer(NamedTuple):
    qkv_XD: Tensor
    out_DD: Tensor
    wide_FD: Tensor
    narrow_DF: Tensor


class Decoder:
    """A policy's weights as decoding wants them. `refresh` it when the policy has new ones."""

    def __init__(self, model: GPT) -> None:
        self.model, self.shape = model, model.shape
        H, J, K = self.shape.heads, self.shape.kv_heads, self.shape.head_width
        device, wide = model.turns.device, model.turns.dtype
        self.turns_TK = torch.view_as_complex(model.turns)
        eps = torch.finfo(wide).eps
        is_query_X1 = (torch.arange(H + J, device=device) < H)[:, None]
        # (squares / K + eps)^-1/2, for queries times the K^-1/2 by which scores are divided.
        self.slopes_X1 = torch.where(is_query_X1, 1.0, 1.0 / K).to(wide)
        self.eps_X1 = torch.where(is_query_X1, K * eps, eps).to(wide)
        self.embedding_VD = torch.empty_like(model.transformer.wte.weight)
        self._blocks = cast("list[Block]", list(model.transformer.h))
        self.layers = [
            _Layer(
                block.attn.c_q.weight.new_empty((H + 2 * J) * K, self.shape.width),
                block.attn.c_proj.weight,
                block.mlp.c_fc.weight,
                block.mlp.c_proj.weight,
            )
            for block in self._blocks
        ]
        self.refresh()

    @torch.inference_mode()
    def refresh(self) -> None:
        """Take the policy's weights as they are now, each to the place of the old one."""
        H, J, K = self.shape.heads, self.shape.kv_heads, self.shape.head_width
        self.embedding_VD.copy_(norm(self.model.transformer.wte.weight))
        for block, layer in zip(self._blocks, self.layers, strict=True):
            q, k, v = layer.qkv_XD.split([H * K, J * K, J * K])
            q.copy_(interleaved(block.attn.c_q.weight, K))
            k.copy_(interleaved(block.attn.c_k.weight, K))
            v.copy_(block.attn.c_v.weight)

    def turns_after(self, lengths_P: Tensor, room: int) -> Tensor:
        """Return (T, P, K / 2) complex: by what each of so many positions after these is turned."""
        steps_T = torch.arange(room, device=lengths_P.device)
        return self.turns_TK[steps_T[:, None] + lengths_P]

    def squashed(self, hidden_BD: Tensor) -> Tensor:
        """Return (B, V) fp32 numbers s in [0, 1] of which the logits are (2 s - 1) * SOFT_CAP."""
        return squashed_logits(hidden_BD, self.model.lm_head.weight).float().sigmoid_()


class Decoding:
    """The answers of one call of `Sampler.sample` on their way. Rows are ordered prompt by prompt.

    Args:
        prefixes: The computed prompts, some in each.
        G: Answers to each prompt; it falls when rows are dropped.
        room: Positions that an answer may come to have.
    """

    def __init__(self, decoder: Decoder, prefixes: Sequence[Prefix], G: int, room: int) -> None:
        self.decoder, self.G, self.room = decoder, G, room
        self.prompts = [SharedPrompts(prefix) for prefix in prefixes]
        lengths_P = torch.cat([prefix.lengths_P for prefix in prefixes])
        self.P = len(lengths_P)
        self.length = 0
        """Positions of the answers that are in the cache already."""
        self.turns_TPK = decoder.turns_after(lengths_P, room)
        self.cache: list[list[KeysValues]] = [[] for _ in decoder.layers]
        """The blocks of each layer, all full but the last."""

    def _empty(self, room: int) -> KeysValues:
        """Return room for keys (P, J, G, room, K) and for values and ones (P, J, G, room, W)."""
        J, K = self.decoder.shape.kv_heads, self.decoder.shape.head_width
        keys = self.decoder.embedding_VD.new_empty(self.P, J, self.G, room, K)
        values = keys.new_empty(self.P, J, self.G, room, K + 1)
        values[..., K] = 1.0
        return keys, values

    def _make_room(self) -> None:
        if self.length % BLOCK == 0:
            for blocks in self.cache:
                blocks.append(self._empty(min(BLOCK, self.room - self.length)))

    def _remember(
        self, number: int, k_PGJK: Tensor, v_PGJK: Tensor, turns_P11K: Tensor
    ) -> list[KeysValues]:
        """Append a key, turned, and a value to a layer's cache. Return all of it that is in use,
        some positions after the other: keys (A, S, K), values and ones (A, S, W)."""
        *full, (keys, values) = self.cache[number]
        at = self.length % BLOCK
        turn(k_PGJK, turns_P11K, keys[:, :, :, at].transpose(1, 2))
        values[:, :, :, at, :-1] = v_PGJK.transpose(1, 2)
        used = [*full, (keys[:, :, :, : at + 1], values[:, :, :, : at + 1])]
        return [(keys.flatten(0, 2), values.flatten(0, 2)) for keys, values in used]

    def keep(self, prompts: Tensor, answers_PG: Tensor) -> None:
        """Drop all rows but these answers of these prompts (ascending), in the old numbering."""
        start = 0
        for part in self.prompts:
            is_here = (prompts >= start) & (prompts < start + part.count)
            start += part.count
            part.keep(prompts[is_here] - (start - part.count))
        self.prompts = [part for part in self.prompts if part.count]
        self.P, self.G = answers_PG.shape
        self.turns_TPK = self.turns_TPK[:, prompts]
        for blocks in self.cache:
            for number, block in enumerate(blocks):
                keys, values = (x[prompts[:, None], :, answers_PG].transpose(1, 2) for x in block)
                blocks[number] = keys.contiguous(), values.contiguous()

    def step(self, ids_B: Tensor) -> Tensor:
        """Return normalised hidden states (B, D) after one more token in each row."""
        self._make_room()
        x_BD = self.decoder.embedding_VD.index_select(0, ids_B)
        turns_P11K = self.turns_TPK[self.length][:, None, None]
        for number, layer in enumerate(self.decoder.layers):
            y_BD = self._attend(number, _normed(x_BD) @ layer.qkv_XD.T, turns_P11K)
            x_BD = torch.addmm(x_BD, y_BD, layer.out_DD.T)
            wide_BF = (_normed(x_BD) @ layer.wide_FD.T).relu_()
            x_BD = torch.addmm(x_BD, wide_BF.mul_(wide_BF), layer.narrow_DF.T)
        self.length += 1
        return _normed(x_BD)

    def _attend(self, number: int, qkv_BX: Tensor, turns_P11K: Tensor) -> Tensor:
        """Put the position's key and value into a layer's cache; return what its query finds."""
        shape, P, G = self.decoder.shape, self.P, self.G
        H, J, K = shape.heads, shape.kv_heads, shape.head_width
        R = H // J
        qkv = qkv_BX.view(P, G, H + 2 * J, K)
        qk = self._unit(qkv[:, :, : H + J])
        q = qkv.new_empty(P, J, G, R, K)
        turn(qk[:, :, :H].view(P, G, J, R, K), turns_P11K[:, None], q.transpose(1, 2))
        answers = self._remember(number, qk[:, :, H:], qkv[:, :, H + J :], turns_P11K)

        sums = q.new_empty(P, J, G, R, K + 1)
        start = 0
        for part in self.prompts:
            rows = slice(start, start + part.count)
            part.attend(number, q[rows].view(-1, G * R, K), sums[rows].view(-1, G * R, K + 1))
            start += part.count
        q_ARK, sums_ARW = q.view(-1, R, K), sums.view(-1, R, K + 1)
        for k_ASK, v_ASW in answers:
            torch.baddbmm(sums_ARW, weights(q_ARK, k_ASK), v_ASW, out=sums_ARW)
        y = q.new_empty(P, G, J, R, K)
        in_order = sums.transpose(1, 2)
        torch.div(in_order[..., :K], in_order[..., K:], out=y)
        return y.view(P * G, H * K)

    def _unit(self, qk: Tensor) -> Tensor:
        """Return queries and keys normalised, in fp32 at least."""
        wide, decoder = qk.to(self.decoder.slopes_X1.dtype), self.decoder
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        return wide.mul_(torch.addcmul(decoder.eps_X1, squares, decoder.slopes_X1).rsqrt_())


class SharedPrompts:
    """Some prompts of all layers: keys (count * J, L, K), values and ones (count * J, L, W)."""

    def __init__(self, prefix: Prefix) -> None:
        lengths = prefix.lengths_P
        self.count = len(lengths)
        L = prefix.keys_values[0][0].shape[2]
        is_real = (torch.arange(L, device=lengths.device) < lengths[:, None])[:, None, :, None]
        self.keys = [k.flatten(0, 1) for k, _ in prefix.keys_values]
        self.values = [
            torch.cat([v * is_real, is_real.to(v.dtype).expand_as(v[..., :1])], dim=3).flatten(0, 1)
            for _, v in prefix.keys_values
        ]

    def keep(self, prompts: Tensor) -> None:
        if len(prompts) == self.count:
            return
        for tensors in (self.keys, self.values):
            tensors[:] = [t.unflatten(0, (self.count, -1))[prompts].flatten(0, 1) for t in tensors]
        self.count = len(prompts)

    def attend(self, number: int, q: Tensor, out: Tensor) -> None:
        """Write the unnormalised sums over the prompts, and of the weights, to `out`."""
        torch.bmm(weights(q, self.keys[number]), self.values[number], out=out)


def weights(q_ARK: Tensor, k_ASK: Tensor) -> Tensor:
    """Return exp(q k^T) as (A, R, S): by rows of keys, which takes two thirds of the time."""
    return torch.bmm(k_ASK, q_ARK.transpose(1, 2)).exp_().transpose(1, 2)


def _normed(x: Tensor) -> Tensor:
    """`gpt.norm` without what training needs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = length.square_().div_(x.shape[-1]).add_(torch.finfo(wide).eps).rsqrt_()
    return (x * scale).to(x.dtype)


def turn(pairs: Tensor, turns: Tensor, out: Tensor) -> None:
    """Write heads whose dimensions come in pairs, each pair turned, to `out`."""
    turned = torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
    if out.dtype == pairs.dtype:
        torch.mul(turned, turns, out=torch.view_as_complex(out.unflatten(-1, (-1, 2))))
    else:
        out.copy_(torch.view_as_real(turned * turns).flatten(-2))
