"""The RL loop: steps in, a tuned policy out. One line an arrow of the picture.

Knows no cluster: the stream it is given is the Ray one, or `InProcess`, which samples by itself
between two steps and shows that the cluster changes nothing but the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from aquarl.config import RLConfig
from aquarl.evaluate.scores import majority_baseline, wilson_interval
from aquarl.records import (
    LeaseResult,
    Metrics,
    Prompt,
    Sampler,
    Sampling,
    StepShare,
    Weights,
)
from aquarl.rl.learner import Learner
from aquarl.rl.rewards import scored_groups
from aquarl.rl.stream import RolloutStream, describe

T = TypeVar("T")


class Each(Protocol):
    def __call__(self, work: Callable[[], T], /) -> T:
        """Return what this makes here, once every rank has done it. Raises: what it raised on any
        of them; so none waits in the update for one that has given up."""


def alone(work: Callable[[], T]) -> T:
    """The `Each` of a learner that is the only one."""
    return work()


class LearnerStream(Protocol):
    """What a learner rank sees of the samplers, wherever they are."""

    def publish(self, weights: Weights) -> None:
        """Hand new weights to whoever samples from now on."""

    def next_step(self, step: int, rank: int, world: int) -> StepShare:
        """Wait for a rank's groups of a step. Raises: ClusterError, when they cannot come."""

    def evaluate(
        self, name: str, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[LeaseResult]:
        """Sample one answer to each prompt with the newest weights, and wait for them."""

    def frontier(self, step: int) -> int:
        """Return the position of the first prompt of a step."""


def train_policy(
    config: RLConfig,
    stream: LearnerStream,
    learner: Learner,
    *,
    validation: Sequence[Prompt],
    log: Callable[[int, Metrics], None],
    save: Callable[[Learner, int], None],
    each: Each = alone,
) -> None:
    """Update the policy until `config.steps`. Starts at `learner.step`, so it also resumes.

    Args:
        validation: Problems that are evaluated greedily on the way, by rank 0's asking.
        log: Called with the step that the numbers belong to.
        save: Called with the learner and the frontier to write beside it.
        each: How the ranks do together what may fail on one of them.
    """

    def look(step: int) -> None:
        """Validate on rank 0. The others wait, so that none waits too long for its next step."""
        seen = each(lambda: validate(stream, validation, config, step) if is_first_rank else {})
        if is_first_rank:
            log(step, seen)

    is_first_rank = learner.rank == 0
    if is_first_rank:
        stream.publish(learner.weights())
    while (step := learner.step) < config.steps:
        if step % config.eval_every == 0:
            look(step)

        began = time.perf_counter()
        share = each(partial(stream.next_step, step, learner.rank, learner.world))
        waited = time.perf_counter()
        metrics = learner.update(
            share.packed, share.tokens_in_step, share.rollouts_in_step, share.is_padding
        )
        learned = time.perf_counter()
        if is_first_rank:
            stream.publish(learner.weights())
        times = step_times(share, began, waited, learned, time.perf_counter())

        log(step, metrics | share.metrics | times | {"tokens/trained": share.tokens_in_step})
        if learner.step % config.save_every == 0 or learner.step == config.steps:
            save(learner, stream.frontier(learner.step))
    look(learner.step)


def step_times(
    share: StepShare, began: float, waited: float, learned: float, published: float
) -> Metrics:
    """Return where a step's time went, as the learner and as the rollout workers see it.

    Args:
        began, waited, learned, published: When the step began and its three parts were done, in
            seconds of `time.perf_counter`.

    Returns:
        Seconds, and two shares of the step: the learner is idle while it waits for groups, a
        worker when it does not sample. What is sampled ahead for a step counts for that step, so
        the workers' share is right on average over steps, and a single one may be below 0.
    """
    step_s = published - began
    # Over all workers that are up: a step may have fewer leases than there are. In one process,
    # and where all was set aside, there are none.
    total_s, sampled_s = (
        share.metrics.get(f"time/sample_{of}s", 0.0) for of in ("", "per_worker_")
    )
    sampled_s = min(sampled_s, total_s / max(1.0, share.metrics.get("pool/workers", 1.0)))
    return {
        "time/wait_s": waited - began,
        "time/publish_s": published - learned,
        "time/step_s": step_s,
        "time/ended": time.time(),  # Unix seconds: where to draw the step beside the workers
        "time/learner_idle_fraction": (waited - began) / step_s,
        "time/rollout_idle_fraction": 1 - sampled_s / step_s,
    }


def validate(
    stream: LearnerStream, prompts: Sequence[Prompt], config: RLConfig, step: int
) -> Metrics:
    """Return greedy accuracy and length on held-out problems, sampled by the rollout workers.

    The accuracy with its n, its 95 % Wilson interval, and what always naming the commonest letter
    would reach.

    Of no problems, or if no worker survived them, there is nothing to say: {}.
    """
    if not prompts:
        return {}
    sampling = Sampling(config.max_new_tokens, temperature=0.0)
    began = time.perf_counter()
    if not (results := stream.evaluate(f"validation {step}", prompts, sampling)):
        return {}
    seen = describe(results, step)
    right_letters = [right for result in results for _, _, right in result.asked_P]
    n = len(right_letters)
    low, high = wilson_interval(round(seen["reward/accuracy"] * n), n)
    return {
        "validation/accuracy": seen["reward/accuracy"],
        "validation/n": n,
        "validation/low": low,
        "validation/high": high,
        "validation/majority_baseline": majority_baseline(right_letters),
        "validation/committed_fraction": seen["reward/committed_fraction"],
        "validation/length_mean": seen["rollout/length_mean"],
        "validation/cut_fraction": seen["rollout/cut_fraction"],
        "time/validate_s": time.perf_counter() - began,
    }


class InProcess:
    """A `LearnerStream` that samples in the learner's own process when a step is asked for."""

    def __init__(self, stream: RolloutStream, sampler: Sampler) -> None:
        self.stream, self.sampler = stream, sampler

    def publish(self, weights: Weights) -> None:
        self.sampler.load_weights(weights)
        self.stream.publish(weights.version)

    def next_step(self, step: int, rank: int, world: int) -> StepShare:
        while (share := self.stream.step_share(step, rank, world)) is None:
            self._work()
        return share

    def evaluate(
        self, name: str, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[LeaseResult]:
        self.stream.ask(name, prompts, [(0,)] * len(prompts), sampling)
        while (results := self.stream.answers(name)) is None:
            self._work()
        return results

    def frontier(self, step: int) -> int:
        return self.stream.frontier(step)

    def _work(self) -> None:
        """Take one lease and finish it."""
        lease = self.stream.lease("in process", time.monotonic())
        assert lease is not None, "a step that is not complete has a lease to give"
        lease = self.stream.filled(lease)
        sampled_from, started = time.time(), time.perf_counter()
        rollouts = self.sampler.sample(lease.prompts, lease.seeds, lease.sampling)
        groups = scored_groups(
            lease,
            rollouts,
            self.stream.source.tokenizer,
            self.stream.config,
            weights_version=self.sampler.version,
            sample_s=time.perf_counter() - started,
            worker="in process",
            sampled_from=sampled_from,
        )
        self.stream.submit(LeaseResult.of(groups))
