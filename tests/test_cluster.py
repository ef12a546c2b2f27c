"""Ray changes the clock and nothing else: same weights in one process, on many, and after deaths.

The runs start from one finished SFT stage, without staleness, so every number is reproducible.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from aquarl.cli import main
from aquarl.cluster.results import finished_policy
from aquarl.config import load_config
from aquarl.data.tokenizer import Tokenizer
from aquarl.engines.torch_engine import TorchSampler
from aquarl.model.gpt import GPT
from aquarl.records import Metrics
from aquarl.rl.learner import Learner
from aquarl.rl.loop import InProcess, train_policy
from aquarl.rl.prompts import PromptSource
from aquarl.rl.stream import RolloutStream
from aquarl.tasks.base import to_prompt
from aquarl.tasks.catalog import load_problems
from tests.conftest import eventually, rows

pytestmark = pytest.mark.usefixtures("ray_here")


def weights(run: Path, stage: str = "rl") -> dict[str, torch.Tensor]:
    words = Tokenizer.load(f"{run}/tokenizer")
    return finished_policy(str(run), stage, words.fingerprint).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="session")
def in_process(finished_run: Path, tiny: str) -> tuple[dict[str, torch.Tensor], list[Metrics]]:
    """Weights and numbers of the RL stage without any cluster."""
    config = load_config(tiny, [f"run.dir={finished_run}"])
    words = Tokenizer.load(f"{finished_run}/tokenizer")
    splits = load_problems(config.data, config.run.seed)
    model = finished_policy(str(finished_run), "sft", words.fingerprint)
    stream = InProcess(
        RolloutStream(PromptSource(splits.train, words, config.run.seed), config.rl),
        TorchSampler(GPT(model.shape), words.end_of_turn, "cpu"),
        words,
        config.rl,
    )
    seen: list[Metrics] = []
    train_policy(
        config.rl,
        stream,
        Learner(model, config.rl),
        validation=[to_prompt(problem, words) for problem in splits.validation[:8]],
        log=lambda step, metrics: seen.append(metrics),
        save=lambda learner, frontier: None,
    )
    return model.state_dict(), seen


Watcher = Callable[[], None]


def run_rl(tiny: str, run: Path, *settings: str, meanwhile: Watcher | None = None) -> int:
    """Run the RL stage while something happens to it in a thread. Returns the exit status."""
    failed: list[BaseException] = []

    def watch() -> None:
        assert meanwhile is not None
        try:
            meanwhile()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    if meanwhile:
        thread.start()
    status = main(["rl", "--config", tiny, f"run.dir={run}", *settings])
    if meanwhile:
        thread.join(timeout=60)
        assert not thread.is_alive() and not failed, failed
    return status


def actors(class_name: str) -> Iterator[Any]:
    import ray
    from ray.util.state import list_actors

    here = ray.get_runtime_context().gcs_address  # this machine may hold other clusters

    for actor in list_actors(here, detail=True, limit=1000):
        if actor.class_name == class_name and actor.state == "ALIVE":
            yield actor


def pid_of(class_name: str) -> int:
    """Return the process of the one actor of this class, when it is up."""
    return int(eventually(lambda: list(actors(class_name)))[0].pid)


def kill_at_step_2(run: Path, class_name: str) -> Callable[[], None]:
    """Return what kills an actor's process right after the checkpoint of step 2.

    The rollout worker is stopped meanwhile, so the run cannot be over before the kill, and goes
    on when there is another actor of that class.
    """

    def meanwhile() -> None:
        worker, victim = pid_of("RolloutWorker"), pid_of(class_name)
        eventually((run / "checkpoints/rl/step_000002/meta.json").exists)
        os.kill(worker, signal.SIGSTOP)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: [a for a in actors(class_name) if a.pid != victim])
        with suppress(ProcessLookupError):  # it ends with the stream that hired it
            os.kill(worker, signal.SIGCONT)

    return meanwhile


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


def test_a_killed_rollout_worker_is_replaced_and_changes_nothing(
    after_sft: Path, tiny: str, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    assert run_rl(tiny, after_sft, meanwhile=kill_at_step_2(after_sft, "RolloutWorker")) == 0
    result = json.loads((after_sft / "results/rl.json").read_text())
    assert result["stream"]["workers_replaced"] == 1
    assert_same(weights(after_sft), in_process[0])


def test_a_killed_learner_goes_on_from_its_checkpoint_and_changes_nothing(
    after_sft: Path, tiny: str, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    assert run_rl(tiny, after_sft, meanwhile=kill_at_step_2(after_sft, "RayTrainWorker")) == 0
    assert_same(weights(after_sft), in_process[0])
    trained = rows(after_sft / "ledger.jsonl")
    assert len(trained) == 48 and len({row["problem"] for row in trained}) == 48


@pytest.mark.slow
def test_a_killed_stream_is_started_again_and_changes_nothing(
    after_sft: Path, tiny: str, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    assert run_rl(tiny, after_sft, meanwhile=kill_at_step_2(after_sft, "StreamActor")) == 0
    assert_same(weights(after_sft), in_process[0])
    trained = rows(after_sft / "ledger.jsonl")
    assert len(trained) == 48 and len({row["problem"] for row in trained}) == 48


@pytest.mark.slow
def test_with_staleness_groups_are_at_most_that_old(after_sft: Path, tiny: str) -> None:
    settings = ("rl.max_staleness=1", "rl.rollout_workers=2")
    assert run_rl(tiny, after_sft, *settings) == 0
    ages = [row["step"] - row["weights_version"] for row in rows(after_sft / "ledger.jsonl")]
    assert len(ages) == 48 and set(ages) <= {0, 1} and 1 in ages


@pytest.mark.slow
def test_weights_change_inside_a_generation_and_the_bound_holds_for_the_oldest_token(
    after_sft: Path, tiny: str
) -> None:
    settings = ("rl.max_staleness=2", "rl.inflight_updates=true", "rl.max_new_tokens=100")
    assert run_rl(tiny, after_sft, *settings, "rl.rollout_workers=2") == 0
    oldest: dict[int, set[int]] = {step: set() for step in range(6)}
    for row in rows(after_sft / "ledger.jsonl"):
        oldest[row["step"]].add(row["step"] - row["weights_version"])
    assert max(max(ages) for ages in oldest.values()) <= 2
    fresher = []
    for row in rows(after_sft / "metrics.jsonl"):
        if "policy/entropy" in row:
            shares = {age: row.get(f"rollout/staleness_{age}", 0.0) for age in range(3)}
            assert sum(shares.values()) == pytest.approx(1)
            fresher += [age for age in shares if shares[age] and age < min(oldest[row["step"]])]
    assert fresher, "some tokens are of newer weights than the first of their answer"


@pytest.mark.slow
def test_a_pool_takes_what_it_gets_and_so_does_a_learner_group(
    after_sft: Path, tiny: str, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    """Of four CPUs there is room for one learner of 2.5, though two would be welcome. It waits for
    groups, so a second rollout worker is wanted, and there is no room for one of its kind."""
    pool = ("rl.rollout_workers={min = 1, max = 9}", "cluster.rollout_kinds=[{cpus=0.5}, {cpus=9}]")
    group = ("cluster.learners={min = 1, max = 2}", "cluster.learner_cpus=2.5")
    assert run_rl(tiny, after_sft, *pool, *group) == 0
    assert_same(weights(after_sft), in_process[0])
    assert json.loads((after_sft / "results/rl.json").read_text())["learners"] == 1
    pools = [row for row in rows(after_sft / "metrics.jsonl") if "pool/wanted" in row]
    assert [row["step"] for row in pools] == list(range(6))
    assert {row["pool/wanted"] for row in pools} == {1, 2}, "no more than leases in a step"
    assert {row["pool/workers"] for row in pools} == {1}
    assert all(0 < row["pool/wait_share"] < 1 for row in pools[1:])


@pytest.mark.slow
def test_a_run_of_one_learner_goes_on_with_two_as_it_would_have_with_one(
    finished_run: Path,
    tmp_path: Path,
    tiny: str,
    in_process: tuple[dict[str, torch.Tensor], list[Metrics]],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "results/rl.json").unlink()
    shutil.rmtree(run / "checkpoints/rl/step_000006")
    (run / "metrics.jsonl").unlink()
    assert run_rl(tiny, run, "cluster.learners=2") == 0
    for name, value in weights(run).items():
        torch.testing.assert_close(value, in_process[0][name], rtol=1e-2, atol=1e-3)
    alone = [metrics for metrics in in_process[1] if "loss/policy" in metrics]
    together = [row for row in rows(run / "metrics.jsonl") if "loss/policy" in row]
    assert [row["step"] for row in together] == [4, 5]
    for row in together:
        for name in ("loss/policy", "policy/entropy", "policy/ratio_mean", "learner/grad_norm"):
            assert row[name] == pytest.approx(alone[row["step"]][name], rel=1e-2, abs=1e-4), name
        assert row["reward/mean"] == alone[row["step"]]["reward/mean"]
    trained = rows(run / "ledger.jsonl")
    assert len(trained) == 48 and len({row["problem"] for row in trained}) == 48


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
