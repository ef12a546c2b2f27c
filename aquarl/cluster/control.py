"""A run that is going on somewhere: see it, change its rollout workers, submit another."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import services
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.exceptions import AuthenticationError, GetTimeoutError

from aquarl.cluster.connection import cluster_address, namespace, require_answer
from aquarl.cluster.errors import first_line, plain_errors
from aquarl.cluster.own_ray import on_loopback
from aquarl.cluster.results import finished_at
from aquarl.config import Config, to_toml
from aquarl.errors import ClusterError, ConfigError

JOBS = ("tokenizer", "base", "mid", "sft", "rl", "evaluate", "report", "pipeline")
ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = "http://127.0.0.1:8265"
LOST_AFTER_S = 20.0
"""Without an answer of a cluster, following a job ends."""
STOP_WAIT_S = "20"
"""How long a stopped job has to end in order before it is killed."""


MOST_WORKERS = 1024
"""Four times what one stream was ever seen to serve (docs/control_plane.md): more is a slip."""


def scale(config: Config, workers: int) -> None:
    """Give the live RL run in `run.dir` this many rollout workers.

    Raises:
        ConfigError: None, or more than any run has use for.
        ClusterError: No such run is live on the cluster.
    """
    if workers < 1:
        raise ConfigError(f"A run needs at least 1 rollout worker, not {workers}. Try 1.")
    if workers > MOST_WORKERS:
        raise ConfigError(
            f"{workers} rollout workers were asked for, and more than {MOST_WORKERS} are surely a "
            "slip: Ray would start a process for each, and one stream feeds far fewer. Ask for "
            "what the learner can use: `aquarl status` says whether it waits."
        )
    _ask(config, "scale", workers)


def status(config: Config) -> dict[str, Any]:
    """Return where the live RL run in `run.dir` stands. Raises: ClusterError, as `scale`."""
    answer: dict[str, Any] = _ask(config, "status")
    return answer


def _ask(config: Config, method: str, *args: Any) -> Any:
    """Return what the run's stream answers, in the cluster that is named or any of this machine."""
    named = cluster_address(config)
    here = [named] if named or ray.is_initialized() else sorted(_addresses_here())
    why = "no Ray of yours runs on this machine"
    for address in here:
        try:
            with _joined(address), plain_errors():
                stream = ray.get_actor("stream", namespace=namespace(config))
                return ray.get(getattr(stream, method).remote(*args), timeout=30)
        except (OSError, RuntimeError, ValueError, GetTimeoutError, AuthenticationError) as error:
            why = f"{address or 'this Ray'}: {first_line(error)}"
    if finished_at(config.run.dir, "rl") is not None:
        raise ClusterError(
            f"RL is finished in {config.run.dir}, so nothing of it is live. "
            f"`aquarl report run.dir={config.run.dir}` writes what came of it."
        )
    raise ClusterError(
        f"No RL run in {config.run.dir} answers ({why}). Name the run's directory with "
        "run.dir=... and its cluster with cluster.address=HOST:6379, from a machine of that "
        "cluster. Stages before RL have no workers to ask."
    )


def _addresses_here() -> set[str]:
    """Return the Ray clusters that this user runs on this machine. Another's could be anything, and
    would be sent the token."""
    found = set()
    for process in psutil.process_iter(["name", "uids", "cmdline"]):
        about = process.info
        if about["name"] == "raylet" and about["uids"] and about["uids"].real == os.getuid():
            flags = (flag.partition("=") for flag in about["cmdline"] or ())
            found |= {value for flag, _, value in flags if flag == "--gcs-address"}
    return found


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """Be in the Ray cluster at HOST:PORT, unless we are in one already. Raises: as `ray.init`."""
    if ray.is_initialized() or address is None:
        yield
        return
    require_answer(address)
    with ExitStack() as held:
        if _is_on_loopback_alone(address):
            held.enter_context(on_loopback())
            logging.getLogger("ray").setLevel(logging.ERROR)  # it warns of having a token
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            yield
        finally:
            ray.shutdown()


def _is_on_loopback_alone(address: str) -> bool:
    """Return whether this is the Ray of a local command, which Ray would ask for elsewhere."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return False
    try:
        require_answer(f"{services.get_node_ip_address()}:{port}")
    except OSError:
        return True
    return False


def submit(stage: str, config: Config) -> str:
    """Submit a stage as a Ray job from this checkout and follow its log.

    Args:
        stage: One of `JOBS`.
        config: Its settings; `cluster.address` is that of the dashboard, http://HOST:8265.
            Without it RAY_API_SERVER_ADDRESS counts, then this machine.

    Returns:
        The job's last status, or "RUNNING" if the person stopped following.

    Raises:
        ClusterError: There is no such job, or no cluster that takes jobs.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    script = Path("ray_jobs") / f"{stage}.py"
    if stage not in JOBS or not (ROOT / script).is_file():
        raise ClusterError(f"There is no job {stage!r}. Jobs: {', '.join(JOBS)}.")
    address = config.cluster.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    address = address if "://" in address else f"http://{address}"
    try:
        client = _impatient(JobSubmissionClient)(address)
        job = client.submit_job(
            entrypoint=shlex.join(
                ["python", str(script), "--config", "defaults", *settings(config)]
            ),
            runtime_env={
                "working_dir": str(ROOT),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT_S, "PYTHONUNBUFFERED": "1"},
            },
        )
    except (OSError, RuntimeError, AuthenticationError) as error:
        raise ClusterError(
            f"No cluster takes jobs at {address} ({first_line(error)}). Start one with "
            "`ray start --head`, or set cluster.address=http://HOST:8265; its token belongs in "
            "~/.ray/auth_token or RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token."
        ) from error
    print(f"{job} is submitted; `ray job stop {job}` ends it, and it can be resumed.", flush=True)
    shown, answered = 0, time.monotonic()
    try:
        while True:
            try:
                state = client.get_job_status(job)
                log = client.get_job_logs(job)
                answered = time.monotonic()
            except (OSError, RuntimeError) as error:
                if time.monotonic() - answered > LOST_AFTER_S:
                    raise ClusterError(
                        f"The cluster at {address} has said nothing of {job} for "
                        f"{LOST_AFTER_S:.0f} s ({first_line(error)}). If it still runs, `ray job "
                        f"logs --follow {job}` shows the job; if it is gone, start it and type "
                        "the same command again: it goes on from the last checkpoint."
                    ) from error
                time.sleep(1)
                continue
            print(log[shown:], end="", flush=True)
            shown = len(log)
            if state in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
                return str(state.value)
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\n{job} goes on; `ray job logs --follow {job}` shows it.", flush=True)
        return "RUNNING"


def _impatient(client: Any) -> Any:
    """Return Ray's client with an end to each of its questions: it would wait for ever."""

    class Impatient(client):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, **{"timeout": LOST_AFTER_S} | kwargs)

    return Impatient


def settings(config: Config) -> list[str]:
    """Return what differs from the defaults, as key=value, so that a job needs no file of ours.

    Local paths are whole already: a job runs in a folder of its own that is deleted after it.
    """
    tree = config.model_dump(mode="json")
    tree["cluster"].pop("address")  # a job is in its cluster already
    default = set(_pairs(Config()))
    return [pair for pair in _pairs(Config.model_validate(tree)) if pair not in default]


def _pairs(config: Config) -> Iterator[str]:
    """Yield every setting as section.key=value."""
    section = ""
    for line in to_toml(config).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):  # not set
            yield f"{section}.{line.replace(' = ', '=', 1)}"
