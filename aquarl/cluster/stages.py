"""What runs on each learner: the supervised stages one after the other, or RL.

Each finds its newest whole checkpoint and goes on from there, so starting, resuming and being
restarted by Ray Train are the same code. The first rank alone writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError

from aquarl.cluster.errors import plain_errors
from aquarl.cluster.learner_group import LONGEST_WAIT, Member
from aquarl.cluster.relay import say_finished
from aquarl.cluster.results import (
    COMES_FROM,
    finished_at,
    finished_policy,
    record,
    settings_of,
    stands,
    tokenizer_folder,
)
from aquarl.cluster.waits import Deadline, leave_stacks
from aquarl.config import Config
from aquarl.data.batches import RowSource
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import ConfigError
from aquarl.model.checkpoint import (
    checkpoint_folder,
    latest_checkpoint,
    load_model,
    load_training,
    read_meta,
    save_checkpoint,
    stage_folder,
)
from aquarl.model.gpt import GPT
from aquarl.model.modes import compile_policy
from aquarl.model.shape import Shape
from aquarl.observe.ledger import Ledger
from aquarl.observe.transcripts import forget_transcripts, write_transcripts
from aquarl.records import (
    Lease,
    LeaseResult,
    Metrics,
    Prompt,
    Sampling,
    StepShare,
    Weights,
)
from aquarl.rl.learner import Learner
from aquarl.rl.loop import train_policy
from aquarl.rl.stream import what_is_set_aside
from aquarl.storage import remove
from aquarl.tasks.base import to_prompt
from aquarl.tasks.catalog import load_problems
from aquarl.train import base, mid, sft
from aquarl.train.loop import SupervisedTrainer, train_stage

T = TypeVar("T")


@dataclass(frozen=True)
class Post:
    """A learner's place in a run: settings, group, and the ways to the driver and the stream."""

    config: Config
    member: Member
    relay: Any
    stream: Any = None
    """The stream actor, where the RL stage is to run."""

    @cached_property
    def deadline(self) -> Deadline:
        """Of a step, and of what is read before the first. Renewed by what shows that the learner
        gets on."""
        return Deadline(self.config.cluster.step_timeout_s)

    def begin(self, stage: str, step: int) -> None:
        """Have all that was logged after so many steps of a stage forgotten."""
        if self.member.rank == 0:
            self.relay.put.remote(stage, step, None)

    def log(self, stage: str, step: int, metrics: Metrics) -> None:
        self.deadline.renew()
        if self.member.rank == 0:
            self.relay.put.remote(stage, step, metrics)

    def finish(self, stage: str, since: float, metrics: Metrics, **facts: Any) -> None:
        """Write the stage's result, and go on when it is written. Raises: AquarlError."""
        self.deadline.lift()

        def write() -> None:
            line = record(self.config, stage, since, metrics, learners=self.member.world, **facts)
            say_finished(self.relay, stage, facts["steps"], line)

        self.member.once(write)


def learner_stages(post: Post, stages: tuple[str, ...], since: float) -> None:
    """Run these stages in turn. One that stands was finished before this group was restarted.

    Args:
        since: Unix seconds at which the first of them began.
    """
    post.deadline.renew()
    tokenizer = post.member.each(lambda: Tokenizer.load(tokenizer_folder(post.config)))
    for stage, following in zip(stages, (*stages[1:], ""), strict=True):
        post.deadline.renew()
        if not post.member.each(partial(stands, post.config, stage)):
            if stage == "rl":
                _rl_stage(post, tokenizer, since)
            else:
                _supervised_stage(post, stage, tokenizer, since, then_rl=following == "rl")
        since = post.member.each(partial(finished_at, post.config.run.dir, stage)) or since
    post.deadline.lift()


def _supervised_stage(
    post: Post, stage: str, tokenizer: Tokenizer, since: float, *, then_rl: bool
) -> None:
    config, member = post.config, post.member
    model = member.each(lambda: _policy_before(post, stage, tokenizer))
    if then_rl and member.rank == 0:
        post.stream.begin.remote(model.shape)  # the rollout workers start while this stage trains
    if stage == "base":
        with post.deadline.lifted():  # it takes as long as there is text
            member.once_a_machine(
                lambda: base.encode_corpus(config, tokenizer, token_folder(config))
            )
    with post.deadline.lifted():  # as long as there are conversations
        train, validation, refused = member.each(lambda: _rows(config, stage, tokenizer))
    trainer = SupervisedTrainer(
        model,
        getattr(config, stage),
        train,
        validation,
        tokenizer,
        member.parallel,
        member.rank,
        member.world,
    )
    member.each(lambda: _resume(config, stage, tokenizer, model, trainer))
    post.begin(stage, trainer.step)
    last: Metrics = {}

    def log(step: int, metrics: Metrics) -> None:
        last.update(metrics)
        post.log(stage, step, metrics)

    def save(trainer: SupervisedTrainer) -> None:
        folder = checkpoint_folder(config.run.dir, stage, trainer.step)
        member.once(
            lambda: save_checkpoint(
                folder,
                model,
                stage=stage,
                step=trainer.step,
                tokenizer_fingerprint=tokenizer.fingerprint,
                training=trainer.state(),
                facts={"settings": settings_of(config, stage)},
            )
        )

    train_stage(trainer, log=log, save=save)
    positions = trainer.rows_in_step * train.context * trainer.config.steps
    post.finish(
        stage,
        since,
        last,
        steps=trainer.step,
        tokens=positions,
        refused=refused,
        cut=train.cut,
    )
    if stage == "base" and "://" in config.run.dir:
        member.once_a_machine(lambda: remove(str(token_folder(config))))


