"""The script for a GPU's first minutes runs its whole path here, at a size of nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from aquarl.bench.work import Work

SCRIPT = Path(__file__).parents[1] / "ray_jobs" / "gpu_check.py"


@pytest.fixture
def gpu_check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_checks_measures_and_writes_both_files(gpu_check: Any, tmp_path: Path) -> None:
    out = tmp_path / "seen"
    assert gpu_check.main(["--device", "cpu", "--small", "--out", str(out)]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["checks"].keys() == gpu_check.CHECKS.keys()
    assert {line["bench"] for line in result["bench"]} == {"rollouts", "learner", "step", "sft"}
    assert len(result["profile"]) == 10 and result["left_out"] == []
    page = out.with_suffix(".md").read_text()
    assert page.count("| holds |") == 4 and "tokens per CPU second" in page


@pytest.mark.vllm
def test_vllm_is_held_to_the_learner_with_one_policy_and_then_another(gpu_check: Any) -> None:
    work = Work("1,64,2,512", prompts=2, samples=2, max_new=4)
    seen = gpu_check.check_vllm(work, "cpu")
    assert seen["holds"] and max(seen["mean_gaps_nats"]) < 1e-5


def test_what_is_wrong_is_said_and_what_is_late_is_named(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(work: Any, device: str) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_check, "CHECKS", {"broken": fails})
    monkeypatch.setattr(gpu_check, "PIECES", {})
    monkeypatch.setattr(gpu_check, "profiled", lambda work, device: [])
    monkeypatch.setattr(gpu_check, "bench", lambda *args, **settings: [])
    out = tmp_path / "seen"
    assert gpu_check.main(["--device", "cpu", "--small", "--out", str(out)]) == 1
    assert "RuntimeError: no such kernel" in out.with_suffix(".md").read_text()
    late = gpu_check.run("cpu", small=True, minutes=-1)
    assert "bench step" in late["left_out"] and late["bench"] == []
