"""Promises of `aquarl.tasks.catalog` and of the mid stage's sources."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from aquarl.config import DataConfig, load_config
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import ConfigError, DataError
from aquarl.records import Conversation, Message, Problem
from aquarl.tasks import arc, mmlu
from aquarl.tasks.base import question_key, to_conversation
from aquarl.tasks.catalog import (
    check_mid_sources,
    corpus_documents,
    load_problems,
    mid_source,
    mixture,
    not_trained_on,
    repeated,
)
from aquarl.tasks.chat import conversation_from_row, load_chat
from aquarl.tasks.gsm8k import plain_answer
from aquarl.tasks.rows import problem_from_row
from tests.fakes import REAL, real_data

needs_real_data = real_data("gsm8k")
FOUR = ["A)1", "B)2", "C)3", "D)4"]


def conversations(name: str, config: DataConfig, split: str) -> list[Conversation]:
    items = mid_source(name, config, 0, split)
    return [to_conversation(item) if isinstance(item, Problem) else item for item in items]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small folder of every source, in the shapes of the real ones."""
    chosen = [
        {"question": f"{n} {i}", "options": FOUR, "correct": "B"} for n in "mvd" for i in range(9)
    ]
    write(tmp_path / "mmlu/val.jsonl", chosen[9:18])
    write(tmp_path / "mmlu/dev.jsonl", chosen[18:])
    write(tmp_path / "mmlu/test.jsonl", [{"never": "read"}])
    write(tmp_path / "arc/train.jsonl", chosen[:9])
    write(tmp_path / "arc/dev.jsonl", chosen[9:12])
    sums = [
        {"question": f"sum {i}", "answer": f"{i}+1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in range(100)
    ]
    write(tmp_path / "gsm8k/train.jsonl", sums)
    write(tmp_path / "gsm8k/test.jsonl", [{"never": "read"}])
    turns = [
        [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "hi"}]
        for i in range(100)
    ]
    write(tmp_path / "chat/one.jsonl", [{"messages": t, "source": "one"} for t in turns[:50]])
    write(tmp_path / "chat/two.jsonl", [{"messages": t} for t in turns[50:]])
    return tmp_path


def config_of(root: Path | None = None, **settings: Any) -> DataConfig:
    settings = {"train_problems": 40, "held_out_problems": 10} | settings
    return DataConfig(root=str(root) if root else None, **settings)


def test_dialogues_of_one_system_prompt_stand_on_both_sides(tmp_path: Path) -> None:
    turns = [
        [
            {"role": "system", "content": "Rewrite what you are given."},
            {"role": "user", "content": f"hello {i}"},
            {"role": "assistant", "content": "hi"},
        ]
        for i in range(100)
    ]
    write(tmp_path / "chat/one.jsonl", [{"messages": t} for t in turns])
    config = config_of(tmp_path, validation_fraction=0.2)
    train, held_out = (load_chat(config, split) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 100 and 5 < len(held_out) < 40


def test_an_unknown_name_is_answered_with_the_nearest_known() -> None:
    with pytest.raises(DataError, match=r"data\.task names 'aqau'.*Did you mean aqua\?"):
        load_problems(config_of(task="aqau"), 0)
    for passes in (0, 1):
        with pytest.raises(ConfigError, match=r"data\.mid\.caht is 'caht', but: .*'chat'"):
            load_config(None, [f"data.mid.caht={passes}"])
    with pytest.raises(DataError, match=r"There is no .*mine\.jsonl"):
        load_problems(config_of(task="mine.jsonl"), 0)


def test_files_of_a_source_that_are_not_there_are_named_before_anything_is_trained(
    root: Path,
) -> None:
    config = config_of(root, mid={"chat": 0.5, "mmlu": 1.0, "task": 1.0, "gsm8k": 0.0})
    for unused in ("gsm8k", "arc"):
        (root / unused).rename(root / f"no {unused}")
    check_mid_sources(config)
    (root / "mmlu").rename(root / "no mmlu")
    with pytest.raises(DataError, match=r"asks for mmlu, .* no .*/mmlu\..*data\.mid\.mmlu=0"):
        check_mid_sources(config)


def test_what_a_policy_was_trained_on_is_not_put_to_it_again() -> None:
    small: dict[str, Any] = {"difficulty": 1, "largest_number": 5, "train_problems": 900}
    small["held_out_problems"] = 100
    then, now = config_of(mid={"task": 1.0, "easy": 1.0}, **small), config_of(**small)
    problems = load_problems(now, 1).test
    kept = not_trained_on(then, 0, problems)
    seen = [*load_problems(then, 0).train, *mid_source("easy", then, 0, "train")]
    keys = {question_key(item) for item in seen}
    assert [p for p in problems if question_key(p) not in keys] == kept
    assert 0 < len(kept) < len(problems)
    assert not_trained_on(now, 1, problems) == [*problems]


def test_a_task_file_is_found_as_typed_or_below_the_root(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "options": FOUR, "answer_letter": "A"} for i in range(100)]
    write(tmp_path / "mine/all.jsonl", rows)
    typed = load_problems(config_of(task=str(tmp_path / "mine/all.jsonl")), 0)
    below = load_problems(config_of(tmp_path, task="mine/all.jsonl"), 0)
    assert typed == below
    assert sum(map(len, (typed.train, typed.validation, typed.test))) == 100


