"""From a configuration to finished stages: what `aquarl STAGE` and every Ray job call.

Starts or joins Ray, hires the tokenizer's task, the stream and one learner group for all stages
that do not stand yet, and shows what they say. Nothing here trains or samples.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import fsspec
import ray
from ray.exceptions import ActorAlreadyExistsError
from rich.console import Console

from aquarl.cluster.connection import beside_driver, cluster_address, connected, namespace
from aquarl.cluster.errors import plain_errors
from aquarl.cluster.kinds import evaluation_kind, first_kinds, kinds_of
from aquarl.cluster.results import (
    COMES_FROM,
    alone_in,
    already_running,
    finished_at,
    finished_checkpoint,
    put_json,
    ran_on,
    record,
    require_predecessor,
    run_and_stage,
    settings_kept,
    stands,
    tokenizer_folder,
)
from aquarl.config import Config, RolloutKind
from aquarl.errors import ClusterError, ConfigError

CALLS_AT_ONCE = 4096
"""Of the stream: each worker has a question or two open, and there may be 1,024."""

TOKENIZER_WITHIN_S = 2 * 3600.0
CHARACTERS_LOOKED_AT = 100_000
"""Of what the vocabulary was trained on: to count how many bytes one of its tokens stands for."""

# What needs torch and ray.train (seconds to import) is imported where it is used: after Ray has
# been started and while its first task runs.


def run_stages(config: Config, stages: Sequence[str]) -> None:
    """Run these stages in order, skipping those whose result stands.

    The tokenizer's task runs while the learner group starts, the rollout workers start while the
    stage before RL trains, and one group runs all stages: starting a group costs as much as
    hundreds of small steps.

    Raises:
        AquarlError: A stage cannot run; what was there before stands.
    """
    since = time.time()
    missing = tuple(stage for stage in stages if not stands(config, stage))
    for stage in stages:
        if stage not in missing and (before := COMES_FROM.get(stage)) in missing:
            raise ConfigError(
                f"{config.run.dir} holds a finished {stage} stage, but not the {before} stage that "
                f"it was made from. Delete results/{stage}.json and checkpoints/{stage} there too, "
                "or choose another run.dir."
            )
    for stage in stages:
        if stage not in missing:
            print(f"{stage:>9}  stands already in {config.run.dir}", file=sys.stderr)
    if not missing:
        return
    if "rl" in missing:
        check_engine(config, kinds_of(config), config.rl.temperature)
    if "mid" in missing:
        from aquarl.tasks.catalog import check_mid_sources

        check_mid_sources(config.data)
    require_predecessor(config, missing[0])
    with connected(config), alone_in(config.run.dir), settings_kept(config), plain_errors():
        _run(config, missing, since)


def _run(config: Config, stages: tuple[str, ...], since: float) -> None:
    hired = first_kinds(config, config.rl.rollout_workers.min) if "rl" in stages else []
    check_resources(config, config.cluster.learners.min, hired)
    from aquarl.cluster.relay import relay_to
    from aquarl.observe.metrics import make_sinks

    with make_sinks(config) as sinks, relay_to(sinks) as relay:
        words = None
        if stages[0] == "tokenizer":
            task = ray.remote(num_cpus=1)(tokenizer_stage).options(name="tokenizer")
            words = task.remote(config, relay, since)
        if learned := tuple(stage for stage in stages if stage != "tokenizer"):
            with hired_stream(config, wanted="rl" in learned) as stream:
                _learn(config, learned, relay, stream, words, since)
        elif words is not None:
            _tokenizer_done(config, words)


def _learn(
    config: Config, stages: tuple[str, ...], relay: Any, stream: Any, words: Any, since: float
) -> None:
    from aquarl.cluster.learner_group import Member, run_group
    from aquarl.cluster.stages import Post, learner_stages

    def work(config: Config, member: Member) -> None:
        began = since
        if words is not None:
            with plain_errors():
                began = _tokenizer_done(config, words)
        learner_stages(Post(config, member, relay, stream), stages, began)

    run_group(config, work)


def _tokenizer_done(config: Config, words: Any) -> float:
    """Wait for the tokenizer's task. Returns when it was finished."""
    from aquarl.cluster.waits import wait_for

    finished: float = wait_for(
        words,
        TOKENIZER_WITHIN_S,
        what="the tokenizer, a task on 1 CPU",
        advice="Free a CPU or add a node, or lower tokenizer.train_chars.",
        run_dir=config.run.dir,
    )
    return finished


def tokenizer_stage(config: Config, relay: Any, since: float) -> float:
    """Train the vocabulary on some of the corpus and of the task. Returns when it was finished."""
    from aquarl.cluster.relay import say_finished
    from aquarl.data.batches import some_of
    from aquarl.data.tokenizer import Tokenizer

    texts = tokenizer_texts(config)
    first = some_of(texts, CHARACTERS_LOOKED_AT)
    tokenizer = Tokenizer.train(chain(first, texts), config.tokenizer.vocab_size)
    tokenizer.save(tokenizer_folder(config))
    some = "\n".join(first)[:CHARACTERS_LOOKED_AT]
    metrics = {
        "vocabulary": tokenizer.vocab_size,
        "bytes_per_token": len(some.encode()) / len(tokenizer.encode(some)),
    }
    relay.put.remote("tokenizer", 0, None)
    relay.put.remote("tokenizer", 0, metrics)
    line = record(config, "tokenizer", since, metrics)
    say_finished(relay, "tokenizer", 0, line)
    return finished_at(config.run.dir, "tokenizer") or time.time()


