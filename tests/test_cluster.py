"""Ray changes the clock and nothing else: same weights in one process, on many, and after deaths.

The runs start from one finished SFT stage, without staleness, so every number is reproducible.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train.torch import TorchConfig
from ray.util.state import list_actors, list_placement_groups

from aquarl.cli import main
from aquarl.cluster import learner_group, rollout_pool, stages, stream_actor
from aquarl.cluster.errors import plain_errors
from aquarl.cluster.launch import hired_stream, run_stages
from aquarl.cluster.learner_group import Member, run_group
from aquarl.cluster.meeting import Meeting
from aquarl.cluster.relay import relay_to
from aquarl.cluster.results import finished_policy
from aquarl.cluster.rollout_pool import RolloutWorker
from aquarl.cluster.stages import RayStream
from aquarl.cluster.stream_actor import Offer, StreamActor
from aquarl.config import Config, load_config
from aquarl.data.tokenizer import Tokenizer
from aquarl.engines.torch_engine import TorchSampler
from aquarl.errors import AquarlError, ClusterError, DataError
from aquarl.model.flat_weights import flatten
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.observe.metrics import JsonlSink, Sinks, read_metrics
from aquarl.records import Lease, LeaseResult, Metrics, Problem, Sampling, Weights
from aquarl.rl import pool_size
from aquarl.rl.learner import Learner
from aquarl.rl.prompts import PromptSource
from aquarl.tasks.base import to_prompt
from aquarl.tasks.catalog import load_problems
from tests.conftest import assert_same, eventually, rows, run_rl, weights
from tests.kill_points import MortalArrival, arm, armed

pytestmark = pytest.mark.usefixtures("ray_here")


def test_one_worker_gives_the_weights_of_one_process(
    finished_run: Path, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    expected, seen = in_process
    assert any(metrics.get("learner/grad_norm", 0.0) > 0 for metrics in seen)  # something moved
    assert_same(weights(finished_run), expected)


def test_workers_of_two_kinds_give_the_same(
    after_sft: Path, tiny: str, in_process: tuple[dict[str, torch.Tensor], list[Metrics]]
) -> None:
    kinds = "cluster.rollout_kinds=[{cpus = 0.5}, {cpus = 0.25}]"
    assert run_rl(tiny, after_sft, "rl.rollout_workers=2", kinds) == 0
    assert_same(weights(after_sft), in_process[0])
    told = ("reward/mean", "validation/accuracy", "validation/length_mean")
    curves = [
        [row[name] for row in logged for name in told if name in row]
        for logged in (rows(after_sft / "metrics.jsonl"), in_process[1])
    ]
    assert len(curves[0]) == 6 + 3 * 2 and curves[0] == curves[1], "validation's too"


@pytest.mark.parametrize(
    "error",
    [
        RayActorError(),
        WorkerCrashedError(),
        OutOfMemoryError("a node ran low on memory"),
        NodeDiedError("a node is gone"),
        ObjectLostError("0" * 56, None, ""),
    ],
)
def test_a_part_that_is_gone_is_said_in_a_sentence(error: RayError) -> None:
    with pytest.raises(ClusterError, match=r"start the same command again"), plain_errors():
        raise error
    with pytest.raises(type(error)), plain_errors(dead_is_a_mistake=False):
        raise error


class Group:
    """As much of Ray Train's worker group as a backend asks for its size."""

    def __init__(self, learners: int) -> None:
        self.learners = learners

    def __len__(self) -> int:
        return self.learners


