"""Token ids in, logits out: nanochat's GPT of October 2025.

Rotary positions that turn by -theta, query and key normalised after them, RMSNorm without
parameters (also right after the embedding), squared ReLU, untied head, no biases, logits capped
softly at 15, optionally fewer kv heads than query heads. Parameter names are nanochat's, so its
checkpoints are ours.

Dropped from there: the embedding is kept in fp32 (autocast rounds what leaves it), and the KV cache
lives in `attention.py`. What stands between two products is one kernel (`fused.py` on a GPU,
`fused_cpu.py` on a CPU).

Source: github.com/karpathy/nanochat, nanochat/gpt.py, October 2025.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquarl.model.attention import Attend, causal
from aquarl.model.modes import kernels_for
from aquarl.model.products import linear
from aquarl.model.shape import Shape

SOFT_CAP = 15.0
ROPE_BASE = 10_000.0


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without parameters."""
    if (kernels := kernels_for(x)) is not None:
        return kernels.norm(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), (x.shape[-1],), eps=torch.finfo(wide).eps).to(x.dtype)


def add_norm(x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum, which the blocks hand on, and its norm, which the next of them reads."""
    if (kernels := kernels_for(x)) is not None:
        return kernels.add_norm(x, more)
    x = x + more
    return x, norm(x)


def _working(x: Tensor) -> Tensor:
    """Return x in the precision that products are done in, as nanochat has all between them."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2"""
    if (kernels := kernels_for(x)) is not None:
        squared: Tensor = kernels.SquaredReLU.apply(x)
        return squared
    return x.relu().square()


def interleaved(weight_XD: Tensor, head_width: int) -> Tensor:
    """Return a projection's rows so that a head's dimensions come as 0, K/2, 1, K/2 + 1, ...

    Then the two that turn together stand together, as the parts of a complex number. Queries and
    keys in another order of dimensions have the same products.
    """
    X, D = weight_XD.shape
    return weight_XD.view(-1, 2, head_width // 2, D).transpose(1, 2).reshape(X, D)


def rotate(pairs: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair (x[2 i], x[2 i + 1]) by -theta, the direction nanochat uses.

    Args:
        pairs: (..., H, K), interleaved.
        turns: (..., 1, K / 2) complex, in at least the precision of x; the result has theirs. As
            real pairs, (..., 1, K / 2, 2), while a compiler looks on: none knows complex numbers.
    """
    if not turns.is_complex():
        a, b = pairs.to(turns.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    x = pairs.to(turns.dtype.to_real()).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(x) * turns).flatten(-2)


class Attention(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape
        kv_width = shape.kv_heads * shape.head_width
        self.c_q = nn.Linear(shape.width, shape.width, bias=False)
        self.c_k = nn.Linear(shape.width, kv_width, bias=False)
        self.c_v = nn.Linear(shape.width, kv_width, bias=False)
        self.c_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        B, T, D = x_BTD.shape
        K = self.shape.head_width
        weights = (*(interleaved(c.weight, K) for c in (self.c_q, self.c_k)), self.c_v.weight)
        if (kernels := kernels_for(x_BTD)) is not None:
            q, k, v = kernels.turned_heads(linear(x_BTD, torch.cat(weights)), turns, self.shape)
        else:
            q, k, v = (linear(x_BTD, weight).view(B, T, -1, K) for weight in weights)
            # Rotation in fp32 tables widens q and k under autocast; v tells the working precision.
            q, k = (norm(rotate(x, turns)).to(v.dtype) for x in (q, k))
        y_BHTK = attend(self.layer, *(x.transpose(1, 2) for x in (q, k, v)))
        return linear(y_BHTK.transpose(1, 2).reshape(B, T, D), self.c_proj.weight)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.c_proj = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return linear(squared_relu(linear(x_BTD, self.c_fc.weight)), self.c_proj.weight)


class Block(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.attn = Attention(shape, layer)
        self.mlp = MLP(shape)

    def forward(
        self, x_BTD: Tensor, normed_BTD: Tensor, turns: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        x_BTD, normed_BTD = add_norm(x_BTD, self.attn(normed_BTD, turns, attend))
        return add_norm(x_BTD, self.mlp(normed_BTD))


class Transformer(nn.Module):
    """The embedding and the blocks; a module of its own for the sake of nanochat's names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab, shape.width)
        self.h = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))


class GPT(nn.Module):
    """The policy. `forward` gives normalised hidden states; `logits` is the head on top of them.

    The two are apart so that nobody computes logits of positions that nobody reads.
    """

    turns: Tensor
    """(10 * context, K / 2, 2): see `rotary_turns`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = Transformer(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)
        # Ten contexts long, as in nanochat: generation may outgrow a training row.
        turns = rotary_turns(10 * shape.context, shape.head_width)
        self.register_buffer("turns", turns, persistent=False)

    def init_weights(self, seed: int) -> GPT:
        """Draw fresh weights as nanochat does, from this seed alone. Returns itself.

        Matrices: normal, std = min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in)
        (arXiv:2310.17813). Embedding: std 1. Output projections and head: zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                std = min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        nn.init.zeros_(self.lm_head.weight)
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.zeros_(weight)
        return self

    def in_precision(self, dtype: torch.dtype) -> GPT:
        """Have all weights in this precision, and return itself.

        The positions' turns keep theirs: in bf16, far positions would run together.
        """
        for weight in self.parameters():
            weight.data = weight.data.to(dtype)
        return self

    def forward(
        self, ids_BT: Tensor, attend: Attend = causal, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Return normalised hidden states (B, T, D) of these token ids.

        Args:
            ids_BT: (B, T) int64.
            attend: One of `attention.py`'s four, or `packed.Packed`.
            positions_BT: (B, T) int64 places in the sequence; 0..T-1 without it.
        """
        assert positions_BT is not None or ids_BT.shape[1] <= len(self.turns), "too long a row"
        turns = self.turns[: ids_BT.shape[1]] if positions_BT is None else self.turns[positions_BT]
        turns = turns.unsqueeze(-3)  # the same for all heads
        x_BTD = _working(norm(self.transformer.wte(ids_BT)))
        if not torch.compiler.is_compiling() and kernels_for(x_BTD) is None:
            turns = torch.view_as_complex(turns)
        normed_BTD = norm(x_BTD)
        for block in self.transformer.h:
            x_BTD, normed_BTD = block(x_BTD, normed_BTD, turns, attend)
        return normed_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Return softly capped fp32 logits (..., V) of hidden states (..., D)."""
        return SOFT_CAP * torch.tanh(self.lm_head(hidden).float() / SOFT_CAP)

    def count(self) -> dict[str, int]:
        """Return parameters in all and FLOPs per trained token (forward and backward), those of
        the head also by themselves.

        6 FLOPs a matrix parameter, 12 * H * K * T a layer for attention over full rows
        (arXiv:2204.02311 appendix B); the embedding is a look-up and costs none.
        """
        parameters = sum(p.numel() for p in self.parameters())
        matrices = parameters - self.transformer.wte.weight.numel()
        attention = 12 * self.shape.layers * self.shape.width * self.shape.context
        return {
            "parameters": parameters,
            "flops_per_token": 6 * matrices + attention,
            "head_flops_per_token": 6 * self.lm_head.weight.numel(),
        }


def rotary_turns(length: int, head_width: int) -> Tensor:
    """Return (length, K / 2, 2) fp32: cos and -sin of each position times frequency.

    As complex numbers, they turn by -theta.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    angles = torch.outer(torch.arange(length, dtype=torch.float32), ROPE_BASE**-exponents)
    return torch.stack([angles.cos(), -angles.sin()], dim=-1)
