"""nanochat's GPT as vLLM runs it: paged keys and values, one matrix for q, k and v.

`vllm_engine` registers it under `ARCHITECTURE`, a name that is nobody else's: vLLM cannot fall
back silently to its slower wrapper around transformers' model. Weights come in under our names.
Norm and rotation are `model.gpt`'s own, so engine and learner differ in their kernels alone.
One process runs the whole model: there is no tensor or pipeline parallelism.

Shapes: N tokens of all requests in one row, D width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from aquarl.model.gpt import SOFT_CAP, norm, rotary_turns

ARCHITECTURE = "AquarlNanochat"
STACKED = WeightsMapper(
    orig_to_new_stacked={f".c_{part}.": (".c_qkv.", part) for part in ("q", "k", "v")}
)


class PagedAttention(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        width, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_width = width // heads
        self.heads = [heads, kv_heads, kv_heads]
        self.c_qkv = QKVParallelLinear(
            width, self.head_width, heads, kv_heads, bias=False, prefix=f"{prefix}.c_qkv"
        )
        self.c_proj = RowParallelLinear(width, width, bias=False, prefix=f"{prefix}.c_proj")
        self.attend = Attention(
            heads,
            self.head_width,
            self.head_width**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attend",
        )

    def forward(self, x_ND: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        qkv, _ = self.c_qkv(x_ND)
        q, k, v = qkv.view(-1, sum(self.heads), self.head_width).split(self.heads, dim=1)
        # As in `model.gpt`: fp32 tables widen q and k.
        q, k = (norm(_turned(x, *turns)).to(v.dtype) for x in (q, k))
        y_ND = self.attend(q.flatten(1), k.flatten(1), v.flatten(1))
        return self.c_proj(y_ND)[0]


def _turned(x: Tensor, cos: Tensor, minus_sin: Tensor) -> Tensor:
    """`gpt.rotate` for heads as nanochat has them, in real numbers, which compile."""
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * minus_sin, x2 * cos + x1 * minus_sin], dim=-1)


class MLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        width = vllm_config.model_config.hf_config.hidden_size
        self.c_fc = ColumnParallelLinear(width, 4 * width, bias=False, prefix=f"{prefix}.c_fc")
        self.c_proj = RowParallelLinear(4 * width, width, bias=False, prefix=f"{prefix}.c_proj")

    def forward(self, x_ND: Tensor) -> Tensor:
        hidden, _ = self.c_fc(x_ND)
        return self.c_proj(F.relu(hidden).square())[0]


class Block(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.attn = PagedAttention(vllm_config, f"{prefix}.attn")
        self.mlp = MLP(vllm_config, f"{prefix}.mlp")

    def forward(self, x_ND: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        x_ND = x_ND + self.attn(norm(x_ND), turns)
        return x_ND + self.mlp(norm(x_ND))


@support_torch_compile(dynamic_arg_dims={"ids_N": 0, "positions_N": 0})
class Transformer(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.wte = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(
            Block(vllm_config, f"{prefix}.h.{layer}") for layer in range(config.num_hidden_layers)
        )
        head_width = config.hidden_size // config.num_attention_heads
        # No buffers: what is registered, vLLM looks for among the weights that come in.
        self.turns = rotary_turns(vllm_config.model_config.max_model_len, head_width)

    def forward(self, ids_N: Tensor, positions_N: Tensor) -> Tensor:
        x_ND = norm(self.wte(ids_N))
        cos_N1K, minus_sin_N1K = self.turns[positions_N][:, None].unbind(dim=-1)
        for block in self.h:
            x_ND = block(x_ND, (cos_N1K, minus_sin_N1K))
        return norm(x_ND)


class NanochatForVllm(nn.Module):
    """What vLLM's model registry holds; its argument names are vLLM's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.transformer = Transformer(vllm_config=vllm_config, prefix="transformer")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=SOFT_CAP)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.transformer.wte(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        hidden_ND: Tensor = self.transformer(input_ids, positions)
        return hidden_ND

    def compute_logits(self, hidden_ND: Tensor) -> Tensor | None:
        logits_NV: Tensor | None = self.logits_processor(self.lm_head, hidden_ND)
        return logits_NV

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=STACKED)
        return loaded
