"""A row of JSON in, a clean Problem out, or the reason why not.

Two schemas: `{"question", "options", "correct" or "answer_letter", "rationale"}`, AQuA's own, and
finished conversations, `{"messages", "letters", "answer_letter"}`. Cleaning takes the letters off
the options and, by `tasks.rationale`, the closing answer line off the worked solution, so that
`base.py` can write both again under any other order of the options. `aqua.py`, `mmlu.py` and
`arc.py` bring the rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from aquarl.data.corpus import stable_share
from aquarl.data.files import Row
from aquarl.errors import DataError
from aquarl.records import LETTERS, Message, Problem
from aquarl.tasks.base import Splits, deduplicated, question_key
from aquarl.tasks.rationale import without_answer_line


class Refused(ValueError):
    """A row that cannot become a problem. The message is the reason it is counted under."""


NO_LABEL = "label not among the options"
TWO_RIGHT = "right option stands twice"

# "A)21", "A) 21", "(A) 21", "A.21", "A: 21"; the text may go on with a point, as in "A).5".
MARK = re.compile(r"\s*[(\[]?(?P<letter>[A-Za-z])[)\].:]\s*(?P<text>.*)", re.DOTALL)
# "A)a) 21": some AQuA rows write the letter once more.
SECOND_MARK = re.compile(r"\(?(?P<letter>[A-Za-z])[).]\s*(?P<text>.+)", re.DOTALL)


def split_options(options: Sequence[str | float]) -> tuple[str, ...]:
    """Return the texts of options without their letters, each on one line.

    Args:
        options: Either all carry their own letter in order ("A)21" or "(A) 21" or "A.21", then
            B, ...), or none does. Numbers stand for their text.

    Raises:
        Refused: Letters are missing, repeated or out of order, a text is empty, or there are not
            2 to 5 options.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise Refused(f"not 2 to {len(LETTERS)} options")
    if not all(isinstance(option, str | int | float) for option in options):
        raise Refused("an option is neither text nor a number")
    written = [str(option) for option in options]
    marks = [MARK.match(option) for option in written]
    in_order = [
        mark is not None and mark["letter"].upper() == letter
        for mark, letter in zip(marks, LETTERS, strict=False)
    ]
    if all(in_order):
        texts = [
            _without_second_mark(" ".join(mark["text"].split()), letter)
            for mark, letter in zip(marks, LETTERS, strict=False)
            if mark is not None
        ]
    elif all(marks) or sum(in_order) > len(written) / 2:
        raise Refused("options not lettered in order")
    else:
        texts = [" ".join(option.split()) for option in written]
    if not all(texts):
        raise Refused("an option is empty")
    return tuple(texts)


def _without_second_mark(text: str, letter: str) -> str:
    mark = SECOND_MARK.fullmatch(text)
    if mark is not None and mark["letter"].upper() == letter:
        return mark["text"]
    return re.sub(r"^\.\s+(?=[^\d\s])", "", text)  # "C). C + 6", but not "A). 05"


def problem_from_row(where: str, row: Row, id: str) -> Problem:
    """Return the problem that a row of either schema holds.

    Args:
        where: What an error calls the row: "train.json, line 3".

    Raises:
        Refused: The row is of the schema, but its label or options cannot stand.
        DataError: The row is of neither schema.
    """
    if "messages" in row:
        return _from_conversation(where, row, id)
    label = row.get("correct", row.get("answer_letter"))
    if not isinstance(row.get("question"), str) or not isinstance(row.get("options"), list):
        raise DataError(
            f"{where}, has the fields {', '.join(row)}, but a problem needs question, options and "
            "correct, or messages and answer_letter. Convert that row."
        )
    options = split_options(row["options"])
    letters = LETTERS[: len(options)]
    letter = _checked_label(label, letters)
    if not row["question"].strip():
        raise Refused("no question")
    return Problem(
        id=id,
        question=row["question"].strip(),
        options=options,
        answer_letter=letter,
        letters=letters,
        rationale=without_answer_line(str(row.get("rationale") or ""), letter),
        source=str(row.get("source") or ""),
    )


def _from_conversation(where: str, row: Row, id: str) -> Problem:
    messages = messages_of(where, row["messages"])
    opening = ""
    if messages and messages[0].role == "system":  # read before the question, as the template does
        opening, messages = f"{messages[0].content}\n\n", messages[1:]
    if len(messages) > 2:
        raise Refused("more than one exchange")
    text = f"{opening}{messages[0].content}"
    question, options = split_question(text)
    given = row.get("letters")
    letters = LETTERS[: len(options) or len(LETTERS)]
    if given:
        letters = "".join(map(str, given if isinstance(given, list) else [given]))
    if not LETTERS.startswith(letters) or (options and len(options) != len(letters)):
        raise Refused("letters are not those of the options")
    letter = _checked_label(row.get("answer_letter"), letters)
    if not question.strip():
        raise Refused("no question")
    said = messages[1].content if len(messages) == 2 else ""
    return Problem(
        id=id,
        question=question,
        options=options,
        answer_letter=letter,
        letters=letters,
        rationale=without_answer_line(said, letter),
        source=str(row.get("source") or ""),
    )


