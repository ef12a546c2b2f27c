"""Rollout workers: Ray actors that lease prompts and yield scored groups, and who hires them.

A worker knows the stream and nobody else. It is never restarted by Ray: the stream actor replaces
it and issues its lease again. What the worker alone needs it imports itself: who hires needs no
torch.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.actor import ActorHandle

from aquarl.cluster.waits import stacks_after, wait_for
from aquarl.config import Config
from aquarl.data.tokenizer import Tokenizer
from aquarl.model.shape import Shape
from aquarl.records import Lease, LeaseResult, Sampler, Weights
from aquarl.rl.prompts import PromptSource

LEASE_WAIT_S = 5.0
"""How long a worker's question stays open before the stream tells it to ask again."""


class RolloutWorker:
    """One model copy on its own resources: leases prompts, yields scored groups. No algorithm."""

    def __init__(
        self,
        name: str,
        config: Config,
        source: PromptSource,
        make_sampler: Callable[[], Sampler],
        stream: ActorHandle,
    ) -> None:
        self._name, self._config, self._source = name, config, source
        self._sampler = make_sampler()  # built here, on the worker's own machine
        self._stream = stream
        self._have: tuple[int, int] | None = None
        """Version and checksum of the weights that the sampler holds."""
        self._asked: tuple[Any, Any] = None, None
        """Weights, and the question for newer ones, where they may change between two tokens."""

    def __repr__(self) -> str:
        return f"RolloutWorker({self._name})"  # Ray asks once, when it is made

    def run(self) -> Iterator[LeaseResult]:
        """Yield the result of one lease after the other until the stream says stop."""
        from aquarl.rl.rewards import scored_groups

        while True:
            offer = self._wait_for(self._stream.lease.remote(self._name, self._have), "a lease")
            if offer.is_over:
                return
            if offer.lease is None:
                continue
            lease = self._source.filled(offer.lease, self._config.rl.rollouts_per_prompt)
            fetch_s = 0.0
            with stacks_after(self._config.rl.lease_timeout_s):
                if offer.weights is not None:
                    fetched_from = time.perf_counter()
                    # From shared memory, without a copy; checks the sum, then flips.
                    self._sampler.load_weights(self._wait_for(offer.weights, "new weights"))
                    self._have = offer.identity
                    fetch_s = time.perf_counter() - fetched_from
                if self._config.rl.inflight_updates:
                    self._let_weights_change(lease)
                sampled_from, started = time.time(), time.perf_counter()
                version = self._sampler.version
                rollouts = self._sampler.sample(lease.prompts, lease.seeds, lease.sampling)
            groups = scored_groups(
                lease,
                rollouts,
                self._source.tokenizer,
                self._config.rl,
                weights_version=version,
                worker=self._name,
                sample_s=time.perf_counter() - started,
                fetch_s=fetch_s,
                sampled_from=sampled_from,
            )
            yield LeaseResult.of(groups)

    def _let_weights_change(self, lease: Lease) -> None:
        """Have the sampler look for newer weights between the tokens of a lease of the training.

        The question stays open at the stream, so that looking costs a fraction of a millisecond.
        """
        from aquarl.engines.torch_engine import TorchSampler

        assert isinstance(self._sampler, TorchSampler), "RLConfig allows no other"

        def ask() -> None:
            self._asked = self._have, self._stream.newer.remote(self._have)

        def newer_weights() -> Weights | None:
            _, asked = self._asked
            if not ray.wait([asked], timeout=0)[0]:
                return None
            offer, weights = ray.get(asked), None
            if offer.weights is not None:
                weights = self._wait_for(offer.weights, "new weights")
                self._have = offer.identity
            ask()
            return weights

        # One that is answered may be of before this lease, or of before the learner went back.
        had, asked = self._asked
        if asked is None or had != self._have or ray.wait([asked], timeout=0)[0]:
            ask()

        # An evaluation is of the very weights that were asked about.
        is_training = lease.purpose == "train"
        self._sampler.newer_weights = newer_weights if is_training else lambda: None

    def _wait_for(self, ref: Any, what: str) -> Any:
        return wait_for(
            ref,
            LEASE_WAIT_S + self._config.rl.wait_timeout_s,
            what=f"the stream to answer {self._name} with {what}",
            advice="Start the same command again to resume.",
            run_dir=self._config.run.dir,
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
        from aquarl.engines.torch_engine import TorchSampler
        from aquarl.model.gpt import GPT
        from aquarl.model.modes import keep_memory
        from aquarl.model.products import use_threads

        use_threads(threads)
        keep_memory()
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
    source: Any,
    make_sampler: Callable[[], Sampler],
    stream: ActorHandle,
) -> Any:
    """Start a worker as a Ray actor and return its handle, before it is up.

    Args:
        source: Reference of the `PromptSource`, which is sent once to a machine.
    """
    remote_class = ray.remote(
        num_cpus=config.cluster.rollout_cpus,
        num_gpus=config.cluster.rollout_gpus,
        max_restarts=0,
        max_concurrency=1,
    )(RolloutWorker)
    hired = remote_class.options(name=unused(name))
    return hired.remote(name, config, source, make_sampler, stream)


def unused(name: str) -> str:
    """Return a name for an actor that none, even one that is about to end, has had."""
    return f"{name}-{secrets.token_hex(3)}"
