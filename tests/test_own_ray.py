"""A command with a Ray of its own: nobody hears it, no secret stays, and it leaves nothing behind.

Each command runs with a folder of its own for temporary files, so all it leaves is found.
"""

from __future__ import annotations

import gc
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from psutil import CONN_LISTEN, Error, Process, net_connections, process_iter

from aquarl.cli import main
from aquarl.cluster.results import copy_up_to_sft
from aquarl.model.checkpoint import latest_checkpoint
from tests.conftest import PATIENCE_S, eventually
from tests.planted import MARK, SECRETS, holding_a_secret

pytestmark = pytest.mark.slow
SHM = "/dev/shm/"
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Watched:
    """A finished command, and what was seen of it and its children while it ran."""

    run: Path
    temporary: Path
    status: int = 0
    said: bytes = b""
    listening: dict[tuple[str, str], int] = field(default_factory=dict)
    """(process, address) to port."""
    told: set[str] = field(default_factory=set)
    """Log files of Ray with a secret in them."""
    shared: set[Path] = field(default_factory=set)
    """Shared memory that its processes had, by its name in /dev/shm."""


def watched(run: Path, *argv: str, until: Any = None) -> Watched:
    """Run a command with secrets in its environment; interrupt it when `until` comes true."""
    temporary = Path(tempfile.mkdtemp(prefix="aq", dir="/tmp"))  # short: it holds sockets
    seen = Watched(run, temporary)
    environment = {**os.environ, **SECRETS, "TMPDIR": str(temporary), "WANDB_MODE": "offline"}
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        environment.pop(name, None)
    command = subprocess.Popen(
        [sys.executable, "-m", "aquarl.cli", *argv, f"run.dir={run}"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = command.stdout
    assert output is not None
    reader = threading.Thread(target=lambda: seen.__setattr__("said", output.read()))
    reader.start()
    is_asked, look_next = False, 0.0
    while command.poll() is None:
        if time.monotonic() > look_next:  # it costs what a stage costs
            look_at(command.pid, seen)
            look_next = time.monotonic() + 1
        if until is not None and not is_asked and until():
            is_asked = True
            command.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            command.wait(0.2)
    reader.join()
    seen.status = command.returncode
    return seen


def look_at(pid: int, seen: Watched) -> None:
    """Write down who listens where, and which logs hold a secret."""
    with suppress(Error):
        parent = Process(pid)
        family = {each.pid: each for each in (parent, *parent.children(recursive=True))}
        for socket in net_connections("inet"):  # one process after the other takes 8 times as long
            if socket.status == CONN_LISTEN and socket.laddr and socket.pid in family:
                with suppress(Error):  # it may end while we look
                    name = family[socket.pid].name()
                    seen.listening[name, socket.laddr.ip] = socket.laddr.port
        for each in family:
            with suppress(OSError):
                lines = Path(f"/proc/{each}/maps").read_text().splitlines()
                names = [line.split(maxsplit=5)[5] for line in lines if SHM in line]
                seen.shared |= {Path(name.removesuffix(" (deleted)")) for name in names}
    seen.told |= holding_a_secret(seen.temporary)


def processes_of(temporary: Path) -> list[str]:
    """Return the processes that were started with this folder for their temporary files."""
    found = []
    for process in process_iter():
        with suppress(Error):
            if str(temporary) in "\n".join(process.environ().values()):
                found.append(f"{process.pid} {process.name()}")
    return found


def left_in(temporary: Path) -> list[str]:
    """Return the files left, but for one that Ray keeps for Prometheus and overwrites."""
    files = (str(f.relative_to(temporary)) for f in temporary.rglob("*") if not f.is_dir())
    return [f for f in files if f != "ray/prom_metrics_service_discovery.json"]


@pytest.fixture(scope="module")
def finished(
    finished_run: Path, tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """RL with two learners, evaluation and report, from a finished SFT stage."""
    run = tmp_path_factory.mktemp("own") / "run"
    copy_up_to_sft(finished_run, run)
    seen = watched(run, "pipeline", "--config", tiny, "cluster.learners=2")
    assert seen.status == 0, seen.said.decode()
    yield seen
    shutil.rmtree(seen.temporary)


def test_nothing_listens_beyond_loopback(finished: Watched) -> None:
    who = {process for process, _ in finished.listening}
    for part in ("raylet", "gcs_server", "StreamActor", "RolloutWorker", "RayTrainWorker"):
        assert any(part in name for name in who), (part, who)
    heard = {
        (process, address) for process, address in finished.listening if not is_loopback(address)
    }
    assert not heard


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def test_no_secret_is_said_or_written(finished: Watched) -> None:
    assert (finished.run / "report.md").is_file() and list((finished.run / "wandb").iterdir())
    assert MARK not in finished.said
    assert not holding_a_secret(finished.run)
    assert not finished.told, "Ray's logs hold a secret"


def test_a_finished_command_leaves_its_run_directory_and_nothing_else(finished: Watched) -> None:
    eventually(lambda: not processes_of(finished.temporary))
    assert finished.shared and not [entry for entry in finished.shared if entry.exists()]
    assert not left_in(finished.temporary)
    assert not (finished.run / "ray_train").exists()
    assert not [f for f in finished.run.rglob("*") if f.name.endswith((".writing", ".replaced"))]


def status_of(run: Path, **token: str) -> subprocess.CompletedProcess[str]:
    """Ask as a person does who names no cluster: there are two on this machine."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | token
    command = [sys.executable, "-m", "aquarl.cli", "status", f"run.dir={run}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )


SOON = ("rl.wait_timeout_s=0.01", "rl.lease_timeout_s=0.009")
"""No worker is up by then."""


@pytest.mark.parametrize("ending", ["interrupt", "failure"])
def test_a_command_that_ends_early_leaves_nothing_either(
    ending: str, after_sft: Path, tiny: str
) -> None:
    """But for Ray's logs, where it failed. While it goes on, it is there to be asked."""
    is_failing = ending == "failure"
    asked: list[subprocess.CompletedProcess[str]] = []

    def is_to_end() -> bool:
        if not is_failing and latest_checkpoint(f"{after_sft}/checkpoints/rl"):
            asked.append(status_of(after_sft, RAY_AUTH_TOKEN=SECRETS["RAY_AUTH_TOKEN"]))
        return bool(asked)

    seen = watched(
        after_sft, "rl", "--config", tiny, "rl.steps=2000",
        *(SOON if is_failing else []), until=is_to_end,
    )  # fmt: skip
    for answer in asked:
        assert json.loads(answer.stdout)["step"] > 0, answer.stderr
    assert "No RL run in" in status_of(after_sft).stderr
    assert seen.status == (2 if is_failing else 130), seen.said.decode()
    assert b"Traceback" not in seen.said
    eventually(lambda: not processes_of(seen.temporary))
    assert not [entry for entry in seen.shared if entry.exists()]
    left = [f for f in left_in(seen.temporary) if not re.match(r"ray/session_[^/]*/logs/", f)]
    assert not left
    assert bool(left_in(seen.temporary)) == is_failing
    assert not (after_sft / "ray_train").exists()
    shutil.rmtree(seen.temporary)


# In a cluster that goes on, what a command took must be given back.


def taken() -> dict[str, Any]:
    """Return what is alive in the cluster of this test session, by kind."""
    from ray.util.state import list_actors, list_objects, list_placement_groups

    here = ray.get_runtime_context().gcs_address
    actors = list_actors(here, limit=1000, filters=[("state", "!=", "DEAD")])
    groups = list_placement_groups(here, limit=1000, filters=[("state", "!=", "REMOVED")])
    return {
        # Ray Data and Ray Train keep one helper each for a cluster's life.
        "actors": sorted(a.class_name for a in actors if not a.class_name.startswith(KEPT)),
        "placement groups": len(groups),
        "objects": len(list_objects(here, limit=1000, raise_on_missing_output=False)),
        "CPUs": ray.available_resources().get("CPU"),
    }


KEPT = ("_AutoscalingCoordinatorActor", "DatasetManager")
NOTHING = {"actors": [], "placement groups": 0, "objects": 0, "CPUs": 4.0}


@pytest.mark.parametrize("ending", ["success", "failure", "interrupt"])
def test_a_lasting_cluster_gets_everything_back(
    ending: str, ray_here: Any, after_sft: Path, tiny: str
) -> None:
    settings = {
        "success": ["rl.steps=2"],
        "failure": ["rl.steps=2000", *SOON],
        "interrupt": ["rl.steps=2000"],
    }[ending]
    if ending == "interrupt":

        def interrupt() -> None:
            eventually(lambda: latest_checkpoint(f"{after_sft}/checkpoints/rl"))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
    status = main(["rl", "--config", tiny, f"run.dir={after_sft}", *settings])
    assert status == {"success": 0, "failure": 2, "interrupt": 130}[ending]
    left: dict[str, Any] = {}

    def is_given_back() -> bool:
        gc.collect()  # a traceback holds what its frames held
        left.update(taken())
        return left == NOTHING

    try:
        eventually(is_given_back)
    except AssertionError:
        raise AssertionError(left) from None


# What is said of secrets without any Ray.


@pytest.mark.parametrize(
    "argv",
    [
        ("rl", "run.dir=s3://AKIA5EC4E7:5ec4e7/a@bucket/run"),
        ("rl", "data.root=https://host/file?X-Amz-Signature=5ec4e7"),
        ("publish", "https://user:5ec4e7@host/run"),
        ("publish", "https://5ec4e7@host/run"),
        ("rl", "data.root=https://host/file?sv=1&sig=5ec4e7"),
        ("rl", "track.wandb=" + SECRETS["WANDB_API_KEY"]),
        ("rl", "track.api_key=" + SECRETS["WANDB_API_KEY"]),
    ],
)
def test_a_secret_among_the_settings_is_refused_and_not_repeated(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert not re.search("5ec4e7", said.out + said.err, re.IGNORECASE)


def test_a_secret_in_an_unknown_option_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--api-key=5ec4e7"]) == 2
    assert "there is no option --api-key here" in (said := capsys.readouterr().err)
    assert "5ec4e7" not in said


def test_a_url_without_a_password_is_none_of_these(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "data.root=hf://datasets/user/set@main/folder", "--dry-run"]) == 0
