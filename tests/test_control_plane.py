"""The simulation of a large pool, at the size of a small one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_jobs import control_plane

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.slow]


def test_one_stream_carries_what_its_workers_offer(tmp_path: Path) -> None:
    small = ["--workers", "3", "--unpaced", "2", "--seconds", "1", "--pace", "20"]
    control_plane.main([*small, "--out", str(tmp_path / "docs")])
    found = json.loads((tmp_path / "docs/control_plane.json").read_text())
    paced, *free = found["rows"]
    assert paced["offered_per_s"] == 60 and 10 < paced["groups_per_s"] < 90
    assert all(row["groups_per_s"] > paced["groups_per_s"] for row in free)
    for row in found["rows"]:
        assert row["late"] == 0, "no group was dropped or asked for twice"
        assert 0 < row["submit_ms"]["p50"] <= row["submit_ms"]["p99"]
        assert row["mb_per_s"] == pytest.approx(row["groups_per_s"] * found["group_mb"])
    page = (tmp_path / "docs/control_plane.md").read_text()
    assert "1,109 groups/s" in page, "ten times 64 times 1,560 x 16 / 1,800 s / 8"
    for row in ("| 3 | 8 | 60 |", "| 2 | 8 | all they can |", "| 2 | 32 | all they can |"):
        assert row in page
    assert (tmp_path / "docs/control_plane.png").is_file()
