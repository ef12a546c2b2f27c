"""What a failure costs: the parts of a run die, and its result is the same to the bit.

A job that is stopped, a driver and a node that die are in test_jobs.py; a full disk is in
test_cli.py and test_checkpoint.py.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from aquarl.cli import main
from aquarl.cluster.chaos import (
    KINDS,
    LEARNER,
    STREAM,
    WORKER,
    compared,
    each_once_an_epoch,
    ledger_of,
)
from aquarl.cluster.results import copy_up_to_sft
from aquarl.config import load_config
from aquarl.data.tokenizer import Tokenizer
from aquarl.records import Metrics
from aquarl.rl.prompts import PromptSource
from aquarl.tasks.catalog import load_problems
from tests.conftest import assert_same, rows, run_rl, weights
from tests.kill_points import POINTS, arm, armed, employ, employ_evaluation_workers

pytestmark = [pytest.mark.usefixtures("ray_here"), pytest.mark.chaos, pytest.mark.slow]


def test_a_run_killed_at_every_point_gives_the_weights_of_an_undisturbed_one(
    after_sft: Path,
    tiny: str,
    in_process: tuple[dict[str, torch.Tensor], list[Metrics]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    employ(monkeypatch)
    arm(after_sft, *POINTS)
    (after_sft / "scale to").write_text("3")
    soon = ("rl.lease_timeout_s=5", "cluster.step_timeout_s=10")
    assert run_rl(tiny, after_sft, "rl.rollout_workers=2", "cluster.max_failures=3", *soon) == 0
    assert armed(after_sft) == [], "somebody died at each of them"
    assert_same(weights(after_sft), in_process[0])
    pool = [row["pool/wanted"] for row in rows(after_sft / "metrics.jsonl") if "pool/wanted" in row]
    assert (pool[0], pool[-1]) == (2, 3), "what was asked for outlives the stream"
    assert not (after_sft / "scaled.json").exists()
    trained = rows(after_sft / "ledger.jsonl")
    assert len(trained) == 48 and len({row["problem"] for row in trained}) == 48


def test_two_learners_of_which_one_dies_end_with_the_weights_of_an_undisturbed_pair(
    after_sft: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ("cluster.learners=2", "rl.rollout_workers=2", "cluster.max_failures=3")
    peace = tmp_path / "peace"
    copy_up_to_sft(after_sft, peace)
    assert run_rl(tiny, peace, *pair) == 0
    employ(monkeypatch)
    arm(after_sft, "after backward, rank 1", "checkpoint write", "batch taken, rank 0")
    assert run_rl(tiny, after_sft, *pair) == 0
    assert armed(after_sft) == []
    assert_same(weights(after_sft), weights(peace))
    assert ledger_of(str(after_sft)) == ledger_of(str(peace))


def test_a_lease_that_kills_its_workers_is_set_aside_and_the_run_goes_on(
    after_sft: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(tiny, [f"run.dir={after_sft}"])
    words = Tokenizer.load(f"{after_sft}/tokenizer")
    source = PromptSource(load_problems(config.data, config.run.seed).train, words, config.run.seed)
    lease = [source.prompt(position).problem_id for position in range(12, 16)]  # the last of step 1
    (after_sft / "poison").write_text(lease[2])
    (after_sft / "mild").touch()
    employ(monkeypatch)
    budget = ("rl.lease_deaths=2", "rl.worker_restarts=1")
    assert run_rl(tiny, after_sft, *budget) == 0

    lines = rows(after_sft / "ledger.jsonl")
    trained = [row["problem"] for row in lines if "rewards" in row]
    set_aside = [row for row in lines if "rewards" not in row]
    assert [row["problem"] for row in set_aside] == lease
    assert {(row["step"], row["set_aside_after_deaths"]) for row in set_aside} == {(1, 2)}
    assert trained == [source.prompt(p).problem_id for p in range(48) if p not in range(12, 16)]
    curve = {row["step"]: row for row in rows(after_sft / "metrics.jsonl") if "loss/policy" in row}
    assert [curve[step]["reward/groups_set_aside"] for step in range(3)] == [0, 4, 0]
    assert [curve[step]["reward/groups"] for step in range(3)] == [8, 4, 8]
    said = capsys.readouterr().err
    assert "2 rollout workers died over lease" in said and lease[2] in said
    assert not (after_sft / "mild").exists(), "one of an error, one of SIGKILL"
    assert json.loads((after_sft / "results/rl.json").read_text())["stream"]["set_aside"] == 1


@pytest.mark.parametrize(("budget", "replaced"), [(1, 1), (20, 2)])
def test_a_pool_that_cannot_start_ends_with_the_reason(
    budget: int,
    replaced: int,
    after_sft: Path,
    tiny: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A start that raises an error is tried thrice, whatever the budget for deaths."""
    (after_sft / "broken").write_text("the graphics card is on fire")
    employ(monkeypatch)
    assert run_rl(tiny, after_sft, f"rl.worker_restarts={budget}") == 2
    said = capsys.readouterr().err
    assert "the graphics card is on fire" in said and f"{replaced} were replaced" in said


