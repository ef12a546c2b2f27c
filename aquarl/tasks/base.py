"""What is asked: a problem as text, as a conversation, as a prompt, and under other letters.

`tasks/*.py` make problems, `grading.py` judges answers to them, the stages train on them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from aquarl.data.tokenizer import Tokenizer
from aquarl.records import Conversation, Message, Problem, Prompt
from aquarl.tasks.rationale import names_an_option

Item = TypeVar("Item", Problem, Conversation, Problem | Conversation)


@dataclass(frozen=True)
class Splits:
    """The problems of a task. No question stands in two splits."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    refused: dict[str, int] = field(default_factory=dict)
    """Why rows were left out, and how many."""


def question_text(problem: Problem) -> str:
    """Return what the user says: the question, then one option a line, as AQuA writes them."""
    letters = problem.letters[: len(problem.options)]
    lines = [f"{letter}){text}" for letter, text in zip(letters, problem.options, strict=True)]
    return "\n".join([problem.question, *lines])


def solution_text(problem: Problem) -> str:
    """Return what the assistant is to say: rationale, options gone through, the committing line."""
    lines = [problem.rationale] if problem.rationale else []
    if problem.checks_options:
        lines += checked_options(problem)
    return "\n".join([*lines, f"Answer: {problem.answer_letter}"])


def checked_options(problem: Problem) -> list[str]:
    """Return a line "B)12 no" for each option up to the right one, which says yes.

    Naming the letter of a number at once takes a small model millions of tokens to learn (it has
    to match one number among all with itself); comparing two numbers it has just read does not.
    """
    right = problem.letters.index(problem.answer_letter)
    return [
        f"{problem.letters[i]}){problem.options[i]} {'yes' if i == right else 'no'}"
        for i in range(right + 1)
    ]


def to_conversation(problem: Problem) -> Conversation:
    """Return question and worked solution as one exchange."""
    question = Message("user", question_text(problem))
    return Conversation((question, Message("assistant", solution_text(problem))), problem.source)


def to_prompt(problem: Problem, tokenizer: Tokenizer) -> Prompt:
    """Return the problem as token ids that end where the assistant begins."""
    question = Conversation((Message("user", question_text(problem)),))
    return Prompt(
        problem_id=problem.id,
        ids=tuple(tokenizer.render_prompt(question)),
        letters=problem.letters,
        answer_letter=problem.answer_letter,
    )


def permuted(problem: Problem, order: Sequence[int]) -> Problem:
    """Return the same problem with its options in another order.

    Args:
        problem: One without options is returned as it is: its letters stand inside the text.
        order: Option i becomes what was option `order[i]`.
    """
    if not problem.options:
        return problem
    answer = order.index(problem.letters.index(problem.answer_letter))
    return replace(
        problem,
        options=tuple(problem.options[i] for i in order),
        answer_letter=problem.letters[answer],
    )


def shifted(problem: Problem, places: int) -> Problem:
    """Return the problem with its options rotated: what was option 0 becomes option `places`."""
    n = len(problem.options)
    return permuted(problem, [(i - places) % n for i in range(n)])


def shuffled_options(problem: Problem, rng: random.Random) -> Problem:
    """Return the problem with its options in an order drawn from `rng`.

    Where the worked solution names an option by its letter ("so C is out") the order stays.
    """
    order = list(range(len(problem.options)))
    rng.shuffle(order)
    return problem if names_an_option(problem.rationale) else permuted(problem, order)


NO_MATTER = re.compile(r"[^\w+*/^=<>÷×%√.-]|_|(?<=[^\W\d])\.|\.(?!\d)|-(?![\s(]*[\d.])")
"""In a question, for telling it from others."""


def question_key(item: Problem | Conversation) -> str:
    """Return what makes two problems the same: the question's letters, digits, and what stands
    between numbers (12 * 3 is not 12 / 3, nor 1.5 x 2 what 15 x 2 is).

    The question of a conversation is what its user says first.
    """
    if isinstance(item, Problem):
        question = item.question
    else:
        question = next((m.content for m in item.messages if m.role == "user"), "")
    return NO_MATTER.sub("", question.lower())


def apart_from(held_out: Iterable[Problem], items: Iterable[Item]) -> list[Item]:
    """Return the problems, or conversations, whose question is none of those held out."""
    keys = {question_key(problem) for problem in held_out}
    return [item for item in items if question_key(item) not in keys]


def deduplicated(splits: Splits) -> Splits:
    """Return the splits with each question once: test keeps it before validation before train."""
    seen: set[str] = set()

    def fresh(problems: Iterable[Problem]) -> tuple[Problem, ...]:
        kept = []
        for problem in problems:
            key = question_key(problem)
            if key not in seen:
                seen.add(key)
                kept.append(problem)
        return tuple(kept)

    test, validation, train = fresh(splits.test), fresh(splits.validation), fresh(splits.train)
    before = sum(map(len, (splits.train, splits.validation, splits.test)))
    repeats = before - len(train) - len(validation) - len(test)
    refused = dict(splits.refused)
    if repeats:
        refused["question repeated"] = refused.get("question repeated", 0) + repeats
    return Splits(train, validation, test, refused)
