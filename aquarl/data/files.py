"""A path in, its lines and rows out: local, `gs://`, `s3://`, `hf://`, or a data set of the hub.

`corpus.py` and `tasks/*.py` read through here, so that a file which is missing, cut short or not
what its name says ends in one sentence that names it, and the line where there is one. Rows come
as `(where, row)` pairs; `where` is what such a sentence says: "aqua/train.json, line 3".
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import fsspec
import zstandard

from aquarl.errors import AquarlError, DataError

Row = dict[str, Any]

CHUNK_BYTES = 1 << 20
ZST_WINDOW_BYTES = 1 << 27
"""Files packed with `zstd --long` need a window larger than the library allows by itself."""


def join(root: str | None, name: str) -> str:
    """Return `name` below `root`; a name that is absolute or a URL already stays as it is."""
    if root is None or "://" in name or name.startswith("/"):
        return name
    return f"{root.rstrip('/')}/{name}"


def exists(path: str) -> bool:
    """Return whether there is a file or folder. Raises: DataError, where that cannot be known."""
    with _in_words(path):
        fs, bare = fsspec.url_to_fs(path)
        return bool(fs.exists(bare))


def is_folder(path: str) -> bool:
    """Return whether there is a folder. Raises: DataError, where that cannot be known."""
    with _in_words(path):
        fs, bare = fsspec.url_to_fs(path)
        return bool(fs.isdir(bare))


def matching_files(pattern: str) -> list[tuple[str, int]]:
    """Return the files that a pattern names and their sizes in bytes, sorted by path.

    Args:
        pattern: A file, a folder (all files directly in it), or a glob with `*`, `?`, `[...]`.

    Raises:
        DataError: Nothing matches, or the place cannot be read.
    """
    with _in_words(pattern):
        fs, bare = fsspec.url_to_fs(pattern)
        if not set("*?[") & set(bare):
            bare = f"{bare.rstrip('/')}/*" if fs.isdir(bare) else bare
        found = [entry for entry in fs.glob(bare, detail=True).values() if entry["type"] == "file"]
        if not found:
            raise FileNotFoundError(pattern)
        is_url = "://" in pattern
        named = [
            (fs.unstrip_protocol(entry["name"]) if is_url else entry["name"], int(entry["size"]))
            for entry in found
        ]
    return sorted(named)


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file without their ends; `.zst` is unpacked on the way.

    Raises:
        DataError: The file is missing, unreadable, cut short, or not UTF-8.
    """
    with _in_words(path), _opened(path) as stream:
        chunks = _unpacked(stream) if path.endswith(".zst") else _chunks(stream)
        for number, line in enumerate(_split_lines(chunks), start=1):
            body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                yield body.removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}, is not UTF-8 text ({error.reason} at byte "
                    f"{error.start}). Save the file as UTF-8, or drop that line."
                ) from error


def read_rows(path: str) -> Iterator[tuple[str, Row]]:
    """Yield `(where, row)` for each object of a JSON-lines file; blank lines are passed over.

    Halves of characters (lone surrogates, as a cut emoji leaves them) become question marks.

    Raises:
        DataError: The file is missing or empty, or a line does not hold one JSON object.
    """
    is_empty = True
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        is_empty = False
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}, is not JSON: {error.msg} at column {error.colno}. "
                "Each line has to hold one whole object; mend or drop that line."
            ) from error
        except RecursionError:
            raise DataError(
                f"{where}, holds lists or objects nested too deeply to be read. Drop that line."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{where}, holds a {type(row).__name__}, but each line has to be one object with "
                'named fields. Write for example {"question": "...", ...}.'
            )
        if "\\ud" in line or "\\uD" in line:
            row = json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
        yield where, row
    if is_empty:
        raise DataError(
            f"{path} is empty, so there is nothing to read. Fetch or write that file again."
        )