def test_learners_of_several_machines_meet_as_torchs_own_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, int, str]] = []
    for name in ("on_start", "on_shutdown"):

        def note(self: Any, group: Group, config: TorchConfig, name: str = name) -> None:
            asked.append((name, len(group), str(config.backend)))

        monkeypatch.setattr(TorchConfig().backend_cls, name, note)
    meeting = Meeting("nccl", None, 60)
    assert meeting.train_func_context is TorchConfig().train_func_context
    backend = meeting.backend_cls()
    assert backend.share_cuda_visible_devices
    for learners in (1, 2):
        backend.on_start(Group(learners), meeting)
        backend.on_shutdown(Group(learners), meeting)
    assert asked == [("on_start", 2, "nccl"), ("on_shutdown", 2, "nccl")]


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
    """Of four CPUs there is room for one learner of 2.5, though two would be welcome. When it waits
    for groups, a second rollout worker is wanted, and there is no room for one of its kind."""
    pool = ("rl.rollout_workers={min = 1, max = 9}", "cluster.rollout_kinds=[{cpus=0.5}, {cpus=9}]")
    group = ("cluster.learners={min = 1, max = 2}", "cluster.learner_cpus=2.5")
    assert run_rl(tiny, after_sft, *pool, *group) == 0
    assert_same(weights(after_sft), in_process[0])
    assert json.loads((after_sft / "results/rl.json").read_text())["learners"] == 1
    pools = [row for row in rows(after_sft / "metrics.jsonl") if "pool/wanted" in row]
    assert [row["step"] for row in pools] == list(range(6))
    assert {row["pool/wanted"] for row in pools} <= {1, 2}, "no more than leases in a step"
    assert {row["pool/workers"] for row in pools} == {1}
    assert all(0 < row["pool/wait_share"] < 1 for row in pools[1:])


