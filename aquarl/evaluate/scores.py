"""Letters and booleans in, numbers that can be trusted out: intervals, baselines, comparisons.

`evaluator.py` calls these on what a policy answered; `report.py` prints them. Pure arithmetic on
the standard library: no model, no tensors, no files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from aquarl.records import Measured, Metrics

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(correct: float, n: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion.

    Unlike `p +- 1.96 * sqrt(p * (1 - p) / n)` it stays within [0, 1] and has a width at 0 and n.

    Args:
        correct: How many of `n`. Both may be fractional, for an effective sample size.
        n: How many trials; with none nothing is known, and (0, 1) comes back.

    Raises:
        ValueError: `correct` is not within [0, n].

    Source: Wilson 1927; Brown, Cai and DasGupta 2001, doi.org/10.1214/ss/1009213286.
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct must be within [0, n], got {correct} of {n}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, Z_95**2
    middle = p + z2 / (2 * n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    low = 0.0 if correct == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if correct == n else min(1.0, (middle + half) / scale)
    return low, high


def accuracy_text(accuracy: float, low: float, high: float) -> str:
    """Return an accuracy and its interval, in percent, as it is shown everywhere."""
    return f"{100 * accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def validation_text(metrics: Metrics) -> str:
    """Return what RL's last validation found, for a person; "" if there was none."""
    if "validation/n" not in metrics:
        return ""
    accuracy, low, high, n, baseline = (
        metrics[f"validation/{name}"]
        for name in ("accuracy", "low", "high", "n", "majority_baseline")
    )
    return f"{accuracy_text(accuracy, low, high)} of {n:.0f}, baseline {100 * baseline:.1f} %"


def clustered_interval(rates: Sequence[float], draws: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean whose unit is the problem, not the draw.

    Answers to one problem resemble one another, so n problems with k draws each are worth fewer
    than n * k trials. Their worth, m * (1 - m) / (variance of the rates / n), goes into the Wilson
    interval in place of n. With one draw a problem this is the plain Wilson interval.

    Args:
        rates: For each problem, the share of its draws that were right.
        draws: k: how many draws each rate is the mean of.

    Source: clustered errors, arXiv:2411.00640 section 2.2; effective sample size in an interval
    for proportions, Korn and Graubard 1998.
    """
    n = len(rates)
    mean = math.fsum(rates) / n if n else 0.0
    spread = math.fsum((rate - mean) ** 2 for rate in rates) / n if n else 0.0
    worth = min(n * draws, mean * (1 - mean) * n / spread) if spread else float(n * draws)
    if mean in (0.0, 1.0):
        worth = float(n)  # no spread to learn from: claim no more than one trial a problem
    return wilson_interval(min(mean * worth, worth), worth)


def mcnemar_exact(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Return the two-sided exact p-value of two models having the same accuracy.

    Only problems that one of them solves and the other does not say anything; if both are as good,
    each of those falls either way like a fair coin. 1.0 where there are none.

    Args:
        correct_a: For each problem, whether the first model solved it.
        correct_b: The same problems in the same order, for the second.

    Raises:
        ValueError: The two are not of one length.

    Source: McNemar 1947, in the exact binomial form.
    """
    a_only = sum(a and not b for a, b in zip(correct_a, correct_b, strict=True))
    b_only = sum(b and not a for a, b in zip(correct_a, correct_b, strict=True))
    n, fewer = a_only + b_only, min(a_only, b_only)
    # Whole numbers up to the one division, so nothing underflows however large n is.
    tail, ways = 0, 1
    for i in range(fewer + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)  # C(n, i + 1)
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k answers is right.

    1 - C(n - c, k) / C(n, k): the share of the k-subsets of n answers that hold a right one.

    Args:
        n: How many answers were drawn for the problem.
        correct: c: how many of them were right.
        k: At most n.

    Raises:
        ValueError: k is not within [1, n], or `correct` not within [0, n].

    Source: arXiv:2107.03374, equation 1.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n={n} c={correct} k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_baseline(answers: Sequence[str]) -> float:
    """Return the accuracy of always naming the letter that is right most often; 0 for no answers.

    On AQuA validation this is 69 / 254 = 27.2 %.
    """
    return max(Counter(answers).values(), default=0) / max(1, len(answers))


def letter_histogram(letters: Sequence[str | None], answers: Sequence[str]) -> dict[str, int]:
    """Return how often each letter was chosen, in alphabetical order.

    Letters that were right somewhere but never chosen stand with 0; the uncommitted are left out.
    """
    chosen = Counter(letter for letter in letters if letter is not None)
    return {letter: chosen[letter] for letter in sorted({*chosen, *answers})}


def measure(letters: Sequence[str | None], answers: Sequence[str], cut: Sequence[bool]) -> Measured:
    """Return the accuracy of chosen letters, with everything needed to trust it.

    Args:
        letters: What each answer committed to, or None.
        answers: The right letter of each problem.
        cut: Whether each answer was ended by the length limit.

    Raises:
        ValueError: The three are not of one length.
    """
    n = len(answers)
    if not n == len(letters) == len(cut):
        raise ValueError(f"{len(letters)} letters, {n} answers and {len(cut)} cut differ in length")
    correct = sum(letter == answer for letter, answer in zip(letters, answers, strict=True))
    low, high = wilson_interval(correct, n)
    return Measured(
        n=n,
        correct=correct,
        accuracy=correct / max(1, n),
        low=low,
        high=high,
        majority_baseline=majority_baseline(answers),
        letters=letter_histogram(letters, answers),
        committed_fraction=sum(letter is not None for letter in letters) / max(1, n),
        cut_fraction=sum(cut) / max(1, n),
    )


def content_consistency(choices: Sequence[Sequence[Hashable | None]]) -> tuple[float, float]:
    """Return how often the same content is chosen when only its letter changes.

    A policy that always says "A" scores 0, one that picks at random among 5 options 0.2, one that
    reads the options 1. No choice (None) agrees with nothing, not even with another None.

    Args:
        choices: For each problem, the *option* chosen under each cyclic shift of the options.

    Returns:
        The share of pairs of shifts that agree, averaged over problems, and the share of problems
            on which all shifts agree. Both 0 where there are no problems.

    Raises:
        ValueError: A problem has fewer than 2 shifts, so there is nothing to compare.
    """
    pairs, always = [], 0
    for chosen in choices:
        shifts = len(chosen)
        if shifts < 2:
            raise ValueError("consistency compares shifts, so each problem needs at least 2")
        counts = Counter(choice for choice in chosen if choice is not None)
        pairs.append(sum(math.comb(c, 2) for c in counts.values()) / math.comb(shifts, 2))
        always += shifts in counts.values()
    n = max(1, len(choices))
    return math.fsum(pairs) / n, always / n
