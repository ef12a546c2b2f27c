"""Stand-ins that keep the contract of what they stand for, defined once for all tests."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aquarl.data.tokenizer import Tokenizer
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.records import Lease, PackedGroups, Prompt, Rollout, RolloutGroup, Sampling, Weights

REAL = Path(os.environ.get("AQUARL_DATA") or Path(__file__).parents[2] / "shared" / "data")
"""Where the real data sets are, if they are anywhere."""


def real_data(folder: str) -> pytest.MarkDecorator:
    """Return the mark of tests that need this folder of the real data."""
    return pytest.mark.skipif(
        not (REAL / folder).is_dir(),
        reason=f"no {folder}/ in {REAL}: set AQUARL_DATA to a folder that has one",
    )


def byte_tokenizer(*merged: bytes) -> Tokenizer:
    """Return a tokenizer of single bytes and, if given, of longer tokens in order of merging."""
    ranks = {bytes([i]): i for i in range(256)}
    return Tokenizer(ranks | {token: 256 + i for i, token in enumerate(merged)})


class ScriptedSampler:
    """A policy that says what a function tells it: a `Sampler` without weights.

    Args:
        answer: (text of the prompt, seed, sampling) to the text of the answer.
        letter_chances: Text of the prompt to the chance of each letter right after "Answer:".
    """

    version = 0

    def __init__(
        self,
        tokenizer: Tokenizer,
        answer: Callable[[str, int, Sampling], str],
        letter_chances: Callable[[str], dict[str, float]] = lambda prompt: {"A": 1.0},
    ) -> None:
        self.tokenizer, self.answer, self.letter_chances = tokenizer, answer, letter_chances
        self.calls: list[tuple[tuple[Prompt, ...], tuple[tuple[int, ...], ...], Sampling]] = []

    def load_weights(self, weights: Weights) -> None:
        self.version = weights.version

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Rollout]]:
        self.calls.append((tuple(prompts), tuple(map(tuple, seeds)), sampling))
        return [
            [self._rollout(prompt, seed, sampling) for seed in row]
            for prompt, row in zip(prompts, seeds, strict=True)
        ]

    def _rollout(self, prompt: Prompt, seed: int, sampling: Sampling) -> Rollout:
        text = self.answer(self.tokenizer.decode(prompt.ids), seed, sampling)
        ids = [*self.tokenizer.encode(text), self.tokenizer.end_of_turn]
        kept = tuple(ids[: sampling.max_new_tokens])
        return Rollout(ids=kept, logprobs=(0.0,) * len(kept), stopped=len(kept) == len(ids))

    def letter_logprobs(
        self, prompts: Sequence[Sequence[int]], letter_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return [
            [self._logprob(list(prompt), wanted) for wanted in ids]
            for prompt, ids in zip(prompts, letter_ids, strict=True)
        ]

    def _logprob(self, prompt: list[int], wanted: int) -> float:
        """Chance of a token next = chance of the letters spelled so, given what is spelled yet."""
        opening = self.tokenizer.encode("Answer:")
        chances = self.letter_chances(self.tokenizer.decode(prompt))
        spelled = {x: self.tokenizer.encode(f" {x}") for x in chances}
        for t in range(max(map(len, spelled.values()))):
            possible = {
                x: ids
                for x, ids in spelled.items()
                if len(ids) > t and prompt[-len(opening) - t :] == [*opening, *ids[:t]]
            }
            if possible:
                here = sum(chances[x] for x in possible)
                fitting = sum(chances[x] for x, ids in possible.items() if ids[t] == wanted)
                return math.log(fitting / here) if fitting else -math.inf
        raise AssertionError("the prompt does not end in 'Answer:' and the start of a letter")


def random_model(
    vocab: int = 64,
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    context: int = 32,
    seed: int = 0,
    std: float = 0.2,
) -> GPT:
    """Return a model whose every weight is normal: zeros, as at the start, would hide mistakes."""
    model = GPT(Shape(vocab, layers, width, heads, kv_heads, context))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=std, generator=generator)
    return model


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """Give a file system of this size below a folder. Skips the test where that is forbidden."""
    disk = folder / "disk"
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    command = [mount, "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(disk)]
    try:
        is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def random_ids(shape: tuple[int, ...], vocab: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


packed = PackedGroups.of


def make_group(
    prompt_ids: Sequence[int],
    answers: Sequence[Sequence[int]],
    *,
    advantages: Sequence[float] | None = None,
    rewards: Sequence[float] | None = None,
    logprob: float = -1.0,
    lease: Lease | None = None,
    index: int = 0,
    version: int = 0,
) -> RolloutGroup:
    """Return a group of these answers; each token was sampled with the same log-probability."""
    rewards = rewards if rewards is not None else [float(g == 0) for g in range(len(answers))]
    prompt = Prompt("p", tuple(prompt_ids), "ABCDE", "A")
    rollouts = tuple(
        Rollout(tuple(ids), (logprob,) * len(ids), stopped=True, reward=reward)
        for ids, reward in zip(answers, rewards, strict=True)
    )
    mean = sum(rewards) / len(rewards)
    return RolloutGroup(
        lease_id=lease.id if lease else 0,
        index=index,
        step=lease.step if lease else 0,
        prompt=lease.prompts[index] if lease else prompt,
        rollouts=rollouts,
        advantages=tuple(advantages if advantages is not None else [r - mean for r in rewards]),
        weights_version=version,
    )
