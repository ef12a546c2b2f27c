"""Problems and a sampler in, one dict of measures out: what a policy can do, and how sure that is.

The sampler is an engine (torch or vLLM) or a pool of them; nothing here knows which. The dict is
plain JSON: `aquarl evaluate --json` prints it, `results/evaluate.json` keeps one for each stage,
`report.py` makes the page of it.

Four ways to ask, each under its own name:

- `greedy`: the likeliest answer, read by `tasks.grading`. The headline; comparisons use it.
- `sampled`: several answers at a temperature: pass@1 (their mean) and pass@k.
- `letter_logit`: no generation; the likeliest letter after the bare prompt and `Answer:`. It
  cannot use a rationale and always commits, so it is not comparable with the two above.
- `permutation`: greedy under every cyclic shift of the options. What reads the options keeps its
  accuracy and its content; what likes a letter does not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from aquarl.config import EvaluateConfig
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import DataError
from aquarl.evaluate.scores import (
    clustered_interval,
    content_consistency,
    letter_histogram,
    majority_baseline,
    mcnemar_exact,
    measure,
    pass_at_k,
)
from aquarl.records import Metrics, Problem, Prompt, Rollout, Sampler, Sampling
from aquarl.tasks.base import shifted, to_prompt
from aquarl.tasks.grading import committed_letter


def evaluate_policy(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    sampler: Sampler,
    config: EvaluateConfig,
    seed: int,
) -> dict[str, Any]:
    """Return the measures of one policy on the first `config.problems` problems.

    Args:
        problems: Of one split; the majority baseline is theirs.
        sampler: Holds the weights to be measured.
        seed: With it, a problem's samples do not depend on which others are scored beside it.

    Returns:
        `n`, `greedy`, `sampled`, `letter_logit`, and `permutation` unless switched off or no
            problem has options that can be moved. JSON types only. Every accuracy has `n`, `low`
            and `high`; lengths are in tokens, the stop token included.

    Raises:
        DataError: There are no problems.
    """
    problems = problems[: config.problems]
    if not problems:
        raise DataError(
            "The split holds no problems, so there is nothing to measure. "
            "Choose another with evaluate.split=validation or evaluate.split=test."
        )
    ask = _Asker(tokenizer, sampler, config, seed)
    result: dict[str, Any] = {"n": len(problems), "greedy": ask.greedy(problems)}
    result["sampled"] = ask.sampled(problems)
    result["letter_logit"] = ask.letter_logit(problems)
    movable = [p for p in problems if len(p.options) > 1][: config.permutation_problems]
    if config.permutations and movable:
        result["permutation"] = ask.permutation(movable)
    return result


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return McNemar's exact test of two results of `evaluate_policy` on the same problems.

    Returns:
        `n`, `a_only` and `b_only` (solved by one of them alone), `both`, `neither`, `difference`
            (accuracy of b minus that of a), `p_value` of there being none.

    Raises:
        DataError: The two were not measured on the same problems in the same order.
    """
    if a["greedy"]["problem_ids"] != b["greedy"]["problem_ids"]:
        raise DataError(
            "The two results are of different problems, so they cannot be compared pair by pair. "
            "Run `aquarl evaluate` for both with one evaluate.split and evaluate.problems."
        )
    correct_a, correct_b = a["greedy"]["is_correct"], b["greedy"]["is_correct"]
    pairs = list(zip(correct_a, correct_b, strict=True))
    a_only, b_only = pairs.count((True, False)), pairs.count((False, True))
    return {
        "n": len(pairs),
        "a_only": a_only,
        "b_only": b_only,
        "both": pairs.count((True, True)),
        "neither": pairs.count((False, False)),
        "difference": (b_only - a_only) / len(pairs),
        "p_value": mcnemar_exact(correct_a, correct_b),
    }


