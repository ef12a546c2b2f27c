"""Several hosts on one machine, joined by a switch whose cables can be pulled.

A host is a process that Linux has given a network, mounts and process ids of its own, so each has
its own address, ports, /dev/shm and /tmp/ray; everything else it shares with the machine, as hosts
share a bucket. The switch is one more, with a bridge in it. None of it has a name outside: it all
hangs on the first process of each host, which ends with its stdin, and so with whoever made it,
however that ends; the kernel then ends the host's other processes and takes back links and mounts.

Needs no privileges where the kernel lets users make namespaces.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.conftest import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("ip", "mount", "nsenter", "unshare")
UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
ANYBODY = ("--user", "--map-root-user")
"""Makes whoever types it root, within."""
AS_ROOT = ("--user", "--preserve-credentials")
BOOT = """set -e
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
ip link set lo up
echo up
cat  # no exec: the shell takes up what becomes of orphans
exit
"""


def why_not() -> str | None:
    """Return why this machine cannot hold several hosts; None if it can."""
    if sys.platform != "linux":
        return "several hosts on one machine are made of Linux namespaces, and this is not Linux"
    if missing := [tool for tool in NEEDED if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found (Debian: apt-get install iproute2 util-linux)"
    probe = "ip link add probe type bridge && mount -t tmpfs probe /dev/shm"
    tried = subprocess.run(
        [*UNSHARE, *ANYBODY, "sh", "-c", probe], capture_output=True, text=True, timeout=20
    )
    if tried.returncode:
        return f"this user may not make network namespaces here ({tried.stderr.strip()})"
    return None


class Host:
    """A machine of our own. `address` is the one that the other hosts know it by."""

    def __init__(self, address: str, unshare: Sequence[str], environment: Mapping[str, str]):
        self.address, self.environment = address, dict(environment)
        self._shell = subprocess.Popen(
            [*unshare, "sh", "-c", BOOT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._shell.stdout is not None
        assert self._shell.stdout.readline() == "up\n", f"{address} did not come up"
        children = Path(f"/proc/{self._shell.pid}/task/{self._shell.pid}/children")
        self.init = int(children.read_text().split()[0])
        """The process that everything here hangs on, by its id on the machine around it."""

    def entering(self, *command: str) -> list[str]:
        """Return what to type on the machine around it to have this typed here."""
        spaces = (*AS_ROOT, "--net", "--mount", "--pid", f"--wd={ROOT}")
        return ["nsenter", f"--target={self.init}", *spaces, "--", *command]

    def call(self, *command: str, timeout: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.entering(*command),
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def start(self, *command: str, log: Path | None = None) -> subprocess.Popen[str]:
        """Begin a command. Its output goes to the log, or to whoever communicates with it."""
        return subprocess.Popen(
            self.entering(*command),
            cwd=ROOT, env=self.environment, text=True,
            stdout=subprocess.PIPE if log is None else log.open("a"),
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
        )  # fmt: skip

    def processes(self, text: str = "") -> list[int]:
        """Return the ids, outside, of the processes with this in their command line."""
        found = []
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it may end while we look
                if os.readlink(folder / "ns/pid") == space:
                    line = (folder / "cmdline").read_bytes()
                    if text.encode() in line:
                        found.append(int(folder.name))
        return found

    def end(self) -> None:
        """End all that runs here at once."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._shell.wait(20)
        for pipe in (self._shell.stdin, self._shell.stdout):
            if pipe is not None:
                pipe.close()


class Switch:
    """What the hosts' cables lead to."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._hosts: list[Host] = []
        self._itself = Host("switch", (*UNSHARE, *ANYBODY), environment)
        self._ip("link add switch type bridge")
        self._ip("link set switch up")

    def host(self) -> Host:
        """Return a new host, plugged in."""
        address = f"10.77.0.{len(self._hosts) + 1}"
        # Below the switch's root, to whom both ends of the cable belong.
        below = ("nsenter", f"--target={self._itself.init}", *AS_ROOT)
        host = Host(address, (*below, "--", *UNSHARE), self._environment)
        self._hosts.append(host)
        port = self._port(host)
        self._ip(f"link add {port} type veth peer name eth0 netns {host.init}")
        for command in (
            f"address add {address}/24 dev eth0",
            "link set eth0 up",
            "route add default dev eth0",  # by which programs look for their own address
        ):
            _check(host.call("ip", *command.split()))
        self._ip(f"link set {port} up")
        self.plug(host)
        return host

    def unplug(self, host: Host) -> None:
        """Let nothing through any more, either way, without telling anybody."""
        self._ip(f"link set {self._port(host)} nomaster")

    def plug(self, host: Host) -> None:
        self._ip(f"link set {self._port(host)} master switch")

    def power_off(self, host: Host) -> None:
        """End a host without a last word: its connections are not closed, they are silent."""
        self.unplug(host)
        host.end()

    def end(self) -> None:
        for host in self._hosts:
            host.end()
        self._itself.end()

    def _port(self, host: Host) -> str:
        return f"port{self._hosts.index(host) + 1}"

    def _ip(self, command: str) -> None:
        # With the process ids of the machine around it: by these it knows where cables lead.
        enter = ("nsenter", f"--target={self._itself.init}", *AS_ROOT, "--net", "--")
        _check(subprocess.run([*enter, "ip", *command.split()], capture_output=True, text=True))


def _check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.args}: {done.stderr}"


@contextmanager
def switched(environment: Mapping[str, str]) -> Iterator[Switch]:
    """Give a switch to put hosts at. What they run ends with the block."""
    switch = Switch(environment)
    try:
        yield switch
    finally:
        switch.end()
