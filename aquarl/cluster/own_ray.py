"""A Ray of one command alone: it listens on loopback and leaves nothing behind when it ends.

`connection.connected` starts Ray inside of `alone()`; a cluster that somebody else started is
theirs.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants


@contextmanager
def alone() -> Iterator[None]:
    """Keep to this machine, and to folders that are removed, what Ray starts within the block.

    By default Ray listens on every interface, though with a token. The switch by which it stays on
    loopback (meant for laptops with firewalls) is read on importing it, too early for us.

    After an error Ray's logs stay, in its `session_..._PID/logs`.
    """
    sessions = Path(get_default_system_temp_dir()) / "ray"
    mine = f"session_*_{os.getpid()}"
    older = set(sessions.glob(mine))
    folder = tempfile.mkdtemp(prefix="aquarl_")
    loopback = "lo" if sys.platform == "linux" else "lo0"
    settings = {
        "RAY_TMPDIR": str(sessions.parent),  # where it is anyway
        "TMPDIR": folder,  # of Ray's processes; some leave sockets and encoded text behind
        "LOG_NAME_UPDATE_INTERVAL_S": "3600",  # for new logs to send to a driver; ours takes none
        # Of each call Ray keeps a record of some 3 kB for its dashboard, by default 100,000.
        "RAY_task_events_max_num_task_in_gcs": "10000",
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    keeps: set[str] = set()
    try:
        with on_loopback():
            yield
    except Exception:
        keeps.add("logs")
        raise
    finally:
        _put_back(before)
        shutil.rmtree(folder, ignore_errors=True)
        for session in set(sessions.glob(mine)) - older:
            _clear(session, keeps)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have Ray take 127.0.0.1 for what it is, not for this machine's address in its network.

    So it must be where a Ray is started that keeps to loopback, and where one like that is joined.
    """
    switch = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = {switch: os.environ.get(switch)}
    could_cluster, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    os.environ[switch] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = could_cluster
        _put_back(before)


def _put_back(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _clear(folder: Path, keeps: set[str]) -> None:
    """Remove a session's folder but for what is to be kept, and a link that led to it."""
    for entry in folder.iterdir():
        if entry.name in keeps:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if not keeps:
        shutil.rmtree(folder, ignore_errors=True)
    latest = folder.parent / "session_latest"
    if latest.is_symlink() and not latest.exists():
        with suppress(OSError):  # another Ray may have made it its own meanwhile
            latest.unlink()
