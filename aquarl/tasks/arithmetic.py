"""A seed in, AQuA-shaped word problems out: the embedded default, so nothing is downloaded.

A story gives a number and changes it in one to four steps; five options, one right, the others
what a slip would give. Numbers stay within 0..99, each of which is one token. `fact_documents`
is the text of the base stage: sums, short stories with their sums, and options gone through to
find a result.

Difficulty d: a problem has 1 to d steps, evenly. Splits are disjoint by question.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from aquarl.config import DataConfig
from aquarl.errors import ConfigError
from aquarl.records import LETTERS, Problem
from aquarl.tasks.base import Splits, deduplicated, question_text, solution_text

NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "toys")
LARGEST_RESULT = 99

STARTS = ("{name} has {a} {things}.", "{name} owns {a} {things}.", "There are {a} {things}.")
PACKS = ("{name} has {a} boxes of {b} {things}.", "There are {a} bags with {b} {things} each.")
GAINS = ("{name} buys {b} more.", "{name} finds {b} more.", "Then {b} are added.")
LOSSES = ("{name} gives away {b}.", "{name} loses {b}.", "Then {b} are sold.")
FACTORS = ("Then the number grows {b} times.",)
SHARES = ("They are shared equally by {b} friends; each gets a part.",)
MOST_REPEATS = 10_000
"""In a row, of questions that were there already, before there seem to be no others."""
QUESTIONS = ("How many {things} now?", "How many {things} are there in the end?")


@dataclass(frozen=True)
class Story:
    text: str
    sums: tuple[str, ...]
    """One "7 + 5 = 12" a step."""
    numbers: tuple[int, ...]
    """All that was named or computed on the way; the last is the result."""


def tell(rng: random.Random, steps: int, largest: int) -> Story:
    """Return a story of so many steps of arithmetic."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    sentences, sums, numbers = [], [], []
    value = rng.randint(2, largest)
    if rng.random() < 0.2:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        sentences.append(rng.choice(PACKS).format(name=name, things=things, a=a, b=b))
        value = a * b
        sums.append(f"{a} * {b} = {value}")
        numbers += [a, b, value]
    else:
        sentences.append(rng.choice(STARTS).format(name=name, things=things, a=value))
        numbers.append(value)
    while len(sums) < steps:
        sentence, sign, other, result = _change(rng, value, largest)
        sentences.append(sentence.format(name=name, things=things, b=other))
        sums.append(f"{value} {sign} {other} = {result}")
        numbers += [other, result]
        value = result
    return Story(" ".join(sentences), tuple(sums), tuple(numbers))


def _change(rng: random.Random, value: int, largest: int) -> tuple[str, str, int, int]:
    """Return a sentence, its sign, its number and what it makes of `value`."""
    while True:
        kind, other = rng.random(), rng.randint(1, largest)
        if kind < 0.42 and value + other <= LARGEST_RESULT:
            return rng.choice(GAINS), "+", other, value + other
        if 0.42 <= kind < 0.84 and value - other >= 1:
            return rng.choice(LOSSES), "-", other, value - other
        small = rng.randint(2, 5)
        if 0.84 <= kind < 0.92 and value * small <= LARGEST_RESULT:
            return rng.choice(FACTORS), "*", small, value * small
        if kind >= 0.92 and value % small == 0 and value >= small:
            return rng.choice(SHARES), "/", small, value // small


def make_problem(rng: random.Random, steps: int, largest: int, place: int) -> Problem:
    """Return one problem with exactly this many steps, its right option in this place."""
    story = tell(rng, steps, largest)
    right = story.numbers[-1]
    slips = {n for n in story.numbers if n != right}
    if len(story.numbers) >= 3:
        before, other = story.numbers[-3:-1]
        slips |= {before + other, abs(before - other)} - {right}
    options = rng.sample(sorted(slips), min(2, len(slips)))
    while len(options) < len(LETTERS) - 1:
        near = right + rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
        if 0 <= near <= LARGEST_RESULT and near != right and near not in options:
            options.append(near)
    rng.shuffle(options)
    options.insert(place, right)
    things = next(word for word in THINGS if word in story.text)
    return Problem(
        id="",
        question=f"{story.text} {rng.choice(QUESTIONS).format(things=things)}",
        options=tuple(map(str, options)),
        answer_letter=LETTERS[place],
        rationale="\n".join(story.sums),
        checks_options=True,
        source="arithmetic",
    )


def arithmetic_problems(config: DataConfig, seed: int) -> Splits:
    """Return generated problems; the same configuration and seed give the same ones.

    Raises:
        ConfigError: So simple problems do not come in so many kinds.
    """
    rng = random.Random(f"arithmetic {seed}")
    wanted = {
        "test": config.held_out_problems,
        "validation": config.held_out_problems,
        "train": config.train_problems,
    }
    made: dict[str, tuple[Problem, ...]] = {}
    seen: set[str] = set()
    for split, count in wanted.items():
        problems: list[Problem] = []
        repeats = 0
        while len(problems) < count:
            steps = rng.randint(1, config.difficulty)
            place = len(problems) % len(LETTERS)  # so that no letter is likelier than another
            problem = make_problem(rng, steps, config.largest_number, place)
            repeats = repeats + 1 if problem.question in seen else 0
            if repeats > MOST_REPEATS:
                raise ConfigError(
                    f"Problems of at most {config.difficulty} steps with numbers up to "
                    f"{config.largest_number} come in about {len(seen):,} kinds, but "
                    f"{sum(wanted.values()):,} are asked for: data.train_problems, and twice "
                    "data.held_out_problems. Ask for fewer, or raise data.largest_number or "
                    'data.difficulty (the "easy" ones of data.mid have 1 step).'
                )
            if not repeats:
                seen.add(problem.question)
                fields = vars(problem) | {"id": f"{split}-{len(problems)}"}
                problems.append(Problem(**fields))
        rng.shuffle(problems)
        made[split] = tuple(problems)
    return deduplicated(Splits(made["train"], made["validation"], made["test"]))


def fact_documents(config: DataConfig, seed: int, split: str = "train") -> Iterator[str]:
    """Yield documents of the base stage, without end. None tells a held-out problem's story."""
    rng = random.Random(f"facts {split} {seed}")
    held_out = arithmetic_problems(config.model_copy(update={"train_problems": 1}), seed)
    secret = {_told(problem) for problem in (*held_out.validation, *held_out.test)}
    while True:
        document = rng.choice((_sums, _story_with_sums, _checked_options))(rng, config)
        if document.split("\n", 1)[0] not in secret:
            yield document


def _told(problem: Problem) -> str:
    """Return a problem's story without its closing question."""
    return problem.question.rsplit(". ", 1)[0] + "."


def _sums(rng: random.Random, config: DataConfig) -> str:
    sums: list[str] = []
    while len(sums) < 8:
        sums += tell(rng, 1, config.largest_number).sums
    return "\n".join(sums)


def _story_with_sums(rng: random.Random, config: DataConfig) -> str:
    story = tell(rng, rng.randint(1, config.difficulty), config.largest_number)
    return "\n".join([story.text, *story.sums])


def _checked_options(rng: random.Random, config: DataConfig) -> str:
    """Options, a sum, and the options gone through until one is its result."""
    problem = make_problem(rng, 1, config.largest_number, rng.randrange(len(LETTERS)))
    listed = question_text(problem).split("\n", 1)[1]
    return f"{listed}\n{solution_text(problem)}"
