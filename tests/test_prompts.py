"""What stands at a position follows from the position alone."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import pytest

from aquarl.errors import DataError
from aquarl.records import Lease, Problem, Sampling
from aquarl.rl.prompts import PromptSource, SharedProblems
from aquarl.tasks.base import to_prompt
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROBLEMS = [
    Problem(
        f"p{i}",
        f"What is {i}?",
        tuple(f"o{i}{j}" for j in range(5)),
        "ABCDE"[i % 5],
        rationale=f"Only option {'ABCDE'[i % 5]} fits.",
    )
    for i in range(7)
]


def source(seed: int = 0, permute_options: bool = False) -> PromptSource:
    return PromptSource(PROBLEMS, TOKENIZER, seed, permute_options)


def test_every_problem_comes_exactly_once_an_epoch() -> None:
    prompts = source()
    orders = [
        [prompts.prompt(epoch * 7 + place).problem_id for place in range(7)] for epoch in range(4)
    ]
    assert all(Counter(order) == Counter(p.id for p in PROBLEMS) for order in orders)
    assert len({tuple(order) for order in orders}) == 4, "each epoch has its own order"


@pytest.mark.parametrize("permute_options", [False, True])
def test_a_position_means_the_same_whatever_was_asked_before(permute_options: bool) -> None:
    used = source(permute_options=permute_options)
    for position in (20, 3, 7, 6, 13, 3):
        fresh = source(permute_options=permute_options)
        assert used.prompt(position) == fresh.prompt(position)
        assert used.seeds(position, 4) == fresh.seeds(position, 4)


def test_a_lease_of_the_training_is_filled_by_its_positions_and_an_evaluation_is_whole() -> None:
    mine = source(permute_options=True)
    lease = Lease(4, 1, (), (), Sampling(8), weights_version=1, positions=range(5, 8))
    filled = mine.filled(lease, rollouts=2)
    assert filled.prompts == tuple(mine.prompt(position) for position in (5, 6, 7))
    assert filled.seeds == tuple(mine.seeds(position, 2) for position in (5, 6, 7))
    assert replace(filled, prompts=(), seeds=()) == lease and len(filled) == len(lease) == 3
    asked = Lease(5, 1, filled.prompts, ((0,),) * 3, Sampling(8), weights_version=1)
    assert mine.filled(asked, rollouts=2) is asked and len(asked) == 3


@pytest.mark.parametrize("permute_options", [False, True])
def test_problems_that_are_shared_give_the_same_prompts(permute_options: bool) -> None:
    odd = Problem("é", "½ · 2 = ?\n\u2028", ("1\0", "²", "'"), "C", letters="αβγC"[-3:])
    problems = [*PROBLEMS, odd]
    sent = pickle.loads(pickle.dumps(SharedProblems(problems)))
    shared = PromptSource(sent, TOKENIZER, 0, permute_options)
    usual = PromptSource(problems, TOKENIZER, 0, permute_options)
    assert [shared.prompt(i) for i in range(16)] == [usual.prompt(i) for i in range(16)]
    assert [sent[i] for i in range(8)] == [replace(p, rationale="") for p in problems]


def test_the_runs_seed_decides_order_and_seeds() -> None:
    assert [source(0).prompt(i) for i in range(7)] != [source(1).prompt(i) for i in range(7)]
    assert source(0).seeds(0, 2) != source(1).seeds(0, 2)


def test_all_seeds_of_a_run_differ_and_more_rollouts_begin_with_the_same() -> None:
    seeds = [seed for position in range(500) for seed in source().seeds(position, 8)]
    assert len(set(seeds)) == len(seeds)
    assert source().seeds(3, 8)[:2] == source().seeds(3, 2)


def test_unpermuted_prompts_are_the_problems_as_they_stand() -> None:
    prompt = source().prompt(0)
    problem = next(p for p in PROBLEMS if p.id == prompt.problem_id)
    assert prompt == to_prompt(problem, TOKENIZER)


def test_permuted_options_keep_the_right_one_right() -> None:
    """And over the epochs the answer of one problem stands under every letter, though its worked
    solution, which RL never shows, names one."""
    prompts, letters = source(permute_options=True), set()
    for position in range(7 * 40):
        prompt = prompts.prompt(position)
        problem = next(p for p in PROBLEMS if p.id == prompt.problem_id)
        right = problem.options["ABCDE".index(problem.answer_letter)]
        assert f"\n{prompt.answer_letter}){right}" in TOKENIZER.decode(prompt.ids)
        if problem.id == "p0":
            letters.add(prompt.answer_letter)
    assert letters == set("ABCDE")


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="training split is empty"):
        PromptSource([], TOKENIZER, 0)