def tokenizer_texts(config: Config) -> Iterator[str]:
    """Yield `tokenizer.train_chars` characters: half from the task's problems, while they last,
    half and the rest from the corpus."""
    from aquarl.tasks.base import question_text, solution_text
    from aquarl.tasks.catalog import corpus_documents, load_problems

    left = config.tokenizer.train_chars
    for problem in load_problems(config.data, config.run.seed).train:
        if left < config.tokenizer.train_chars / 2:
            break
        text = f"{question_text(problem)}\n{solution_text(problem)}"
        left -= len(text)
        yield text
    for document in corpus_documents(config.data, config.run.seed, "train"):
        if left <= 0:
            break
        left -= len(document)
        yield document


@contextmanager
def hired_stream(config: Config, *, wanted: bool) -> Iterator[Any]:
    """Hire the stream, if it is wanted, and send it and its workers home at the end."""
    if not wanted:
        yield None
        return
    from aquarl.cluster.stream_actor import StreamActor

    # In RL its death is a failure of the learners, and counted there.
    hired = ray.remote(num_cpus=0, max_restarts=-1)(StreamActor).options(
        name="stream",
        namespace=namespace(config),
        scheduling_strategy=beside_driver(),
        max_concurrency=CALLS_AT_ONCE,
    )
    try:
        stream: Any = hired.remote(config)
    except ActorAlreadyExistsError as error:
        raise ClusterError(already_running(config.run.dir)) from error
    try:
        yield stream
    finally:
        try:
            ray.get(stream.close.remote(), timeout=20)
        except Exception as error:  # it may be dead already; then so are its workers
            logging.getLogger(__name__).debug("stream did not close: %s", error)
        ray.kill(stream)


def run_evaluation(config: Config, against: str | None = None) -> dict[str, Any]:
    """Score the checkpoints of `evaluate.stages` and write `results/evaluate.json`.

    Args:
        against: Another run directory, or one of its stages as DIR:STAGE, to compare with.
    """
    workers, kind = config.rl.rollout_workers.min, evaluation_kind(config)
    check_engine(config, (kind,), config.evaluate.temperature)
    began = time.time()
    with connected(config), plain_errors():
        check_resources(config, 0, [kind] * workers)
        from aquarl.cluster.evaluation import evaluate_checkpoints
        from aquarl.evaluate.evaluator import accuracies
        from aquarl.observe.metrics import make_trackers

        with Console(stderr=True).status(
            "evaluating " + ", ".join(config.evaluate.stages), refresh_per_second=4
        ):
            result = evaluate_checkpoints(config, against)
        result["ran_on"] = ran_on()
    result["wall_s"] = time.time() - began
    result["rollout_workers"] = workers
    result["settings"] = config.evaluate.model_dump(mode="json")
    put_json(f"{config.run.dir}/results/evaluate.json", result)
    with make_trackers(config) as trackers:
        trackers.log("evaluate", 0, accuracies(result))
    return result


def check_engine(config: Config, kinds: Sequence[RolloutKind], temperature: float) -> None:
    """Refuse at once what no worker of these kinds could do, before a stage has taken minutes.

    Raises:
        ConfigError: vLLM is to sample, but is not installed, or not at this temperature.
    """
    if all(kind.engine != "vllm" for kind in kinds):
        return
    from aquarl.engines.vllm_engine import check_temperature, require_vllm

    if not cluster_address(config):  # else its workers have an installation of their own
        require_vllm()
    check_temperature(temperature)


def check_evaluation(config: Config, against: str | None) -> None:
    """Refuse at once an evaluation that cannot be, before stages have taken hours.

    Raises:
        AquarlError: There are no problems to evaluate on, or no such run or stage to compare with,
            or vLLM is to sample and cannot.
    """
    from aquarl.tasks.catalog import problems_to_evaluate

    check_engine(config, (evaluation_kind(config),), config.evaluate.temperature)
    problems_to_evaluate(config)
    if against is None:
        return
    folder, stage = run_and_stage(against, config.evaluate.stages[-1])
    if fsspec.url_to_fs(folder)[1] != fsspec.url_to_fs(config.run.dir)[1]:  # else it may come yet
        finished_checkpoint(folder, stage)


def check_resources(config: Config, learners: int, hired: Sequence[RolloutKind]) -> None:
    """Refuse what this machine can never give: Ray itself would wait for ever, silently.

    Args:
        learners: How many there have to be at once.
        hired: The kind of each rollout worker that has to be there beside them.

    Raises:
        ClusterError: It has too few CPUs or GPUs.
    """
    if cluster_address(config):
        return  # a cluster may grow: there the deadlines speak
    cluster = config.cluster
    for kind, learner, rollouts in (
        ("CPU", cluster.learner_cpus, sum(worker.cpus for worker in hired)),
        ("GPU", cluster.learner_gpus, sum(worker.gpus for worker in hired)),
    ):
        needed = learners * learner + rollouts
        there = ray.cluster_resources().get(kind, 0)
        if needed > there:
            shares = " cluster.learner_cpus=0.5 cluster.rollout_cpus=0.5 gives each a share."
            would_do = (learners + len(hired)) / 2 <= there
            advice = (
                f"Lower rl.rollout_workers or cluster.learners.{shares if would_do else ''}"
                if kind == "CPU"
                else "To let a learner and a worker share a GPU, set cluster.learner_gpus=0.5 and "
                "cluster.rollout_gpus=0.5. To use CPUs, set both to 0. Or name a cluster that has "
                "them: cluster.address=HOST:6379."
            )
            raise ClusterError(
                f"{learners} learners with {learner:g} {kind}s each and {len(hired)} rollout "
                f"workers with {rollouts:g} in all need {needed:g} {kind}s, but this machine has "
                f"{there:g}. {advice}"
            )
