"""A batch is a pure function of its row numbers, and loses or doubles nothing."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aquarl.data import batches
from aquarl.data.batches import IGNORED, PackedRows, Rows, RowSource, TokenFile, pack, write_tokens
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import DataError, StorageError
from aquarl.records import Conversation, Message
from tests.conftest import PATIENCE_S
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONTEXT = 16


def conversation(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


CONVERSATIONS = [conversation("?" * (i % 4), f"{i:02}") for i in range(23)]


def packed_rows(seed: int = 0) -> PackedRows:
    return PackedRows(lambda epoch: CONVERSATIONS, TOKENIZER, CONTEXT, seed)


def token_file(tmp_path: Path, tokens: int = 100, seed: int = 0) -> TokenFile:
    path = tmp_path / "tokens.bin"
    write_tokens([bytes(i % 128 for i in range(tokens)).decode()], TOKENIZER, path, tokens)
    return TokenFile(path, TOKENIZER.vocab_size, CONTEXT, seed)


def equal(a: Rows, b: Rows) -> bool:
    pairs = [(a.ids_BT, b.ids_BT), (a.targets_BT, b.targets_BT)]
    if a.documents_BT is not None and b.documents_BT is not None:
        pairs.append((a.documents_BT, b.documents_BT))
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(params=["file", "packed"])
def make_source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return packed_rows if request.param == "packed" else lambda: token_file(tmp_path)


def test_rows_are_a_pure_function_of_their_numbers(make_source: Any) -> None:
    """Whatever was asked before, in whatever pieces: past the end of several epochs."""
    source: RowSource = make_source()
    whole = source.rows(0, 40)
    for first, count in [(37, 3), (0, 1), (5, 20), (19, 2), (0, 40)]:
        part = source.rows(first, count)
        assert equal(part, make_source().rows(first, count)), "a fresh source agrees"
        assert torch.equal(part.ids_BT, whole.ids_BT[first : first + count])
        assert torch.equal(part.targets_BT, whole.targets_BT[first : first + count])


# TokenFile


def test_neighbouring_tokens_are_learned_one_ahead(tmp_path: Path) -> None:
    rows = token_file(tmp_path).rows(0, 12)
    assert rows.ids_BT.shape == rows.targets_BT.shape == (12, CONTEXT)
    assert torch.equal(rows.ids_BT[:, 1:], rows.targets_BT[:, :-1])
    assert rows.ids_BT[0, 0] == TOKENIZER.bos
    assert rows.ids_BT[0, 1:].tolist() == list(range(CONTEXT - 1))
    assert rows.trained_tokens == 12 * CONTEXT


def test_the_first_epoch_gives_each_token_once_in_order(tmp_path: Path) -> None:
    source = token_file(tmp_path, tokens=6 * CONTEXT)
    targets = source.rows(0, 5).targets_BT.flatten()
    assert targets.tolist() == list(range(5 * CONTEXT))


def test_later_epochs_begin_elsewhere(tmp_path: Path) -> None:
    source = token_file(tmp_path, tokens=6 * CONTEXT)
    starts = [int(source.rows(5 * epoch, 1).ids_BT[0, 0]) for epoch in range(1, 9)]
    assert len(set(starts)) > 1
    assert all(start == TOKENIZER.bos or start < CONTEXT for start in starts)


def test_each_document_is_led_by_bos_and_the_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokens.bin"
    assert write_tokens(["ab", "", "cde", "never read"], TOKENIZER, path, at_most=7) == 7
    bos = TOKENIZER.bos
    assert np.fromfile(path, dtype="<u2").tolist() == [bos, 97, 98, bos, bos, 99, 100]


def test_a_corpus_that_ends_early_is_written_whole(tmp_path: Path) -> None:
    assert write_tokens(["ab", "c"], TOKENIZER, tmp_path / "t.bin", at_most=1_000) == 5


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gives 31 tokens, but .* take at least 32"):
        token_file(tmp_path, tokens=2 * CONTEXT - 1)
    assert token_file(tmp_path, tokens=2 * CONTEXT).rows(0, 3).ids_BT.shape == (3, CONTEXT)


def test_a_file_appears_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    write_tokens(["first"], TOKENIZER, path, 100)
    before = path.read_bytes()

    def documents() -> Iterator[str]:
        yield "second"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        write_tokens(documents(), TOKENIZER, path, 100)
    assert path.read_bytes() == before


@pytest.mark.parametrize("torn", [0, 1, 2, 3])
def test_what_a_killed_run_encoded_is_not_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: int
) -> None:
    monkeypatch.setattr(batches, "CHARACTERS_AT_A_TIME", 8)
    monkeypatch.setattr(batches, "TOKENS_AT_A_TIME", 5)
    texts = [("", "a", "bc", "a long one", "def")[i % 5] + str(i) for i in range(40)]
    encoded: list[str] = []

    class Watched(Tokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            encoded.extend(texts)
            return super().encode_batch(texts)

    def until_killed() -> Iterator[str]:
        yield from texts[:25]
        raise KeyboardInterrupt

    tokenizer = Watched(TOKENIZER.ranks, TOKENIZER.pattern)
    whole, path = tmp_path / "whole.bin", tmp_path / "tokens.bin"
    tokens = write_tokens(texts, TOKENIZER, whole, at_most=190)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(until_killed(), tokenizer, path, at_most=190)
    assert encoded and not path.exists()
    (aside,) = tmp_path.glob("*.writing")
    with aside.open("ab") as file:
        file.truncate(aside.stat().st_size - torn)
    before = len(encoded)
    assert write_tokens(texts, tokenizer, path, at_most=190) == tokens
    assert path.read_bytes() == whole.read_bytes()
    assert encoded[before:] == texts[before - 1 : len(encoded) - 1]  # the last may be half
    assert sorted(tmp_path.iterdir()) == [path, whole]


# PackedRows


def learned(rows: Rows) -> list[str]:
    """The answers that rows teach, in order: what stands between ends of turn."""
    ids = rows.targets_BT[rows.targets_BT != IGNORED].tolist()
    return TOKENIZER.decode(ids).split("<|assistant_end|>")[:-1]


def rows_of_an_epoch(source: PackedRows, epoch: int) -> Rows:
    source._epoch_of(10_000)
    first, end = source._rows_before[epoch : epoch + 2]
    return source.rows(first, end - first)


def test_every_conversation_comes_exactly_once_an_epoch() -> None:
    everything = Counter(f"{i:02}" for i in range(23))
    source = packed_rows()
    orders = [learned(rows_of_an_epoch(source, epoch)) for epoch in range(3)]
    assert [Counter(order) for order in orders] == [everything] * 3
    assert orders[0] != orders[1] != orders[2], "each epoch has its own order"
    assert learned(rows_of_an_epoch(packed_rows(seed=1), 0)) != orders[0]


def test_each_epoch_asks_for_its_own_conversations() -> None:
    def of_epoch(epoch: int) -> list[Conversation]:
        return [conversation("", f"{epoch}{i}") for i in range(10)]

    source = PackedRows(of_epoch, TOKENIZER, CONTEXT, seed=0)
    for epoch in (0, 1, 2):
        answers = learned(rows_of_an_epoch(source, epoch))
        assert sorted(answers) == [f"{epoch}{i}" for i in range(10)]


def test_the_next_epoch_is_packed_while_this_one_is_used_if_it_will_be_wanted() -> None:
    packed_in: dict[int, str] = {}
    is_begun = threading.Event()

    def of_epoch(epoch: int) -> list[Conversation]:
        packed_in[epoch] = threading.current_thread().name
        if epoch == 1:
            is_begun.set()
        return [conversation("", f"{epoch}{i}") for i in range(10)]

    expected = packed_alone(of_epoch).rows(0, 12)
    in_epoch = 5  # ten answers of seven tokens, two to a row of 16
    is_begun.clear()
    source = packed_alone(of_epoch, wanted=2 * in_epoch)
    packed_in.clear()
    first = source.rows(0, 1)
    assert is_begun.wait(PATIENCE_S), "before anybody asked for its rows"
    rest = source.rows(1, 9)
    assert packed_in == {0: "MainThread", 1: "packs epoch 1"}, "and nobody will want a third"
    assert torch.equal(torch.cat([first.ids_BT, rest.ids_BT]), expected.ids_BT[:10])
    assert torch.equal(torch.cat([first.targets_BT, rest.targets_BT]), expected.targets_BT[:10])


def test_what_goes_wrong_ahead_is_said_when_it_is_asked_for() -> None:
    def of_epoch(epoch: int) -> list[Conversation]:
        return [] if epoch else [conversation("", "a")]

    source = packed_alone(of_epoch, wanted=2)
    source.rows(0, 1)
    with pytest.raises(DataError, match="the stage's data is empty"):
        source.rows(1, 1)


def packed_alone(of_epoch: Callable[[int], list[Conversation]], wanted: int = 0) -> PackedRows:
    return PackedRows(of_epoch, TOKENIZER, CONTEXT, seed=0, wanted=wanted)


def test_targets_are_the_next_token_where_it_is_learned() -> None:
    source = PackedRows(lambda epoch: [conversation("q", "yes")], TOKENIZER, CONTEXT, seed=0)
    rows = source.rows(0, 1)
    ids, _ = TOKENIZER.render_conversation(conversation("q", "yes"))
    n = len(ids) - 1
    assert rows.ids_BT[0, :n].tolist() == ids[:-1]
    assert rows.targets_BT[0, :n].tolist() == [IGNORED] * 4 + [*b"yes", TOKENIZER.end_of_turn]
    assert (rows.targets_BT[0, n:] == IGNORED).all()
    assert rows.documents_BT is not None
    assert rows.documents_BT[0].tolist() == [1] * n + [0] * (CONTEXT - n)


def test_no_document_is_cut_or_crossed_by_another() -> None:
    rows = rows_of_an_epoch(packed_rows(), 0)
    assert rows.documents_BT is not None
    whole = {tuple(TOKENIZER.render_conversation(c)[0][:-1]) for c in CONVERSATIONS}
    for ids, documents in zip(rows.ids_BT, rows.documents_BT, strict=True):
        for number in range(1, int(documents.max()) + 1):
            places = (documents == number).nonzero()[:, 0]
            assert places[-1] - places[0] + 1 == len(places), "it stands in one piece"
            assert tuple(ids[places].tolist()) in whole


def test_packing_fills_rows_in_order() -> None:
    """By hand, T = 5: 3 and 2 fill a row, 4 opens the next, 1 fills it."""
    rows = pack([(np.full(n, 7), np.full(n, 8)) for n in (3, 2, 4, 1)], context=5)
    assert rows.documents_BT is not None
    assert rows.documents_BT.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 2]]
    assert rows.trained_tokens == 10


def test_what_is_longer_than_a_row_is_cut_at_its_end() -> None:
    long = conversation("q", "y" * 100)
    source = PackedRows(lambda epoch: [long], TOKENIZER, CONTEXT, seed=0)
    rows = source.rows(0, 1)
    ids, _ = TOKENIZER.render_conversation(long)
    assert rows.ids_BT[0].tolist() == ids[:CONTEXT]
    assert rows.targets_BT[0, 4:].tolist() == ids[5 : CONTEXT + 1]
    assert source.cut == 1


@pytest.mark.parametrize(("longer", "cut"), [(0, 0), (1, 1)])
def test_how_many_are_cut_is_counted_to_the_token(longer: int, cut: int) -> None:
    ids, _ = TOKENIZER.render_conversation(conversation("q", ""))
    fitting = conversation("q", "y" * (CONTEXT + 1 - len(ids) + longer))
    source = PackedRows(lambda epoch: [fitting, conversation("q", "y")], TOKENIZER, CONTEXT, seed=0)
    source.rows(0, 5)  # five epochs or less
    assert source.cut == cut


def test_data_that_teaches_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="the stage's data is empty"):
        PackedRows(lambda epoch: [], TOKENIZER, CONTEXT, seed=0).rows(0, 1)
    cut_off = [conversation("q" * CONTEXT, "yes")]
    with pytest.raises(DataError, match=r"Set a larger model\.context"):
        PackedRows(lambda epoch: cut_off, TOKENIZER, CONTEXT, seed=0).rows(0, 1)
