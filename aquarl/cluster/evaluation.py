"""Checkpoints in, measures out: evaluation through Ray actors that each hold a sampler.

The prompts of a question are dealt out to the actors in turn and come back in order.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from aquarl.cluster.errors import GONE, last_line
from aquarl.cluster.results import (
    finished_at,
    finished_checkpoint,
    finished_policy,
    run_and_stage,
    settings_made_with,
)
from aquarl.cluster.rollout_pool import sampler_maker, unused
from aquarl.cluster.waits import wait_for
from aquarl.config import Config, DataConfig
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import ConfigError, DataError, StorageError
from aquarl.evaluate.evaluator import compare, evaluate_policy, evaluation_summary
from aquarl.model.checkpoint import read_meta
from aquarl.model.flat_weights import flatten
from aquarl.model.gpt import GPT
from aquarl.records import Problem, Prompt, Rollout, Sampling, Weights
from aquarl.tasks.catalog import not_trained_on, problems_to_evaluate, split_by

logger = logging.getLogger(__name__)


class EvaluationWorker:
    """A sampler on its own resources, with the weights of one checkpoint."""

    def __init__(self, name: str, config: Config, model_shape: Any, tokenizer: Tokenizer) -> None:
        self._name, self._sampler = name, sampler_maker(config, model_shape, tokenizer)()

    def __repr__(self) -> str:
        return f"EvaluationWorker({self._name})"

    def load_weights(self, weights: Weights) -> None:
        self._sampler.load_weights(weights)

    def sample(self, *args: Any) -> list[list[Rollout]]:
        return self._sampler.sample(*args)

    def letter_logprobs(self, *args: Any) -> list[list[float]]:
        return self._sampler.letter_logprobs(*args)


class PooledSampler:
    """Several `EvaluationWorker`s as one `Sampler`. One that dies is replaced."""

    def __init__(self, config: Config, model: GPT, tokenizer: Tokenizer, workers: int) -> None:
        hired = ray.remote(
            num_cpus=config.cluster.rollout_cpus, num_gpus=config.cluster.rollout_gpus
        )(EvaluationWorker)

        def hire(place: int) -> Any:
            name = unused(f"evaluate-{place}")
            return hired.options(name=name).remote(name, config, model.shape, tokenizer)

        self._hire = hire
        self._workers = [hire(place) for place in range(workers)]
        self._deaths_in_a_row = 0
        self._weights: Any = None
        self.fits, self.version = (model.shape, tokenizer.end_of_turn), -1
        """Which policies these workers can take."""
        self._config = config

    def load_weights(self, weights: Weights) -> None:
        """Let every worker take these weights."""
        self._weights = ray.put(weights)
        self._ask_all("load_weights", dict.fromkeys(range(len(self._workers)), (self._weights,)))
        self.version = weights.version

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Rollout]]:
        return self._dealt("sample", prompts, seeds, extra=(sampling,))

    def letter_logprobs(
        self, prompts: Sequence[Sequence[int]], letter_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return self._dealt("letter_logprobs", prompts, letter_ids)

    def close(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def _dealt(self, method: str, *columns: Sequence[Any], extra: tuple[Any, ...] = ()) -> Any:
        n = len(self._workers)
        shares = {
            place: (*(list(column[place::n]) for column in columns), *extra)
            for place in range(min(n, len(columns[0])))
        }
        results: list[Any] = [None] * len(columns[0])
        for place, answers in self._ask_all(method, shares).items():
            results[place::n] = answers
        return results

    def _ask_all(self, method: str, arguments: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Return the answer from each place. Who dies of it has a successor, which is asked again.

        The seeds are the problems' own, so that it gives the same answers.
        """
        asked = {place: self._ask(place, method, *of) for place, of in arguments.items()}
        answers: dict[int, Any] = {}
        while asked:
            place = next(iter(asked))
            try:
                answers[place] = self._wait_for(asked[place], is_start=method == "load_weights")
            except GONE as error:  # an answer may be lost with its machine, too
                self._replace(place, error)
                asked[place] = self._ask(place, method, *arguments[place])
            else:
                del asked[place]
                self._deaths_in_a_row = 0
        return answers

    def _ask(self, place: int, method: str, *arguments: Any) -> Any:
        return getattr(self._workers[place], method).remote(*arguments)

    def _replace(self, place: int, error: Exception) -> None:
        """Hire who follows a dead worker. Raises: `error`, if that would not help."""
        self._deaths_in_a_row += 1
        has_started = not (isinstance(error, ActorDiedError) and error.actor_init_failed)
        if not has_started or self._deaths_in_a_row > self._config.rl.worker_restarts:
            raise error
        logger.warning("evaluate-%d died and is replaced: %s", place, last_line(error))
        ray.kill(self._workers[place])  # where it is its answer that is lost
        self._workers[place] = self._hire(place)
        try:
            self._wait_for(self._ask(place, "load_weights", self._weights), is_start=True)
        except GONE as again:
            self._replace(place, again)

    def _wait_for(self, ref: Any, *, is_start: bool) -> Any:
        """Return an answer. Any may have to wait for a successor to start."""
        cluster, wait_s = self._config.cluster, self._config.rl.wait_timeout_s
        return wait_for(
            ref,
            cluster.start_timeout_s + (0 if is_start else wait_s),
            what="rollout workers to start" if is_start else "a batch of answers",
            advice=f"Each of {len(self._workers)} workers asks for {cluster.rollout_cpus:g} CPUs "
            f"and {cluster.rollout_gpus:g} GPUs. Lower rl.rollout_workers or "
            "evaluate.prompts_per_batch, or raise cluster.start_timeout_s and rl.wait_timeout_s.",
            run_dir=self._config.run.dir,
        )


