"""Problems in, prompts by position out: what is sampled next, and with which seeds.

A position counts prompts since the start of the run. Everything at a position, the problem, the
order of its options, the seeds of its answers, follows from the position and the run's seed alone,
so a run's frontier is one number, and what was lost can be sampled again as it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import DataError
from aquarl.records import Lease, Problem, Prompt
from aquarl.tasks.base import shuffled_options, to_prompt


class Problems(Protocol):
    """Of a sequence, what is needed here."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Problem: ...


class SharedProblems:
    """Problems as text in an array, which all processes of a machine can read where it lies: Ray
    hands it to each without a copy. Their worked solutions, which no prompt shows, are left out."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        texts = [json.dumps(vars(problem) | {"rationale": ""}).encode() for problem in problems]
        self._text = np.frombuffer(b"".join(texts), np.uint8)
        self._starts = np.cumsum([0, *map(len, texts)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: int, /) -> Problem:
        facts = json.loads(bytes(self._text[self._starts[place] : self._starts[place + 1]]))
        return Problem(**facts | {"options": tuple(facts["options"])})


@dataclass
class PromptSource:
    """Training problems without end, every one once an epoch, in another order each epoch."""

    problems: Problems
    tokenizer: Tokenizer
    seed: int
    permute_options: bool = False
    _order: tuple[int, list[int]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not len(self.problems):
            raise DataError(
                "There is no problem to train on: the training split is empty. "
                "Check data.task, data.root and data.max_train_problems."
            )

    def prompt(self, position: int) -> Prompt:
        """Return the prompt at a position (0, 1, 2, ...)."""
        epoch, place = divmod(position, len(self.problems))
        problem = self.problems[self._epoch_order(epoch)[place]]
        if self.permute_options:
            problem = replace(problem, rationale="")  # nobody sees which letters that names
            problem = shuffled_options(problem, random.Random(f"options {self.seed} {position}"))
        return to_prompt(problem, self.tokenizer)

    def filled(self, lease: Lease, rollouts: int) -> Lease:
        """Return a lease with its prompts, and with seeds for so many rollouts of each.

        That takes many times as long as all else there is to do about a lease, so it is done by
        the many who sample and not by the one who gives the leases out.
        """
        if not lease.positions:
            return lease  # an evaluation brings its own
        return replace(
            lease,
            prompts=tuple(map(self.prompt, lease.positions)),
            seeds=tuple(self.seeds(position, rollouts) for position in lease.positions),
        )

    def seeds(self, position: int, rollouts: int) -> tuple[int, ...]:
        """Return a seed for each rollout of the prompt at a position."""
        rng = random.Random(f"rollouts {self.seed} {position}")
        return tuple(rng.getrandbits(62) for _ in range(rollouts))

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            order = list(range(len(self.problems)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]
