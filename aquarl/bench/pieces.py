"""A name and the work in, something that can be run again and again out.

rollouts   prompts to sampled tokens with their log-probabilities
learner    sampled groups to one optimizer step
step       both, with scoring and the weights handed over: one RL step
sft        rows of text, each of one document, to one optimizer step
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from aquarl.bench import floor
from aquarl.bench.floor import Machine
from aquarl.bench.work import NEVER, Work
from aquarl.config import SupervisedConfig
from aquarl.data.batches import Rows
from aquarl.data.tokenizer import Tokenizer
from aquarl.engines.torch_engine import TorchSampler
from aquarl.engines.vllm_engine import VllmSampler
from aquarl.model.flat_weights import flatten
from aquarl.model.modes import compile_policy
from aquarl.records import Lease, Sampler
from aquarl.rl.learner import Learner
from aquarl.rl.rewards import scored_groups
from aquarl.train.loop import SupervisedTrainer


@dataclass(frozen=True)
class Piece:
    run: Callable[[], object]
    tokens: int
    """What one run gets done: tokens sampled, or positions trained."""
    floor_s: Callable[[Machine], float]


def rollouts(work: Work, device: str, engine: str) -> Piece:
    sampler = make_sampler(work, device, engine)
    sampler.load_weights(flatten(work.model(), 0))
    return Piece(
        lambda: sampler.sample(work.prompt_list, work.seeds, work.sampling),
        tokens=work.prompts * work.samples * work.max_new,
        floor_s=lambda machine: floor.rollouts(work, machine, _bytes_a_number(device)),
    )


def make_sampler(work: Work, device: str, engine: str) -> Sampler:
    if engine == "vllm":
        return VllmSampler(work.shape, NEVER, device, rows=work.prompts * work.samples)
    return TorchSampler(work.model(), NEVER, device)


def learner(work: Work, device: str, engine: str) -> Piece:
    policy = Learner(work.model().to(device), work.rl_config)
    groups, rollouts_in_step = work.groups(work.drawn()), work.prompts * work.samples
    tokens = rollouts_in_step * work.max_new
    return Piece(
        lambda: policy.update(groups, tokens, rollouts_in_step),
        tokens=tokens,
        floor_s=lambda machine: floor.learner(work, machine),
    )


def step(work: Work, device: str, engine: str) -> Piece:
    policy = Learner(work.model().to(device), work.rl_config)
    sampler = make_sampler(work, device, engine)
    rollouts_in_step = work.prompts * work.samples
    tokens = rollouts_in_step * work.max_new
    prompts, seeds = tuple(work.prompt_list), tuple(map(tuple, work.seeds))

    def run() -> None:
        sampler.load_weights(policy.weights())
        drawn = work.readable(sampler.sample(prompts, seeds, work.sampling))
        lease = Lease(0, policy.step, prompts, seeds, work.sampling, policy.step)
        scored = scored_groups(
            lease, drawn, work.tokenizer, work.rl_config, weights_version=policy.step
        )
        # Random letters are seldom right: with all rewards 0 there would be nothing to learn.
        groups = work.groups([group.rollouts for group in scored])
        policy.update(groups, tokens, rollouts_in_step)

    def both(machine: Machine) -> float:
        sampling = floor.rollouts(work, machine, _bytes_a_number(device))
        return sampling + floor.learner(work, machine)

    return Piece(run, tokens=tokens, floor_s=both)


def sft(work: Work, device: str, engine: str) -> Piece:
    positions = work.rows * work.context
    config = SupervisedConfig(batch_tokens=positions, micro_rows=work.rows)
    rows = _RandomRows(work)
    words = Tokenizer.train(["bench"], vocab_size=265)
    model = work.model().to(device)
    compile_policy(model, work.compile)
    trainer = SupervisedTrainer(model, config, rows, rows, words)
    return Piece(trainer.update, positions, lambda machine: floor.supervised(work, machine))


class _RandomRows:
    """A `RowSource` of one document a row, every position trained."""

    cut = 0

    def __init__(self, work: Work) -> None:
        self.context, self._work = work.context, work

    def rows(self, first: int, count: int) -> Rows:
        generator = torch.Generator().manual_seed(self._work.seed + first)
        ids_BT = torch.randint(
            self._work.shape.vocab, (count, self.context + 1), generator=generator
        )
        return Rows(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), None)


def _bytes_a_number(device: str) -> int:
    return 2 if device.startswith("cuda") else 4
