"""Dialogue rows in, checked conversations out, for the mid stage.

Reads `<root>/chat/*.jsonl` with `{"messages": [{"role", "content"}, ...]}` a line, or SmolTalk's
small share from the hub. Turns must go user, assistant, user, ..., with at most a system message
before; anything else would teach the template wrong, so it is an error and not skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from aquarl.config import DataConfig
from aquarl.data.corpus import stable_share
from aquarl.data.files import Row, hub_rows, join, matching_files, read_rows
from aquarl.errors import DataError
from aquarl.records import Conversation
from aquarl.tasks.rows import messages_of

HUB_CHAT = "HuggingFaceTB/smol-smoltalk"


def load_chat(config: DataConfig, split: str = "train") -> list[Conversation]:
    """Return the dialogues of one split, in the order of their files.

    Args:
        config: `validation_fraction` of them, by the hash of what the user says first, make up
            validation.
        split: "train" or "validation".

    Raises:
        DataError: There is no file, a line is broken, or turns do not alternate.
    """
    kept = []
    for where, row in _rows(config):
        conversation = conversation_from_row(where, row)
        opening = next(m.content for m in conversation.messages if m.role == "user")
        if (stable_share(opening) < config.validation_fraction) == (split == "validation"):
            kept.append(conversation)
    return kept


def conversation_from_row(where: str, row: Row) -> Conversation:
    """Return the conversation of a row. Raises: DataError, where it is not one."""
    if "messages" not in row:
        raise DataError(
            f"{where}, has the fields {', '.join(row)}, but a dialogue needs messages. "
            'Write {"messages": [{"role": "user", "content": "..."}, ...]}.'
        )
    return Conversation(messages_of(where, row["messages"]), str(row.get("source") or "chat"))


def _rows(config: DataConfig) -> Iterator[tuple[str, Row]]:
    if config.root is None:
        return hub_rows(HUB_CHAT, "train")
    files = matching_files(join(config.root, "chat/*.jsonl"))
    return chain.from_iterable(read_rows(path) for path, _ in files)
