"""The nouns: what crosses the border of a stage or of a process.

All are frozen; a record is made once and then only read. Axes, used in names everywhere:
P prompts, G rollouts per prompt, B rows, T positions, V vocabulary, D width, H heads, K head
width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

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

    A lease of the training is given without prompts and seeds: who samples makes them, by
    `rl.prompts.PromptSource.filled`.
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
    positions: range = range(0)
    """Of its prompts in the training; an evaluation has none."""

    def __len__(self) -> int:
        return len(self.positions) or len(self.prompts)


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
    letter: str | None = None
    """What the answer committed to, by `tasks.grading.committed_letter`."""
    reward: float = 0.0


@dataclass(frozen=True)
class RolloutGroup:
    """All answers to one prompt of a lease, scored and compared with one another."""

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


TOKEN = np.dtype([("id", "i4"), ("logprob", "f4")])
ANSWER = np.dtype(
    [("length", "i4"), ("stopped", "?"), ("letter", "U1"), ("reward", "f8"), ("advantage", "f8")]
)


@dataclass(frozen=True, eq=False)
class PackedGroups:
    """What a learner trains on: P prompts with G answers each, as arrays.

    All prompts' N ids stand one after the other, and all answers' M tokens.
    """

    prompt_lengths_P: np.ndarray
    prompt_ids_N: np.ndarray
    """int32"""
    answers_PG: np.ndarray
    """`ANSWER`"""
    tokens_M: np.ndarray
    """`TOKEN`"""

    def __len__(self) -> int:
        return len(self.prompt_lengths_P)

    @property
    def tokens_P(self) -> np.ndarray:
        """How many tokens all answers to a prompt have."""
        tokens: np.ndarray = self.answers_PG["length"].sum(axis=1)
        return tokens

    @property
    def is_uniform_P(self) -> np.ndarray:
        """Whether all rewards of a group are equal: it has nothing to teach."""
        rewards_PG = self.answers_PG["reward"]
        same: np.ndarray = (rewards_PG == rewards_PG[:, :1]).all(axis=1)
        return same

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> PackedGroups:
        """Return these groups, at least one, of as many answers each."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        tokens_M = np.empty(sum(len(rollout.ids) for rollout in rollouts), TOKEN)
        for name, rows in (
            ("id", (rollout.ids for rollout in rollouts)),
            ("logprob", (rollout.logprobs for rollout in rollouts)),
        ):
            numbers = chain.from_iterable(rows)
            tokens_M[name] = np.fromiter(numbers, TOKEN[name], len(tokens_M))
        answers = [
            (len(rollout.ids), rollout.stopped, rollout.letter or "", rollout.reward, advantage)
            for group in groups
            for rollout, advantage in zip(group.rollouts, group.advantages, strict=True)
        ]
        return cls(
            prompt_lengths_P=np.array([len(group.prompt.ids) for group in groups]),
            prompt_ids_N=np.array([i for group in groups for i in group.prompt.ids], np.int32),
            answers_PG=np.array(answers, ANSWER).reshape(len(groups), len(groups[0].rollouts)),
            tokens_M=tokens_M,
        )

    @classmethod
    def joined(cls, parts: Sequence[PackedGroups]) -> PackedGroups:
        """Return all groups of these parts, at least one, in their order."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def only(self, places: Sequence[int]) -> PackedGroups:
        """Return some of the groups, by their order here."""
        return PackedGroups(
            self.prompt_lengths_P[places],
            parts_of(self.prompt_ids_N, self.prompt_lengths_P, places),
            self.answers_PG[places],
            parts_of(self.tokens_M, self.tokens_P, places),
        )


def parts_of(flat: np.ndarray, lengths: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Return some parts of what stands one after the other."""
    parts = np.split(flat, lengths.cumsum())
    return np.concatenate([flat[:0], *(parts[place] for place in places)])


