"""Promises of `aquarl.tasks.aqua`, `rows` and `rationale`: real rows become clean problems."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aquarl.config import DataConfig
from aquarl.errors import DataError
from aquarl.records import Conversation
from aquarl.tasks.aqua import load_aqua, load_jsonl
from aquarl.tasks.base import (
    Splits,
    permuted,
    question_key,
    question_text,
    shuffled_options,
    solution_text,
    to_conversation,
)
from aquarl.tasks.grading import committed_letter
from aquarl.tasks.rationale import names_an_option, without_answer_line
from aquarl.tasks.rows import Refused, problem_from_row, split_options, split_question
from tests.fakes import REAL, real_data

needs_real_data = real_data("aqua")
FIVE = ["A)1", "B)2", "C)3", "D)4", "E)5"]


def config_of(**settings: Any) -> DataConfig:
    return DataConfig(**settings)


def aqua_row(question: str, correct: str = "C", **more: Any) -> dict[str, Any]:
    row = {"question": question, "options": FIVE, "rationale": "1 + 2 = 3", "correct": correct}
    return row | more


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_row(conversation: Conversation, **more: Any) -> dict[str, Any]:
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    return {"messages": messages} | more


@pytest.mark.parametrize(
    "options",
    [
        ["A)21", "B)22"],
        ["A) 21", "B)  22"],
        ["(A) 21", "(B) 22"],
        ["A.21", "B. 22"],
        ["a: 21", "b: 22"],
        ["A)a) 21", "B)b) 22"],
        [" A)21\n", "B)22 "],
        ["21", "22"],
    ],
)
def test_options_lose_their_letters_however_written(options: list[str]) -> None:
    assert split_options(options) == ("21", "22")


def test_what_only_looks_like_a_letter_stays() -> None:
    assert split_options(["A).5", "B).25"]) == (".5", ".25")
    assert split_options(["A)A > B", "B)B > A"]) == ("A > B", "B > A")
    assert split_options(["A. Lincoln", "Washington", "Adams"]) == (
        "A. Lincoln",
        "Washington",
        "Adams",
    )
    assert split_options([4, 5.5, "6"]) == ("4", "5.5", "6")
    assert split_options(["A)C + 6", "B). C + 7"]) == ("C + 6", "C + 7")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["B)1", "A)2"], "options not lettered in order"),
        (["A)1", "B)2", "3"], "options not lettered in order"),
        (["A)1", "B)"], "an option is empty"),
        (["A)1"], "not 2 to 5 options"),
        (["A)1", None], "an option is neither text nor a number"),
        ([*FIVE, "F)6"], "not 2 to 5 options"),
    ],
)
def test_options_that_cannot_stand_are_refused_with_the_reason(
    options: list[str], reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        split_options(options)


@pytest.mark.parametrize(
    "ending",
    [
        "\nAnswer: C",
        "\nANSWER:C",
        "\nAnswer is C.",
        "\nThe answer is C",
        "\nthe answer is, therefore, c.",
        "\nANSWER : OPTION C",
        "\nCorrect option: C",
        "\nHence, the correct answer is (C)",
        "\nAns - C",
        "\nCorrect answer - C",
        "\nOption C",
        "\nC",
        "\n(C)",
        " answer : c",
        " so the correct option is c.",
        " answer : c) 45",
        " answer c 45",
        "\nAnswer: (C) 45 days",
        " hence c is the correct answer.",
        " c is the ans",
        " (option c)",
        " c",
        " hence (c)",
        "=C",
        " = C",
        "\nOption C\nAnswer: C",
        "\nAnswer: D",  # a named letter goes even if it is not the label
    ],
)
def test_the_closing_answer_is_cut_from_a_rationale(ending: str) -> None:
    assert without_answer_line(f"9 * 5 = 45{ending}", "C") == "9 * 5 = 45"


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 45",
        "only option C has two digits",
        "Let the speeds be A, B and C",
        "so the point lies on train b",
        "x = 5a",
        "where 5y=c",
        "9 * 5 = 45\nB",  # a lone letter that is not the label
    ],
)
def test_a_rationale_that_names_no_letter_at_its_end_stays(text: str) -> None:
    assert without_answer_line(text, "C") == text


def test_an_answer_line_goes_wherever_it_stands() -> None:
    assert without_answer_line("Answer = D\n80 - 10 = 70", "D") == "80 - 10 = 70"


def test_cutting_stays_quick_on_hostile_text() -> None:
    hostile = ["so " * 40 + "x", "the " * 30, "answer" + " " * 110 + "x", "= " * 60, "is, " * 30]
    start = time.perf_counter()
    for text in hostile:
        without_answer_line(text, "C")
    assert time.perf_counter() - start < 1.0


def test_a_problem_is_read_whole() -> None:
    problem = problem_from_row("x, line 1", aqua_row(" Sum? ", rationale="1+2=3\nAnswer: C"), "t-0")
    assert question_text(problem) == "Sum?\nA)1\nB)2\nC)3\nD)4\nE)5"
    assert solution_text(problem) == "1+2=3\nAnswer: C"
    assert (problem.id, problem.letters) == ("t-0", "ABCDE")


def test_rows_that_cannot_stand_are_refused_and_counted(tmp_path: Path) -> None:
    rows = [aqua_row(f"question {i}") for i in range(5)]
    rows += [aqua_row("x", "F"), aqua_row("y", ""), aqua_row("z", options=FIVE[:4])]
    rows += [aqua_row("  "), aqua_row("twice", options=["A)3", *FIVE[1:]])]
    rows += [aqua_row("w", options=["B)1", "A)2", *FIVE[2:]]), aqua_row("Question 0?")]
    write(tmp_path / "aqua" / "train.json", rows)
    write(tmp_path / "aqua" / "dev.json", [aqua_row("held out")])
    splits = load_aqua(config_of(root=str(tmp_path)))
    assert [problem.id for problem in splits.train] == [f"train-{i}" for i in range(5)]
    assert splits.refused == {
        "label not among the options": 2,
        "not 5 options": 1,
        "no question": 1,
        "right option stands twice": 1,
        "options not lettered in order": 1,
        "question repeated": 1,
    }


def test_no_question_stands_in_two_splits(tmp_path: Path) -> None:
    write(tmp_path / "aqua/train.json", [aqua_row("One?"), aqua_row("two"), aqua_row("three")])
    write(tmp_path / "aqua/dev.json", [aqua_row("TWO"), aqua_row("one")])
    write(tmp_path / "aqua/test.json", [aqua_row("one")])
    splits = load_aqua(config_of(root=str(tmp_path)))
    assert [
        [p.question for p in part] for part in (splits.train, splits.validation, splits.test)
    ] == [
        ["three"],
        ["TWO"],
        ["one"],
    ]
    assert splits.refused == {"question repeated": 3}


def test_what_stands_between_numbers_tells_questions_apart(tmp_path: Path) -> None:
    questions = ["12 * 3?", "12 + 3?", "12 - 3?", "12 / 3?", "1.5 times 2?", "15 times 2?"]
    again = ["12*3", "12 - 3 ?", "1.5 Times 2"]
    write(tmp_path / "aqua/train.json", [aqua_row(q) for q in (*questions, *again)])
    write(tmp_path / "aqua/dev.json", [aqua_row("held out")])
    splits = load_aqua(config_of(root=str(tmp_path)))
    assert [problem.question for problem in splits.train] == questions
    assert splits.refused == {"question repeated": len(again)}


def test_without_dev_json_validation_is_held_out_of_train_and_test_stays_empty(
    tmp_path: Path,
) -> None:
    write(tmp_path / "aqua/train.json", [aqua_row(f"question {i}") for i in range(200)])
    splits = load_aqua(config_of(root=str(tmp_path), validation_fraction=0.2))
    assert len(splits.train) + len(splits.validation) == 200 and splits.test == ()
    assert 20 <= len(splits.validation) <= 60


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    config = config_of(root=str(tmp_path))
    write(tmp_path / "aqua/dev.json", [aqua_row("one")])
    with pytest.raises(DataError, match=r"There is no .*aqua/train\.json.*holds dev\.json"):
        load_aqua(config)
    (tmp_path / "aqua/train.json").write_text(json.dumps(aqua_row("two")) + "\n{oops\n")
    with pytest.raises(DataError, match=r"aqua/train\.json, line 2, is not JSON"):
        load_aqua(config)
    write(tmp_path / "aqua/train.json", [{"prompt": "two", "answer": "3"}])
    with pytest.raises(DataError, match=r"line 1, has the fields prompt, answer, but"):
        load_aqua(config)


def test_an_empty_split_is_an_error_that_counts_what_was_refused(tmp_path: Path) -> None:
    write(tmp_path / "aqua/train.json", [aqua_row("one")])
    write(tmp_path / "aqua/dev.json", [aqua_row("two", "Z")])
    with pytest.raises(DataError, match=r"validation split.*label not among the options"):
        load_aqua(config_of(root=str(tmp_path)))
    write(tmp_path / "aqua/dev.json", [aqua_row("one")])
    with pytest.raises(DataError, match=r"train split of .* is empty.*question repeated: 1"):
        load_aqua(config_of(root=str(tmp_path)))


def test_a_conversation_gives_back_the_problem_it_was_made_of() -> None:
    problem = problem_from_row("x", aqua_row("How many?\nCount them.", source="s"), "t-0")
    row = as_row(to_conversation(problem), answer_letter="C", letters=list("ABCDE"), source="s")
    assert problem_from_row("x", row, "t-0") == problem
    four = problem_from_row("x", aqua_row("Q", options=FIVE[:4]), "t-1")
    assert problem_from_row("x", as_row(to_conversation(four), answer_letter="C"), "t-1") == four


def test_a_conversation_whose_options_cannot_be_told_apart_keeps_its_text() -> None:
    text = "Pick one: A is 3, B is 4."
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Answer: B"}]
    row = {"messages": messages, "letters": ["A", "B"], "answer_letter": "B"}
    problem = problem_from_row("x", row, "t-0")
    assert (problem.question, problem.options, problem.letters) == (text, (), "AB")
    assert permuted(problem, (1, 0)) == problem
    assert as_row(to_conversation(problem))["messages"] == messages
    assert split_question("Only options\nA)1\nC)2") == ("Only options\nA)1\nC)2", ())
    assert split_question("How many?\nA)1\nB)2\n") == ("How many?", ("1", "2"))


def test_conversations_of_another_kind_are_refused_or_named() -> None:
    user, said = {"role": "user", "content": "Q\nA)1\nB)2"}, {"role": "assistant", "content": "3"}
    system = {"role": "system", "content": "Be brief."}
    row = {"messages": [system, user, said], "answer_letter": "A"}
    assert problem_from_row("x", row, "t").question == "Be brief.\n\nQ"
    with pytest.raises(Refused, match="more than one exchange"):
        problem_from_row("x", {"messages": [user, said, user, said], "answer_letter": "A"}, "t")
    with pytest.raises(Refused, match="label not among the options"):
        problem_from_row("x", {"messages": [user, said], "answer_letter": "C"}, "t")
    with pytest.raises(Refused, match="letters are not those of the options"):
        problem_from_row("x", row | {"letters": ["A", "B", "C"]}, "t")
    with pytest.raises(DataError, match=r"x: turn 1 is not by 'user'"):
        problem_from_row("x", {"messages": [said], "answer_letter": "A"}, "t")
    with pytest.raises(DataError, match=r"x, has messages of another shape"):
        problem_from_row("x", {"messages": ["hello"], "answer_letter": "A"}, "t")
    with pytest.raises(DataError, match=r"x, has messages of another shape"):
        problem_from_row("x", {"messages": [{**system, "content": None}, user, said]}, "t")
    with pytest.raises(Refused, match="letters are not those of the options"):
        problem_from_row("x", row | {"letters": 5}, "t")


def test_one_file_holds_all_splits_and_a_question_keeps_its_own(tmp_path: Path) -> None:
    rows = [aqua_row(f"question {i}") for i in range(300)]
    config = config_of(validation_fraction=0.1)
    write(tmp_path / "all.jsonl", rows)
    write(tmp_path / "some.jsonl", rows[150:])
    whole, half = (load_jsonl(str(tmp_path / n), config) for n in ("all.jsonl", "some.jsonl"))
    sizes = [len(part) for part in (whole.train, whole.validation, whole.test)]
    assert sum(sizes) == 300 and all(14 <= size <= 46 for size in sizes[1:])
    questions = {p.question for p in whole.validation}
    assert {p.question for p in half.validation} == questions & {r["question"] for r in rows[150:]}


def test_a_folder_of_three_files_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, count in (("train", 4), ("validation", 2), ("test", 1)):
        write(tmp_path / f"{name}.jsonl", [aqua_row(f"{name} {i}") for i in range(count)])
    splits = load_jsonl(str(tmp_path), config_of())
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 2, 1]
    assert splits.refused == {}


@pytest.fixture(scope="module")
def real_splits() -> Splits:
    return load_aqua(config_of(root=str(REAL)))


@needs_real_data
def test_the_real_rows_are_all_there(real_splits: Splits) -> None:
    """254 validation problems; 11,436 different training questions, less what is refused.

    By letters and digits alone the train file holds 11,436 different questions. `question_key`
    heeds operators, so it tells some more apart; 54 rows have their right option twice.
    """
    splits = real_splits
    assert len(splits.validation) == 254
    assert Counter(p.answer_letter for p in splits.validation) == {
        "A": 69, "B": 66, "C": 43, "D": 50, "E": 26,
    }  # fmt: skip
    assert all(len(p.options) == 5 for part in (splits.train, splits.validation) for p in part)
    rows = [json.loads(line) for line in (REAL / "aqua/train.json").open()]
    assert len({re.sub(r"[\W_]", "", row["question"].lower()) for row in rows}) == 11_436
    assert splits.refused.keys() == {"right option stands twice", "question repeated"}
    assert splits.refused["right option stands twice"] == 54
    assert len(splits.train) + sum(splits.refused.values()) == len(rows) == 12_236
    assert 11_300 <= len(splits.train) <= 11_450
    keys = [{question_key(p) for p in part} for part in (splits.train, splits.validation)]
    assert not keys[0] & keys[1]


@needs_real_data
def test_real_solutions_commit_to_their_label_and_to_nothing_else(real_splits: Splits) -> None:
    splits = real_splits
    rng = random.Random(0)
    named = re.compile(r"\b(answer|option)\b\W{1,3}(is )?\(?[A-E]\)?\W*$", re.IGNORECASE)
    cut = Counter[bool]()
    raw = [json.loads(line)["rationale"].strip() for line in (REAL / "aqua/dev.json").open()]
    for problem, before in zip(splits.validation, raw, strict=True):
        cut[problem.rationale != before] += 1
        moved = shuffled_options(problem, rng)
        assert committed_letter(solution_text(moved)) == moved.answer_letter
        right = problem.options["ABCDE".index(problem.answer_letter)]
        assert moved.options["ABCDE".index(moved.answer_letter)] == right
    assert cut[True] >= 230
    left = [p for p in (*splits.train, *splits.validation) if named.search(p.rationale)]
    assert len(left) <= 10


@pytest.mark.parametrize(
    ("rationale", "names_one"),
    [
        ("The last digit is odd, so we eliminate option C and E.", True),
        ("consider option (c) 13 * 13.85 = 180", True),
        ("Let's go through each: (A) can never be true.", True),
        ("8! = 40320\nE. 4^10 = 1048576", True),
        ("C and D are out; 299 is divisible by 13.", True),
        ("therefore answer is b explanation : 5 : 1 = x : 10", True),
        ("A can do it in 10 days, B in 15: together 1/10 + 1/15 = 1/6.", False),
        ("Let b be her age. Two choices of digit remain, so 2 * 9 = 18.", False),
        ("Each answer scores 4, a wrong one -1: 4x - (60 - x) = 130, x = 38", False),
    ],
)
def test_a_solution_that_names_an_option_keeps_its_order(rationale: str, names_one: bool) -> None:
    assert names_an_option(rationale) == names_one
    plain = problem_from_row("here", aqua_row("How many?"), "p")
    problem = replace(plain, rationale=rationale)
    orders = {shuffled_options(problem, random.Random(seed)).options for seed in range(20)}
    assert (orders == {problem.options}) == names_one


@needs_real_data
def test_few_real_solutions_name_an_option(real_splits: Splits) -> None:
    train = real_splits.train
    assert 0.01 < sum(names_an_option(p.rationale) for p in train) / len(train) < 0.05
