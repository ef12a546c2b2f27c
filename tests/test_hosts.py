"""RL across hosts with addresses of their own: links are cut, hosts die, and nodes come and go.

A head that only keeps the books, a host that learns and two that sample; what goes where is decided
by CPUs alone. Each host runs `ray start` again whenever Ray ends there, as systemd would. The head
has Ray's autoscaler, with a provider whose nodes are further raylets beside the head.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aquarl.cluster.chaos import each_once_an_epoch
from tests.conftest import PATIENCE_S, assert_same, eventually, rl_in_process, rows, weights
from tests.hosts import Host, Switch, switched, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.chaos,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
AGAIN = "while true; do ray start --block --disable-usage-stats {}; sleep 0.2; done"
STARTED = "Ray runtime started"
STEPS = 24
"""Four epochs of the 48 problems: enough to be in the middle of the run when something happens."""
HERE = (f"rl.steps={STEPS}", "rl.eval_every=100", "cluster.learner_cpus=5")
ON_A_HOST = "cluster.rollout_cpus=4"
"""Too much for a node of the autoscaler."""
ON_ANY = "cluster.rollout_cpus=3"
HEAD_ID = "f" * 51 + "00000"
"""By which the provider below knows the head's node."""

LISTS = (
    *("cluster_synced_files", "rsync_exclude", "rsync_filter"),
    *("initialization_commands", "setup_commands"),
    *("head_setup_commands", "head_start_ray_commands"),
    *("worker_setup_commands", "worker_start_ray_commands"),
)
"""Of a cluster's file, empty here: nothing is installed on these nodes."""
AUTOSCALER: dict[str, Any] = {
    "cluster_name": "hosts",
    "max_workers": 1,
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 0.1,
    "provider": {
        "type": "fake_multinode",
        "gcs_address": "10.77.0.1:6379",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "rollout": {
            "resources": {"CPU": 3, "object_store_memory": 100_000_000},
            "node_config": {},
            "max_workers": 1,
        },
    },
    "auth": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
} | {key: [] for key in LISTS}