@dataclass(frozen=True, eq=False)
class LeaseResult:
    """All groups of a lease on their way from worker to learner.

    The stream between them reads what it needs and passes them on; Ray moves arrays without a copy.
    """

    lease_id: int
    step: int
    weights_version: int
    worker: str
    sample_s: float
    fetch_s: float
    sampled: tuple[float, float]
    """These, from the lease on, are each group's."""
    index_P: tuple[int, ...]
    asked_P: tuple[tuple[str, str, str], ...]
    """Of each prompt its problem, the letters of that, and the right one."""
    packed: PackedGroups
    newer_M: np.ndarray
    """int32: how many versions of the weights each token is newer than `weights_version`; empty
    where they did not change on the way. Negative for a lease that nobody wants any more, as the
    learner went back while it was sampled."""

    def __len__(self) -> int:
        return len(self.index_P)

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> LeaseResult:
        """Return the result of a lease with these groups, at least one, of as many answers each."""
        version = groups[0].weights_version
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        has_changed = any(rollout.versions for rollout in rollouts)
        newer = [
            of_token - version
            for rollout in rollouts
            for of_token in rollout.versions or (version,) * len(rollout.ids)
            if has_changed
        ]
        return cls(
            **{name: getattr(groups[0], name) for name in _OF_ALL},
            index_P=tuple(group.index for group in groups),
            asked_P=tuple(
                (group.prompt.problem_id, group.prompt.letters, group.prompt.answer_letter)
                for group in groups
            ),
            packed=PackedGroups.of(groups),
            newer_M=np.array(newer, np.int32),
        )

    def groups(self) -> Iterator[RolloutGroup]:
        """Yield what this was made of: log-probabilities as the float32 values they are."""
        packed, about = self.packed, {name: getattr(self, name) for name in _OF_ALL}
        prompts = _cut(packed.prompt_ids_N, packed.prompt_lengths_P)
        lengths_B = packed.answers_PG["length"].flatten()
        ids, logprobs = (_cut(packed.tokens_M[name], lengths_B) for name in ("id", "logprob"))
        newer = _cut(self.newer_M, lengths_B)  # none of each, where there are none
        for p, (problem, letters, right) in enumerate(self.asked_P):
            rollouts, advantages = [], []
            for _, stopped, letter, reward, advantage in packed.answers_PG[p].tolist():
                newer_T = next(newer)
                versions = tuple(self.weights_version + n for n in newer_T) if any(newer_T) else ()
                rollouts.append(
                    Rollout(next(ids), next(logprobs), stopped, versions, letter or None, reward)
                )
                advantages.append(advantage)
            yield RolloutGroup(
                index=self.index_P[p],
                prompt=Prompt(problem, next(prompts), letters, right),
                rollouts=tuple(rollouts),
                advantages=tuple(advantages),
                **about,
            )

    def only(self, places: Sequence[int]) -> LeaseResult:
        """Return the result with some of its groups, by their order here."""
        if list(places) == list(range(len(self))):
            return self
        return replace(
            self,
            index_P=tuple(self.index_P[place] for place in places),
            asked_P=tuple(self.asked_P[place] for place in places),
            packed=self.packed.only(places),
            newer_M=parts_of(self.newer_M, self.packed.tokens_P, places),
        )


_OF_ALL = "lease_id", "step", "weights_version", "worker", "sample_s", "fetch_s", "sampled"


def _cut(flat: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Yield one part after the other, as Python numbers."""
    numbers, end = flat.tolist(), 0
    for length in lengths.tolist():
        start, end = end, end + length
        yield tuple(numbers[start:end])


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

    results: tuple[LeaseResult, ...]
    """This rank's part of each, in the order of the leases."""
    tokens_in_step: int
    rollouts_in_step: int
    metrics: Metrics
    """About the whole step, the same on every rank."""
    is_padding: bool = False
    """Its one group is there for the exchange of gradients alone: it is not counted."""

    @property
    def packed(self) -> PackedGroups | None:
        """This rank's groups; None where the whole step was set aside."""
        parts = [result.packed for result in self.results]
        return PackedGroups.joined(parts) if parts else None


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
