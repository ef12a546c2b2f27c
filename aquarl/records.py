"""The nouns: what crosses the border of a stage or of a process.

All are frozen; a record is made once and then only read. Axes, used in names everywhere:
P prompts, G rollouts per prompt, B rows, T positions, V vocabulary, D width, H heads, K head
width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # a second to import: only for those who hold a `TrainBatch`
    from torch import Tensor

LETTERS = "ABCDE"

Metrics = dict[str, float]
"""Numbers to plot, named `noun/what_it_measures`."""


@dataclass(frozen=True)
class Problem:
    """A question with lettered options, one of them right.

    Options carry no letters: option i is called `LETTERS[i]`. A problem that came as finished
    conversation text, whose options could not be told apart, has `options=()`.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer_letter: str
    letters: str = LETTERS
    rationale: str = ""
    """Worked solution without its own closing answer line."""
    checks_options: bool = False
    """The worked solution then goes through the options, saying yes or no, until one fits."""
    source: str = ""


@dataclass(frozen=True)
class Message:
    role: str
    """"system", "user" or "assistant"."""
    content: str


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    source: str = ""


@dataclass(frozen=True)
class Prompt:
    """A problem as the sampler sees it: token ids up to where the assistant begins."""

    problem_id: str
    ids: tuple[int, ...]
    letters: str
    answer_letter: str


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. RL uses temperature alone; greedy is temperature 0."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    """Keep only the k likeliest tokens; 0 keeps all. For evaluation and chat."""
    top_p: float = 1.0
    """Of those, the fewest whose chances add up to this (arXiv:1904.09751 section 3.1)."""


@dataclass(frozen=True)
class Weights:
    """A policy as one contiguous buffer, in the order of `model.state_dict()`."""

    version: int
    checksum: int
    buffer: np.ndarray


@dataclass(frozen=True)
class Lease:
    """A fixed unit of sampling: its result is accepted once, by `id`.

    `seeds[p][g]` belongs to rollout g of prompt p, so a lease that is issued again gives the same
    rollouts from the same weights, whoever holds it.
    """

    id: int
    step: int
    prompts: tuple[Prompt, ...]
    seeds: tuple[tuple[int, ...], ...]
    sampling: Sampling
    weights_version: int
    """Sample with these weights, or with newer ones where the staleness bound allows."""
    purpose: str = "train"
    """"train", or the name of an evaluation."""
    attempt: int = 0
    deaths: int = 0
    """Of workers that held it."""


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. The stop token, when sampled, is the last of `ids`."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, one for each id, of the very distribution that was sampled: float32 values."""
    stopped: bool
    """False: cut by length."""
    versions: tuple[int, ...] = ()
    """Weights version of each token, where they changed on the way; else empty: the group's."""
    text: str = ""
    letter: str | None = None
    """What the answer committed to, by `tasks.grading.committed_letter`."""
    reward: float = 0.0


class Glance(NamedTuple):
    """What can be seen of a group without opening its answers; a value for each of them."""

    rewards: tuple[float, ...]
    letters: tuple[str | None, ...]
    lengths: tuple[int, ...]
    """Tokens."""
    stopped: tuple[bool, ...]
    tokens_of_version: dict[int, int]
    """How many tokens were sampled with which weights."""


