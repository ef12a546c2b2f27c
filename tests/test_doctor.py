"""The doctor: names what is there, what is missing and what to type, and gives no secret away."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from aquarl.cli import main
from aquarl.cluster import doctor as module
from aquarl.cluster.doctor import GIB, Finding, doctor, print_findings

ACCESS = {
    "WANDB_API_KEY": "secret-wandb",
    "HF_TOKEN": "secret-hf",
    "AWS_ACCESS_KEY_ID": "secret-aws-id",
    "AWS_SECRET_ACCESS_KEY": "secret-aws-key",
}
ACCOUNTS = ("wandb", "hugging face", "google storage", "s3")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and an environment without any login, and no cluster but one that is named."""
    for name in os.environ:
        if name.startswith(("WANDB_", "HF_", "AWS_", "GOOGLE_", "CLOUDSDK_", "RAY_", "NETRC")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def named(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def printed(findings: list[Finding], width: int = 80) -> str:
    out = io.StringIO()
    print_findings(findings, Console(file=out, width=width))
    return out.getvalue()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_every_lack_says_what_to_type(home: Path) -> None:
    findings = doctor(str(home / "runs"), f"127.0.0.1:{free_port()}")
    assert named(findings)["cluster"].state == "lack"
    assert named(findings)["python"].state == "ok" and named(findings)["ray"].state == "ok"
    assert all(finding.do for finding in findings if finding.state == "lack")


def test_keys_are_told_of_but_never_shown(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ACCESS.items():
        monkeypatch.setenv(name, value)
    key = home / "key.json"
    key.write_text("secret-gcs")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    findings = doctor(str(home), "local")
    assert [named(findings)[account].state for account in ACCOUNTS] == ["ok"] * 4
    assert "secret" not in printed(findings)


def test_logins_kept_in_files_are_found(home: Path) -> None:
    files = {
        ".netrc": "machine api.wandb.ai login user password secret-wandb\n",
        ".cache/huggingface/token": "secret-hf",
        ".config/gcloud/application_default_credentials.json": "{}",
        ".aws/credentials": "[default]\naws_access_key_id = a\naws_secret_access_key = secret%\n",
    }
    without = named(doctor(str(home), "local"))
    assert [without[account].state for account in ACCOUNTS] == ["note"] * 4
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o600)
    findings = doctor(str(home), "local")
    assert [named(findings)[account].state for account in ACCOUNTS] == ["ok"] * 4
    assert "secret" not in printed(findings)


def test_a_login_for_another_server_is_none_for_this_one(home: Path) -> None:
    (home / ".netrc").write_text("machine example.org login user password secret\n")
    (home / ".aws").mkdir()
    (home / ".aws/credentials").write_text("[work]\naws_secret_access_key = secret\n")
    assert module.check_wandb().state == "note"
    assert module.check_s3().state == "note"


def test_a_credentials_file_that_is_gone_is_a_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    found = module.check_google_storage()
    assert found.state == "lack" and "/nowhere/key.json" in found.what


def test_a_broken_package_does_not_hide_the_other_findings(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Finding:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(module, "check_torch", broken)
    found = named(doctor(str(home), "local"))
    assert found["torch"].state == "lack" and "libcudart" in found["torch"].what
    assert found["disk"].state == "ok"


def test_a_run_folder_need_not_exist_but_must_be_possible(home: Path) -> None:
    (home / "file").write_text("")
    assert module.check_disk(str(home / "not" / "yet")).state in ("ok", "lack")
    assert "not/yet" in module.check_disk(str(home / "not" / "yet")).what
    assert "cannot be written to" in module.check_disk(str(home / "file" / "run")).what
    assert module.check_disk("gs://bucket/run").state == "ok"
    assert not (home / "not").exists()


@pytest.mark.parametrize(("free_gib", "state"), [(4.9, "lack"), (5.1, "ok")])
def test_little_disk_is_a_lack(
    home: Path, monkeypatch: pytest.MonkeyPatch, free_gib: float, state: str
) -> None:
    usage = SimpleNamespace(total=10 * GIB, free=int(free_gib * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert module.check_disk(str(home)).state == state


@pytest.mark.parametrize(("free_gib", "state"), [(3.9, "lack"), (4.1, "ok")])
def test_little_memory_is_a_lack(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, state: str
) -> None:
    monkeypatch.setattr(module, "memory_bytes", lambda: (8 * GIB, int(free_gib * GIB)))
    assert module.check_memory().state == state


def test_a_container_has_its_limit_not_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n",
        "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    monkeypatch.setattr(module, "_read", lambda path: files[path])
    assert module.memory_bytes() == (4 * GIB, 3 * GIB)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert module.memory_bytes() == (16 * GIB, 12 * GIB)


def test_small_shared_memory_is_a_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.check_shared_memory(str(tmp_path / "none")).state == "note"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20))
    assert module.check_shared_memory(str(tmp_path)).state == "lack"


def test_commands_are_printed_whole_however_narrow_the_terminal() -> None:
    do = "a command that is much longer than the terminal is wide [and] holds brackets"
    assert do in printed([Finding("disk", "lack", "full", do)], width=40)


def test_a_server_that_never_answers_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = module.check_cluster(f"127.0.0.1:{server.getsockname()[1]}")
    assert found.state == "lack" and "did not answer" in found.what


def test_auto_finds_what_runs_here_and_says_so_if_nothing_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    found = module.check_cluster(None)
    assert found.state == "note" and found.what.startswith("none runs")
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 0.5)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        found_by_ray = f"127.0.0.1:{port}"  # which Ray shows by this machine's other address
        monkeypatch.setattr(
            "ray._private.services.find_bootstrap_address", lambda folder: found_by_ray
        )
        assert f":{port}" in module.check_cluster(None).what


@pytest.fixture
def cluster(home: Path) -> Iterator[dict[str, str]]:
    """A real Ray in a process of its own, with the token that Ray makes for it in `home`."""
    code = (
        "import ray, sys\n"
        "context = ray.init(address='local', num_cpus=2, include_dashboard=True)\n"
        "print(context.address_info['gcs_address'], context.dashboard_url, flush=True)\n"
        "sys.stdin.read()"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(home)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdin and process.stdout
    address, dashboard = process.stdout.readline().split()
    yield {"gcs": address, "dashboard": f"http://{dashboard}"}
    process.stdin.close()
    process.wait(60)


@pytest.mark.slow
def test_a_running_cluster_is_seen_with_its_token_and_not_without(
    cluster: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = module.check_cluster(cluster["gcs"])
    assert found.state == "ok" and "1 nodes, 2 CPUs" in found.what
    assert module.check_cluster(cluster["dashboard"]).state == "ok"

    token = (home / ".ray" / "auth_token").read_text()
    (home / ".ray" / "auth_token").write_text("0" * len(token))
    for address in cluster.values():
        found = module.check_cluster(address)
        assert found.state == "lack" and "does not let us in" in found.what
        assert token not in found.what


def test_the_command_prints_what_it_found(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"run.dir={tmp_path}/run"]) == 0
    printed = capsys.readouterr().out
    for finding in module.doctor(f"{tmp_path}/run", None):
        assert finding.name in printed
