"""Whether something grows: what counts as growing, by hand, and a look at a short run."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from ray_jobs import memory


def series(per_hour: float, noise: float = 0.0) -> list[tuple[float, float]]:
    """Looks every ten seconds for half an hour, at something of 100 MB."""
    rng = random.Random(0)
    return [(10.0 * i, 100 + per_hour * i / 360 + rng.gauss(0, noise)) for i in range(180)]


def test_the_slope_of_a_line_is_its_own() -> None:
    slope, error = memory.slope_of(series(60))
    assert slope == pytest.approx(60) and error == pytest.approx(0, abs=1e-6)
    slope, error = memory.slope_of(series(60, noise=5))
    assert 0 < error < 10 and abs(slope - 60) < 3 * error
    with pytest.raises(ValueError, match="too few"):
        memory.slope_of(series(60)[:9])


@pytest.mark.parametrize(
    ("per_hour", "noise", "said"), [(0, 1, "flat"), (100, 1, "grows"), (19, 20, "undecided")]
)
def test_only_what_surely_grows_is_said_to_and_only_what_surely_does_not_is_flat(
    per_hour: float, noise: float, said: str
) -> None:
    assert memory.verdict(*memory.slope_of(series(per_hour, noise))) == said


def test_who_came_or_went_on_the_way_is_not_judged() -> None:
    seen = {"stays": series(0), "leaves": series(0)[:150], "comes": series(0)[90:]}
    assert [row["process"] for row in memory.judged(seen, 1800)] == ["stays"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_a_run_is_looked_at_until_its_time_is_up_and_keeps_nothing_of_a_step(
    after_sft: Path, tiny: str
) -> None:
    """Of a hundred or so: an object each would show in the store, weights of each in a process."""
    often = ["--minutes", "0.5", "--every", "0.5", "--config", tiny, f"run.dir={after_sft}"]
    memory.main([*often, "rl.steps=5000", "rl.save_every=1000", "rl.eval_every=5000"])
    found = json.loads((after_sft / "memory.json").read_text())
    assert not (after_sft / "results/rl.json").exists(), "it was stopped on its way"
    assert found["steps"] > 30
    roles = {name.split()[0] for name in found["seen"]}
    assert {"driver", "raylet", "gcs_server", "StreamActor", "RolloutWorker"} <= roles
    gained = {}
    for row in found["rows"]:
        values = [value for _, value in found["seen"][row["process"]]]
        third = len(values) // 3
        before, after = values[third : 2 * third], values[2 * third :]
        gained[row["process"]] = statistics.median(after) - statistics.median(before)
    assert gained.keys() >= {memory.STORE_MB, memory.STORE_OBJECTS}
    assert {name: more for name, more in gained.items() if more > 10} == {}, "MB, or objects"
    assert "| object store |" in (after_sft / "memory.md").read_text()