@pytest.mark.slow
def test_a_pool_grows_while_the_learner_waits_and_shrinks_while_it_does_not(
    after_sft: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling is slow up to a turn, and learning from there on."""
    turn, pause_s = 8, 1.0

    class SlowWorker(RolloutWorker):
        def run(self) -> Iterator[LeaseResult]:
            for result in super().run():
                time.sleep(pause_s if result.step < turn else 0)
                yield result

    class QuickToShrink(StreamActor):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            rollout_pool.RolloutWorker = SlowWorker  # type: ignore[misc]  # in its process alone
            pool_size.STEPS_TO_FORGET = 0

    class SlowLearner(Learner):
        def weights(self) -> Weights:
            time.sleep(pause_s if self.step > turn else 0)
            return super().weights()

    def slowed(config: Config, work: Callable[[Config, Member], None]) -> None:
        def slow_work(config: Config, member: Member) -> None:
            stages.Learner = SlowLearner  # type: ignore[misc]
            work(config, member)

        run_group(config, slow_work)

    monkeypatch.setattr(stream_actor, "StreamActor", QuickToShrink)
    monkeypatch.setattr(learner_group, "run_group", slowed)
    pool = ("rl.rollout_workers={min = 1, max = 3}", "cluster.rollout_cpus=0.25")
    plan = ("rl.max_staleness=1", "rl.steps=24", "rl.eval_every=100", "rl.save_every=100")
    assert run_rl(tiny, after_sft, *pool, *plan) == 0
    steps = [row for row in rows(after_sft / "metrics.jsonl") if "pool/wanted" in row]
    wanted = [row["pool/wanted"] for row in steps]
    assert wanted[0] < max(wanted[: turn + 2]) and wanted[-1] < max(wanted)
    trained = Counter(row["problem"] for row in rows(after_sft / "ledger.jsonl"))
    assert len(trained) == 48 and set(trained.values()) == {4}, "four epochs of 48 problems"
    counts = json.loads((after_sft / "results/rl.json").read_text())["stream"]
    assert not {"workers_replaced", "reissued"} & counts.keys(), "who leaves finishes its lease"


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
    shutil.copytree(finished_run / "checkpoints/mid", after_sft / "checkpoints/mid")
    run_stages(load_config(tiny, ["cluster.learners=2", f"run.dir={after_sft}"]), ("sft", "rl"))
    alone = weights(finished_run, "sft")
    for name, value in weights(after_sft, "sft").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)
    for name, value in weights(after_sft).items():
        torch.testing.assert_close(value, in_process[0][name], rtol=1e-2, atol=1e-3)
    assert json.loads((after_sft / "results/rl.json").read_text())["learners"] == 2
    assert len(rows(after_sft / "ledger.jsonl")) == 48


@pytest.mark.slow
def test_what_one_learner_finds_wrong_ends_them_all_at_once(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one encodes the corpus while the others wait, which may take hours."""
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{i} and {i * i} are numbers. " * 9}) for i in range(2_000)]
    corpus.write_text("\n".join([*lines, "{cut off"]))
    here = [f'data.corpus=["{corpus}"]', f"run.dir={tmp_path / 'run'}"]
    assert main(["tokenizer", "--config", tiny, *here]) == 0
    more = ["base.steps=2000", "cluster.learners=2"]  # more than there is before that line
    assert main(["base", "--config", tiny, *here, *more]) == 2
    assert "line 2001, is not JSON" in capsys.readouterr().err


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
    whole, resumed = (
        json.loads((folder / "results/rl.json").read_text())["stream"]["groups"]
        for folder in (finished_run, run)
    )
    assert resumed >= whole, "of the whole run; what was under way at the checkpoint came twice"


@pytest.mark.slow
def test_what_one_learner_alone_lacks_ends_them_all_at_once(tiny: str, tmp_path: Path) -> None:
    """The other one would wait for it in the next thing that they do together."""
    config = load_config(tiny, ["cluster.learners=2", f"run.dir={tmp_path}"])

    def work(config: Config, member: Member) -> None:
        def load() -> int:
            if member.rank == 1:
                raise DataError("its disk is empty")
            return member.rank

        member.each(load)
        member.total({"never": 1.0})

    with pytest.raises(AquarlError, match="its disk is empty"):
        run_group(config, work)


@pytest.mark.slow
def test_a_learner_that_dies_before_it_has_begun_is_started_again(
    tiny: str, tmp_path: Path
) -> None:
    config = load_config(tiny, [f"run.dir={tmp_path}", "cluster.max_failures=1"])
    arm(tmp_path, "arriving")
    run_group(config, MortalArrival(str(tmp_path)))
    assert (tmp_path / "arrived").exists() and not armed(tmp_path)
    for time_ in ("first", "second"):
        (tmp_path / "armed" / time_).touch()
    with pytest.raises(ClusterError, match=r"could not start, tried 2 times: .*(SIGKILL|died)"):
        run_group(config, MortalArrival(str(tmp_path)))
    assert not armed(tmp_path)
    groups = partial(list_placement_groups, filters=[("state", "!=", "REMOVED")])
    eventually(lambda: not groups(), every=0.5)  # else the next try could find no place


@pytest.mark.slow
def test_a_group_of_learners_of_before_is_not_heard(after_sft: Path, tiny: str) -> None:
    """Its host was cut off and comes back, say: its steps would drop those of the new group."""
    config = load_config(tiny, [f"run.dir={after_sft}"])
    fingerprint = Tokenizer.load(f"{after_sft}/tokenizer").fingerprint
    shape = finished_policy(str(after_sft), "sft", fingerprint).shape
    nothing = Weights(2, 0, np.zeros(1))
    with hired_stream(config, wanted=True) as actor:
        old, new, its_other_rank = (RayStream(config, actor) for _ in range(3))
        old.begin(shape)
        ray.get(actor.scale.remote(0), timeout=60)
        old.rewind(2, 16)
        new.rewind(2, 16)
        for call in (
            lambda: old.publish(nothing),
            lambda: old.next_step(9, 0, 1),
            lambda: old.evaluate("validation 9", (), Sampling(1)),
        ):
            with pytest.raises(RayTaskError, match="Another group of learners"):
                call()
        assert new.status()["weights_version"] == -1
        its_other_rank.join()
        its_other_rank.publish(nothing)
        assert new.status()["weights_version"] == 2


@pytest.mark.slow
def test_many_workers_may_die_at_once_and_an_evaluation_take_its_time(
    after_sft: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a machine has, though none may be replaced in vain; and each lease of the
    evaluation comes in time, though not all of them within `rl.wait_timeout_s`."""

    class SlowWorker(RolloutWorker):
        def run(self) -> Iterator[LeaseResult]:
            for result in super().run():
                time.sleep(2)
                yield result

    class SlowStream(StreamActor):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            rollout_pool.RolloutWorker = SlowWorker  # type: ignore[misc]  # in its process alone

    monkeypatch.setattr(stream_actor, "StreamActor", SlowStream)
    budget = ("rl.worker_restarts=0", "rl.wait_timeout_s=9", "rl.lease_timeout_s=8")
    config = load_config(tiny, [f"run.dir={after_sft}", *budget, "cluster.rollout_cpus=0.25"])
    words = Tokenizer.load(f"{after_sft}/tokenizer")
    policy = finished_policy(str(after_sft), "sft", words.fingerprint)
    problems = load_problems(config.data, config.run.seed).train[:32]

    def workers() -> set[int]:
        return {
            actor.pid
            for actor in list_actors(filters=[("class_name", "=", "SlowWorker")])
            if actor.state == "ALIVE" and actor.pid
        }

    with hired_stream(config, wanted=True) as actor:
        stream = RayStream(config, actor)
        stream.begin(policy.shape)
        ray.get(actor.scale.remote(4), timeout=60)
        eventually(lambda: len(stream.status()["workers"]) == 4, every=0.5)
        first = workers()
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(workers() - first) == 4, every=0.5)
        ray.get(actor.scale.remote(1), timeout=60)
        stream.rewind(0, 0)
        stream.publish(flatten(policy, 0))
        prompts = [to_prompt(problem, words) for problem in problems]
        began = time.monotonic()
        results = stream.evaluate("all", prompts, Sampling(4, temperature=0.0))
        assert time.monotonic() - began > config.rl.wait_timeout_s
        assert [group.prompt for result in results for group in result.groups()] == prompts
        assert stream.status()["counts"]["workers_replaced"] == 4


@pytest.mark.slow
def test_a_stream_of_which_a_task_fails_dies_and_another_begins(
    after_sft: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nobody would look after leases that take too long, say, and nothing would tell."""
    failed = after_sft / "failed"

    class Failing(StreamActor):
        async def _watch_the_clock(self) -> None:
            if failed.exists():
                return await super()._watch_the_clock()
            failed.touch()
            raise RuntimeError("the clock stands still")

    monkeypatch.setattr(stream_actor, "StreamActor", Failing)
    config = load_config(tiny, [f"run.dir={after_sft}"])
    fingerprint = Tokenizer.load(f"{after_sft}/tokenizer").fingerprint
    shape = finished_policy(str(after_sft), "sft", fingerprint).shape
    with hired_stream(config, wanted=True) as actor:
        with suppress(RayActorError):  # it may be gone before it has answered
            ray.get(actor.begin.remote(shape), timeout=60)

        def step() -> Any:
            with suppress(RayActorError):
                return ray.get(actor.status.remote(), timeout=60)["step"]
            return "gone"

        eventually(failed.exists)
        eventually(lambda: step() is None)
        RayStream(config, actor).begin(shape)
        assert step() == 0


def test_an_answer_to_a_question_of_before_is_not_taken_for_newer_weights(tiny: str) -> None:
    """A learner that goes back makes the same versions again: those of before are others."""
    model = GPT(Shape(vocab=300, layers=1, width=16, heads=1, kv_heads=1, context=64))
    of_before, of_now = (3, 30), (2, 20)

    class Stream:
        async def newer(self, have: tuple[int, int]) -> Offer:
            if have == of_before:
                return Offer(weights=ray.put(flatten(model, 4)), identity=(4, 40))
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

    stream = ray.remote(num_cpus=0)(Stream).remote()
    sampler = TorchSampler(model, 0)
    config = load_config(tiny, ["rl.max_staleness=2", "rl.inflight_updates=true"])
    source = PromptSource([Problem("p", "?", (), "A")], Tokenizer.train(["no word"], 265), seed=0)
    worker = RolloutWorker("rollout-0", config, source, lambda: sampler, stream)
    lease = Lease(0, 2, (), (), Sampling(1), 2)

    worker._have = of_before
    worker._let_weights_change(lease)
    newer = eventually(sampler.newer_weights)
    assert (newer.version, worker._have) == (4, (4, 40))

    worker._have = of_before
    worker._let_weights_change(lease)
    ray.wait([worker._asked[1]], timeout=60)  # answered, and not looked at
    worker._have = of_now  # as the next lease said
    worker._let_weights_change(lease)
    assert sampler.newer_weights() is None and worker._have == of_now
    assert worker._asked[0] == of_now
    ray.kill(stream)


@pytest.mark.slow
def test_workers_sent_away_before_they_are_up_are_no_deaths_and_come_back_when_wanted(
    after_sft: Path, tiny: str
) -> None:
    config = load_config(tiny, [f"run.dir={after_sft}", "rl.worker_restarts=0"])
    shape = finished_policy(
        str(after_sft), "sft", Tokenizer.load(f"{after_sft}/tokenizer").fingerprint
    ).shape

    def pool(stream: Any) -> dict[str, Any]:
        seen: dict[str, Any] = ray.get(stream.status.remote(), timeout=60)
        return seen

    with hired_stream(config, wanted=True) as stream:
        ray.get(stream.begin.remote(shape), timeout=60)
        eventually(lambda: pool(stream)["workers"] == ["rollout-0"])
        for count in (4, 1, 3, 1, 3):
            ray.get(stream.scale.remote(count), timeout=60)
        eventually(lambda: len(pool(stream)["workers"]) == 3)
        seen = pool(stream)
    assert "workers_replaced" not in seen["counts"] and seen["waiting"] == []


@pytest.mark.slow
def test_a_worker_that_is_one_too_many_finishes_its_lease_and_leaves(
    after_sft: Path, tiny: str
) -> None:
    """The newest is stopped with a lease in hand, so that the pool shrinks while it has it."""
    three = ("rl.rollout_workers=3", "rl.max_staleness=1")  # four leases at once
    config = load_config(tiny, [f"run.dir={after_sft}", *three])
    fingerprint = Tokenizer.load(f"{after_sft}/tokenizer").fingerprint
    policy = finished_policy(str(after_sft), "sft", fingerprint)
    with hired_stream(config, wanted=True) as actor:
        stream = RayStream(config, actor)

        def workers() -> list[str]:
            names: list[str] = stream.status()["workers"]
            return names

        stream.begin(policy.shape)
        stream.rewind(0, 0)
        eventually(lambda: len(workers()) == 3)
        here = ray.get_runtime_context().gcs_address
        actors = list_actors(here, filters=[("state", "=", "ALIVE")], detail=True)
        (newest,) = [actor.pid for actor in actors if (actor.name or "").startswith("rollout-2-")]
        os.kill(newest, signal.SIGSTOP)
        try:
            stream.publish(flatten(policy, 0))
            eventually(lambda: "rollout-2" in stream.status()["leases"])
            ray.get(actor.scale.remote(1), timeout=60)
            eventually(lambda: workers() == ["rollout-0", "rollout-2"])
        finally:
            os.kill(newest, signal.SIGCONT)
        eventually(lambda: workers() == ["rollout-0"])
        shares = [stream.next_step(step, 0, 1) for step in (0, 1)]
        groups = [group for share in shares for x in share.results for group in x.groups()]
        assert "rollout-2" in {group.worker for group in groups}
        assert not stream.status()["counts"].get("reissued")


@pytest.mark.slow
def test_the_relay_of_metrics_may_die_and_the_next_one_carries_on(
    ray_here: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sink = JsonlSink(str(tmp_path))
    with relay_to(Sinks([sink])) as relay:
        ray.get(relay.put.remote("rl", 0, {"reward/mean": 0.5}), timeout=60)
        eventually(lambda: read_metrics(str(tmp_path)))
        ray.kill(relay, no_restart=False)

        def carried() -> bool:
            relay.put.remote("rl", 1, {"reward/mean": 0.75})
            return len(read_metrics(str(tmp_path))["rl"]) > 1

        eventually(carried)
    assert capsys.readouterr().err.count("The relay of metrics died") == 1
