"""Waits that end: with what was waited for, or with who stood where when the time was up.

A wait that passes its deadline leaves the stacks of its process in `RUN/stacks/`, a file a wait,
for whoever asks why. The wait itself then ends in an error; nothing here steers.
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from aquarl.errors import ClusterError, StorageError
from aquarl.storage import put

logger = logging.getLogger(__name__)


def wait_for(ref: Any, timeout_s: float, *, what: str, advice: str, run_dir: str) -> Any:
    """Return what a reference, or a list of them, stands for.

    Args:
        what: Completes "Waited 5 s for ...".
        advice: What to type instead.

    Raises:
        ClusterError: It did not come in time. Any error of the work itself, as it is.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as error:
        why = f"Waited {timeout_s:.0f} s for {what}, and it did not come."
        raise ClusterError(f"{why} {advice} {leave_stacks(run_dir, why)}") from error


@contextmanager
def stacks_after(seconds: float) -> Iterator[None]:
    """Have the process print its stacks to its log if the block lasts longer, even stuck in C."""
    faulthandler.dump_traceback_later(seconds, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Deadline:
    """Ends this process, its stacks in its log, if it is not renewed in time; even stuck in C.

    One a process: it is `faulthandler`'s only timer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def renew(self) -> None:
        log = sys.__stderr__ or sys.stderr
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=log)

    def lift(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Have none within the block, which has another, and begin anew after it."""
        self.lift()
        try:
            yield
        finally:
            self.renew()


def leave_stacks(run_dir: str, why: str, state: dict[str, Any] | None = None) -> str:
    """Write where every thread and task of this process stands. Returns the sentence that says so.

    Args:
        state: What else the one who waited knows.
    """
    text = f"{why}\n{json.dumps(state or {}, indent=1, default=str)}\n\n{stacks()}"
    logger.error("%s", text)
    path = f"{run_dir}/stacks/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        put(path, text.encode())
    except StorageError:
        return "Where it stood is in the log of its process."
    return f"Where it stood is in {path}."


def stacks() -> str:
    """Return the Python stack of every thread, and of every task of this thread's event loop."""
    out = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        out.write(f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}\n")
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:  # no loop runs here
        tasks = set()
    for task in tasks:
        task.print_stack(file=out)
    return out.getvalue()
