"""A policy and computed prompts in, what comes after one more token of every row out, again and
again: `torch_engine.py` draws from it.

It is what `GPT` computes with `attention.Continuation`, arranged for one position a call, where a
CPU spends its time on many small operations and on reading caches, and a GPU on being told to:

- Queries, keys and values come from one product, residuals are added by a product, the embedding
  is normalised beforehand, and the dimensions that turn together stand together
  (`gpt.interleaved`). What stands between two products is one compiled loop (`model/loops.py`).
- Scores are bounded, so their exponentials need no maximum (`model/packed.py`). A column of ones
  beside a prompt's values adds them up. What is not to be seen has values, and a one, of zero: so
  there is no mask and no second sum.
- Prompts of like length stand together (`Prefix`es of a few), so that little is padded.
- The answers' cache has its positions one after the other: what is in use lies together.

`Decoder` is for the static batches of a GPU, too (`graphs.py`), `Decoding` for a CPU in fp32 or
more, and `PlainDecoding`, slower, for all the rest: a GPU for which there are no kernels.

Shapes: see `records`; J kv heads, R query heads per kv head, A = P * G * J caches, L positions of a
prompt, W = K + 1 columns of values and one, X columns of q, k and v together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from aquarl.model import loops
from aquarl.model.attention import Continuation, Prefix
from aquarl.model.gpt import GPT, Block, interleaved, norm
from aquarl.model.head import squashed_logits
from aquarl.model.loops import eps_of, over_rows
from aquarl.model.modes import has_loops


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

    def raw(self, hidden_BD: Tensor) -> Tensor:
        """See `head.squashed_logits`."""
        return squashed_logits(hidden_BD, self.model.lm_head.weight)


class Answers(Protocol):
    """The answers of one call of `Sampler.sample` on their way. Rows are ordered prompt by
    prompt."""

    def step(self, ids_B: Tensor) -> Tensor:
        """Return normalised hidden states (B, D) after one more token in each row."""

    def keep(self, prompts: Tensor, answers_PG: Tensor) -> None:
        """Drop all rows but these answers of these prompts (ascending), in the old numbering."""


def begin(decoder: Decoder, prefixes: Sequence[Prefix], G: int, room: int) -> Answers:
    """Return what decodes answers best here.

    Args:
        prefixes: The computed prompts, some in each.
        G: Answers to each prompt; it falls when rows are dropped.
        room: Positions that an answer may come to have.
    """
    way = Decoding if has_loops(decoder.embedding_VD) else PlainDecoding
    return way(decoder, prefixes, G, room)


class PlainDecoding:
    """By the model itself. See `begin`."""

    def __init__(self, decoder: Decoder, prefixes: Sequence[Prefix], G: int, room: int) -> None:
        self._model = decoder.model
        self._parts = [Continuation(prefix, G, room) for prefix in prefixes]

    def step(self, ids_B: Tensor) -> Tensor:
        found, start = [], 0
        for part in self._parts:
            positions_B1 = part.positions_BT(1)
            ids_B1 = ids_B[start : start + len(positions_B1), None]
            found.append(self._model(ids_B1, part, positions_B1)[:, 0])
            part.advance(1)
            start += len(positions_B1)
        return torch.cat(found)

    def keep(self, prompts: Tensor, answers_PG: Tensor) -> None:
        start = 0
        for part in self._parts:
            stop = start + part.P
            is_here = (prompts >= start) & (prompts < stop)
            part.keep(prompts[is_here] - start, answers_PG[is_here])
            start = stop
        self._parts = [part for part in self._parts if part.P]


class Decoding:
    """By loops made for it. See `begin`."""

    def __init__(self, decoder: Decoder, prefixes: Sequence[Prefix], G: int, room: int) -> None:
        self.decoder, self.G, self.room = decoder, G, room
        self.prompts = [SharedPrompts(prefix) for prefix in prefixes]
        lengths_P = torch.cat([prefix.lengths_P for prefix in prefixes])
        self.P = len(lengths_P)
        self.length = 0
        """Positions of the answers that are in the cache already."""
        positions_TP = torch.arange(room)[:, None] + lengths_P
        self.turns_TPU2 = decoder.model.turns[positions_TP]
        size = room, self.P * G, decoder.shape.kv_heads * decoder.shape.head_width
        new = decoder.embedding_VD.new_empty
        self.cache = [(new(size), new(size)) for _ in decoder.layers]
        """Keys and values (T, B, J * K) of each layer."""

    def keep(self, prompts: Tensor, answers_PG: Tensor) -> None:
        start = 0
        for part in self.prompts:
            is_here = (prompts >= start) & (prompts < start + part.count)
            start += part.count
            part.keep(prompts[is_here] - (start - part.count))
        self.prompts = [part for part in self.prompts if part.count]
        rows_B = (prompts[:, None] * self.G + answers_PG).flatten()
        for number, (keys, values) in enumerate(self.cache):
            self.cache[number] = self._kept(keys, rows_B), self._kept(values, rows_B)
        self.P, self.G = answers_PG.shape
        self.turns_TPU2 = self.turns_TPU2[:, prompts]

    def _kept(self, old: Tensor, rows_B: Tensor) -> Tensor:
        """Return these rows of a cache, with the same room."""
        new = old.new_empty(self.room, len(rows_B), old.shape[2])
        torch.index_select(old[: self.length], 1, rows_B, out=new[: self.length])
        return new

    def step(self, ids_B: Tensor) -> Tensor:
        x_BD = self.decoder.embedding_VD.index_select(0, ids_B)
        for number, layer in enumerate(self.decoder.layers):
            y_BD = self._attend(number, _normed(x_BD) @ layer.qkv_XD.T)
            x_BD = torch.addmm(x_BD, y_BD, layer.out_DD.T)
            wide_BF = _normed(x_BD) @ layer.wide_FD.T
            squared_BF = torch.empty_like(wide_BF)
            over_rows(loops.squared_relu, len(x_BD), wide_BF, squared_BF)
            x_BD = torch.addmm(x_BD, squared_BF, layer.narrow_DF.T)
        self.length += 1
        return _normed(x_BD)

    def _attend(self, number: int, qkv_BX: Tensor) -> Tensor:
        """Put the position's key and value into a layer's cache; return what its query finds."""
        shape, P, G = self.decoder.shape, self.P, self.G
        J, K = shape.kv_heads, shape.head_width
        R, A = shape.heads // J, P * G * J
        T = self.length + 1
        keys_TAK, values_TAK = (x[:T].view(T, A, K) for x in self.cache[number])
        q_PJGRK, q_ARK = qkv_BX.new_empty(P, J, G, R, K), qkv_BX.new_empty(A, R, K)
        given = qkv_BX.view(P, G, -1, K), self.turns_TPU2[self.length], eps_of(qkv_BX)
        over_rows(loops.next_heads, P, *given, q_PJGRK, q_ARK, keys_TAK[-1], values_TAK[-1])

        found_PJGRW = qkv_BX.new_empty(P, J, G, R, K + 1)
        start = 0
        for part in self.prompts:
            q, found = (x[start : start + part.count] for x in (q_PJGRK, found_PJGRW))
            part.attend(number, q.view(-1, G * R, K), found.view(-1, G * R, K + 1))
            start += part.count
        y_ARK = torch.empty_like(q_ARK)
        over_rows(loops.attend(R, K), A, q_ARK, keys_TAK, values_TAK, found_PJGRW, y_ARK)
        return y_ARK.view(P * G, -1)


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
        # By rows of keys, which takes two thirds of the time.
        weights = torch.bmm(self.keys[number], q.transpose(1, 2)).exp_()
        torch.bmm(weights.transpose(1, 2), self.values[number], out=out)


def _normed(x_BD: Tensor) -> Tensor:
    """`gpt.norm` without what training needs."""
    y_BD, scales_B = torch.empty_like(x_BD), x_BD.new_empty(len(x_BD))
    over_rows(loops.norm, len(x_BD), x_BD, eps_of(x_BD), y_BD, scales_B)
    return y_BD
