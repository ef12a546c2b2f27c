"""A size and a seed in, a fixed piece of work out: random weights, real prompts, answers all long.

The same work for every engine and every machine: the end token is never drawn, so an answer is as
long as was asked, and what is measured does not hang on what a policy happens to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from aquarl.config import Compile, DataConfig, RLConfig
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import ConfigError, DataError
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.records import PackedGroups, Prompt, Rollout, RolloutGroup, Sampling
from aquarl.tasks.base import question_text, to_prompt
from aquarl.tasks.catalog import load_problems

SIZES = {"d2": (2, 128, 2, 1024), "d4": (4, 256, 4, 4096), "d8": (8, 512, 4, 65536)}
"""Layers, width, heads, vocabulary."""
NEVER = -1
"""A stop token that no vocabulary holds."""
TOKENIZER_PROBLEMS, TOKENIZER_SIZE = 2000, 512
"""Few problems hold no more tokens, so every size is asked the same prompts."""


@dataclass(frozen=True)
class Work:
    """What one repeat of a benchmark does, whatever is measured on it."""

    size: str
    """A name in `SIZES`, or "layers,width,heads,vocabulary"."""
    prompts: int = 16
    samples: int = 16
    max_new: int = 64
    rows: int = 32
    context: int = 256
    """B and T of the supervised step."""
    micro_prompts: int = 4
    """What a learner takes at once: more is faster where there is room for it, on a GPU."""
    problems: str | None = None
    """A file of problems, in any shape that `data.task` takes; generated ones without it."""
    compile: Compile = "auto"
    """Of the supervised step, as `cluster.compile` has it."""
    seed: int = 0

    @cached_property
    def shape(self) -> Shape:
        """Raises: ConfigError."""
        try:
            layers, width, heads, vocab = SIZES.get(self.size) or map(int, self.size.split(","))
        except ValueError:
            raise ConfigError(
                f"--size is {self.size!r}. Write one of {', '.join(SIZES)}, or "
                "LAYERS,WIDTH,HEADS,VOCABULARY, for example 4,256,4,4096."
            ) from None
        if min(layers, width, heads) < 1 or width % heads or width // heads % 2:
            raise ConfigError(
                f"--size {self.size} has {heads} heads on a width of {width}, but each head needs "
                "an even part of the width. Try 4,256,4,4096."
            )
        if vocab < TOKENIZER_SIZE:
            raise ConfigError(
                f"--size {self.size} has a vocabulary of {vocab}, but the prompts hold "
                f"{TOKENIZER_SIZE} different tokens. Write that or more."
            )
        return Shape(vocab, layers, width, heads, heads, max(self.context, 512))

    def model(self) -> GPT:
        """Return a policy with random weights, the output projections included."""
        model = GPT(self.shape).init_weights(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in model.parameters():
                if not weight.any():  # what training finds at zero
                    weight.normal_(std=0.02, generator=generator)
        return model

    @cached_property
    def _problems_and_words(self) -> tuple[list[Prompt], Tokenizer]:
        task = {} if self.problems is None else {"task": self.problems}
        splits = load_problems(DataConfig.model_validate(task), self.seed)
        found = (*splits.train, *splits.validation)[:TOKENIZER_PROBLEMS]
        if len(found) < self.prompts:
            raise ConfigError(
                f"{self.problems or 'The generated set'} holds {len(found)} problems, but "
                f"--prompts asks for {self.prompts}. Ask for fewer, or name a larger file."
            )
        try:
            words = Tokenizer.train(map(question_text, found), TOKENIZER_SIZE)
        except DataError:
            raise ConfigError(
                f"The {len(found)} problems of {self.problems} are too little text for the "
                f"{TOKENIZER_SIZE} tokens that the prompts are written in. Name a larger file, or "
                "leave --problems out."
            ) from None
        prompts = [to_prompt(problem, words) for problem in found[: self.prompts]]
        return prompts, words

    @property
    def tokenizer(self) -> Tokenizer:
        return self._problems_and_words[1]

    @property
    def prompt_list(self) -> list[Prompt]:
        return self._problems_and_words[0]

    @property
    def seeds(self) -> list[list[int]]:
        return [[p * self.samples + g for g in range(self.samples)] for p in range(self.prompts)]

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new)

    @property
    def rl_config(self) -> RLConfig:
        return RLConfig(
            prompts_per_step=self.prompts,
            prompts_per_lease=self.prompts,
            rollouts_per_prompt=self.samples,
            micro_prompts=self.micro_prompts,
            max_new_tokens=self.max_new,
        )

    def groups(self, rollouts_PG: Sequence[Sequence[Rollout]]) -> PackedGroups:
        """Return what a learner trains on, no group of it without a gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        advantages_PG = torch.randn(self.prompts, self.samples, generator=generator)
        groups = [
            RolloutGroup(0, p, 0, prompt, tuple(row), tuple(advantages_PG[p].tolist()), 0)
            for p, (prompt, row) in enumerate(zip(self.prompt_list, rollouts_PG, strict=True))
        ]
        return PackedGroups.of(groups)

    def drawn(self) -> list[list[Rollout]]:
        """Return answers as a sampler would give them, at random: what `bench learner` trains."""
        generator = torch.Generator().manual_seed(self.seed)
        ids_PGT = torch.randint(
            self.tokenizer.vocab_size,
            (self.prompts, self.samples, self.max_new),
            generator=generator,
        )
        logprobs = (-5.0,) * self.max_new
        return [
            [Rollout(tuple(ids), logprobs, stopped=False) for ids in row]
            for row in ids_PGT.tolist()
        ]

    def readable(self, rollouts_PG: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
        """Return the same answers in tokens that the prompts' small vocabulary can read."""
        known = self.tokenizer.vocab_size
        return [
            [replace(answer, ids=tuple(i % known for i in answer.ids)) for answer in row]
            for row in rollouts_PG
        ]