def test_an_evaluation_goes_on_when_a_worker_dies_and_finds_the_same(
    finished_run: Path, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    employ_evaluation_workers(monkeypatch)
    arm(run, "evaluation")
    assert main(["evaluate", "--config", tiny, f"run.dir={run}", "rl.rollout_workers=2"]) == 0
    assert not armed(run), "one died"
    before, after = (
        json.loads((folder / "results/evaluate.json").read_text()) for folder in (finished_run, run)
    )
    for name in ("stages", "comparisons"):
        assert after[name] == before[name]


def test_a_run_killed_at_random_is_the_same_to_the_bit(
    after_sft: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("rl.steps=80", "rl.rollout_workers=2", f"run.dir={after_sft}")
    assert main(["chaos", "--config", tiny, "--minutes", "0.5", "--every", "2", *settings]) == 0
    told = json.loads((after_sft / "chaos.json").read_text())
    assert told["holds"] and all(run["checks"]["weights_identical"] for run in told["runs"])
    recovered = [row for row in told["table"] if row["recovered"]]
    killed = Counter(KINDS[fault["kind"]] for fault in told["faults"])
    assert killed[WORKER] and killed[LEARNER] + killed[STREAM], "two recoveries may fill its time"
    for row in recovered:
        assert row["median_s"] < row["allowed_s"], row
    assert len(rows(after_sft / "chaos/disturbed_1/ledger.jsonl")) == 80 * 8
    assert (
        f"| {recovered[0]['fault']} | {recovered[0]['injected']} | "
        in (after_sft / "chaos.md").read_text()
    )
    assert "weights identical: yes" in capsys.readouterr().out.replace("\n", " ")


def test_a_problem_that_comes_twice_in_an_epoch_is_seen() -> None:
    assert each_once_an_epoch(["a", "b", "c", "c", "a"], problems=3)
    assert not each_once_an_epoch(["a", "b", "a", "c"], problems=3)


def test_a_difference_to_the_undisturbed_run_is_found(
    finished_run: Path, tiny: str, tmp_path: Path
) -> None:
    """The same run twice is the same; with one line of the ledger less, or other weights, not."""
    config = load_config(tiny, [f"run.dir={finished_run}"])
    for name in ("undisturbed", "disturbed"):
        shutil.copytree(finished_run, tmp_path / name)
    disturbed = tmp_path / "disturbed"
    assert compared(config, tmp_path, str(disturbed))["holds"]
    ledger = disturbed / "ledger.jsonl"
    ledger.write_text("".join(f"{line}\n" for line in ledger.read_text().splitlines()[1:]))
    last = disturbed / "checkpoints/rl/step_000006/weights.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    found = compared(config, tmp_path, str(disturbed))
    assert not found["holds"] and found["checks"] == {
        "finished": True,
        "weights_identical": False,
        "ledger_identical": False,
        "each_problem_once_an_epoch": False,
    }