def _policy_before(post: Post, stage: str, tokenizer: Tokenizer) -> GPT:
    """Return the policy that a supervised stage starts from, on this learner's device."""
    config = post.config
    if stage == "base":
        model = GPT(Shape.of(config.model, tokenizer.vocab_size)).init_weights(config.run.seed)
    else:
        model = finished_policy(config.run.dir, COMES_FROM[stage], tokenizer.fingerprint)
    compile_policy(model.to(post.member.device), config.cluster.compile)
    return model


def _resume(
    config: Config,
    stage: str,
    tokenizer: Tokenizer,
    model: GPT,
    trainer: SupervisedTrainer | Learner,
) -> dict[str, Any] | None:
    """Go on from a stage's newest whole checkpoint, and return its facts, if there is one."""
    newest = latest_checkpoint(stage_folder(config.run.dir, stage))
    if newest is None:
        return None
    _load_into(model, newest, tokenizer.fingerprint)
    trainer.load_state(load_training(newest))
    facts: dict[str, Any] = read_meta(newest)["facts"]
    return facts


def _load_into(model: GPT, folder: str, fingerprint: str) -> None:
    loaded = load_model(folder, fingerprint)
    if loaded.shape != model.shape:
        raise ConfigError(
            f"{folder} holds a model of {loaded.shape}, and these settings ask for {model.shape}. "
            f"Choose another run.dir, or delete {folder.rpartition('/')[0]} to begin that stage "
            "anew."
        )
    model.load_state_dict(loaded.state_dict())


def _rows(
    config: Config, stage: str, tokenizer: Tokenizer
) -> tuple[RowSource, RowSource, dict[str, int]]:
    """Return a stage's rows to train and to validate on, and which of its data were refused."""
    if stage == "base":
        return *base.rows(config, tokenizer, token_folder(config)), {}
    if stage == "mid":
        return mid.rows(config, tokenizer)
    splits = load_problems(config.data, config.run.seed)
    return *sft.rows(config, tokenizer, splits), dict(splits.refused)


def token_folder(config: Config) -> Path:
    """Return where this machine keeps encoded text: in the run directory where that is local.

    Else in the user's cache, where it outlives a run that is stopped.
    """
    if "://" not in config.run.dir:
        return Path(config.run.dir) / "tokens"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = config.run.dir.replace("://", "_").replace("/", "_")
    return cache / "aquarl" / "tokens" / name