def evaluate_checkpoints(config: Config, against: str | None = None) -> dict[str, Any]:
    """Return the measures of the stages in `evaluate.stages`, and how each compares with the one
    before.

    Args:
        against: "DIR" or "DIR:STAGE": a checkpoint of another run, measured on the same problems
            and compared with the last stage here.

    Raises:
        CheckpointError: A checkpoint is missing, damaged, or of another vocabulary.
        ConfigError: The split is empty, or a policy was trained on all of it.
    """
    stages = config.evaluate.stages
    places: list[tuple[str, str]] = [(config.run.dir, stage) for stage in stages]
    if against is not None:
        places.append(run_and_stage(against, stages[-1]))
    problems, which = _unseen_problems(config, places)
    words = {folder: Tokenizer.load(f"{folder}/tokenizer") for folder in dict(places)}
    policies = [
        (finished_policy(folder, stage, words[folder].fingerprint), words[folder])
        for folder, stage in places
    ]
    measured = _measured(config, policies, problems)
    for result, place in zip(measured, places, strict=True):
        result["checkpoint"] = _which(*place)
    summary = evaluation_summary(
        config.evaluate.split, dict(zip(stages, measured[: len(stages)], strict=True))
    )
    summary |= which
    if against is not None:
        here, other = measured[-2:]
        summary["stages"][against] = other
        summary["comparisons"].append({"a": against, "b": stages[-1], **compare(other, here)})
    return summary


def _unseen_problems(
    config: Config, places: Sequence[tuple[str, str]]
) -> tuple[Sequence[Problem], dict[str, Any]]:
    """Return the problems of the split that no policy was trained on, and what is to be said of it.

    That is, how many are left out (none, where the policies were made with the settings of this
    evaluation: splits are disjoint), and the settings by which they are not the run's own.
    """
    whole = problems_to_evaluate(config)
    here, problems = split_by(config.data, config.run.seed), [*whole]
    not_its_own: dict[str, Any] = {}
    looked_at: list[tuple[DataConfig, int]] = []  # a run's stages are mostly made with the same
    for run_dir, stage in places:
        made_with = settings_made_with(run_dir, stage)
        if not made_with:
            continue  # imported: nobody knows what it has seen
        data, seed = DataConfig.model_validate(made_with["data"]), made_with["run"]["seed"]
        then = split_by(data, seed)
        if then == here or (data, seed) in looked_at:
            continue
        looked_at.append((data, seed))
        if run_dir == config.run.dir:
            not_its_own = {key: value for key, value in here.items() if then.get(key) != value}
        try:
            problems = not_trained_on(data, seed, problems)
        except (DataError, StorageError) as error:
            warnings.warn(
                f"{stage} of {run_dir} may have been trained on some of these problems: what it "
                f"was trained on is no longer there. {error}",
                stacklevel=2,
            )
        if not problems:
            raise ConfigError(
                f"{stage} of {run_dir} was trained on every problem of this "
                f"{config.evaluate.split} split, as it was made with other settings. Evaluate with "
                f"its own: {' '.join(f'{key}={value}' for key, value in then.items())}"
            )
    return problems, {"left_out": len(whole) - len(problems), "not_its_own": not_its_own}


def _which(run_dir: str, stage: str) -> dict[str, Any]:
    """Return which checkpoint was measured, and when its stage was finished: None, if it is not.

    The moment tells it from another that is made in its place.
    """
    meta = read_meta(finished_checkpoint(run_dir, stage))
    moment = finished_at(run_dir, stage)
    return {"stage": meta["stage"], "step": meta["step"], "finished": moment}


def _measured(
    config: Config, policies: Sequence[tuple[GPT, Tokenizer]], problems: Sequence[Problem]
) -> list[dict[str, Any]]:
    """Return the measures of each policy; neighbours share their workers where they can."""
    workers = min(config.rl.rollout_workers.min, len(problems))
    pool: PooledSampler | None = None
    measured: list[dict[str, Any]] = []
    try:
        for model, tokenizer in policies:
            if pool is None or pool.fits != (model.shape, tokenizer.end_of_turn):
                if pool is not None:
                    pool.close()
                pool = PooledSampler(config, model, tokenizer, workers)
            pool.load_weights(flatten(model, version=len(measured)))
            measured.append(
                evaluate_policy(problems, tokenizer, pool, config.evaluate, config.run.seed)
            )
    finally:
        if pool is not None:
            pool.close()
    return measured
