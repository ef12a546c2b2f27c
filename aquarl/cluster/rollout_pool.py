"""Rollout workers: Ray actors that lease prompts and yield scored groups, and who hires them.

A worker knows the stream and nobody else. It is never restarted by Ray: the stream actor replaces
it and issues its lease again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.actor import ActorHandle

from aquarl.config import Config
from aquarl.data.tokenizer import Tokenizer
from aquarl.model.gpt import GPT, Shape
from aquarl.records import RolloutGroup, Sampler
from aquarl.rl.rewards import scored_groups


class RolloutWorker:
    """One model copy on its own resources: leases prompts, yields scored groups. No algorithm."""

    def __init__(
        self,
        name: str,
        config: Config,
        tokenizer: Tokenizer,
        make_sampler: Callable[[], Sampler],
        stream: ActorHandle,
    ) -> None:
        self._name, self._config, self._tokenizer = name, config, tokenizer
        self._sampler = make_sampler()  # built here, on the worker's own machine
        self._stream = stream
        self._have: tuple[int, int] | None = None
        """Version and checksum of the weights that the sampler holds."""

    def __repr__(self) -> str:
        return f"RolloutWorker({self._name})"  # Ray asks once, when it is made

    def run(self) -> Iterator[list[RolloutGroup]]:
        """Yield the finished groups of one lease at a time until the stream says stop."""
        while True:
            offer = ray.get(self._stream.lease.remote(self._name, self._have))
            if offer.is_over:
                return
            if offer.weights is not None:
                # From shared memory, without a copy; checks the sum, then flips.
                self._sampler.load_weights(ray.get(offer.weights))
                self._have = offer.identity
            if (lease := offer.lease) is None:
                continue
            started = time.perf_counter()
            rollouts = self._sampler.sample(lease.prompts, lease.seeds, lease.sampling)
            yield scored_groups(
                lease,
                rollouts,
                self._tokenizer,
                self._config.rl,
                weights_version=self._sampler.version,
                worker=self._name,
                sample_s=time.perf_counter() - started,
            )


def sampler_maker(config: Config, shape: Shape, tokenizer: Tokenizer) -> Callable[[], Sampler]:
    """Return what builds the configured engine, on the machine that calls it."""
    threads = config.cluster.threads
    device = "cuda" if config.cluster.rollout_gpus > 0 else "cpu"
    rows = max(
        config.rl.prompts_per_lease * config.rl.rollouts_per_prompt,
        config.evaluate.prompts_per_batch * config.evaluate.samples,
    )

    def make_torch() -> Sampler:
        import torch

        from aquarl.engines.torch_engine import TorchSampler

        torch.set_num_threads(threads)
        return TorchSampler(GPT(shape), tokenizer.end_of_turn, device)

    def make_vllm() -> Sampler:
        import torch

        from aquarl.engines.vllm_engine import VllmSampler

        torch.set_num_threads(threads)  # vLLM's, too, and it allows no change later
        return VllmSampler(shape, tokenizer.end_of_turn, device, rows=rows)

    return {"torch": make_torch, "vllm": make_vllm}[config.rl.engine]


def hire(
    name: str,
    config: Config,
    tokenizer: Tokenizer,
    make_sampler: Callable[[], Sampler],
    stream: ActorHandle,
) -> Any:
    """Start a worker as a Ray actor and return its handle, before it is up."""
    remote_class = ray.remote(
        num_cpus=config.cluster.rollout_cpus,
        num_gpus=config.cluster.rollout_gpus,
        max_restarts=0,
        max_concurrency=1,
    )(RolloutWorker)
    hired = remote_class.options(name=unused(name))
    return hired.remote(name, config, tokenizer, make_sampler, stream)


def unused(name: str) -> str:
    """Return a name for an actor that none, even one that is about to end, has had."""
    return f"{name}-{secrets.token_hex(3)}"
