"""The study of staleness: that its rollouts are as stale as it says, and how it tells of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aquarl.config import load_config
from ray_jobs import staleness
from ray_jobs.staleness import Kind


def test_every_step_trains_on_rollouts_of_exactly_so_many_versions_before(
    finished_run: Path, tiny: str
) -> None:
    settings = ["rl.max_staleness=2", "rl.steps=5", f"run.dir={finished_run}"]
    rows = staleness.exact(load_config(tiny, settings))
    assert [row["rollout/staleness_mean"] for row in rows] == [0, 1, 2, 2, 2]
    assert "validation/accuracy" in rows[-1]


def made_up(reward: float) -> list[dict[str, Any]]:
    names = (
        "rollout/staleness_mean", "policy/kl_from_sampler", "policy/effective_fraction",
        "time/wait_s", "time/learn_s", "time/publish_s", "validation/accuracy",
    )  # fmt: skip
    return [{"reward/mean": reward} | dict.fromkeys(names, 1.0) for _ in range(12)]


def test_a_difference_is_paired_by_seed_and_has_its_interval(tmp_path: Path) -> None:
    """Seeds differ by 0.1 and 0.3: 0.2 with a deviation of 0.1414 / sqrt(2) = 0.1, times 12.706."""
    found: dict[Kind, dict[str, staleness.Rows]] = {kind: {} for kind in staleness.KINDS} | {
        Kind("exact", 0, True): {"a": made_up(0.5), "b": made_up(0.8)},
        Kind("exact", 2, False): {"a": made_up(0.4), "b": made_up(0.5)},
    }
    lines = staleness.table(found).splitlines()
    assert len(lines) == 4 and "| - |" in lines[2]
    assert "| 2, not corrected | 2 | 0.450 | 0.400, 0.500 | -0.200 ± 1.271 |" in lines[3]
    staleness.plot(found, 128, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_one_seed_has_no_interval() -> None:
    assert staleness.with_interval([0.1]) == "-"
    assert staleness.with_interval([0.1, 0.1, 0.1]) == "+0.100 ± 0.000"
