"""Patterns in, documents of plain text out, in an order that a seed decides.

Reads `.txt`, `.txt.zst` (documents parted by a line `<|doc|>`), `.jsonl` and `.parquet` (field or
column `text`), or the hub's shuffled FineWeb-Edu. A share of the documents is held out by their
own hash, so it stays the same whatever the seed, the files or their order. `train.base` packs what
comes out; generated text joins in `tasks.catalog`.

Files are read side by side, always going on with the one that is least far through: the first
thousand documents are then like the last, and no file has to fit into memory.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from aquarl.config import DataConfig
from aquarl.data.files import hub_rows, join, matching_files, read_column, read_lines, read_rows
from aquarl.errors import DataError

HUB_CORPUS = "karpathy/fineweb-edu-100b-shuffle"
"""FineWeb-Edu in parquet shards, shuffled: the corpus of nanochat."""
SEPARATOR = "<|doc|>"
ENDINGS = (".txt", ".txt.zst", ".parquet", ".jsonl", ".jsonl.zst")
OPEN_FILES = 8
LONGEST_DOCUMENT = 4_000_000
"""Characters after which a document is cut, so that memory stays bounded."""
PIECE = 20_000
"""Characters, about, of the documents that a text without separators is cut into."""


def stable_share(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone, on every machine alike."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def documents(config: DataConfig, seed: int, split: str = "train") -> Iterator[str]:
    """Yield the documents of one split, once each.

    Args:
        config: `corpus` names files, folders or globs relative to `root`, or "hub";
            `validation_fraction` is the share of documents held out.
        seed: Decides the order of the files. The same seed gives the same documents in the same
            order; another pass wants another seed.
        split: "train" or "validation".

    Raises:
        DataError: A pattern matches nothing, a file cannot be read, or the split is empty.
    """
    assert split in ("train", "validation"), split
    is_empty = True
    count = 0
    for document in _all_documents(config, seed):
        count += 1
        is_held_out = stable_share(document) < config.validation_fraction
        if is_held_out == (split == "validation"):
            is_empty = False
            yield document
    if is_empty:
        raise DataError(
            f"The corpus {', '.join(config.corpus)} holds {count} documents, and none of them "
            f"falls into its {split} share, as data.validation_fraction is "
            f"{config.validation_fraction}. Give more text, or change that fraction."
        )


def corpus_files(config: DataConfig) -> list[tuple[str, int]]:
    """Return the files that `config.corpus` names and their sizes in bytes, sorted, once each.

    Raises:
        DataError: A pattern matches nothing, or only files of a kind that is not read.
    """
    files: dict[str, int] = {}
    for pattern in config.corpus:
        if pattern == "hub":
            continue
        found = matching_files(join(config.root, pattern))
        readable = {path: size for path, size in found if path.endswith(ENDINGS)}
        if not readable:
            raise DataError(
                f"{pattern} names only {found[0][0]}{' and others' if found[1:] else ''}, "
                f"but text is read from {', '.join(ENDINGS)}. Rename or convert what it names."
            )
        files |= readable
    return sorted(files.items())


@dataclass
class _OpenFile:
    """A file being read, and how far: characters out for each byte of the file."""

    documents: Iterator[str]
    size: int
    characters: int = 0

    @property
    def progress(self) -> float:
        return self.characters / max(self.size, 1)


def _all_documents(config: DataConfig, seed: int) -> Iterator[str]:
    files = corpus_files(config)
    random.Random(f"corpus {seed}").shuffle(files)
    waiting = iter(files)
    opened: list[_OpenFile] = []
    while True:
        while len(opened) < OPEN_FILES and (following := next(waiting, None)) is not None:
            path, size = following
            opened.append(_OpenFile(file_documents(path), size))
        if not opened:
            break
        behind = min(opened, key=lambda file: file.progress)
        document = next(behind.documents, None)
        if document is None:
            opened.remove(behind)
        else:
            behind.characters += len(document)
            yield document
    if "hub" in config.corpus:
        for _, row in hub_rows(HUB_CORPUS, "train", streaming=True):
            yield row["text"]


def file_documents(path: str) -> Iterator[str]:
    """Yield the documents of one file, in its own order.

    Raises:
        DataError: The file is missing, broken, or holds no field or column `text`.
    """
    if path.endswith(".parquet"):
        yield from read_column(path, "text")
    elif path.endswith((".jsonl", ".jsonl.zst")):
        for where, row in read_rows(path):
            if not isinstance(row.get("text"), str):
                raise DataError(
                    f"{where}, has no text; its fields are {', '.join(row)}. "
                    'Name the field that holds the document "text".'
                )
            yield row["text"]
    else:
        yield from _parted(read_lines(path))


def _parted(lines: Iterator[str]) -> Iterator[str]:
    """Part lines into documents at separators; a text that has none is cut into pieces."""
    kept: list[str] = []
    size, is_separated = 0, False
    for line in lines:
        is_separator = line == SEPARATOR
        is_separated |= is_separator
        if not is_separator:
            kept.append(line)
            size += len(line) + 1
        if is_separator or size > LONGEST_DOCUMENT:
            yield from _stripped(kept) if is_separated else _pieces(kept)
            kept, size = [], 0
    yield from _stripped(kept) if is_separated else _pieces(kept)


def _pieces(lines: list[str]) -> Iterator[str]:
    """Cut at the first blank line after `PIECE` characters, or at any line after twice as many."""
    kept: list[str] = []
    size = 0
    for line in lines:
        kept.append(line)
        size += len(line) + 1
        if size > 2 * PIECE or (size > PIECE and not line.strip()):
            yield from _stripped(kept)
            kept, size = [], 0
    yield from _stripped(kept)


def _stripped(lines: list[str]) -> Iterator[str]:
    if document := "\n".join(lines).strip():
        yield document
