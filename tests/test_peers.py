"""The peers' script does the same work with all of them, here at a size of nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "ray_jobs" / "peers.py"
SMALL = (
    "--size", "1,64,2,512", "--repeats", "1", "--prompts", "2", "--samples", "2",
    "--max-new", "4", "--rows", "2", "--context", "16",
)  # fmt: skip


@pytest.mark.slow
def test_each_peer_is_timed_beside_aquarl(capsys: pytest.CaptureFixture[str]) -> None:
    """The script itself asserts that prompts and lengths of answers are the same."""
    spec = importlib.util.spec_from_file_location("peers", SCRIPT)
    assert spec and spec.loader
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    peers.main(SMALL)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["bench"]: list(line["times_aquarls"]) for line in lines} == {
        "rollouts": ["transformers"], "step": ["TRL"], "sft": ["transformers"],
    }  # fmt: skip
    for line in lines:
        for peer, times in line["times_aquarls"].items():
            theirs, ours = line["cpu_s"][peer]["median"], line["cpu_s"]["aquarl"]["median"]
            assert times == round(theirs / ours, 2) > 0
