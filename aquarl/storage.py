"""Bytes in, files that are whole or not there out: on a disk, in a bucket, after a crash.

Everything that must never be found half-written goes through here: checkpoints, the tokenizer, the
ledger, results, reports, exports. On a disk it is written aside and renamed into place; in a bucket
a file arrives whole or not at all, and of several files the last one written is what counts.
"""

from __future__ import annotations

import errno
from contextlib import suppress

import fsspec
from fsspec import AbstractFileSystem

from aquarl.errors import StorageError


def what(error: Exception) -> str:
    """Return what a disk or a bucket's client says went wrong."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def get(path: str) -> bytes:
    """Return a file's bytes. Raises: FileNotFoundError; StorageError, where nobody can tell."""
    try:
        fs, where = fsspec.url_to_fs(path)
        body: bytes = fs.cat_file(where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(path) from error
    except Exception as error:  # a bucket can fail in as many ways as there are clients
        raise _unreadable(path, error) from error
    return body


def find(folder: str) -> list[str]:
    """Return the paths of all files below a folder. Raises: StorageError, where nobody can tell."""
    try:
        fs, where = fsspec.url_to_fs(folder)
        fs.invalidate_cache()
        found: list[str] = fs.find(where)
    except Exception as error:
        raise _unreadable(folder, error) from error
    return found


def _unreadable(path: str, error: Exception) -> StorageError:
    return StorageError(
        f"Could not read {path}: {what(error)}. If it is in a bucket, see that this machine "
        "reaches it and is logged in (gcloud auth application-default login, aws configure); "
        "else choose another place (a run's is run.dir). Then start the same command again."
    )


def put(path: str, body: bytes) -> None:
    """Write one file, or leave what stood there. Raises: StorageError."""
    fs, where = fsspec.url_to_fs(path)
    aside = f"{where}.writing" if _can_rename(fs) else where
    try:
        if aside != where:  # a bucket has no folders, and s3fs would make a missing bucket
            fs.makedirs(where.rsplit("/", 1)[0], exist_ok=True)
        _pipe(fs, aside, body)
        if aside != where:
            fs.mv(aside, where)
    except Exception as error:  # a bucket can fail in as many ways as there are clients
        if aside != where:
            _forget(fs, aside)
        raise _refusal(path, error) from error


def put_together(folder: str, files: dict[str, bytes]) -> None:
    """Write all these files of a folder, in order, or leave the folder as it was.

    In a bucket, where nothing can be renamed, readers go by the last of them.

    Raises:
        StorageError: The place is full, away or forbidden.
    """
    fs, path = fsspec.url_to_fs(folder)
    target, replaced = (f"{path}.writing", f"{path}.replaced") if _can_rename(fs) else (path, path)
    try:
        for left_over in (target, replaced):
            if fs.exists(left_over):
                fs.rm(left_over, recursive=True)
        if target != path:
            fs.makedirs(target, exist_ok=True)
        for name, body in files.items():
            _pipe(fs, f"{target}/{name}", body)
        if target != path:  # by renaming alone, so `path` never names a part of a folder
            if fs.exists(path):
                fs.mv(path, replaced, recursive=True)
            fs.mv(target, path, recursive=True)
            _forget(fs, replaced)
    except Exception as error:
        with suppress(Exception):
            if target != path and fs.exists(replaced) and not fs.exists(path):
                fs.mv(replaced, path, recursive=True)
        _forget(fs, target)
        raise _refusal(folder, error) from error


def _can_rename(fs: AbstractFileSystem) -> bool:
    return "file" in fs.protocol


def _pipe(fs: AbstractFileSystem, path: str, body: bytes) -> None:
    fs.pipe_file(path, body)
    if fs.info(path)["size"] != len(body):
        raise OSError(errno.EIO, "fewer bytes arrived than were sent")


def remove(path: str) -> None:
    """Remove a file or folder that nobody needs any more, if it is there. Never raises."""
    fs, where = fsspec.url_to_fs(path)
    _forget(fs, where)


def _forget(fs: AbstractFileSystem, path: str) -> None:
    try:
        if fs.exists(path):
            fs.rm(path, recursive=True)
    except Exception:  # the place may be gone altogether; the next write cleans up
        return


def _refusal(path: str, error: Exception) -> StorageError:
    scheme, is_url, rest = path.partition("://")
    if isinstance(error, FileNotFoundError) and is_url:
        bucket = f"{scheme}://{rest.split('/', 1)[0]}"
        make = {"gs": "gcloud storage buckets create", "s3": "aws s3 mb"}.get(scheme)
        return StorageError(
            f"Could not write {path}: there is no bucket {bucket}. Buckets are never made for you: "
            + (f"make it (`{make} {bucket}`), or choose" if make else "make it, or choose")
            + " another place (a run's is run.dir). Then start the same command again."
        )
    return StorageError(
        f"Could not write {path}: {what(error)}. What was saved before is as it was. "
        "Free some space or choose another place (a run's is run.dir), then start the same command "
        "again."
    )