def split_question(text: str) -> tuple[str, tuple[str, ...]]:
    """Return question and options of a text that `base.question_text` wrote.

    Returns:
        The text itself and `()` where its last lines are not two to five options lettered in
        order from "A)" on.
    """
    lines = text.rstrip().split("\n")
    for count in range(len(LETTERS), 1, -1):
        tail = lines[-count:]
        is_lettered = len(lines) > count and all(
            line.startswith(f"{letter})") and line[2:].strip()
            for line, letter in zip(tail, LETTERS, strict=False)
        )
        if is_lettered:
            return "\n".join(lines[:-count]), tuple(line[2:] for line in tail)
    return text, ()


def messages_of(where: str, messages: Any) -> tuple[Message, ...]:
    """Return checked messages: an optional system message, then user and assistant in turn.

    Raises:
        DataError: They are of another shape, or the turns do not alternate.
    """
    try:
        made = tuple(Message(message["role"], message["content"]) for message in messages)
        if not all(isinstance(message.content, str) for message in made):
            raise TypeError("content is not text")
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{where}, has messages of another shape. Each has to be "
            '{"role": "user" or "assistant", "content": "..."}.'
        ) from error
    turns = made[1:] if made and made[0].role == "system" else made
    for turn, message in enumerate(turns):
        expected = "user" if turn % 2 == 0 else "assistant"
        if message.role != expected:
            raise DataError(
                f"{where}: turn {turn + 1} is not by {expected!r}, but by "
                f"{message.role!r}. Turns go user, assistant, user, ...; mend or drop that row."
            )
    if not turns:
        raise DataError(f"{where}, has no turn of a user, so nothing is asked. Drop that row.")
    return made


def _checked_label(label: Any, letters: str) -> str:
    letter = str(label or "").strip().upper()
    if len(letter) != 1 or letter not in letters:
        raise Refused(NO_LABEL)
    return letter


def collect(
    rows: Iterable[tuple[str, Row]],
    split: str,
    refused: Counter[str],
    parse: Callable[[str, Row, str], Problem] = problem_from_row,
) -> tuple[Problem, ...]:
    """Return the problems of all rows that hold one; count the others in `refused` by reason.

    Ids are the split and the row's place in its file, so they stay when another row is refused.
    In "train" a row is refused as well whose right option stands twice: a policy that names the
    twin would be told that it is wrong.
    """
    problems = []
    for place, (where, row) in enumerate(rows):
        try:
            problem = parse(where, row, f"{split}-{place}")
            if split == "train" and _right_option_stands_twice(problem):
                raise Refused(TWO_RIGHT)
        except Refused as refusal:
            refused[str(refusal)] += 1
        else:
            problems.append(problem)
    return tuple(problems)


def _right_option_stands_twice(problem: Problem) -> bool:
    if not problem.options:
        return False
    right = problem.options[problem.letters.index(problem.answer_letter)]
    return problem.options.count(right) > 1


def finished_splits(splits: Splits, name: str, fraction: float, *, hold_out_test: bool) -> Splits:
    """Return splits that can be trained on: deduplicated, with a validation split, none unsaid.

    Args:
        splits: As the files hold them. Without validation problems, a share is held out of train
            by a hash of each question.
        name: What an error calls the task.
        fraction: That share, and the test's share.
        hold_out_test: Hold out a test split too where there is none; otherwise it stays empty.

    Raises:
        DataError: Train or validation is empty in the end; the message counts what was refused.
    """
    splits = deduplicated(splits)
    needs_validation, needs_test = not splits.validation, hold_out_test and not splits.test
    if needs_validation or needs_test:
        parts: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
        for problem in splits.train:
            share = stable_share(question_key(problem))
            if needs_validation and share < fraction:
                parts["validation"].append(problem)
            elif needs_test and fraction <= share < 2 * fraction:
                parts["test"].append(problem)
            else:
                parts["train"].append(problem)
        splits = replace(
            splits,
            train=tuple(parts["train"]),
            validation=splits.validation or tuple(parts["validation"]),
            test=splits.test or tuple(parts["test"]),
        )
    for split, problems in (("train", splits.train), ("validation", splits.validation)):
        if not problems:
            reasons = ", ".join(f"{why}: {n}" for why, n in splits.refused.items()) or "none"
            raise DataError(
                f"The {split} split of {name} is empty: {len(splits.train)} problems are left for "
                f"training and {len(splits.validation)} for validation; rows refused: {reasons}. "
                f"Give more rows, or change data.validation_fraction, which is {fraction}."
            )
    return splits