def test_train_problems_are_limited_and_held_out_ones_are_not() -> None:
    whole = load_problems(config_of(), 3)
    few = load_problems(config_of(max_train_problems=7), 3)
    assert len(whole.train) == 40 and len(few.train) == 7
    assert set(few.train) < set(whole.train)
    assert (few.validation, few.test) == (whole.validation, whole.test)
    assert load_problems(config_of(max_train_problems=7), 3) == few
    assert load_problems(config_of(max_train_problems=99), 3) == whole


def test_gsm8k_answers_lose_their_marks_and_close_like_every_task() -> None:
    answer = "48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = $<<48+24=72>>72.\n#### 1,072"
    assert plain_answer("x", answer) == "48/2 = 24 clips.\nIn all 48+24 = $72.\nAnswer: 1,072"
    with pytest.raises(DataError, match=r"x, line 3: the answer does not end in a line"):
        plain_answer("x, line 3", "24")


def test_hub_rows_of_mmlu_and_arc_become_the_same_problems_as_local_ones() -> None:
    wanted = problem_from_row("x", {"question": "Q", "options": FOUR, "correct": "C"}, "t")
    row = {"question": "Q", "choices": ["1", "2", "3", "4"], "answer": 2, "subject": "s"}
    choices = {"text": ["1", "2", "3", "4"], "label": ["1", "2", "3", "4"]}
    made = [
        mmlu.lettered(row),
        mmlu.lettered({"train": row}),
        arc.lettered({"question": "Q", "choices": choices, "answerKey": "3"}),
        arc.lettered(
            {"question": "Q", "choices": choices | {"label": [*"ABCD"]}, "answerKey": "C"}
        ),
    ]
    for lettered in made:
        assert vars(problem_from_row("x", lettered | {"source": ""}, "t")) == vars(wanted)
    assert arc.lettered({"question": "Q", "choices": choices, "answerKey": "E"})["correct"] == ""


