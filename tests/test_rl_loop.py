"""The whole RL step in one process: repeatable, resumable, and it learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aquarl.config import RLConfig, SupervisedConfig
from aquarl.data.batches import PackedRows
from aquarl.engines.torch_engine import TorchSampler
from aquarl.errors import AquarlError, ClusterError
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.records import Conversation, Message, Metrics, Problem, StepShare, Weights
from aquarl.rl.learner import Learner
from aquarl.rl.loop import Each, InProcess, alone, step_times, train_policy
from aquarl.rl.prompts import PromptSource
from aquarl.rl.stream import RolloutStream
from aquarl.tasks.base import to_conversation, to_prompt
from aquarl.train.loop import SupervisedTrainer
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
LETTERS = "ABC"
PROBLEMS = [
    Problem(f"{letter}{i}", f"{letter}", (), letter, letters=LETTERS)
    for i in range(4)
    for letter in LETTERS
]
"""The letter that is asked for is the whole question."""

SHAPE = Shape(TOKENIZER.vocab_size, layers=2, width=32, heads=2, kv_heads=2, context=24)


@pytest.fixture(scope="module")
def guesser() -> dict[str, Tensor]:
    """A policy that has learned the form, but answers with any letter whatever is asked."""
    model = GPT(SHAPE).init_weights(0)
    any_letter = [
        Conversation((Message("user", asked), Message("assistant", f"Answer: {said}")))
        for asked in LETTERS
        for said in LETTERS
    ]
    rows = PackedRows(lambda epoch: any_letter, TOKENIZER, SHAPE.context, seed=0)
    config = SupervisedConfig(steps=60, batch_tokens=9 * SHAPE.context, micro_rows=16)
    trainer = SupervisedTrainer(model, config, rows, rows, TOKENIZER)
    for _ in range(60):
        trainer.update()
    return dict(model.state_dict())


def config_of(**settings: object) -> RLConfig:
    plan = {
        "steps": 6,
        "prompts_per_step": 6,
        "prompts_per_lease": 3,
        "rollouts_per_prompt": 4,
        "micro_prompts": 4,
        "max_new_tokens": 12,
        "max_staleness": 0,
        "eval_every": 3,
        "save_every": 2,
        "lr_scale": 1.0,
    }
    return RLConfig(**(plan | settings))


@pytest.mark.parametrize("method", ["evaluate", "next_step"])
def test_what_fails_on_one_rank_is_heard_by_all(
    guesser: dict[str, Tensor], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others would wait for it in the next update, for half an hour."""
    run, heard = Run(config_of(), guesser), []

    def fails(*_: object) -> None:
        raise ClusterError("the pool is gone")

    def each(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except AquarlError as error:
            heard.append(str(error))
            raise

    monkeypatch.setattr(run.in_process, method, fails)
    with pytest.raises(AquarlError, match="the pool is gone"):
        run.go(each)
    assert heard == ["the pool is gone"]


def test_waiting_learning_and_publishing_make_up_a_step() -> None:
    share = StepShare((), 0, 0, {"time/sample_s": 3.0, "time/sample_per_worker_s": 3.0})
    times = step_times(share, began=10.0, waited=12.0, learned=15.0, published=16.0)
    assert (times["time/wait_s"], times["time/publish_s"], times["time/step_s"]) == (2, 1, 6)
    assert times["time/learner_idle_fraction"] == 2 / 6
    assert times["time/rollout_idle_fraction"] == 3 / 6


@pytest.mark.parametrize(("up", "idle"), [(1, 0.5), (2, 0.5), (8, 1 - 6 / 8 / 6)])
def test_workers_for_which_a_step_has_no_lease_are_idle(up: int, idle: float) -> None:
    """Two of them sampled for three seconds each, in a step of six."""
    seen = {"time/sample_s": 6.0, "time/sample_per_worker_s": 3.0, "pool/workers": up}
    times = step_times(StepShare((), 0, 0, seen), 0.0, 0.0, 6.0, 6.0)
    assert times["time/rollout_idle_fraction"] == pytest.approx(idle)


class Run:
    """One run with everything it logged and saved."""

    def __init__(self, config: RLConfig, weights: dict[str, Tensor], seed: int = 0) -> None:
        self.config = config
        model = GPT(SHAPE)
        model.load_state_dict(weights)
        self.learner = Learner(model, config)
        self.stream = RolloutStream(PromptSource(PROBLEMS, TOKENIZER, seed), config)
        sampler = TorchSampler(GPT(SHAPE), TOKENIZER.end_of_turn)
        self.in_process = InProcess(self.stream, sampler)
        self.curve: dict[int, Metrics] = {}
        self.validations: dict[int, Metrics] = {}
        self.saved: dict[int, tuple[int, dict[str, Tensor], dict[str, object]]] = {}

    def log(self, step: int, metrics: Metrics) -> None:
        """Keep what is no clock."""
        kept = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        is_training = "loss/policy" in metrics
        (self.curve if is_training else self.validations)[step] = kept

    def save(self, learner: Learner, frontier: int) -> None:
        weights = {name: w.clone() for name, w in learner.model.state_dict().items()}
        # Through bytes, as a checkpoint would: the optimizer goes on changing its own tensors.
        self.saved[learner.step] = (frontier, weights, copied(learner.state()))

    def go(self, each: Each = alone) -> Run:
        validation = [to_prompt(problem, TOKENIZER) for problem in PROBLEMS[:3]]
        train_policy(
            self.config,
            self.in_process,
            self.learner,
            validation=validation,
            log=self.log,
            save=self.save,
            each=each,
        )
        return self


def copied(value: object) -> dict[str, object]:
    if isinstance(value, Tensor):
        return value.clone()  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [copied(inner) for inner in value]  # type: ignore[return-value]
    return value  # type: ignore[return-value]


def same_weights(a: Run, b: Run) -> bool:
    ours, theirs = a.learner.model.state_dict(), b.learner.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_runs_are_the_same_bit_for_bit(guesser: dict[str, Tensor]) -> None:
    first = Run(config_of(), guesser).go()
    torch.manual_seed(99)  # no global state takes part
    second = Run(config_of(), guesser).go()
    assert second.curve == first.curve
    assert second.validations == first.validations
    assert same_weights(first, second)
    assert any(metrics["learner/grad_norm"] > 0 for metrics in first.curve.values())
    other = Run(config_of(), guesser, seed=1).go()
    assert other.curve != first.curve


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    guesser: dict[str, Tensor], step: int, refill: bool
) -> None:
    whole = Run(config_of(refill_uniform_groups=refill), guesser).go()
    frontier, weights, state = whole.saved[step]
    resumed = Run(config_of(refill_uniform_groups=refill), weights)
    resumed.learner.load_state(state)
    resumed.stream.rewind(step, frontier)
    resumed.go()
    assert resumed.curve == {s: metrics for s, metrics in whole.curve.items() if s >= step}
    assert same_weights(whole, resumed)
    assert refill or frontier == 6 * step


