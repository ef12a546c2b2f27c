"""GSM8K rows in, worked-solution conversations out, for the mid stage.

The calculator marks `<<48/2=24>>` go, since no calculator is called here, and the closing
`#### 72` becomes `Answer: 72`, the form in which every task commits.

Source: Cobbe et al. 2021, arXiv:2110.14168. Its test split is not read.
"""

from __future__ import annotations

import re

from aquarl.config import DataConfig
from aquarl.data.corpus import stable_share
from aquarl.data.files import Row, hub_rows, join, read_rows
from aquarl.errors import DataError
from aquarl.records import Conversation, Message

HUB_GSM8K = "openai/gsm8k"
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
FINAL_LINE = re.compile(r"\n?#### *(?P<number>\S.*)\s*\Z")


def load_gsm8k(config: DataConfig, split: str = "train") -> list[Conversation]:
    """Return `<root>/gsm8k/train.jsonl`, or the hub's train split, as conversations.

    Args:
        config: `validation_fraction` of the questions, by their hash, make up validation.
        split: "train" or "validation".

    Raises:
        DataError: The file is missing or broken, or an answer has no closing `#### ` line.
    """
    if config.root is None:
        rows = hub_rows(HUB_GSM8K, "train", "main")
    else:
        rows = read_rows(join(config.root, "gsm8k/train.jsonl"))
    return [
        _conversation(where, row)
        for where, row in rows
        if (stable_share(str(row.get("question"))) < config.validation_fraction)
        == (split == "validation")
    ]


def _conversation(where: str, row: Row) -> Conversation:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError(
            f"{where}, has the fields {', '.join(row)}, but a GSM8K row needs the texts question "
            "and answer. Convert that row."
        )
    return Conversation(
        (Message("user", question.strip()), Message("assistant", plain_answer(where, answer))),
        source="gsm8k",
    )


def plain_answer(where: str, answer: str) -> str:
    """Return a GSM8K answer without calculator marks, closing with `Answer: N`.

    Raises:
        DataError: It has no closing `#### N` line.
    """
    text = CALCULATOR_MARK.sub("", answer)
    final = FINAL_LINE.search(text)
    if final is None:
        raise DataError(
            f"{where}: the answer does not end in a line such as '#### 18', so its result is not "
            "known. Mend or drop that row."
        )
    return f"{text[: final.start()].rstrip()}\nAnswer: {final['number'].strip()}".lstrip()
