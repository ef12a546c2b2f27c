"""Errors that crossed a process border in, the sentence they were born with out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from aquarl.errors import AquarlError, ClusterError

GONE = (RayActorError, WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)


@contextmanager
def plain_errors(*, dead_is_a_mistake: bool = True) -> Iterator[None]:
    """Let an AquarlError raised in another process come out as itself.

    Args:
        dead_is_a_mistake: Say that the process is gone as a `ClusterError`; else leave Ray's own
            error to whoever can start it again.

    Raises:
        AquarlError: What was raised there, or that the process is gone.
    """
    try:
        yield
    except RayTaskError as error:
        if (mistake := users_mistake(error)) is not None:
            raise mistake from None
        raise
    except GONE as error:
        if not dead_is_a_mistake:
            raise
        raise ClusterError(
            f"A part of the run died: {first_line(error)} The last checkpoint is whole; "
            "start the same command again to resume."
        ) from error


def users_mistake(error: BaseException) -> AquarlError | None:
    """Return the AquarlError at the root of an error that Ray wrapped, if there is one."""
    cause = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    return cause if isinstance(cause, AquarlError) else None


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def last_line(error: BaseException) -> str:
    """Return the line of a remote traceback that says what it was."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[-1] if lines else type(error).__name__