def test_on_policy_every_group_is_of_the_newest_weights(guesser: dict[str, Tensor]) -> None:
    run = Run(config_of(), guesser).go()
    assert len(run.curve) == 6
    for metrics in run.curve.values():
        assert metrics["rollout/staleness_max"] == 0
        assert metrics["policy/logprob_gap"] < 1e-4, "learner and sampler mean the same"
        assert metrics["policy/kl_from_sampler"] < 1e-6


def test_a_run_evaluates_and_saves_when_it_should(guesser: dict[str, Tensor]) -> None:
    run = Run(config_of(steps=5), guesser).go()
    assert sorted(run.validations) == [0, 3, 5]
    assert sorted(run.saved) == [2, 4, 5]
    assert {step: saved[0] for step, saved in run.saved.items()} == {2: 12, 4: 24, 5: 30}


def test_a_step_that_is_set_aside_whole_passes(guesser: dict[str, Tensor]) -> None:
    run = Run(config_of(prompts_per_lease=6, lease_deaths=1), guesser)
    next_step = run.in_process.next_step

    def losing(step: int, rank: int, world: int) -> StepShare:
        if step == 2:
            run.stream.lease("dying", 0.0)
            run.stream.lost("dying")
        return next_step(step, rank, world)

    run.in_process.next_step = losing  # type: ignore[method-assign]
    run.go()
    assert sorted(run.curve) == [0, 1, 3, 4, 5], "that one has no loss"
    assert run.validations[2]["reward/groups"] == 0


def test_a_finished_run_only_evaluates(guesser: dict[str, Tensor]) -> None:
    run = Run(config_of(steps=3), guesser)
    run.learner.step = 3
    run.stream.rewind(3, 18)
    run.go()
    assert (run.curve, run.saved, sorted(run.validations)) == ({}, {}, [3])


def test_without_validation_problems_a_run_goes_on(guesser: dict[str, Tensor]) -> None:
    run = Run(config_of(steps=2), guesser)
    train_policy(run.config, run.in_process, run.learner, validation=[], log=run.log, save=run.save)
    assert sorted(run.curve) == [0, 1]
    assert run.validations == {0: {}, 2: {}}


def test_damaged_weights_stop_the_run_instead_of_being_sampled(
    guesser: dict[str, Tensor],
) -> None:
    run = Run(config_of(), guesser)
    whole: Callable[[], Weights] = run.learner.weights

    def damaged() -> Weights:
        weights = whole()
        weights.buffer[0] += 1.0
        return weights

    run.learner.weights = damaged  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="arrived damaged"):
        run.go()
    assert run.curve == {}


@pytest.mark.parametrize("loss", ["reinforce", "ppo"])
def test_a_policy_learns_to_answer_what_is_asked(guesser: dict[str, Tensor], loss: str) -> None:
    """From any of three letters to the right one, by reward alone."""
    config = config_of(
        steps=60,
        prompts_per_step=12,
        prompts_per_lease=12,
        rollouts_per_prompt=8,
        micro_prompts=12,
        eval_every=60,
        save_every=60,
        loss=loss,
        matrix_lr=0.01,
        embedding_lr=0.02,
        unembedding_lr=0.002,
    )
    run = Run(config, guesser).go()
    rewards = [run.curve[step]["reward/mean"] for step in range(60)]
    assert sum(rewards[:3]) / 3 < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9
    assert run.validations[60]["validation/accuracy"] == 1.0


def test_the_toy_problems_are_what_their_names_say() -> None:
    """Guards the tests above: the form that is learned is the form that is graded."""
    assert to_conversation(PROBLEMS[1]).messages[1].content == "Answer: B"
    assert to_prompt(PROBLEMS[1], TOKENIZER).ids[2] == ord("B")
