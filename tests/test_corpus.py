"""Promises of `aquarl.data.corpus`: the same documents in the same order, and a share held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from aquarl.config import DataConfig
from aquarl.data import corpus
from aquarl.data.corpus import documents, file_documents, stable_share
from aquarl.errors import DataError
from tests.fakes import REAL, real_data

needs_real_data = real_data("corpus")


def config_of(root: Path, *patterns: str, fraction: float = 0.2) -> DataConfig:
    settings: dict[str, Any] = {"corpus": patterns, "validation_fraction": fraction}
    return DataConfig(root=str(root), **settings)


def write(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n<|doc|>\n".join(texts))


def numbered(name: str, count: int) -> list[str]:
    return [f"{name} {i}\n\nsecond line" for i in range(count)]


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    texts = numbered("document", 3)
    parted = "\n<|doc|>\n".join(texts)
    (tmp_path / "a.txt").write_text(f"<|doc|>\n{parted}\n<|doc|>\n")
    (tmp_path / "b.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(parted.encode()))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "d.parquet")
    for path in tmp_path.iterdir():
        assert list(file_documents(str(path))) == texts, path.name


def test_the_splits_part_the_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", numbered("a", 60))
    write(tmp_path / "b.txt", numbered("b", 40))
    config = config_of(tmp_path, "*.txt")
    train, held_out = (list(documents(config, 0, split)) for split in ("train", "validation"))
    assert sorted(train + held_out) == sorted(numbered("a", 60) + numbered("b", 40))
    assert 8 <= len(held_out) <= 32  # a fifth of 100, give or take three standard deviations


def test_a_document_stays_in_its_split_whatever_file_or_seed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write(tmp_path / "one" / "all.txt", numbered("d", 50))
    write(tmp_path / "two" / "x.txt", numbered("d", 50)[25:])
    write(tmp_path / "two" / "y.txt", numbered("d", 50)[:25])
    one = set(documents(config_of(tmp_path, "one"), 0, "validation"))
    two = set(documents(config_of(tmp_path, "two"), 7, "validation"))
    assert one == two


def test_the_share_of_a_text_never_changes() -> None:
    """Held-out text must stay held out over releases: sha256 of "abc" begins with ba7816bf."""
    assert stable_share("abc") == pytest.approx(0xBA7816BF / 2**32, abs=2**-32)


def test_a_seed_decides_the_order(tmp_path: Path) -> None:
    for name in "abcdefghijkl":
        write(tmp_path / f"{name}.txt", numbered(name, 5))
    config = config_of(tmp_path, "*.txt")
    first, again, other = (list(documents(config, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other and sorted(first) == sorted(other)


def test_files_advance_side_by_side(tmp_path: Path) -> None:
    """A file three times as large gives three of four documents, from the first on."""
    write(tmp_path / "large.txt", numbered("large", 300))
    write(tmp_path / "small.txt", numbered("small", 100))
    opening = list(islice(documents(config_of(tmp_path, "*.txt", fraction=0.01), 0), 80))
    assert 17 <= sum(text.startswith("small") for text in opening) <= 23


def test_a_text_without_separators_is_cut_at_blank_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE", 100)
    paragraphs = [f"paragraph {i} " + "word " * 10 for i in range(30)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    pieces = list(file_documents(str(tmp_path / "book.txt")))
    assert len(pieces) == 15
    assert " ".join("\n\n".join(pieces).split()) == " ".join("\n\n".join(paragraphs).split())
    assert all(piece.startswith("paragraph") for piece in pieces)


def test_an_endless_document_is_cut_so_that_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 1_000)
    lines = [f"line {i}" for i in range(1_000)]
    (tmp_path / "long.txt").write_text("first\n<|doc|>\n" + "\n".join(lines))
    first, *rest = file_documents(str(tmp_path / "long.txt"))
    assert first == "first"
    assert max(map(len, rest)) <= 1_010
    assert "\n".join(rest).split("\n") == lines


def test_a_corpus_with_an_empty_share_is_an_error(tmp_path: Path) -> None:
    text = next(t for t in numbered("d", 99) if stable_share(t) > 0.2)
    write(tmp_path / "a.txt", [text])
    with pytest.raises(DataError, match=r"holds 1 documents.*validation share"):
        list(documents(config_of(tmp_path, "a.txt"), 0, "validation"))


def test_a_pattern_that_finds_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "index.tsv").write_text("a\tb")
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}')
    with pytest.raises(DataError, match=r"There is no .*books.*holds index\.tsv"):
        list(documents(config_of(tmp_path, "books/*.txt"), 0))
    with pytest.raises(DataError, match=r"index\.tsv.*text is read from \.txt"):
        list(documents(config_of(tmp_path, "*.tsv"), 0))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1, has no text; its fields are body"):
        list(documents(config_of(tmp_path, "rows.jsonl"), 0))


@needs_real_data
def test_the_real_corpus_opens_with_a_mix_of_its_files() -> None:
    config = config_of(REAL, "corpus/*.zst", fraction=0.05)
    assert len(corpus.corpus_files(config)) == 7
    opening = list(islice(documents(config, 0), 40))
    assert all(text.strip() for text in opening)
    assert len({text[:40] for text in opening}) >= 39
    assert max(map(len, opening)) > 100_000 > min(map(len, opening))  # a book; a wiki page
