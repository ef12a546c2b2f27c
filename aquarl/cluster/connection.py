"""Into a Ray cluster and out of it again: the one that is named, or one of this command alone."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from aquarl.cluster.errors import first_line
from aquarl.cluster.own_ray import alone
from aquarl.config import Config
from aquarl.errors import ClusterError


class Stopped(KeyboardInterrupt):
    """SIGTERM came: `ray job stop`, a scheduler, or a person."""

    status = 143
    """What the command ends with: 128 + the number of the signal."""


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Be in a Ray cluster: the configured one, the job's, or one of our own that ends with us.

    Raises:
        ClusterError: There is no such cluster.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address(config) or "local"
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    with alone() if address == "local" else nullcontext():
        _join(address, namespace(config))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)  # after Ray has set its own
        try:
            yield
        except KeyboardInterrupt:  # what Ray makes of an exception in a signal's handler
            if _is_stopping.is_set():
                raise Stopped from None
            raise
        finally:
            ray.shutdown()


def _join(address: str, namespace: str) -> None:
    starts = "starting Ray on this machine" if address == "local" else f"joining Ray at {address}"
    try:
        require_answer(address)
        with Console(stderr=True).status(starts, refresh_per_second=4):
            ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (RuntimeError, ValueError, OSError, AuthenticationError) as error:
        if address == "local":
            raise ClusterError(
                f"Ray does not start on this machine ({first_line(error)}). `aquarl doctor` says "
                "what it lacks; Ray's own log is in the newest folder below /tmp/ray."
            ) from error
        raise ClusterError(
            f"There is no Ray cluster to join at {address} ({first_line(error)}). "
            "Start one with `ray start --head`, or leave cluster.address out to use this machine."
        ) from error


def require_answer(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray's core would end this very process."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


_is_stopping = threading.Event()


def _stop(signum: int, frame: Any) -> None:
    _is_stopping.set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the way out must not be cut
    raise Stopped


def cluster_address(config: Config) -> str | None:
    """Return the cluster that is named: by the job we are in, or the settings; None for neither."""
    return os.environ.get("RAY_ADDRESS") or config.cluster.address


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Return what keeps an actor on the node of this command, with which it ends anyway.

    An actor without CPUs Ray would put on any node, also on one that is there to sample only and
    that may be taken away.
    """
    node = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(node, soft=False)


def namespace(config: Config) -> str:
    """Return the Ray namespace of a run: where `stream` is found by name."""
    return "aquarl-" + config.run.dir.rstrip("/").replace("://", "-").replace("/", "-")
