"""Numbers a reader can work out by hand, or find in a textbook."""

import math
from itertools import combinations

import pytest

from aquarl.evaluate.scores import (
    clustered_interval,
    content_consistency,
    majority_baseline,
    mcnemar_exact,
    measure,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I, method 3 (Wilson): four examples
        (81, 263, 0.2553, 0.3662),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (69, 254, 0.2206, 0.3294),  # always "A" on AQuA validation
    ],
)
def test_wilson_gives_the_published_intervals(
    correct: int, n: int, low: float, high: float
) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_stays_within_the_possible_and_knows_nothing_of_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
    assert wilson_interval(0, 5)[1] == pytest.approx(1 - wilson_interval(5, 5)[0])
    with pytest.raises(ValueError, match="within"):
        wilson_interval(6, 5)


def test_one_draw_a_problem_gives_the_wilson_interval() -> None:
    assert clustered_interval([1.0] * 3 + [0.0] * 7, draws=1) == pytest.approx(
        wilson_interval(3, 10)
    )


def test_draws_that_all_agree_are_worth_one_trial_a_problem() -> None:
    agreeing = clustered_interval([1.0] * 3 + [0.0] * 7, draws=8)
    assert agreeing == pytest.approx(wilson_interval(3, 10))
    assert clustered_interval([0.0] * 10, draws=8) == wilson_interval(0, 10)


def test_problems_that_are_all_alike_are_worth_every_draw() -> None:
    assert clustered_interval([0.5] * 10, draws=8) == pytest.approx(wilson_interval(40, 80))


def test_mcnemar_is_a_fair_coin_on_the_problems_that_differ() -> None:
    # 1 : 5 out of 6 coins; two-sided 2 * (1 + 6) / 64
    a = [True] * 1 + [False] * 5 + [True] * 50 + [False] * 9
    b = [False] * 1 + [True] * 5 + [True] * 50 + [False] * 9
    assert mcnemar_exact(a, b) == 14 / 64 == mcnemar_exact(b, a)


def test_mcnemar_of_equals_is_one_and_of_many_does_not_underflow() -> None:
    assert mcnemar_exact([True, False], [True, False]) == 1.0
    assert mcnemar_exact([True, False], [False, True]) == 1.0
    assert mcnemar_exact([True] * 1000, [False] * 1000) == 2.0**-999
    n = 14_042
    assert 0 < mcnemar_exact([i % 2 == 0 for i in range(n)], [i % 2 == 1 for i in range(n)]) <= 1.0


def test_mcnemar_refuses_different_problems() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        mcnemar_exact([True], [True, False])


@pytest.mark.parametrize(
    ("n", "correct", "k"), [(5, 0, 3), (5, 2, 1), (5, 2, 3), (5, 4, 2), (5, 5, 5)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(
    n: int, correct: int, k: int
) -> None:
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_answers() -> None:
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(4, 2, 5)


def test_the_majority_baseline_of_aqua_validation_is_the_letter_a() -> None:
    assert majority_baseline("A" * 69 + "B" * 53 + "C" * 47 + "D" * 45 + "E" * 40) == 69 / 254


def test_a_measure_carries_what_is_needed_to_trust_it() -> None:
    measured = measure(["A", "A", None, "C"], ["A", "B", "A", "C"], [False, False, True, False])
    assert (measured.n, measured.correct, measured.accuracy) == (4, 2, 0.5)
    assert (measured.low, measured.high) == wilson_interval(2, 4)
    assert measured.majority_baseline == 0.5
    assert measured.letters == {"A": 2, "B": 0, "C": 1}
    assert (measured.committed_fraction, measured.cut_fraction) == (0.75, 0.25)
    with pytest.raises(ValueError, match="differ in length"):
        measure(["A"], ["A", "B"], [False])


def test_always_the_same_letter_has_no_consistent_content() -> None:
    always_first = [[f"option {(0 - shift) % 5}" for shift in range(5)]]
    assert content_consistency(always_first) == (0.0, 0.0)


def test_always_the_same_content_is_consistent_and_silence_is_not() -> None:
    assert content_consistency([["x"] * 5, ["y"] * 5]) == (1.0, 1.0)
    assert content_consistency([[None] * 5]) == (0.0, 0.0)
    # one problem always the same, one with 4 of 5: 6 of its 10 pairs agree
    pairs, always = content_consistency([["x"] * 5, ["y", "y", "y", "y", "z"]])
    assert math.isclose(pairs, (1.0 + 0.6) / 2)
    assert always == 0.5
