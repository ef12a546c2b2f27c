"""The SFT stage: the task's problems in, packed rows of worked solutions out.

Only the assistant's words are learned: the rationale, `Answer: X`, and the end of the turn.
"""

from __future__ import annotations

import random

from aquarl.config import Config
from aquarl.data.batches import PackedRows, RowSource
from aquarl.data.tokenizer import Tokenizer
from aquarl.records import Conversation
from aquarl.tasks.base import Splits, shuffled_options, to_conversation


def rows(config: Config, tokenizer: Tokenizer, splits: Splits) -> tuple[RowSource, RowSource]:
    """Return training and validation rows. With `data.permute_options` every epoch has another
    order of options."""
    seed, context = config.run.seed, config.model.context
    wanted = config.sft.steps * config.sft.rows_in_step(context)

    def epoch_of_train(epoch: int) -> list[Conversation]:
        if not config.data.permute_options:
            return [to_conversation(problem) for problem in splits.train]
        rng = random.Random(f"sft options {seed} {epoch}")
        return [to_conversation(shuffled_options(problem, rng)) for problem in splits.train]

    validation = [to_conversation(problem) for problem in splits.validation]
    return (
        PackedRows(epoch_of_train, tokenizer, context, seed, wanted),
        PackedRows(lambda epoch: validation, tokenizer, context, seed),
    )
