"""A wait that passes its deadline ends, and tells where it stood."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from aquarl.cluster.waits import stacks, wait_for
from aquarl.errors import ClusterError
from tests.conftest import PATIENCE_S


def test_what_comes_in_time_is_returned_and_what_does_not_is_told(
    ray_here: Any, tmp_path: Path
) -> None:
    class Slow:
        def answer(self) -> int:
            return 7

        def never(self) -> None:
            threading.Event().wait()

    slow = ray_here.remote(num_cpus=0)(Slow).remote()
    asked = {"advice": "Try again.", "run_dir": str(tmp_path)}
    assert wait_for(slow.answer.remote(), 60, what="an answer", **asked) == 7
    with pytest.raises(ClusterError, match=r"Waited 0 s for ever, and .* Try again\.") as refused:
        wait_for(slow.never.remote(), 0.2, what="ever", **asked)
    ray_here.kill(slow)
    (left,) = (tmp_path / "stacks").iterdir()
    assert str(left) in str(refused.value)
    assert "test_what_comes_in_time" in left.read_text()


def test_stacks_are_those_of_every_thread() -> None:
    is_over = threading.Event()

    def idle_about() -> None:
        is_over.wait()

    thread = threading.Thread(target=idle_about, name="idler")
    thread.start()
    try:
        told = stacks()
    finally:
        is_over.set()
        thread.join()
    assert "Thread idler" in told and "idle_about" in told
    assert "test_stacks_are_those" in told


def test_a_block_that_lasts_too_long_shows_its_stack_and_goes_on() -> None:
    code = (
        "import time\n"
        "from aquarl.cluster.waits import stacks_after\n"
        "def slow_block(): time.sleep(0.6)\n"
        "with stacks_after(5.0): pass\n"
        "with stacks_after(0.1): slow_block()\n"
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "went on\n"
    assert done.stderr.count("slow_block") == 1 and "Timeout" in done.stderr


def test_who_passes_its_deadline_ends_and_shows_its_stack() -> None:
    script = """
import time
from aquarl.cluster.waits import Deadline

deadline = Deadline(0.5)
for _ in range(3):
    deadline.renew()
    time.sleep(0.2)
with deadline.lifted():
    time.sleep(1)
print("so far", flush=True)
def stuck():
    time.sleep(60)
stuck()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout) == (1, "so far\n")
    assert "in stuck" in done.stderr
