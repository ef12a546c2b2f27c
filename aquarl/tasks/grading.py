"""An answer's text in, its letter and reward out: the one place where answers are judged.

`rl.rewards` calls it on every rollout, `evaluate.scores` counts its letters, and
`aquarl grade FILE.jsonl` shows it line by line before GPU hours are spent on it.

**The rule.** A letter is committed by the last line of the form `Answer: X`; nothing else counts
and there is no fallback: were the first bare letter anywhere taken, in any case, the article "a"
would earn the reward of A. Where a form could be read two ways it does not count:
a policy is told the form by its training data, and whatever is forgiven here gets reinforced.

| counts | because |
|---|---|
| `Answer: C` | the form; spaces and tabs around it are free, the line may end in `\\r` |
| `Answer: (C)`, `Answer: [C]`, `Answer: (C) 12` | brackets that match; then option text, unread |
| `Answer: C)`, `Answer: C) 12`, `Answer: C)12` | the way AQuA writes its options |
| `Answer: C.`, `Answer: C. 12`, `Answer: C: 12` | a full stop or colon, then space or the end |

| does not count | because |
|---|---|
| `answer: C`, `ANSWER: C`, `Answer: c` | another form; only the upper-case letter was asked for |
| `The Answer: C`, `**Answer: C**` | the line has to begin with `Answer:` |
| `Answer: Apple`, `Answer: AB`, `Answer: because` | a word begins there, not a letter alone |
| `Answer: A train`, `Answer: C 12`, `Answer: A or B` | a bare letter before more words may be the \
article, or one of several |
| `Answer: A, B`, `Answer: A/B`, `Answer: A:B` | a list or a ratio commits to nothing |
| `Answer: (C) or (D)`, `Answer: C)/D)`, `Answer: (C)(D)` | a second letter as good as the first |
| `Answer: F`, full-width, Greek or Cyrillic look-alikes | not one of the letters asked for |

A line that does not count does not undo an earlier one that does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from aquarl.data.files import Row, read_rows
from aquarl.errors import DataError
from aquarl.records import LETTERS


@dataclass(frozen=True)
class Grade:
    letter: str | None
    """What the answer committed to."""
    reward: float
    """1.0 for the right letter, else 0.0."""
    why: str


def committed_letter(text: str, letters: str = LETTERS) -> str | None:
    """Return the letter of the last line of the form `Answer: X`, or None where there is none.

    Args:
        text: An answer of any length; time is linear in it.
        letters: The upper-case letters that may be chosen.
    """
    found = _answer_line(letters).findall(text)
    return "".join(found[-1]) if found else None


def grade(completion: str, correct: str, letters: str = LETTERS) -> Grade:
    """Return the grade of one answer.

    Raises:
        ValueError: `correct` is not one of `letters`, so no answer could ever be right.
    """
    if len(correct) != 1 or correct not in letters:
        raise ValueError(f"correct must be one of {letters}, got {correct!r}")
    letter = committed_letter(completion, letters)
    if letter is None:
        return Grade(None, 0.0, _why_none(completion, letters))
    if letter == correct:
        return Grade(letter, 1.0, f"the last answer line says {letter}, which is right")
    why = f"the last answer line says {letter}, but {correct} is right"
    return Grade(letter, 0.0, why)


def grade_file(path: str) -> Iterator[Grade]:
    """Yield the grade of each line `{"completion": ..., "correct": ...}`; blank lines are skipped.

    Raises:
        DataError: The file is missing or empty, or a line is not of that shape; names the line.
    """
    for where, row in read_rows(path):
        yield grade(*_completion_and_correct(row, where))


@lru_cache
def _answer_line(letters: str) -> re.Pattern[str]:
    any_one = f"[{re.escape(letters)}]"
    one = f"({any_one})"
    marked = rf"\({any_one}\)|\[{any_one}\]|{any_one}\)"
    more = rf"[ \t]*+(?:{marked}|(?:or|and|[/,&])[ \t]*+(?:{marked}|{any_one}\b))"
    bare = rf"{one}(?:\)|[.:]?(?=[ \t]*+\r?$)|[.:][ \t])"
    # Possessive quantifiers and one try a line keep a megabyte of blanks linear.
    return re.compile(
        rf"^[ \t]*+Answer:[ \t]*+(?:\({one}\)|\[{one}\]|{bare})(?!{more})", re.MULTILINE
    )


_ATTEMPT = re.compile(r"^[ \t]*+(Answer:[^\n]{0,40})", re.MULTILINE | re.IGNORECASE)


def _why_none(completion: str, letters: str) -> str:
    attempts = [match[1] for match in _ATTEMPT.finditer(completion)]
    if attempts:
        return f"the line {attempts[-1].rstrip()!r} is not `Answer: X` with X one of {letters}"
    return "no line begins with `Answer:`"


def _completion_and_correct(row: Row, where: str) -> tuple[str, str]:
    completion, correct = row.get("completion"), row.get("correct")
    if not isinstance(completion, str):
        raise DataError(
            f'{where}, has no text under "completion", so there is no answer to grade. '
            'Write {"completion": "... Answer: C", "correct": "C"}.'
        )
    if not isinstance(correct, str) or len(correct) != 1 or correct not in LETTERS:
        raise DataError(
            f'{where}, has {correct!r} under "correct", but it has to be one upper-case letter '
            f'of {LETTERS}. Write for example "correct": "C".'
        )
    return completion, correct