def _rl_stage(post: Post, tokenizer: Tokenizer, since: float) -> None:
    """Tune the policy on the stream's groups."""
    config, member = post.config, post.member

    def policy_before() -> GPT:
        return finished_policy(config.run.dir, "sft", tokenizer.fingerprint).to(member.device)

    model = member.each(policy_before)
    reference = None
    if config.rl.kl_weight:
        reference = member.each(policy_before).requires_grad_(False)
    validation = member.each(lambda: _validation_prompts(config, tokenizer))
    learner = Learner(
        model,
        config.rl,
        reference=reference,
        parallel=member.parallel,
        total=member.total,
        rank=member.rank,
        world=member.world,
    )
    frontier, trained_tokens, counts = 0, 0, dict[str, int]()
    if facts := member.each(lambda: _resume(config, "rl", tokenizer, model, learner)):
        frontier, trained_tokens = int(facts["frontier"]), int(facts["trained_tokens"])
        counts = facts.get("stream", {})

    stream = RayStream(config, post.stream, post.deadline)
    ledger = member.each(lambda: Ledger(config.run.dir, learner.step))

    def begin() -> None:
        stream.begin(model.shape)
        stream.rewind(learner.step, frontier, counts)
        forget_transcripts(config.run.dir, learner.step)

    post.begin("rl", learner.step)
    with post.deadline.lifted():  # the stream's own are longer
        member.once(begin)  # no rank may ask for a step of before the rewind
        member.each(stream.join)
    last: Metrics = {}

    def each(work: Callable[[], T]) -> T:
        with post.deadline.lifted():  # what is waited for on any rank has one of its own
            return member.each(work, LONGEST_WAIT)

    def log(step: int, metrics: Metrics) -> None:
        nonlocal trained_tokens
        last.update(metrics)
        trained_tokens += int(metrics.get("tokens/trained", 0))
        post.log("rl", step, metrics)
        if member.rank == 0 and "tokens/trained" in metrics:
            results = stream.results_of_step
            ledger.add(step, results, stream.set_aside_of_step)
            for lease in stream.set_aside_of_step:
                said = what_is_set_aside(lease, config.rl.lease_deaths)
                post.relay.put.remote("rl", step, said)
            shown = config.rl.transcripts_per_step
            write_transcripts(config.run.dir, step, results, tokenizer, shown)

    def save(learner: Learner, frontier: int) -> None:
        def write() -> None:
            ledger.write()  # first: lines that lead the checkpoint are taken back on resuming
            save_checkpoint(
                checkpoint_folder(config.run.dir, "rl", learner.step),
                model,
                stage="rl",
                step=learner.step,
                tokenizer_fingerprint=tokenizer.fingerprint,
                training=learner.state(),
                facts={
                    "settings": settings_of(config, "rl"),
                    "frontier": frontier,
                    "trained_tokens": trained_tokens,
                    "stream": stream.status()["counts"],
                },
            )

        member.once(write)

    train_policy(
        config.rl,
        stream,
        learner,
        validation=validation,
        log=log,
        save=save,
        each=each,
    )
    seen = stream.status()
    post.finish(
        "rl",
        since,
        last,
        steps=learner.step,
        tokens=trained_tokens,
        rollout_workers=seen["wanted"],
        refused=seen["refused"],
        stream=seen["counts"],
    )


def _validation_prompts(config: Config, tokenizer: Tokenizer) -> list[Prompt]:
    problems = load_problems(config.data, config.run.seed).validation
    return [to_prompt(problem, tokenizer) for problem in problems[: config.rl.eval_problems]]


class RayStream:
    """A `LearnerStream`: the stream actor as a learner rank sees it.

    If the actor dies its error goes up as it is: Ray Train restarts the group, Ray the actor, and
    both go on from the last checkpoint.
    """

    def __init__(self, config: Config, actor: Any, deadline: Deadline | None = None) -> None:
        self._actor, self._run_dir = actor, config.run.dir
        self._waiting = deadline.lifted if deadline else nullcontext
        self._timeout_s = config.rl.wait_timeout_s + 60
        self._learner = ""
        """What this rank's group is to the stream, once it is of one."""
        self.results_of_step: Sequence[LeaseResult] = ()
        """On rank 0: all that the step which was asked for last is trained on."""
        self.set_aside_of_step: list[Lease] = []

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        """Return the stream's answer, for as long as it says that it is there: it gives up by
        itself when nothing comes any more."""
        try:
            with self._waiting(), plain_errors(dead_is_a_mistake=False):
                asked = method.remote(*args)  # type: ignore[attr-defined]
                while not ray.wait([asked], timeout=self._timeout_s)[0]:
                    ray.get(self._actor.learner.remote(), timeout=self._timeout_s)
                return ray.get(asked)
        except GetTimeoutError:  # Ray Train starts the group again, and gives up in the end
            leave_stacks(self._run_dir, f"The stream did not answer in {self._timeout_s:.0f} s.")
            raise

    def begin(self, shape: Shape) -> None:
        self._call(self._actor.begin, shape)

    def publish(self, weights: Weights) -> None:
        self._call(self._actor.publish, self._learner, weights)

    def rewind(self, step: int, position: int, counts: dict[str, int] | None = None) -> None:
        self._learner = self._call(self._actor.rewind, step, position, counts or {})

    def join(self) -> None:
        """Be of the group of learners that another rank announced by `rewind`."""
        self._learner = self._call(self._actor.learner)

    def next_step(self, step: int, rank: int, world: int) -> StepShare:
        share: StepShare = self._call(self._actor.next_step, self._learner, step, rank, world)
        self.results_of_step, self.set_aside_of_step = share.results, []
        seen, groups = share.metrics, sum(map(len, share.results))
        is_all = groups == seen["reward/groups"] and not seen["reward/groups_set_aside"]
        if rank == 0 and not is_all:
            # Now, for no rank can ask for the next step, which forgets this one.
            whole = self._call(self._actor.step_results, self._learner, step)
            self.results_of_step, self.set_aside_of_step = whole
        return share

    def evaluate(
        self, name: str, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[LeaseResult]:
        results: list[LeaseResult] = self._call(
            self._actor.evaluate, self._learner, name, prompts, sampling
        )
        return results

    def frontier(self, step: int) -> int:
        position: int = self._call(self._actor.frontier, self._learner, step)
        return position

    def status(self) -> dict[str, Any]:
        seen: dict[str, Any] = self._call(self._actor.status)
        return seen
