"""ARC rows in, problems of three to five options out, for the mid stage.

Easy and challenge together. The test splits are not read.

Source: Clark et al. 2018, arXiv:1803.05457.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from aquarl.config import DataConfig
from aquarl.data.files import Row, hub_rows, join, read_rows
from aquarl.errors import DataError
from aquarl.records import LETTERS, Problem
from aquarl.tasks.rows import collect

HUB_ARC = "allenai/ai2_arc"
HUB_CONFIGS = ("ARC-Easy", "ARC-Challenge")
FILES = {"train": "arc/train.jsonl", "validation": "arc/dev.jsonl"}


def load_arc(
    config: DataConfig, split: str = "train", refused: Counter[str] | None = None
) -> tuple[Problem, ...]:
    """Return the problems of "train" or "validation", from `<root>/arc/` or from the hub.

    Args:
        refused: Rows that cannot be used are counted here, by reason.

    Raises:
        DataError: A file is missing or broken, or no row of it can be used.
    """
    name, rows = HUB_ARC, _hub_rows(split)
    if config.root is not None:
        name = join(config.root, FILES[split])
        rows = read_rows(name)
    refused = Counter() if refused is None else refused
    problems = collect(((where, lettered(row)) for where, row in rows), split, refused)
    if not problems:
        raise DataError(f"No row of {name} could be used: {dict(refused)}. Mend the rows.")
    return problems


def _hub_rows(split: str) -> Iterator[tuple[str, Row]]:
    return chain.from_iterable(hub_rows(HUB_ARC, split, config) for config in HUB_CONFIGS)


def lettered(row: Row) -> Row:
    """Return a row as the hub has it, whose labels may be 1 to 4, in the schema of `tasks.rows`.

    Any other row comes back as it is.
    """
    choices = row.get("choices")
    if not isinstance(choices, dict):
        return row
    labels, answer = choices.get("label", []), row.get("answerKey")
    place = labels.index(answer) if answer in labels else len(LETTERS)
    return {
        "question": row.get("question"),
        "options": choices.get("text"),
        "correct": LETTERS[place : place + 1],
        "source": "arc",
    }
