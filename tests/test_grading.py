"""The reward is what it says: one form counts, and nothing else does."""

import json
import time
from pathlib import Path

import pytest

from aquarl.errors import DataError
from aquarl.tasks.grading import Grade, committed_letter, grade, grade_file

COMMITS_TO_C = [
    "Answer: C",
    "Answer:C",
    "  Answer: \tC  ",
    "Answer: C\r\n",
    "Answer: (C)",
    "Answer: [C]",
    "Answer: (C) 12",
    "Answer: C) 12",
    "Answer: C)12",
    "Answer: C.",
    "Answer: C. 12 apples",
    "Answer: C: 12",
    "7 + 5 = 12\nAnswer: C",
    "Answer: C\nI hope a reader likes it.",
    "Answer: A\nno wait\nAnswer: C",
    "Answer: C\nAnswer: because",
    "Answer: C\n\n\n",
    "Answer: (C) 3 or 4",
    "Answer: (C) and so on",
    "Answer: C) D",
]
COMMITS_TO_NOTHING = [
    "",
    "a car",
    "A",
    "(C)",
    "The answer is C",
    "The answer is C.\nC",
    "answer: because",
    "Answer: because",
    "Answer: Apple",
    "Answer: AB",
    "Answer: A car",
    "Answer: A or B",
    "Answer: (A) or (B)",
    "Answer: A) or B)",
    "Answer: A. or B",
    "Answer: (A)(B)",
    "Answer: [A]/[B]",
    "Answer: A, B",
    "Answer: A/B",
    "Answer: A:B",
    "Answer: C 12",
    "Answer: c",
    "Answer: (c)",
    "answer: C",
    "ANSWER: C",
    "Answer C",
    "Answer : C",
    "Answer:\nC",
    "Answer:",
    "Answer: (C",
    "Answer: (C]",
    "Answer: F",
    "Answer: \N{FULLWIDTH LATIN CAPITAL LETTER C}",
    "Answer: \N{CYRILLIC CAPITAL LETTER ES}",
    "Answer: \N{GREEK CAPITAL LETTER ALPHA}",
    "Answer: C\N{COMBINING CEDILLA}",
    "Answer\N{FULLWIDTH COLON} C",
    "Answer:\N{NO-BREAK SPACE}C",
    "So Answer: C",
    "**Answer: C**",
    "Answer: $C$",
    "Answer: C's",
    "Answer: C-12",
]


@pytest.mark.parametrize("text", COMMITS_TO_C)
def test_the_form_commits_to_its_letter(text: str) -> None:
    assert committed_letter(text) == "C"


@pytest.mark.parametrize("text", COMMITS_TO_NOTHING)
def test_nothing_else_commits(text: str) -> None:
    assert committed_letter(text) is None


def test_a_problem_with_four_options_has_no_letter_e() -> None:
    assert committed_letter("Answer: E", letters="ABCD") is None
    assert committed_letter("Answer: E", letters="ABCDE") == "E"


@pytest.mark.parametrize(
    "unit", [" ", "\n", "Answer:", "Answer: ", "Answer: A", " Answer: A) ", "Answer: A\n", "\r"]
)
def test_a_megabyte_is_read_in_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    committed_letter(text + "\nAnswer: B")
    grade(text, "A")
    assert time.process_time() - start < 2.0  # a quadratic scan takes minutes


def test_only_the_right_letter_is_rewarded() -> None:
    right = Grade("C", 1.0, "the last answer line says C, which is right")
    assert grade("Answer: C", "C") == right
    wrong, silent = grade("Answer: B", "C"), grade("a car costs C", "C")
    assert (wrong.letter, wrong.reward) == ("B", 0.0)
    assert (silent.letter, silent.reward) == (None, 0.0)


def test_the_reason_quotes_the_line_that_failed() -> None:
    assert "'Answer: because it'" in grade("Answer: because it\nends", "C").why
    assert "no line begins with" in grade("It is C", "C").why


def test_a_reason_can_be_printed_whatever_the_answer_held() -> None:
    why = grade("Answer: \ud800\x1b[2J", "C").why
    assert why.isprintable()
    why.encode()


def test_no_letter_can_be_right_that_is_not_an_option() -> None:
    with pytest.raises(ValueError, match="one of ABCDE"):
        grade("Answer: C", "F")


def test_a_file_is_graded_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [("Answer: C", "C"), ("Answer: A", "C"), ("a car", "A")]
    lines = [json.dumps({"completion": text, "correct": letter}) for text, letter in rows]
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n")
    assert [(g.letter, g.reward) for g in grade_file(str(path))] == [
        ("C", 1.0),
        ("A", 0.0),
        (None, 0.0),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{not json", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'"text"', "holds a str"),
        (b'{"correct": "C"}', 'no text under "completion"'),
        (b'{"completion": 3, "correct": "C"}', 'no text under "completion"'),
        (b'{"completion": "Answer: C"}', 'None under "correct"'),
        (b'{"completion": "Answer: C", "correct": "c"}', "'c' under \"correct\""),
        (b'{"completion": "Answer: C", "correct": "AB"}', "'AB' under \"correct\""),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"completion": "Answer: C", "correct": "C"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        list(grade_file(str(path)))
    assert f"{path}, line 2, " in str(error.value)
    assert complaint in str(error.value)


def test_a_missing_or_empty_file_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        list(grade_file(str(tmp_path / "absent.jsonl")))
    with pytest.raises(DataError, match=tmp_path.name):
        list(grade_file(str(tmp_path)))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        list(grade_file(str(tmp_path / "empty.jsonl")))
