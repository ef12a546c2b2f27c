"""Generated problems mean what they say, and no stage before the test has seen its problems."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest

from aquarl.config import DataConfig
from aquarl.errors import ConfigError
from aquarl.records import Problem
from aquarl.tasks.arithmetic import arithmetic_problems, fact_documents
from aquarl.tasks.catalog import mixture

CONFIG = DataConfig(train_problems=1500, held_out_problems=200, difficulty=3, largest_number=20)
SPLITS = arithmetic_problems(CONFIG, seed=0)
ALL = (*SPLITS.train, *SPLITS.validation, *SPLITS.test)


def result(problem: Problem) -> str:
    return problem.options["ABCDE".index(problem.answer_letter)]


def test_every_sum_is_right_and_the_last_one_is_the_right_option() -> None:
    for problem in ALL:
        before = None
        for line in problem.rationale.splitlines():
            a, sign, b, equals, found = line.split()
            assert equals == "=" and before in (None, a), "each step begins with what the last gave"
            expected = {
                "+": int(a) + int(b),
                "-": int(a) - int(b),
                "*": int(a) * int(b),
                "/": int(a) / int(b),
            }[sign]
            assert int(found) == expected and 0 <= expected <= 99
            before = found
        assert result(problem) == before


def test_every_number_of_the_sums_is_told_or_was_computed() -> None:
    for problem in ALL:
        known = set(re.findall(r"\d+", problem.question))
        for line in problem.rationale.splitlines():
            a, _, b, _, found = line.split()
            assert {a, b} <= known
            known.add(found)


def test_five_options_are_different_and_no_letter_is_likelier() -> None:
    assert all(len(set(problem.options)) == 5 for problem in ALL)
    for split in (SPLITS.train, SPLITS.validation, SPLITS.test):
        letters = Counter(problem.answer_letter for problem in split)
        assert max(letters.values()) - min(letters.values()) <= 1


def test_no_question_is_in_two_splits_or_twice_in_one() -> None:
    assert len({problem.question for problem in ALL}) == len(ALL) == 1900


@pytest.mark.parametrize("difficulty", [1, 2, 4])
def test_difficulty_is_the_number_of_steps_at_most(difficulty: int) -> None:
    config = CONFIG.model_copy(update={"difficulty": difficulty})
    train = arithmetic_problems(config, seed=0).train
    steps = Counter(problem.rationale.count("=") for problem in train)
    assert set(steps) == set(range(1, difficulty + 1))
    assert min(steps.values()) > 0.8 * len(train) / difficulty, "evenly"


def test_a_seed_gives_the_same_problems_and_another_gives_others() -> None:
    assert arithmetic_problems(CONFIG, seed=0) == SPLITS
    other = arithmetic_problems(CONFIG, seed=1)
    assert len({p.question for p in other.test} & {p.question for p in SPLITS.test}) < 20


def test_the_text_of_the_base_stage_tells_no_held_out_story() -> None:
    small = DataConfig(train_problems=50, held_out_problems=300, difficulty=1, largest_number=5)
    splits = arithmetic_problems(small, seed=0)
    held_out = {p.question.rsplit(". ", 1)[0] + "." for p in (*splits.validation, *splits.test)}
    told = {text.split("\n", 1)[0] for text in islice(fact_documents(small, seed=0), 5000)}
    assert not told & held_out
    # Of as few stories as there are here, many would be met by chance.
    free = {text.split("\n", 1)[0] for text in islice(fact_documents(small, seed=1), 5000)}
    assert free & held_out


def test_the_easy_problems_of_the_mid_stage_are_none_that_are_held_out() -> None:
    small = DataConfig(
        train_problems=2000, held_out_problems=300, difficulty=1, largest_number=5, mid={"easy": 1}
    )
    splits = arithmetic_problems(small, seed=0)
    held_out = {p.question for p in (*splits.validation, *splits.test)}
    asked = {p.question for p in arithmetic_problems(small, seed=1).train}
    assert asked & held_out, "by chance there would be some"
    trained = str(mixture(small, 0, "train"))
    assert trained and not [question for question in held_out if question in trained]


def test_more_problems_than_there_are_kinds_of_are_refused() -> None:
    """59,008 at most: 2 to 5 things of 8 kinds by 8 names, one change by 1 to 5, ..."""
    with pytest.raises(ConfigError, match=r"come in about [0-9,]+ kinds, but 80,020 are asked for"):
        arithmetic_problems(
            DataConfig(difficulty=1, largest_number=5, train_problems=80_000, held_out_problems=10),
            seed=0,
        )
