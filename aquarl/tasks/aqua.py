"""AQuA-RAT rows in, train, validation and test problems out.

Comes from DeepMind's own JSON lines (`aqua/train.json`, `dev.json`, `test.json`), from the hub, or
from anyone's JSON lines in the same or the conversation schema (`tasks.rows`). The stages of SFT
and RL and `evaluate` read what comes out, by way of `tasks.catalog`.

Source: Ling et al. 2017, "Program Induction by Rationale Generation", arXiv:1705.04146.
Not here: a check that the rationale leads to the label. In AQuA some do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from aquarl.config import DataConfig
from aquarl.data.files import Row, exists, hub_rows, is_folder, join, read_rows
from aquarl.errors import DataError
from aquarl.records import Problem
from aquarl.tasks.base import Splits
from aquarl.tasks.rows import Refused, collect, finished_splits, problem_from_row

HUB_AQUA = "deepmind/aqua_rat"
HUB_SPLITS = {"train": "train", "validation": "validation", "test": "test"}
FILES = {"train": "train.json", "validation": "dev.json", "test": "test.json"}
FOLDER_FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}


def load_aqua(config: DataConfig) -> Splits:
    """Return AQuA-RAT from `<root>/aqua/`, or from the hub when there is no root.

    `dev.json` and `test.json` may be absent: validation is then held out of train, and test is
    empty.

    Raises:
        DataError: `train.json` is missing, a line is broken, or a split ends up empty.
    """
    if config.root is None:
        rows = {split: hub_rows(HUB_AQUA, name, "raw") for split, name in HUB_SPLITS.items()}
        name = HUB_AQUA
    else:
        name = join(config.root, "aqua")
        rows = _rows_of_folder(name, FILES)
    return _splits(rows, name, config, five_options=True)


def load_jsonl(path: str, config: DataConfig) -> Splits:
    """Return the problems of one JSON-lines file, or of a folder of up to three.

    Args:
        path: A file holds all splits: validation and test, `validation_fraction` each, are held
            out by a hash of the question. A folder holds `train.jsonl` and, if it likes,
            `validation.jsonl` and `test.jsonl`.

    Raises:
        DataError: A file is missing, a line is broken, or a split ends up empty.
    """
    if is_folder(path):
        return _splits(_rows_of_folder(path, FOLDER_FILES), path, config)
    return _splits({"train": read_rows(path)}, path, config, hold_out_test=True)


def _rows_of_folder(folder: str, files: dict[str, str]) -> dict[str, Iterator[tuple[str, Row]]]:
    paths = {split: join(folder, name) for split, name in files.items()}
    return {
        split: read_rows(path)
        for split, path in paths.items()
        if split == "train" or exists(path)  # train is read in any case, so its lack is reported
    }


def _five_option_problem(where: str, row: Row, id: str) -> Problem:
    problem = problem_from_row(where, row, id)
    if len(problem.options) != 5:
        raise Refused("not 5 options")
    return problem


def _splits(
    rows: dict[str, Iterator[tuple[str, Row]]],
    name: str,
    config: DataConfig,
    *,
    five_options: bool = False,
    hold_out_test: bool = False,
) -> Splits:
    refused: Counter[str] = Counter()
    parse = _five_option_problem if five_options else problem_from_row
    made = {split: collect(rows[split], split, refused, parse) for split in rows}
    for split, problems in made.items():
        if not problems:
            raise DataError(
                f"No row of the {split} split of {name} could be used: {dict(refused)}. "
                "Mend the rows, or leave that file out."
            )
    splits = Splits(made["train"], made.get("validation", ()), made.get("test", ()), dict(refused))
    return finished_splits(splits, name, config.validation_fraction, hold_out_test=hold_out_test)
