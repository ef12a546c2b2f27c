"""Ray jobs on a real cluster of its own: submitted, watched, scaled, stopped, and resumed.

The head runs in a process group of this test, with its own ports, folder and token; ending the
group ends all of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aquarl.model.checkpoint import latest_checkpoint
from aquarl.storage import get
from tests.conftest import PATIENCE_S, eventually, rows
from tests.planted import SECRETS, holding_a_secret
from tests.test_own_ray import KEPT

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    gcs: str
    dashboard: str
    folder: Path
    environment: dict[str, str]

    def aquarl(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "aquarl.cli", *argv],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip

    def submit(self, *command: str) -> None:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
        done = subprocess.run(
            [*ray, f"--address={self.dashboard}", f"--working-dir={ROOT}", "--", *command],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "aquarl.cli", *argv],
            cwd=ROOT, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def call_scale(self, run: Path, workers: int) -> None:
        """Scale by the Python call, from a process of its own as a notebook is one."""
        lines = f"""
from aquarl.cluster.control import scale
from aquarl.config import load_config

scale(load_config(None, ["run.dir={run}", "cluster.address={self.gcs}"]), {workers})
"""
        done = subprocess.run(
            [sys.executable, "-c", lines],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def ask(self, *argv: str) -> subprocess.CompletedProcess[str]:
        done = self.aquarl(*argv, f"cluster.address={self.gcs}")
        assert done.returncode == 0, done.stderr
        return done


def processes(text: str) -> list[int]:
    """Return the ids of the processes with this in their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may end while we look
            if text.encode() in line.read_bytes():
                found.append(int(line.parent.name))
    return found