def test_without_a_root_everything_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, configurations, splits and rows are those of the data sets' cards on the hub."""
    aqua = {"options": [*FOUR, "E)5"], "rationale": "1 + 2 = 3", "correct": "C"}
    choices = {"text": ["1", "2", "3", "4"], "label": [*"ABCD"]}
    row = {"choices": ["1", "2", "3", "4"], "answer": 2, "subject": "algebra"}
    hub: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {
        ("deepmind/aqua_rat", "raw", split): [{"question": f"{split}?", **aqua}]
        for split in ("train", "validation", "test")
    }
    hub |= {
        ("cais/mmlu", "auxiliary_train", "train"): [{"train": {"question": "aux?", **row}}],
        ("cais/mmlu", "all", "validation"): [{"question": "val?", **row}],
    }
    for name in ("ARC-Easy", "ARC-Challenge"):
        for split in ("train", "validation"):
            question = {"id": "1", "question": f"{name} {split}?", "answerKey": "C"}
            hub["allenai/ai2_arc", name, split] = [question | {"choices": choices}]
    hub["openai/gsm8k", "main", "train"] = [
        {"question": f"{i}?", "answer": f"<<{i}={i}>>{i}\n#### {i}"} for i in range(200)
    ]
    hub["HuggingFaceTB/smol-smoltalk", None, "train"] = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b"}]}
        for i in range(200)
    ]
    hub["karpathy/fineweb-edu-100b-shuffle", None, "train"] = [{"text": f"{i}"} for i in range(200)]
    read = set()

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        read.add((name, config, split))
        return hub[name, config, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = config_of(task="aqua", corpus=["hub"])
    splits = load_problems(config, 0)
    for split in ("train", "validation", "test"):
        (problem,) = getattr(splits, split)
        assert (problem.question, problem.answer_letter) == (f"{split}?", "C")
    assert [p.question for p in mmlu.load_mmlu(config)] == ["aux?"]
    assert [p.question for p in mmlu.load_mmlu(config, "validation")] == ["val?"]
    for split in ("train", "validation"):
        questions = [problem.question for problem in arc.load_arc(config, split)]
        assert questions == [f"ARC-Easy {split}?", f"ARC-Challenge {split}?"]
    for source in ("gsm8k", "chat"):
        parts = [mid_source(source, config, 0, split) for split in ("train", "validation")]
        assert min(map(len, parts)) > 0 and sum(map(len, parts)) == 200
    texts = [*corpus_documents(config, 0, "train"), *corpus_documents(config, 0, "validation")]
    assert sorted(texts, key=int) == [f"{i}" for i in range(200)]
    assert read == set(hub), "all of it, and no test split of a source of mid"


def test_files_may_hold_the_rows_of_the_hub(root: Path) -> None:
    texts = ["1", "2", "3", "4"]
    write(root / "mmlu/val.jsonl", [{"question": "Q", "choices": texts, "answer": 2}])
    choices = {"text": texts, "label": [*"ABCD"]}
    write(root / "arc/train.jsonl", [{"question": "Q", "choices": choices, "answerKey": "C"}])
    for problem in (*mmlu.load_mmlu(config_of(root)), *arc.load_arc(config_of(root))):
        assert (problem.options, problem.answer_letter) == (("1", "2", "3", "4"), "C")
    write(root / "arc/train.jsonl", [{"question": "Q", "choices": texts}])
    with pytest.raises(DataError, match="has the fields question, choices, but"):
        arc.load_arc(config_of(root))


def test_dialogues_must_alternate() -> None:
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    system = {"role": "system", "content": "c"}
    assert conversation_from_row("x", {"messages": [system, user, said]}).messages == (
        Message("system", "c"), Message("user", "a"), Message("assistant", "b"),
    )  # fmt: skip
    for turns in ([user, user], [said], [user, system], [system], []):
        with pytest.raises(DataError, match=r"^x"):
            conversation_from_row("x", {"messages": turns})
    with pytest.raises(DataError, match=r"x, has the fields text, but a dialogue needs messages"):
        conversation_from_row("x", {"text": "a"})


@pytest.mark.parametrize("name", ["chat", "gsm8k", "mmlu", "arc", "task"])
def test_a_source_never_shows_validation_in_training(root: Path, name: str) -> None:
    config = config_of(root, validation_fraction=0.2)
    train, held_out = (conversations(name, config, s) for s in ("train", "validation"))
    asked = [{c.messages[0].content for c in part} for part in (train, held_out)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    ids, is_learned = Tokenizer({bytes([i]): i for i in range(256)}).render_conversation(train[0])
    assert len(ids) == len(is_learned) and any(is_learned)


def test_a_question_held_out_of_mmlu_or_arc_is_not_trained_under_other_options(root: Path) -> None:
    again = {"question": "Held  out?", "options": [*FOUR, "E)5"], "correct": "E"}
    config = config_of(root)
    for name, train, held_out in (("mmlu", "val", "dev"), ("arc", "train", "dev")):
        other = {"question": "Another", "options": FOUR, "correct": "A"}
        write(root / f"{name}/{train}.jsonl", [again, other])
        write(root / f"{name}/{held_out}.jsonl", [{**other, "question": "held out"}])
        (kept,) = mid_source(name, config, 0, "train")
        assert isinstance(kept, Problem) and kept.question.startswith("Another")


def test_mmlu_trains_on_the_auxiliary_file_where_there_is_one(root: Path) -> None:
    def questions(split: str) -> set[str]:
        loaded = mmlu.load_mmlu(config_of(root), split)
        return {problem.question[0] for problem in loaded}

    assert (questions("train"), questions("validation")) == ({"v"}, {"d"})
    write(root / "mmlu/auxiliary_train.jsonl", [{"question": "m", "options": FOUR, "correct": "A"}])
    assert (questions("train"), questions("validation")) == ({"m"}, {"v"})


def test_passes_repeat_all_and_a_part() -> None:
    counts = Counter(repeated(range(10), 2.5, random.Random(0)))
    assert sorted(counts.values()) == [2] * 5 + [3] * 5
    assert repeated(range(10), 0.0, random.Random(0)) == []


def test_the_mixture_honours_passes_and_is_the_same_for_the_same_seed(root: Path) -> None:
    config = config_of(root, mid={"arc": 2.0, "mmlu": 0.5, "chat": 0.0, "task": 1.0})
    mixed = mixture(config, 1)
    assert len(mixed) == 2 * 9 + round(0.5 * 9) + 40
    asked = Counter(c.messages[0].content for c in mixed)
    assert sorted(Counter(asked.values()).items()) == [(1, 4 + 40), (2, 9)]
    assert mixture(config, 1) == mixed and mixture(config, 2) != mixed
    assert len(mixture(config, 1, "validation")) == 3 + 9 + 10
    with pytest.raises(DataError, match=r"train mixture of the mid stage is empty"):
        mixture(config_of(root, mid={"arc": 0.0}), 1)


def test_rows_that_the_mixture_cannot_use_are_counted(root: Path) -> None:
    row = {"question": "m", "options": FOUR}
    write(root / "mmlu/auxiliary_train.jsonl", [row | {"correct": label} for label in "AZZ"])
    refused: Counter[str] = Counter()
    assert len(mixture(config_of(root, mid={"mmlu": 1.0}), 0, "train", refused)) == 1
    assert refused == {"label not among the options": 2}


def test_no_source_of_the_mixture_trains_on_what_the_task_holds_out(root: Path) -> None:
    splits = {"train": range(5), "validation": range(5, 8), "test": (8, 9, 10, 10)}
    for split, numbers in splits.items():
        asked = [{"question": f"Sum {n}?", "options": FOUR, "correct": "A"} for n in numbers]
        write(root / f"mine/{split}.jsonl", asked)
    config = config_of(root, task="mine/", mid={"gsm8k": 1.0, "task": 1.0})
    refused: Counter[str] = Counter()
    trained = mixture(config, 0, "train", refused)
    sums = {c.messages[0].content for c in trained if c.source == "gsm8k"}
    assert {f"sum {n}" for n in range(5)} & sums
    assert not {f"sum {n}" for n in range(5, 11)} & sums
    elsewhere = {c.messages[0].content for c in mixture(config, 0, "validation")}
    held_out = sum(f"sum {n}" not in elsewhere for n in range(5, 11))
    assert refused["question that the task holds out"] == held_out > 0


def test_the_mixture_permutes_the_options_of_train_problems_only() -> None:
    def first_options(split: str, permutes: bool) -> set[str]:
        config = config_of(permute_options=permutes, mid={"task": 1.0})
        return {c.messages[0].content for c in mixture(config, 0, split)}

    assert first_options("train", True) != first_options("train", False)
    assert first_options("validation", True) == first_options("validation", False)


def test_generated_and_read_text_alternate_even_in_characters(tmp_path: Path) -> None:
    read = [f"document {i} " + "x" * 2_000 for i in range(20)]
    (tmp_path / "a.txt").write_text("\n<|doc|>\n".join(read))
    config = config_of(tmp_path, corpus=("arithmetic", "a.txt"))
    mixed = list(corpus_documents(config, 0))
    from_file = sum(len(text) for text in mixed if text.startswith("document"))
    assert 0.45 < from_file / sum(map(len, mixed)) < 0.55
    assert list(corpus_documents(config, 0)) == mixed
    alone = corpus_documents(config_of(corpus=("arithmetic",)), 0)
    assert len(list(islice(alone, 100))) == 100
    with pytest.raises(DataError, match=r"data\.corpus is empty"):
        corpus_documents(config_of(corpus=()), 0)


@needs_real_data
def test_the_real_sources_are_all_there() -> None:
    config = config_of(REAL, task="aqua")
    sizes = {
        name: tuple(len(mid_source(name, config, 0, s)) for s in ("train", "validation"))
        for name in ("chat", "gsm8k", "mmlu", "arc")
    }
    assert sum(sizes["chat"]) == 9_759 and sum(sizes["gsm8k"]) == 7_473
    assert sizes["mmlu"] == (1_529, 285)  # of 1,531, one has its right option twice, one is in both
    assert sizes["arc"] == (3_367, 869)  # three more stand in both files
    for conversation in conversations("gsm8k", config, "train"):
        said = conversation.messages[1].content
        assert "<<" not in said and said.splitlines()[-1].startswith("Answer: ")
