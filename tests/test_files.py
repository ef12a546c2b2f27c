"""Promises of `aquarl.data.files`: what is read, and what a person is told when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from aquarl.data.files import (
    exists,
    hub_rows,
    is_folder,
    join,
    matching_files,
    read_column,
    read_lines,
    read_rows,
)
from aquarl.errors import DataError


def test_a_name_is_joined_to_the_root_unless_it_stands_alone() -> None:
    assert join("gs://bucket/data/", "aqua/train.json") == "gs://bucket/data/aqua/train.json"
    assert join("data", "/elsewhere/x.jsonl") == "/elsewhere/x.jsonl"
    assert join("data", "s3://bucket/x.jsonl") == "s3://bucket/x.jsonl"
    assert join(None, "x.jsonl") == "x.jsonl"


def test_rows_come_with_the_line_they_stand_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": 1}\r\n\n{"a": "\u2028é"}'.encode())
    assert list(read_rows(str(path))) == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 3", {"a": "\u2028é"}),
    ]


@pytest.mark.parametrize(
    ("line", "said"), [('{"a": 1,}', "is not JSON"), ("[1, 2]", "holds a list")]
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2, {said}"):
        list(read_rows(str(path)))


def test_half_a_character_becomes_a_question_mark(tmp_path: Path) -> None:
    """What is cut in the middle of an emoji; nothing after could write it as UTF-8."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "cut \\ud83d here", "whole": "\\ud83d\\ude00"}')
    ((_, row),) = read_rows(str(path))
    assert row == {"text": "cut ? here", "whole": "\N{GRINNING FACE}"}


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2, is not UTF-8"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        list(read_rows(str(path)))


def test_a_missing_file_is_told_with_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "aqua").mkdir()
    (tmp_path / "aqua" / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"aqua holds train\.jsonl\. Did you mean train\.jsonl"):
        list(read_rows(str(tmp_path / "aqua" / "train.json")))
    with pytest.raises(DataError, match=r"holds aqua\. Did you mean aqua\?"):
        list(read_rows(str(tmp_path / "agua" / "train.json")))
    with pytest.raises(DataError, match=r"is a folder"):
        list(read_rows(str(tmp_path / "aqua")))


def test_a_bucket_reads_like_a_folder() -> None:
    with fsspec.open("memory://files-test/aqua/train.jsonl", "w") as stream:
        stream.write('{"a": 1}\n')
    root = "memory://files-test"
    assert exists(join(root, "aqua/train.jsonl")) and not exists(join(root, "aqua/dev.jsonl"))
    assert is_folder(join(root, "aqua"))
    [(path, size)] = matching_files(join(root, "*/*.jsonl"))
    assert size == 9
    assert [row for _, row in read_rows(path)] == [{"a": 1}]


@pytest.mark.slow
def test_s3_reads_like_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, against a server that speaks S3."""
    server_module = pytest.importorskip("moto.server", reason="the dev extra brings moto[server]")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("files-test")
        fs.pipe_file("files-test/data/rows.jsonl", b'{"a": 1}\n')
        fs.pipe_file(
            "files-test/data/text.txt.zst", zstandard.ZstdCompressor().compress(b"one\ntwo\n")
        )
        rows, text = (path for path, _ in matching_files("s3://files-test/data/*"))
        assert (rows, text) == (
            "s3://files-test/data/rows.jsonl",
            "s3://files-test/data/text.txt.zst",
        )
        assert [row for _, row in read_rows(rows)] == [{"a": 1}]
        assert list(read_lines(text)) == ["one", "two"]
        with pytest.raises(DataError, match=r"There is no s3://.*holds rows\.jsonl, text\.txt"):
            list(read_rows("s3://files-test/data/row.jsonl"))
    finally:
        server.stop()


def test_a_bucket_of_an_unknown_kind_is_an_error_in_words() -> None:
    with pytest.raises(DataError, match=r"gx://bucket/x\.jsonl cannot be read"):
        list(read_rows("gx://bucket/x.jsonl"))


def test_packed_text_equals_plain_text_also_in_several_frames(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(5_000))
    path = tmp_path / "text.txt.zst"
    packer = zstandard.ZstdCompressor()
    path.write_bytes(
        packer.compress(text[:10_001].encode()) + packer.compress(text[10_001:].encode())
    )
    assert list(read_lines(str(path))) == text.split("\n")[:-1]


def test_a_packed_file_that_was_cut_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.zst"
    packed = zstandard.ZstdCompressor().compress(b"".join(b"%d\n" % (i * i) for i in range(9_999)))
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"not a whole zstd file"):
        list(read_lines(str(path)))
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"not a whole zstd file"):
        list(read_lines(str(path)))


def test_a_parquet_column_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.parquet")
    table = pyarrow.table({"text": ["one", None, "two"], "score": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path)
    assert list(read_column(path, "text")) == ["one", "two"]
    with pytest.raises(DataError, match=r"int64 in its column 'score', but text is needed"):
        list(read_column(path, "score"))
    with pytest.raises(DataError, match=r"no column 'body'; it has text, score"):
        list(read_column(path, "body"))
    Path(path).write_bytes(Path(path).read_bytes()[:60])
    with pytest.raises(DataError, match=r"not a whole parquet file"):
        list(read_column(path, "text"))


def test_files_match_in_sorted_order_with_their_sizes(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder").mkdir()
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.md"))
    assert matching_files(f"{tmp_path}/*.txt") == [(a, 5), (b, 5)]
    assert matching_files(str(tmp_path)) == [(a, 5), (b, 5), (c, 4)]
    assert matching_files(c) == [(c, 4)]
    with pytest.raises(DataError, match=r"There is no .*\.parquet.*holds a\.txt, b\.txt, c\.md"):
        matching_files(f"{tmp_path}/*.parquet")


def test_the_hub_loader_reads_a_folder_in_the_hubs_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call reads the hub; a test without a network gives it a local data set."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"q{i}", "options": ["A)1", "B)2"]} for i in range(3)]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = list(hub_rows(str(folder), "train", streaming=True))
    assert [row for _, row in read] == rows
    assert read[2][0] == f"{folder} (train), row 3"
    with pytest.raises(DataError, match=r"could not be fetched from the hub .*data\.root"):
        list(hub_rows(str(folder), "test", streaming=True))
