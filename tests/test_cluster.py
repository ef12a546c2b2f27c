"""Ray changes the clock and nothing else: same weights in one process, on many, and after deaths.

The runs start from one finished SFT stage, without staleness, so every number is reproducible.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from aquarl.cli import main
from aquarl.records import Metrics
from tests.conftest import assert_same, rows, run_rl, weights

pytestmark = pytest.mark.usefixtures("ray_here")


def test_one_worker_gives_the_weights_of_one_process(
    finished_run: Path, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    expected, seen = in_process
    assert any(metrics.get("learner/grad_norm", 0.0) > 0 for metrics in seen)  # something moved
    assert_same(weights(finished_run), expected)


def test_two_workers_give_the_same_and_both_work(
    after_sft: Path, tiny: str, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    assert run_rl(tiny, after_sft, "rl.rollout_workers=2") == 0
    assert_same(weights(after_sft), in_process[0])


@pytest.mark.slow
def test_with_staleness_groups_are_at_most_that_old(after_sft: Path, tiny: str) -> None:
    settings = ("rl.max_staleness=1", "rl.rollout_workers=2")
    assert run_rl(tiny, after_sft, *settings) == 0
    ages = [row["step"] - row["weights_version"] for row in rows(after_sft / "ledger.jsonl")]
    assert len(ages) == 48 and set(ages) <= {0, 1} and 1 in ages


@pytest.mark.slow
def test_two_learners_equal_one_up_to_rounding(
    finished_run: Path,
    after_sft: Path,
    tiny: str,
    in_process: tuple[dict[str, torch.Tensor], list[Metrics]],
) -> None:
    """RL and, with the SFT stage removed as well, a supervised stage, in one group of two."""
    shutil.rmtree(after_sft / "checkpoints/sft")
    (after_sft / "results/sft.json").unlink()
    both = ["cluster.learners=2", f"run.dir={after_sft}"]
    assert main(["pipeline", "--config", tiny, *both, "evaluate.problems=2"]) == 0
    alone = weights(finished_run, "sft")
    for name, value in weights(after_sft, "sft").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)
    for name, value in weights(after_sft).items():
        torch.testing.assert_close(value, in_process[0][name], rtol=1e-2, atol=1e-3)
    assert json.loads((after_sft / "results/rl.json").read_text())["learners"] == 2
    assert len(rows(after_sft / "ledger.jsonl")) == 48


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_on_resuming(
    finished_run: Path,
    tmp_path: Path,
    tiny: str,
    in_process: tuple[dict[str, torch.Tensor], list[Metrics]],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "results/rl.json").unlink()
    last = run / "checkpoints/rl/step_000006/weights.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    assert run_rl(tiny, run) == 0  # from step 4
    assert_same(weights(run), in_process[0])
    assert len(rows(run / "ledger.jsonl")) == 48