@pytest.fixture(scope="module")
def head(bucket: str) -> Iterator[Head]:
    """A head node with 4 CPUs that takes jobs from those who have its token. It has a bucket."""
    folder = Path(tempfile.mkdtemp(prefix="aq", dir="/tmp"))  # short: it holds sockets
    gcs, dashboard = free_port(), free_port()
    (folder / "tmp").mkdir()
    environment = {
        **os.environ,
        **SECRETS,
        "HOME": str(folder),
        "TMPDIR": str(folder / "tmp"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_health_check_initial_delay_ms": "2000",  # as in cluster.yaml
        "RAY_health_check_period_ms": "2000",
        "RAY_health_check_timeout_ms": "4000",
        "RAY_health_check_failure_threshold": "4",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [
            *("ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4"),
            *(f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--temp-dir={folder}/ray", f"--ray-client-server-port={free_port()}"),
            *(f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=200000000"),
        ],
        cwd=folder, env=environment, start_new_session=True,
        stdout=(folder / "head.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        eventually(lambda: can_connect(dashboard) or process.poll() is not None)
        assert process.poll() is None, (folder / "head.log").read_text()
        yield Head(f"127.0.0.1:{gcs}", url, folder, environment)
    finally:
        process.terminate()  # `ray start --block` ends what it started, mostly
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
        for left in processes(str(folder)):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        eventually(lambda: not processes(str(folder)))
        shutil.rmtree(folder, ignore_errors=True)


def can_connect(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def mine(head: Head, text: str) -> list[int]:
    """Return the ids of this head's processes; the machine may have others like them."""
    home, found = f"HOME={head.folder}\0".encode(), []
    for pid in processes(text):
        with suppress(OSError):
            if home in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
    return found


def rollout_workers(head: Head) -> list[int]:
    return mine(head, "ray::RolloutWorker")


def test_a_stage_is_submitted_followed_and_done(head: Head, tiny: str, bucket: str) -> None:
    run = f"{bucket}/runs/submitted"
    here = ["--config", tiny, f"run.dir={run}", f"cluster.address={head.dashboard}"]
    done = head.aquarl("submit", "tokenizer", *here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokenizer  done in" in done.stdout and "is submitted" in done.stdout
    assert json.loads(get(f"{run}/results/tokenizer.json"))["stage"] == "tokenizer"
    mistaken = head.aquarl("submit", "rl", *here)
    assert mistaken.returncode == 2
    assert "rl starts from the result of sft" in mistaken.stdout
    assert "The job ended FAILED" in mistaken.stderr and "Traceback" not in mistaken.stderr


def test_without_the_token_nothing_is_taken(head: Head, tiny: str, tmp_path: Path) -> None:
    stranger = {**head.environment, "RAY_AUTH_TOKEN": "f" * 64}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "aquarl.cli", "submit", "tokenizer", "--config", tiny),
            *(f"run.dir={tmp_path}/run", f"cluster.address={head.dashboard}"),
        ],
        cwd=ROOT, env=stranger, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "No cluster takes jobs" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_live_run_is_seen_scaled_stopped_and_resumed_as_if_nothing_had_been(
    head: Head, finished_run: Path, after_sft: Path, tiny: str
) -> None:
    here = ["--config", tiny, f"run.dir={after_sft}"]
    patient = [f"rl.lease_timeout_s={PATIENCE_S}", f"rl.wait_timeout_s={2 * PATIENCE_S}"]
    submitting = ["submit", "rl", *here, *patient, f"cluster.address={head.dashboard}"]
    following = head.start(*submitting)
    worker = eventually(lambda: rollout_workers(head))[0]
    eventually((after_sft / "checkpoints/rl/step_000002/meta.json").exists)
    os.kill(worker, signal.SIGSTOP)  # the run waits for its lease and is not over too soon
    try:
        seen = status(head, here)
        assert seen["workers"] == ["rollout-0"] and 2 <= seen["weights_version"] < 6
        assert seen["leases"] == {"rollout-0": 1}

        head.ask("scale", "4", *here)
        four = [f"rollout-{i}" for i in range(4)]
        names = [f"RolloutWorker({name})" for name in four]
        eventually(lambda: sorted(shown(head)["RolloutWorker"]) == names)  # costs less than status
        eventually(lambda: status(head, here)["workers"] == four)
        said = shown(head)
        assert said["StreamActor"] == [f"RolloutStream({after_sft})"]
        assert said["MetricsRelay"] == ["MetricsRelay"]
        assert len(rollout_workers(head)) == 4

        head.call_scale(after_sft, 2)
        eventually(lambda: len(rollout_workers(head)) == 2)
        head.submit("python", "ray_jobs/scale.py", "1", *here)
        eventually(lambda: len(rollout_workers(head)) == 1)
        seen = status(head, here)
        assert (seen["workers"], seen["waiting"], seen["wanted"]) == (["rollout-0"], [], 1)
        eventually(lambda: shown(head)["RolloutWorker"] == ["RolloutWorker(rollout-0)"])

        scraped = eventually(lambda: metrics_of(head, "ray_aquarl_groups_total"))
        assert f'run="{after_sft}"' in scraped
        for name in ("rollouts", "sampled_tokens", "reward"):
            assert metrics_of(head, f"ray_aquarl_{name}_total")
        assert metrics_of(head, "ray_aquarl_rollout_workers")
        assert metrics_of(head, "ray_aquarl_rollout_workers_wanted")
        assert metrics_of(head, "ray_aquarl_stream_depth_groups")
        assert metrics_of(head, "ray_aquarl_staleness")

        jobs = json.loads(dashboard(head, "/api/jobs/"))
        job = next(j for j in jobs if j["submission_id"] and j["status"] == "RUNNING")
        dashboard(head, f"/api/jobs/{job['submission_id']}/stop", method="POST")
        out, err = following.communicate(timeout=PATIENCE_S)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
    assert following.returncode == 2 and "The job ended STOPPED" in err
    assert "stopped; the same command goes on from here" in out and "Traceback" not in out
    assert latest_checkpoint(f"{after_sft}/checkpoints/rl") is not None
    assert not (after_sft / "results/rl.json").exists()
    assert_nothing_is_held(head)

    ending = set(rollout_workers(head))  # given back, but not gone yet
    following = head.start(*submitting)
    eventually(lambda: set(rollout_workers(head)) - ending)
    drivers = mine(head, "ray_jobs/rl.py")
    assert drivers
    for driver in drivers:
        os.kill(driver, signal.SIGKILL)
    following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 2 and not (after_sft / "results/rl.json").exists()

    again = head.aquarl(*submitting)
    assert again.returncode == 0, again.stdout + again.stderr
    last = Path("checkpoints/rl/step_000006/weights.safetensors")
    assert (after_sft / last).read_bytes() == (finished_run / last).read_bytes()
    trained = rows(after_sft / "ledger.jsonl")
    assert len(trained) == 48 and len({row["problem"] for row in trained}) == 48
    before = {row["step"]: row["reward/mean"] for row in steps_of(finished_run)}
    assert {row["step"]: row["reward/mean"] for row in steps_of(after_sft)} == before


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run / "metrics.jsonl") if "reward/mean" in row]


def test_a_pipeline_goes_through_as_a_job(
    head: Head, finished_run: Path, tiny: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    here = ["--config", tiny, f"run.dir={run}", f"cluster.address={head.dashboard}"]
    done = head.aquarl("submit", "pipeline", *here)
    assert done.returncode == 0, done.stdout + done.stderr
    last = Path("checkpoints/rl/step_000006/weights.safetensors")
    assert (run / last).read_bytes() == (finished_run / last).read_bytes()
    assert (run / "report.md").is_file()
    assert list(head.folder.rglob("job-driver-*.log")), "the logs of all these jobs"
    assert not holding_a_secret(head.folder) and not holding_a_secret(run)


def dashboard(head: Head, path: str, method: str = "GET") -> str:
    request = urllib.request.Request(head.dashboard + path, method=method)
    request.add_header("Authorization", f"Bearer {head.environment['RAY_AUTH_TOKEN']}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def status(head: Head, here: list[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(head.ask("status", *here).stdout)
    return answer


def shown(head: Head) -> dict[str, list[str]]:
    """Return what the dashboard calls the actors that are alive, by their class."""
    listed = json.loads(dashboard(head, "/api/v0/actors?detail=true"))["data"]["result"]["result"]
    names: dict[str, list[str]] = {}
    for actor in listed:
        if actor["state"] == "ALIVE":
            names.setdefault(actor["class_name"], []).append(actor["repr_name"])
    return names


def held(head: Head) -> dict[str, Any]:
    """Return what is alive in the cluster, and which of its temporary files are aquarl's."""

    def listed(kind: str) -> list[dict[str, Any]]:
        body = json.loads(dashboard(head, f"/api/v0/{kind}?limit=1000&detail=true"))
        found: list[dict[str, Any]] = body["data"]["result"]["result"]
        return found

    return {
        "actors": [
            actor["class_name"]
            for actor in listed("actors")
            if actor["state"] != "DEAD" and not actor["class_name"].startswith(KEPT)
        ],
        "placement groups": [x for x in listed("placement_groups") if x["state"] != "REMOVED"],
        "objects": listed("objects"),
        "temporary files": list((head.folder / "tmp").glob("aquarl*")),
    }


def assert_nothing_is_held(head: Head) -> None:
    with suppress(AssertionError):
        eventually(lambda: not any(held(head).values()))
    assert not {kind: found for kind, found in held(head).items() if found}


def metrics_of(head: Head, name: str) -> str:
    """Return the lines of one metric that some port of the cluster serves to Prometheus."""
    listed = head.folder / "ray/session_latest/prom_metrics_service_discovery.json"
    targets = [target for entry in json.loads(listed.read_text()) for target in entry["targets"]]
    found = ""
    for target in targets:
        with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as at:
            lines = at.read().decode().splitlines()
            found += "\n".join(line for line in lines if line.startswith(name + "{"))
    return found


def test_sigterm_ends_a_command_in_order(finished_run: Path, tiny: str, tmp_path: Path) -> None:
    """Without a job around it: a Ray of its own, which ends with the command."""
    run = tmp_path / "run"
    shutil.copytree(finished_run / "tokenizer", run / "tokenizer")
    (run / "results").mkdir()
    shutil.copy(finished_run / "results/tokenizer.json", run / "results")
    command = subprocess.Popen(
        [
            *(sys.executable, "-m", "aquarl.cli", "base", "--config", tiny, f"run.dir={run}"),
            *("base.steps=400", "base.batch_tokens=256"),  # more text takes longer to encode
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    eventually(lambda: latest_checkpoint(f"{run}/checkpoints/base"))
    command.send_signal(signal.SIGTERM)
    _, err = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 143
    assert err.strip().splitlines()[-1].endswith("the same command goes on from here.")
    assert "Traceback" not in err
