"""Tokens in, rows out: what one optimizer step of a supervised stage trains on.

A batch is a pure function of its row numbers, so resuming at a step needs the step alone, and any
number of workers cuts the same step the same way. Two sources:

TokenFile      one long memory-mapped stream of documents, cut every T tokens: base
PackedRows     whole conversations, several to a row, kept apart by their document numbers: mid, sft
"""

from __future__ import annotations

import itertools
import random
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import DataError, StorageError
from aquarl.records import Conversation

IGNORED = -1
"""Target of a position that is not trained."""
CHARACTERS_AT_A_TIME = 1 << 20
"""Of documents that are encoded side by side, on all cores."""
TOKENS_AT_A_TIME = 1 << 24
"""Of a file that is looked through."""


@dataclass(frozen=True)
class Rows:
    """B rows of T positions: each sees `ids`, and learns `targets` where they are not IGNORED."""

    ids_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None
    """Which document each position belongs to; None: attention may cross documents."""

    def to(self, device: torch.device | str) -> Rows:
        documents = self.documents_BT
        return Rows(
            self.ids_BT.to(device),
            self.targets_BT.to(device),
            None if documents is None else documents.to(device),
        )

    @property
    def trained_tokens(self) -> int:
        return int((self.targets_BT != IGNORED).sum())


class RowSource(Protocol):
    """Rows by number, without end: after the last comes the first again, in another order."""

    context: int
    """T."""

    @property
    def cut(self) -> int:
        """How many documents of the epoch asked for last are longer than T and lose their end."""

    def rows(self, first: int, count: int) -> Rows:
        """Return rows `first` to `first + count - 1`."""


