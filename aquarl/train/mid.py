"""The mid stage: the mixture of `data.mid` in, packed rows of conversations out.

Teaches the conversation format, multiple choice and short reasoning before the task itself.
"""

from __future__ import annotations

from collections import Counter

from aquarl.config import Config
from aquarl.data.batches import PackedRows, RowSource
from aquarl.data.tokenizer import Tokenizer
from aquarl.tasks.catalog import mixture


def rows(config: Config, tokenizer: Tokenizer) -> tuple[RowSource, RowSource, dict[str, int]]:
    """Return training and validation rows, and how many problems were refused, by reason.

    The mixture is drawn once and shuffled every epoch.
    """
    seed, context = config.run.seed, config.model.context
    wanted = config.mid.steps * config.mid.rows_in_step(context)
    refused: Counter[str] = Counter()
    train = mixture(config.data, seed, "train", refused)
    validation = mixture(config.data, seed, "validation")
    return (
        PackedRows(lambda epoch: train, tokenizer, context, seed, wanted),
        PackedRows(lambda epoch: validation, tokenizer, context, seed),
        dict(refused),
    )