class Packed(NamedTuple):
    """The rest of a group's answers, one after the other."""

    ids: bytes
    """int32"""
    logprobs: bytes
    """float32"""
    versions: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class RolloutGroup:
    """All answers to one prompt of a lease, scored and compared with one another.

    It travels packed, and is opened by who first looks at its `rollouts`: the learner. The stream
    on the way needs but its `glance`, and carries more groups for it.
    """

    lease_id: int
    index: int
    """Place of the prompt within its lease."""
    step: int
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    advantages: tuple[float, ...]
    weights_version: int
    """Of the oldest token: what the staleness bound is about."""
    worker: str = ""
    sample_s: float = 0.0
    """Wall seconds of the lease, shared evenly among its groups."""
    fetch_s: float = 0.0
    """Wall seconds its worker took to get new weights for the lease, shared alike."""
    sampled: tuple[float, float] = (0.0, 0.0)
    """When the sampling of the lease began and ended: Unix seconds, by its worker's clock."""

    @cached_property
    def glance(self) -> Glance:
        tokens: dict[int, int] = {}
        for rollout in self.rollouts:
            for version in rollout.versions:
                tokens[version] = tokens.get(version, 0) + 1
            if not rollout.versions:
                tokens[self.weights_version] = tokens.get(self.weights_version, 0) + len(
                    rollout.ids
                )
        return Glance(
            tuple(rollout.reward for rollout in self.rollouts),
            tuple(rollout.letter for rollout in self.rollouts),
            tuple(len(rollout.ids) for rollout in self.rollouts),
            tuple(rollout.stopped for rollout in self.rollouts),
            tokens,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels. Packed once, it is passed on as it is."""
        state = dict(vars(self))
        if "packed" not in state:
            rollouts = state.pop("rollouts")
            state["glance"] = self.glance
            state["packed"] = Packed(
                np.array([i for r in rollouts for i in r.ids], dtype=np.int32).tobytes(),
                np.array([x for r in rollouts for x in r.logprobs], dtype=np.float32).tobytes(),
                tuple(rollout.versions for rollout in rollouts),
                tuple(rollout.text for rollout in rollouts),
            )
        return state

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Open what has come packed."""
            if name != "rollouts" or "packed" not in vars(self):
                raise AttributeError(name)
            vars(self)["rollouts"] = _opened(self.glance, vars(self).pop("packed"))
            return self.rollouts


def _opened(glance: Glance, packed: Packed) -> tuple[Rollout, ...]:
    ids = np.frombuffer(packed.ids, dtype=np.int32).tolist()
    logprobs = np.frombuffer(packed.logprobs, dtype=np.float32).tolist()
    rollouts, end = [], 0
    for place, length in enumerate(glance.lengths):
        start, end = end, end + length
        rollouts.append(
            Rollout(
                tuple(ids[start:end]),
                tuple(logprobs[start:end]),
                glance.stopped[place],
                packed.versions[place],
                packed.texts[place],
                glance.letters[place],
                glance.rewards[place],
            )
        )
    return tuple(rollouts)


class Sampler(Protocol):
    """A policy that can be sampled from: what every engine is, and all that others know of it."""

    version: int
    """Of the weights it holds; -1 before the first were loaded."""

    def load_weights(self, weights: Weights) -> None:
        """Check the sum, then take these weights. Raises: ValueError, keeping the old ones."""

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Rollout]]:
        """Return one answer a seed for every prompt, with the stop token where it was drawn.

        Args:
            prompts: P of them.
            seeds: `seeds[p][g]` decides rollout g of prompt p, whatever else is in the batch.
        """

    def letter_logprobs(
        self, prompts: Sequence[Sequence[int]], letter_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return log-probabilities (nats) of these next tokens after each row of ids."""


@dataclass(frozen=True)
class StepShare:
    """What one learner rank gets for one step."""

    groups: tuple[RolloutGroup, ...]
    """This rank's, in the order of their leases."""
    tokens_in_step: int
    rollouts_in_step: int
    metrics: Metrics
    """About the whole step, the same on every rank."""
    is_padding: bool = False
    """Its one group is there for the exchange of gradients alone: it is not counted."""


@dataclass(frozen=True)
class TrainBatch:
    """What one forward and backward pass of the learner works on; see `rl.batch`.

    N tokens stand in one row without padding; M of the policy's choices are scored from them.
    """

    ids_N: Tensor
    positions_N: Tensor
    """Places in their own sequence: a prompt and one answer."""
    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    """Of each group: of its prompt, and of its answers, each without its last token."""
    before_M: Tensor
    """For each sampled token the place in the row right before it."""
    sampled_ids_M: Tensor
    is_sampled_BT: Tensor
    """(B, T) with B = P * G, rows of a prompt together: where answers have a token."""
    behaviour_logprobs_BT: Tensor
    advantages_B: Tensor
    tokens_in_step: int
    """Sampled tokens of the whole step, over all ranks."""
    rollouts_in_step: int


@dataclass(frozen=True)
class Measured:
    """An accuracy that can be trusted: count, interval, baseline, and how the letters fell."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    """95 % Wilson interval."""
    majority_baseline: float
    letters: dict[str, int] = field(default_factory=dict)
    committed_fraction: float = 0.0
    cut_fraction: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))
