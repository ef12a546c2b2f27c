"""MMLU rows in, four-option problems out, for the mid stage.

Trains on the auxiliary split, and on `val.jsonl` where a folder has no auxiliary file. The test
split is not read: it measures models, here and everywhere.

Source: Hendrycks et al. 2021, arXiv:2009.03300.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from aquarl.config import DataConfig
from aquarl.data.files import Row, exists, hub_rows, join, read_rows
from aquarl.errors import DataError
from aquarl.records import LETTERS, Problem
from aquarl.tasks.rows import collect

HUB_MMLU = "cais/mmlu"


def load_mmlu(
    config: DataConfig, split: str = "train", refused: Counter[str] | None = None
) -> tuple[Problem, ...]:
    """Return the problems of one split, from `<root>/mmlu/` or from the hub.

    Args:
        split: "train": the auxiliary split, or val without it. "validation": val, or dev where
            val is trained on.

    Raises:
        DataError: A file is missing or broken, or no row of it can be used.
    """
    name, rows = _rows(config, split)
    refused = Counter() if refused is None else refused
    problems = collect(((where, lettered(row)) for where, row in rows), split, refused)
    if not problems:
        raise DataError(f"No row of {name} could be used: {dict(refused)}. Mend the rows.")
    return problems


def _rows(config: DataConfig, split: str) -> tuple[str, Iterator[tuple[str, Row]]]:
    if config.root is None:
        if split == "train":
            raw = hub_rows(HUB_MMLU, "train", "auxiliary_train")
        else:
            raw = hub_rows(HUB_MMLU, "validation", "all")
        return HUB_MMLU, raw
    auxiliary = join(config.root, "mmlu/auxiliary_train.jsonl")
    if exists(auxiliary):
        path = auxiliary if split == "train" else join(config.root, "mmlu/val.jsonl")
    else:
        path = join(config.root, "mmlu/val.jsonl" if split == "train" else "mmlu/dev.jsonl")
    return path, read_rows(path)


def lettered(row: Row) -> Row:
    """Return a row as the hub has it, whose answer is an index, in the schema of `tasks.rows`.

    Any other row comes back as it is.
    """
    if isinstance(row.get("train"), dict):
        row = row["train"]  # the hub nests the auxiliary rows once more
    if "choices" not in row:
        return row
    answer = row.get("answer")
    return {
        "question": row.get("question"),
        "options": row.get("choices"),
        "correct": LETTERS[answer] if isinstance(answer, int) and 0 <= answer < 4 else None,
        "source": "mmlu",
    }
