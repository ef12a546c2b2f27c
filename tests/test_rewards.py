"""Rewards are `tasks.grading`'s, the format bonus apart, and advantages compare siblings."""

from __future__ import annotations

import pytest

from aquarl.config import RLConfig
from aquarl.records import Lease, Prompt, Rollout, Sampling
from aquarl.rl.rewards import score, scored_groups
from aquarl.tasks.grading import grade
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPT = Prompt("p", (1, 2), "ABCDE", "C")
ANSWERS = ["1 + 1 = 2\nAnswer: C", "Answer: B", "I say C", "Answer: C\nAnswer: A", ""]


def rollout(text: str) -> Rollout:
    ids = (*TOKENIZER.encode(text), TOKENIZER.end_of_turn)
    return Rollout(ids, (-0.5,) * len(ids), stopped=True)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_judged_by_grading(text: str) -> None:
    scored, judged = score(rollout(text), PROMPT, TOKENIZER, RLConfig()), grade(text, "C")
    assert (scored.letter, scored.reward) == (judged.letter, judged.reward)
    assert (scored.ids, scored.logprobs) == (rollout(text).ids, rollout(text).logprobs)


def test_the_format_bonus_is_for_the_form_right_or_wrong() -> None:
    config = RLConfig(format_bonus=0.25)
    scored = [score(rollout(text), PROMPT, TOKENIZER, config) for text in ANSWERS]
    assert [s.reward for s in scored] == [1.25, 0.25, 0.0, 0.25, 0.0]


def test_only_the_letters_of_the_prompt_count() -> None:
    four = Prompt("p", (1,), "ABCD", "A")
    scored = score(rollout("Answer: E"), four, TOKENIZER, RLConfig())
    assert (scored.letter, scored.reward) == (None, 0.0)


def lease(purpose: str = "train") -> Lease:
    prompts = (PROMPT, Prompt("q", (3,), "ABCDE", "B"))
    return Lease(7, 3, prompts, ((1, 2), (3, 4)), Sampling(8), weights_version=2, purpose=purpose)


def test_each_prompt_of_a_lease_gives_a_group_of_its_own() -> None:
    rollouts = [[rollout("Answer: C"), rollout("Answer: B")] for _ in range(2)]
    groups = scored_groups(
        lease(), rollouts, TOKENIZER, RLConfig(), weights_version=5, worker="w", sample_s=3.0,
        fetch_s=0.5, sampled_from=100.0,
    )  # fmt: skip
    assert [g.advantages for g in groups] == [(0.5, -0.5), (-0.5, 0.5)]
    assert [(g.lease_id, g.index, g.step) for g in groups] == [(7, 0, 3), (7, 1, 3)]
    assert [g.prompt for g in groups] == list(lease().prompts)
    assert all(g.weights_version == 5 for g in groups), "the sampler's, not the lease's"
    assert (sum(g.sample_s for g in groups), sum(g.fetch_s for g in groups)) == (3.0, 0.5)
    assert all(g.sampled == (100.0, 103.0) for g in groups), "when the whole lease was sampled"


def test_an_evaluation_has_rewards_but_teaches_nothing() -> None:
    rollouts = [[rollout("Answer: C")], [rollout("Answer: C")]]
    groups = scored_groups(lease("validation"), rollouts, TOKENIZER, RLConfig(), weights_version=0)
    assert [g.rollouts[0].reward for g in groups] == [1.0, 0.0]
    assert [g.advantages for g in groups] == [(0.0,), (0.0,)]


def test_a_missing_answer_is_noticed() -> None:
    with pytest.raises(ValueError, match="zip"):
        scored_groups(lease(), [[rollout("x")] * 2], TOKENIZER, RLConfig(), weights_version=0)