def write_tokens(documents: Iterable[str], tokenizer: Tokenizer, path: Path, at_most: int) -> int:
    """Encode documents into a file of little-endian uint16 or uint32, each led by <|bos|>.

    Stops after `at_most` tokens. Returns how many there are. The file appears whole or not: until
    then it grows beside, and a call that was cut off goes on there, if the documents are the same.

    Raises:
        StorageError: The disk is full or forbidden.
    """
    # By machine: where several share a disk, each writes its own, and the last one stays.
    aside = path.with_suffix(f".{socket.gethostname()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        done, written = _encoded_before(aside, tokenizer)
        with aside.open("ab") as file:
            file.truncate(written * _token_dtype(tokenizer.vocab_size).itemsize)
            left = itertools.islice(documents, done, None)
            while written < at_most:
                batch = some_of(left, min(CHARACTERS_AT_A_TIME, at_most - written))
                if not batch:
                    break
                for encoded in tokenizer.encode_batch(batch):
                    ids = [tokenizer.bos, *encoded][: at_most - written]
                    np.asarray(ids, dtype=_token_dtype(tokenizer.vocab_size)).tofile(file)
                    written += len(ids)
        aside.rename(path)
    except OSError as error:
        raise StorageError(
            f"Could not write tokens to {path}: {error.strerror or error}. What is encoded stays "
            "beside it. Free some space, then start the same command again, and it goes on there."
        ) from error
    return written


def _encoded_before(path: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return how many documents, and how many tokens of them, a file holds whole for sure: all but
    its last, as each begins with a <|bos|> that no text can hold."""
    dtype = _token_dtype(tokenizer.vocab_size)
    begun = last = 0
    for start in range(0, path.stat().st_size // dtype.itemsize, TOKENS_AT_A_TIME):
        tokens = np.fromfile(path, dtype, TOKENS_AT_A_TIME, offset=start * dtype.itemsize)
        (places,) = np.nonzero(tokens == tokenizer.bos)
        if len(places):
            begun, last = begun + len(places), start + int(places[-1])
    return max(begun - 1, 0), last


def some_of(documents: Iterator[str], characters: int) -> list[str]:
    """Return the next documents, until they have so many characters or there are no more."""
    taken: list[str] = []
    for document in documents:
        taken.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return taken


def _token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenFile:
    """Rows of T + 1 neighbouring tokens from a file that `write_tokens` made.

    Rows come in file order, epoch after epoch, each epoch starting at another offset.
    """

    cut = 0

    def __init__(self, path: Path, vocab_size: int, context: int, seed: int) -> None:
        self.context, self.seed = context, seed
        self._tokens = np.memmap(path, dtype=_token_dtype(vocab_size), mode="r")
        self._per_epoch = (len(self._tokens) - context) // context
        if self._per_epoch < 1:
            raise DataError(
                f"The corpus gives {len(self._tokens)} tokens, but rows of model.context="
                f"{context} take at least {2 * context}. Give more text or a smaller context."
            )

    def rows(self, first: int, count: int) -> Rows:
        T = self.context
        starts = []
        for row in range(first, first + count):
            epoch, place = divmod(row, self._per_epoch)
            offset = random.Random(f"{self.seed} {epoch}").randrange(T) if epoch else 0
            starts.append(min(place * T + offset, len(self._tokens) - T - 1))
        tokens = torch.from_numpy(
            np.stack([self._tokens[start : start + T + 1] for start in starts]).astype(np.int64)
        )
        return Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


class PackedRows:
    """Conversations packed whole into rows, in another order every epoch.

    Args:
        conversations: Epoch number to the conversations of that epoch, which may differ (options
            in another order, say).
        tokenizer, context: How they are encoded; T. Longer conversations are cut at the end.
        seed: Decides the order.
        wanted: How many rows will be asked for. While one epoch is trained on, the next is packed,
            if there is to be one.
    """

    def __init__(
        self,
        conversations: Callable[[int], Sequence[Conversation]],
        tokenizer: Tokenizer,
        context: int,
        seed: int,
        wanted: int = 0,
    ) -> None:
        self.context, self.seed, self.tokenizer, self.wanted = context, seed, tokenizer, wanted
        self._cut = 0
        self._conversations = conversations
        self._rows_before = [0]
        """For each epoch packed so far, and the next, how many rows came before it."""
        self._newest: tuple[int, Rows] | None = None
        self._ahead: tuple[int, Future[tuple[Rows, int]]] | None = None

    @property
    def cut(self) -> int:
        if self._newest is None:
            self._pack(0)
        return self._cut

    def rows(self, first: int, count: int) -> Rows:
        parts = []
        while count:
            epoch = self._epoch_of(first)
            packed = self._pack(epoch)
            start = first - self._rows_before[epoch]
            taken = min(count, packed.ids_BT.shape[0] - start)
            parts.append((packed, slice(start, start + taken)))
            first, count = first + taken, count - taken
            if self._rows_before[epoch + 1] < self.wanted:
                self._begin(epoch + 1)
        return Rows(
            torch.cat([packed.ids_BT[at] for packed, at in parts]).long(),
            torch.cat([packed.targets_BT[at] for packed, at in parts]).long(),
            torch.cat([packed.documents_BT[at] for packed, at in parts]),  # type: ignore[index]
        )

    def _epoch_of(self, row: int) -> int:
        while row >= self._rows_before[-1]:
            packed = self._pack(len(self._rows_before) - 1)
            self._rows_before.append(self._rows_before[-1] + packed.ids_BT.shape[0])
        return next(e for e, end in enumerate(self._rows_before[1:]) if row < end)

    def _pack(self, epoch: int) -> Rows:
        if self._newest is None or self._newest[0] != epoch:
            if self._ahead is not None and self._ahead[0] == epoch:
                rows, self._cut = self._ahead[1].result()
            else:
                rows, self._cut = self._packed(epoch)
            self._newest = epoch, rows
        return self._newest[1]

    def _begin(self, epoch: int) -> None:
        """Pack an epoch in a thread of its own, once, which nobody waits for at the end."""
        if self._ahead is not None and self._ahead[0] == epoch:
            return
        future: Future[tuple[Rows, int]] = Future()
        self._ahead = epoch, future

        def work() -> None:
            try:
                future.set_result(self._packed(epoch))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name=f"packs epoch {epoch}", daemon=True).start()

    def _packed(self, epoch: int) -> tuple[Rows, int]:
        """Return an epoch's rows, and how many of its conversations lost their end."""
        cut, encoded = 0, []
        for conversation in self._conversations(epoch):
            ids, is_learned = self.tokenizer.render_conversation(conversation)
            cut += len(ids) > self.context + 1
            encoded.append(self._shifted(ids, is_learned))
        if not encoded:
            raise DataError("There is nothing to train on: the stage's data is empty.")
        if all((targets == IGNORED).all() for _, targets in encoded):
            raise DataError(
                f"No conversation has an answer within its first {self.context} tokens, so there "
                "is nothing to learn. Set a larger model.context."
            )
        random.Random(f"{self.seed} {epoch}").shuffle(encoded)
        return pack(encoded, self.context), cut

    def _shifted(self, ids: list[int], is_learned: list[bool]) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, one position apart: arrays, as an epoch can be large."""
        tokens = np.array(ids[: self.context + 1], np.int32)
        targets = np.where(is_learned[: self.context + 1], tokens, np.int32(IGNORED))
        return tokens[:-1], targets[1:]


def pack(encoded: Sequence[tuple[np.ndarray, np.ndarray]], context: int) -> Rows:
    """Fill rows with whole documents, in order, each into the newest of the last rows with room.

    Args:
        encoded: (inputs, targets) of each document, no longer than `context`.
        context: T.
    """
    open_rows = 16  # looking back further hardly fills rows better and costs time
    members: list[list[int]] = []
    room: list[int] = []
    for number, (ids, _) in enumerate(encoded):
        for row in range(len(members) - 1, max(-1, len(members) - 1 - open_rows), -1):
            if room[row] >= len(ids):
                break
        else:
            row = len(members)
            members.append([])
            room.append(context)
        members[row].append(number)
        room[row] -= len(ids)

    shape = (len(members), context)
    ids_BT = np.zeros(shape, np.int32)
    targets_BT = np.full(shape, IGNORED, np.int32)
    documents_BT = np.zeros(shape, np.int32)  # 0 is padding
    for row, numbers in enumerate(members):
        start = 0
        for document, number in enumerate(numbers, start=1):
            ids, targets = encoded[number]
            here = slice(start, start + len(ids))
            ids_BT[row, here], targets_BT[row, here] = ids, targets
            documents_BT[row, here] = document
            start += len(ids)
    return Rows(*(torch.from_numpy(a) for a in (ids_BT, targets_BT, documents_BT)))