def read_column(path: str, column: str) -> Iterator[str]:
    """Yield the texts of one column of a parquet file, in batches of rows, never the whole file.

    Raises:
        DataError: The file is missing, damaged, or has no such column.
    """
    import pyarrow
    import pyarrow.parquet

    with _in_words(path), _opened(path) as stream:
        try:
            shard = pyarrow.parquet.ParquetFile(stream)
            names = shard.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"{path} has no column {column!r}; it has {', '.join(names)}. "
                    f"Rename the column that holds the text to {column!r}."
                )
            for batch in shard.iter_batches(batch_size=256, columns=[column]):
                for text in filter(None, batch.column(0).to_pylist()):
                    if not isinstance(text, str):
                        raise DataError(
                            f"{path} has {batch.column(0).type} in its column {column!r}, but text "
                            "is needed there. Write that column again as strings."
                        )
                    yield text
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path} is not a whole parquet file ({error}). Fetch it again."
            ) from error


def hub_rows(
    name: str, split: str, config: str | None = None, *, streaming: bool = False
) -> Iterator[tuple[str, Row]]:
    """Yield `(where, row)` for each row of a data set of the hub, or of a folder in its layout.

    Args:
        name: "owner/name" on the hub, or a local folder that `datasets.load_dataset` takes.
        streaming: Read as it comes instead of fetching all of it first; for large corpora.

    Raises:
        DataError: The data set cannot be fetched; the message says why.
    """
    import datasets

    about = f"{name} ({', '.join(part for part in (config, split) if part)})"
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for number, row in enumerate(rows, start=1):
            yield f"{about}, row {number}", dict(row)
    except Exception as error:  # the hub's clients raise errors of a dozen libraries
        raise DataError(
            f"{about} could not be fetched from the hub ({_reason(error)}). Check the network and "
            "HF_TOKEN, or set data.root to a folder that holds the files."
        ) from error


@contextmanager
def _in_words(path: str) -> Iterator[None]:
    """Turn what a file system says about a path into a DataError."""
    try:
        yield
    except AquarlError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no {path}. {_what_is_there(path)}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, but a file is needed. Name one in it.") from error
    except zstandard.ZstdError as error:
        raise DataError(f"{path} is not a whole zstd file ({error}). Fetch it again.") from error
    except ImportError as error:
        raise DataError(
            f"{path} needs a package that is not installed ({error}). "
            "Install gcsfs for gs://, s3fs for s3://, huggingface_hub for hf://."
        ) from error
    except Exception as error:
        # A bucket can fail in as many ways as there are clients; a local file only by OSError.
        if not isinstance(error, OSError | ValueError) and "://" not in path:
            raise
        raise DataError(
            f"{path} cannot be read ({_reason(error)}). Check the path and your rights to it."
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _what_is_there(path: str) -> str:
    """Say what stands in the nearest folder above a path that is not there."""
    folder, _, wanted = path.rstrip("/").rpartition("/")
    try:
        fs, bare = fsspec.url_to_fs(folder or ("/" if path.startswith("/") else "."))
        while bare.strip("/") and not fs.isdir(bare):
            bare, _, wanted = bare.rstrip("/").rpartition("/")
        names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(bare, detail=False))
    except Exception:  # saying more is a courtesy; the first error is the one to report
        return "Check the path, and data.root."
    if not names:
        return f"The folder {bare} is empty. Check the path, and data.root."
    listed = ", ".join(islice(names, 8)) + (", ..." if len(names) > 8 else "")
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f"Did you mean {close[0]}?" if close else "Check the path, and data.root."
    return f"The folder {bare or '/'} holds {listed}. {hint}"


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    fs, bare = fsspec.url_to_fs(path)
    with fs.open(bare, "rb") as stream:
        yield stream


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _unpacked(stream: BinaryIO) -> Iterator[bytes]:
    """Unpack zstd frames. Unlike `stream_reader`, this notices a file that was cut short."""
    unpacker = zstandard.ZstdDecompressor(max_window_size=ZST_WINDOW_BYTES)
    frame, is_open = unpacker.decompressobj(), True
    for packed in _chunks(stream):
        while packed:
            if not is_open:
                frame, is_open = unpacker.decompressobj(), True
            yield frame.decompress(packed)
            packed = frame.unused_data
            is_open = not frame.eof
    if is_open:
        raise zstandard.ZstdError("it ends in the middle")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