@dataclass(frozen=True)
class Cluster:
    switch: Switch
    head: Host
    learner: Host
    rollouts: tuple[Host, Host]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "token").write_text("0123456789abcdef" * 4)
    (folder / "autoscaler.json").write_text(json.dumps(AUTOSCALER))
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_health_check_initial_delay_ms": "1000",  # a third of what cluster.yaml allows
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_raylet_liveness_self_check_interval_ms": "2000",  # of 60 s: is the head another?
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    with switched(environment) as switch:
        head, learner, *rollouts = (switch.host() for _ in range(4))
        head.environment["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = HEAD_ID
        as_head = f"--head --autoscaling-config={folder}/autoscaler.json"
        books = ray_up(head, folder, f"{as_head} --dashboard-host=127.0.0.1 --num-cpus=0")
        eventually(lambda: STARTED in books.read_text())
        join = f"--address={head.address}:6379"
        cpus = {learner: 5, rollouts[0]: 4, rollouts[1]: 4}
        logs = [ray_up(host, folder, f"{join} --num-cpus={n}") for host, n in cpus.items()]
        eventually(lambda: all(STARTED in log.read_text() for log in logs))
        yield Cluster(switch, head, learner, (rollouts[0], rollouts[1]))


def ray_up(host: Host, folder: Path, options: str) -> Path:
    """Have Ray run on a host, and again whenever it ends. Returns the log of its starts."""
    log = folder / f"{host.address}.log"
    options += f" --node-ip-address={host.address} --object-store-memory=100000000"
    host.start("sh", "-c", AGAIN.format(options), log=log)
    return log


def nodes(cluster: Cluster, state: str, *hosts: Host) -> list[dict[str, Any]]:
    """Return what the dashboard says of these hosts' nodes; it listens on the head's loopback."""
    ask = (
        "import os, urllib.request as u;"
        "token = open(os.environ['RAY_AUTH_TOKEN_PATH']).read();"
        "url = 'http://127.0.0.1:8265/api/v0/nodes?detail=true';"
        "ask = u.Request(url, headers={'Authorization': 'Bearer ' + token});"
        "print(u.urlopen(ask, timeout=20).read().decode())"
    )
    done = cluster.head.call(sys.executable, "-c", ask)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["data"]["result"]["result"]
    addresses = {host.address for host in hosts}
    return [node for node in found if node["state"] == state and node["node_ip"] in addresses]


def submit(cluster: Cluster, tiny: str, run: Path, *settings: str) -> Any:
    """Begin what a person types on the head."""
    return cluster.head.start(
        *(sys.executable, "-m", "aquarl.cli", "submit", "rl", "--config", tiny),
        *(f"run.dir={run}", *settings),
    )


def workers(host: Host) -> list[int]:
    return host.processes("ray::RolloutWorker")


def steps_done(run: Path) -> int:
    curve = run / "metrics.jsonl"
    return sum("tokens/trained" in row for row in rows(curve)) if curve.exists() else 0


def sampled_last(run: Path) -> float:
    """Return when the last trained group was begun, in seconds since the epoch."""
    return max(row["sampled"][0] for row in rows(run / "ledger.jsonl"))


def assert_as_if_undisturbed(run: Path, tiny: str, *settings: str) -> list[dict[str, Any]]:
    """Return the ledger, after comparing the run with one in a single process."""
    assert json.loads((run / "results/rl.json").read_text())["steps"] == STEPS
    assert_same(weights(run), rl_in_process(tiny, run, *settings)[0])
    trained = rows(run / "ledger.jsonl")
    assert len(trained) == 8 * STEPS
    assert each_once_an_epoch([row["problem"] for row in trained], problems=48)
    return trained


def test_a_pulled_cable_lets_nothing_through_and_nothing_outlives_the_hosts(tmp_path: Path) -> None:
    with switched(os.environ) as switch:
        near, far = switch.host(), switch.host()
        serve = ("-m", "http.server", "8000", "--bind", far.address)
        far.start(sys.executable, *serve, log=tmp_path / "log")
        ask = f"import socket; socket.create_connection(('{far.address}', 8000), timeout=1)"

        def reached() -> bool:
            return near.call(sys.executable, "-c", ask).returncode == 0

        eventually(reached)
        switch.unplug(far)
        assert not reached()
        switch.plug(far)
        eventually(reached)
        started = near.processes() + far.processes()
    assert far.init in started and len(started) >= 3
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def test_a_pool_that_wants_more_gets_a_node_that_leaves_when_it_is_idle(
    cluster: Cluster, after_sft: Path, tiny: str
) -> None:
    pool = ("rl.rollout_workers={min = 2, max = 3}", "rl.prompts_per_lease=2", ON_ANY)
    following = submit(cluster, tiny, after_sft, *HERE, *pool)
    began = time.time()
    eventually(lambda: [w for host in cluster.rollouts for w in workers(host)][1:])
    eventually(lambda: steps_done(after_sft))
    eventually(lambda: rows(after_sft / "metrics.jsonl")[-1].get("pool/wanted") == 3)
    (learner,) = cluster.learner.processes("ray::RayTrainWorker")
    os.kill(learner, signal.SIGSTOP)  # the run must not be over before the node is there
    wanted_at = time.time()
    assert len(raylets(cluster.head)) == 1
    eventually(lambda: len(raylets(cluster.head)) == 2)
    node_at = time.time()
    eventually(lambda: workers(cluster.head))
    worker_at = time.time()
    os.kill(learner, signal.SIGCONT)
    out, err = following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 0, out + err
    ended_at = time.time()
    trained = assert_as_if_undisturbed(after_sft, tiny, *HERE, *pool)
    assert {row["worker"] for row in trained} == {"rollout-0", "rollout-1", "rollout-2"}
    eventually(lambda: len(raylets(cluster.head)) == 1)
    print(
        f"submitted {wanted_at - began:.1f} s until a third worker was wanted, "
        f"{node_at - wanted_at:.1f} s until the node began, {worker_at - wanted_at:.1f} s until it "
        f"worked, {ended_at - worker_at:.1f} s to end, {time.time() - ended_at:.1f} s to leave"
    )


def raylets(host: Host) -> list[int]:
    return host.processes("/raylet/raylet")


def test_a_learners_host_that_is_cut_costs_the_steps_since_the_checkpoint(
    cluster: Cluster, after_sft: Path, tiny: str
) -> None:
    following = submit(cluster, tiny, after_sft, *HERE, "rl.rollout_workers=2", ON_A_HOST)
    eventually(lambda: steps_done(after_sft) > 5)
    sampling = [pid for host in cluster.rollouts for pid in workers(host)]
    (learner,) = cluster.learner.processes("ray::RayTrainWorker")
    cluster.switch.unplug(cluster.learner)
    cut_at = time.time()
    eventually(lambda: nodes(cluster, "DEAD", cluster.learner), every=1)
    cluster.switch.plug(cluster.learner)
    plugged_at = time.time()
    eventually(lambda: set(cluster.learner.processes("ray::RayTrainWorker")) - {learner})
    steps, again_at = steps_done(after_sft), time.time()
    eventually(lambda: steps_done(after_sft) > steps)
    stepped_at = time.time()
    assert [pid for host in cluster.rollouts for pid in workers(host)] == sampling
    out, err = following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 0, out + err
    assert_as_if_undisturbed(after_sft, tiny, *HERE, "rl.rollout_workers=2")
    print(
        f"noticed in {plugged_at - cut_at:.1f} s, a learner {again_at - plugged_at:.1f} s after "
        f"the cable was back, its first step {stepped_at - again_at:.1f} s later"
    )


def test_a_cut_host_and_a_dead_one_cost_their_leases_and_nothing_else(
    cluster: Cluster, after_sft: Path, tiny: str
) -> None:
    cut, dying = cluster.rollouts
    began = time.time()
    following = submit(cluster, tiny, after_sft, *HERE, "rl.rollout_workers=2", ON_A_HOST)
    eventually(lambda: steps_done(after_sft) > 1)
    eventually(lambda: workers(cut) and workers(dying))
    first = workers(cut)[0]
    for part in ("ray::StreamActor", "ray::MetricsRelay"):  # where nobody cuts the link
        assert cluster.head.processes(part)

    hold(cluster, cut)
    cluster.switch.unplug(cut)
    cut_at = time.time()
    os.kill(first, signal.SIGCONT)  # it goes on, for nobody
    eventually(lambda: sampled_last(after_sft) > cut_at + 4)  # before, Ray cannot have noticed
    hold(cluster, dying)  # the run must not be over before the other is back
    cluster.switch.plug(cut)
    plugged_at = time.time()
    eventually(lambda: set(workers(cut)) - {first})
    back_at = time.time()

    cluster.switch.power_off(dying)
    off_at = time.time()
    out, err = following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 0, out + err
    ended_at = time.time()
    trained = assert_as_if_undisturbed(after_sft, tiny, *HERE, "rl.rollout_workers=2")
    stream = json.loads((after_sft / "results/rl.json").read_text())["stream"]
    assert (stream["reissued"], stream["workers_replaced"]) == (2, 2)
    assert {row["worker"] for row in trained if row["sampled"][0] > off_at} == {"rollout-2"}
    print(f"\nup to the cut {cut_at - began:.1f} s; back after {back_at - plugged_at:.1f} s")
    for host, at in ((cut, cut_at), (dying, off_at)):
        dead_at = nodes(cluster, "DEAD", host)[0]["end_time_ms"] / 1000
        again_at = min(row["sampled"][0] for row in trained if row["sampled"][0] > dead_at)
        print(f"{host.address}: noticed in {dead_at - at:.1f} s, leased in {again_at - at:.1f} s")
        assert at < dead_at < again_at < at + 30
    assert len(nodes(cluster, "ALIVE", cut)) == 1
    print(f"all {ended_at - began:.1f} s")


def test_after_the_end_of_the_cluster_the_same_command_goes_on_from_the_checkpoint(
    cluster: Cluster, after_sft: Path, tiny: str
) -> None:
    """The last test: a host is without power by now."""
    command = (*HERE, "rl.rollout_workers=1", ON_A_HOST)
    following = submit(cluster, tiny, after_sft, *command)
    eventually(lambda: steps_done(after_sft) > 5)
    (books,) = cluster.head.processes("gcs_server")
    os.kill(books, signal.SIGKILL)
    died_at = time.time()
    _, err = following.communicate(timeout=PATIENCE_S)
    assert following.returncode == 2 and not (after_sft / "results/rl.json").exists()
    assert "start it and type the same command again" in err and "Traceback" not in err
    there = cluster.head, cluster.learner, cluster.rollouts[0]
    eventually(lambda: all_up(cluster, there), every=1)
    up_at = time.time()
    again = submit(cluster, tiny, after_sft, *command)
    out, err = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, out + err
    assert steps_done(after_sft) <= STEPS + 3, "it went on from the checkpoint"
    assert_as_if_undisturbed(after_sft, tiny, *HERE, "rl.rollout_workers=1")
    print(f"up again in {up_at - died_at:.1f} s, the rest in {time.time() - up_at:.1f} s")


def all_up(cluster: Cluster, hosts: Sequence[Host]) -> bool:
    try:
        up = {node["node_ip"] for node in nodes(cluster, "ALIVE", *hosts)}
    except (AssertionError, json.JSONDecodeError):  # the dashboard is not up yet
        return False
    return len(up) == len(hosts)


def hold(cluster: Cluster, host: Host) -> None:
    """Have a host's worker stand still with a lease in its hands.

    While the learner stands still, workers finish what they have and ask for more; what this one
    has asked for it gets, and does not do.
    """
    (learner,) = cluster.learner.processes("ray::RayTrainWorker")
    os.kill(learner, signal.SIGSTOP)
    time.sleep(1)
    for worker in workers(host):
        os.kill(worker, signal.SIGSTOP)
    os.kill(learner, signal.SIGCONT)
