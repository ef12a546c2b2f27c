"""Settings in, the numbers that fix every tensor of the model out.

Apart from the model, for those who pass it on and need no torch, which takes two seconds to import.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from aquarl.config import ModelConfig


@dataclass(frozen=True)
class Shape:
    """The numbers that fix every tensor of the model."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    context: int

    @classmethod
    def of(cls, config: ModelConfig, vocab: int) -> Shape:
        return cls(
            vocab=vocab,
            layers=config.depth,
            width=config.resolved_width,
            heads=config.resolved_heads,
            kv_heads=config.resolved_kv_heads,
            context=config.context,
        )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