def evaluation_summary(split: str, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what `results/evaluate.json` holds: each stage, and each compared with the one before.

    Args:
        split: "validation" or "test".
        stages: Results of `evaluate_policy` by stage, in the order a model lives through them.

    Raises:
        DataError: The stages were not measured on the same problems.
    """
    names = list(stages)
    return {
        "split": split,
        "n": max((result["n"] for result in stages.values()), default=0),
        "stages": stages,
        "comparisons": [
            {"a": a, "b": b, **compare(stages[a], stages[b])} for a, b in pairwise(names)
        ],
    }


def accuracies(summary: dict[str, Any]) -> Metrics:
    """Return the accuracies of an `evaluation_summary` by name: "rl/greedy", "rl/pass@8", ...,
    each with the ends of its interval, and for each stage n and the majority baseline."""
    found: Metrics = {}
    for stage, result in summary["stages"].items():
        ways = {
            way: result[way] for way in ("greedy", "letter_logit", "permutation") if way in result
        }
        ways |= {f"pass@{k}": passed for k, passed in result["sampled"]["pass_at_k"].items()}
        for way, measured in ways.items():
            found[f"{stage}/{way}"] = measured["accuracy"]
            found |= {f"{stage}/{way}/{end}": measured[end] for end in ("low", "high")}
        found |= {f"{stage}/{name}": result["greedy"][name] for name in ("n", "majority_baseline")}
    return found


class _Asker:
    """One policy and how to ask it; each method is one way."""

    def __init__(
        self, tokenizer: Tokenizer, sampler: Sampler, config: EvaluateConfig, seed: int
    ) -> None:
        self.tokenizer, self.sampler, self.config, self.seed = tokenizer, sampler, config, seed

    def greedy(self, problems: Sequence[Problem]) -> dict[str, Any]:
        sampling = Sampling(self.config.max_new_tokens, temperature=0.0)
        answers = [group[0] for group in self._answers(problems, sampling, count=1)]
        return _measured(problems, [answer.letter for answer in answers], answers)

    def sampled(self, problems: Sequence[Problem]) -> dict[str, Any]:
        config, draws = self.config, self.config.samples
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
        groups = list(self._answers(problems, sampling, count=draws))
        right = [
            sum(answer.letter == problem.answer_letter for answer in group)
            for problem, group in zip(problems, groups, strict=True)
        ]
        flat = [answer for group in groups for answer in group]
        low, high = clustered_interval([count / draws for count in right], draws)
        letters = [answer.letter for answer in flat]
        answer_letters = [problem.answer_letter for problem in problems]
        return {
            "n": len(problems),
            "samples": draws,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "accuracy": sum(right) / len(flat),
            "low": low,
            "high": high,
            "majority_baseline": majority_baseline(answer_letters),
            "pass_at_k": {
                str(k): _passed([pass_at_k(draws, count, k) for count in right], draws // k)
                for k in sorted(set(config.k))
            },
            "letters": letter_histogram(letters, answer_letters),
            "committed_fraction": _mean([letter is not None for letter in letters]),
            "cut_fraction": _mean([not answer.stopped for answer in flat]),
            "mean_tokens": _mean([len(answer.ids) for answer in flat]),
        }

    def letter_logit(self, problems: Sequence[Problem]) -> dict[str, Any]:
        chosen: list[str | None] = []
        for batch in _batches(problems, self.config.prompts_per_batch):
            chosen += [max(row, key=row.__getitem__) for row in self._letter_logprobs(batch)]
        return _measured(problems, chosen)

    def permutation(self, problems: Sequence[Problem]) -> dict[str, Any]:
        shifts: list[dict[str, Any]] = []
        choices: list[list[str | None]] = [[] for _ in problems]
        right: list[list[bool]] = [[] for _ in problems]
        for places in range(max(len(problem.options) for problem in problems)):
            asked = [i for i, problem in enumerate(problems) if len(problem.options) > places]
            moved = [shifted(problems[i], places) for i in asked]
            measured = self.greedy(moved)
            kept = ("n", "correct", "accuracy", "low", "high", "letters", "committed_fraction")
            shifts.append({"places": places, **{key: measured[key] for key in kept}})
            for i, problem, letter in zip(asked, moved, measured["chosen"], strict=True):
                choices[i].append(_content(problem, letter))
                right[i].append(letter == problem.answer_letter)
        consistency, always = content_consistency(choices)
        correct, n = (sum(shift[key] for shift in shifts) for key in ("correct", "n"))
        low, high = clustered_interval([sum(row) / len(row) for row in right], len(shifts))
        return {
            "n": len(problems),
            "accuracy": correct / n,
            "low": low,
            "high": high,
            "shifts": shifts,
            "content_consistency": consistency,
            "always_same_content": always,
        }

    def _answers(
        self, problems: Sequence[Problem], sampling: Sampling, count: int
    ) -> Iterator[list[Rollout]]:
        for batch in _batches(problems, self.config.prompts_per_batch):
            prompts = [to_prompt(problem, self.tokenizer) for problem in batch]
            seeds = [[self._seed(problem, i) for i in range(count)] for problem in batch]
            groups = self.sampler.sample(prompts, seeds, sampling)
            assert [len(group) for group in groups] == [count] * len(batch)
            for prompt, group in zip(prompts, groups, strict=True):
                yield [self._read(prompt, rollout) for rollout in group]

    def _read(self, prompt: Prompt, rollout: Rollout) -> Rollout:
        text = self.tokenizer.decode_answer(rollout.ids)
        return replace(rollout, letter=committed_letter(text, prompt.letters))

    def _seed(self, problem: Problem, draw: int) -> int:
        name = f"evaluate {self.seed} {draw} {problem.id}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") >> 1

    def _letter_logprobs(self, problems: Sequence[Problem]) -> list[dict[str, float]]:
        """Return the log-probability of " A", " B", ... after the prompt and "Answer:".

        Each is one token in a trained vocabulary. In a small one it may be several, and the first,
        the blank, may be all they share: then the rest is asked for too, given that blank.
        """
        opening = self.tokenizer.encode("Answer:")
        contexts = [[*to_prompt(problem, self.tokenizer).ids, *opening] for problem in problems]
        used = sorted({letter for problem in problems for letter in problem.letters})
        spelled = {letter: tuple(self.tokenizer.encode(f" {letter}")) for letter in used}
        totals = [dict.fromkeys(problem.letters, 0.0) for problem in problems]
        for start in sorted({ids[:t] for ids in spelled.values() for t in range(len(ids))}):
            t = len(start)
            longer = {x: ids for x, ids in spelled.items() if len(ids) > t and ids[:t] == start}
            following = {x: ids[t] for x, ids in longer.items()}
            asked = [[x for x in total if x in following] for total in totals]
            rows = [p for p, letters in enumerate(asked) if letters]
            logprobs = self.sampler.letter_logprobs(
                [[*contexts[p], *start] for p in rows],
                [[following[x] for x in asked[p]] for p in rows],
            )
            for p, row in zip(rows, logprobs, strict=True):
                for letter, logprob in zip(asked[p], row, strict=True):
                    totals[p][letter] += logprob
        return totals


def _measured(
    problems: Sequence[Problem],
    chosen: Sequence[str | None],
    answers: Sequence[Rollout] | None = None,
) -> dict[str, Any]:
    right = [problem.answer_letter for problem in problems]
    cut = [not answer.stopped for answer in answers] if answers else [False] * len(problems)
    result = measure(chosen, right, cut).as_dict()
    if answers:
        result["mean_tokens"] = _mean([len(answer.ids) for answer in answers])
    return result | {
        "right_letters": letter_histogram(right, right),
        "problem_ids": [problem.id for problem in problems],
        "chosen": list(chosen),
        "is_correct": [letter == answer for letter, answer in zip(chosen, right, strict=True)],
    }


def _passed(chances: Sequence[float], sets: int) -> dict[str, Any]:
    """Return the mean chance over problems that one of k answers is right, and its interval.

    Args:
        sets: How many sets of k answers each chance was seen in that share no answer.
    """
    low, high = clustered_interval(chances, sets)
    return {"n": len(chances), "accuracy": _mean(chances), "low": low, "high": high}


def _content(problem: Problem, letter: str | None) -> str | None:
    place = problem.letters.index(letter) if letter else len(problem.options)
    return problem.options[place] if place < len(problem.options) else None


def _batches(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
