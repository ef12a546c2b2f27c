"""Names in a configuration in, problems, conversations or documents out.

The one place that knows which loader a name means. `train.*`, `rl` and `evaluate` ask here and
nowhere else.

Who permutes options: problems leave here in their written order. With `data.permute_options` the
SFT and RL stages permute train problems afresh each epoch (`tasks.base.shuffled_options`), and
`mixture` does so each pass; validation and test problems are never permuted.
"""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

from aquarl.config import Config, DataConfig
from aquarl.data.corpus import documents
from aquarl.data.files import exists, join
from aquarl.errors import ConfigError, DataError
from aquarl.records import Conversation, Problem
from aquarl.tasks.aqua import load_aqua, load_jsonl
from aquarl.tasks.arc import load_arc
from aquarl.tasks.arithmetic import arithmetic_problems, fact_documents
from aquarl.tasks.base import Splits, apart_from, shuffled_options, to_conversation
from aquarl.tasks.chat import load_chat
from aquarl.tasks.gsm8k import load_gsm8k
from aquarl.tasks.mmlu import load_mmlu

TASKS = ("arithmetic", "aqua")

T = TypeVar("T")


def load_problems(config: DataConfig, seed: int) -> Splits:
    """Return the problems of `config.task`, as many for training as `max_train_problems` allows.

    Args:
        config: `task` is "arithmetic", "aqua", or a JSONL file or folder (`aqua.load_jsonl`); a
            relative path is looked for as typed, then below `root`.
        seed: Of generated problems, and of the choice where only some train problems are kept.

    Raises:
        DataError: There is no such task or file, or what it holds cannot be used.
    """
    splits = _all_problems(config, seed)
    limit = config.max_train_problems
    if limit is None or limit >= len(splits.train):
        return splits
    places = random.Random(f"train problems {seed}").sample(range(len(splits.train)), limit)
    return replace(splits, train=tuple(splits.train[place] for place in sorted(places)))


def _all_problems(config: DataConfig, seed: int) -> Splits:
    if config.task == "arithmetic":
        return arithmetic_problems(config, seed)
    if config.task == "aqua":
        return load_aqua(config)
    if "/" not in config.task and "." not in config.task and not exists(config.task):
        close = difflib.get_close_matches(config.task, TASKS, n=1)
        raise DataError(
            f"data.task names {config.task!r}, but there are only {', '.join(TASKS)} or the path "
            "of a JSONL file." + (f" Did you mean {close[0]}?" if close else "")
        )
    below_root = join(config.root, config.task)
    return load_jsonl(config.task if exists(config.task) else below_root, config)


def problems_to_evaluate(config: Config) -> tuple[Problem, ...]:
    """Return the problems of `evaluate.split`. Raises: ConfigError, where there are none."""
    splits = load_problems(config.data, config.run.seed)
    problems: tuple[Problem, ...] = getattr(splits, config.evaluate.split)
    if not problems:
        raise ConfigError(
            f"The {config.evaluate.split} split of {config.data.task} holds no problems. "
            "Set evaluate.split=validation."
        )
    return problems


def split_by(config: DataConfig, seed: int) -> dict[str, Any]:
    """Return the settings that decide which problems are held out of training, by name."""
    if config.task != "arithmetic":
        return {"data.task": config.task, "data.validation_fraction": config.validation_fraction}
    keys = ("task", "difficulty", "largest_number", "train_problems", "held_out_problems")
    return {f"data.{key}": getattr(config, key) for key in keys} | {"run.seed": seed}


def not_trained_on(config: DataConfig, seed: int, problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems that a policy made with these settings cannot have been trained on.

    Raises: DataError, where what it was trained on is no longer there.
    """
    seen = [*load_problems(config, seed).train]
    if config.mid.get("easy"):
        seen += cast(Sequence[Problem], mid_source("easy", config, seed, "train"))
    return apart_from(seen, problems)


def check_mid_sources(config: DataConfig) -> None:
    """Refuse files of the mid mixture that are not there, before the stage before it is trained.

    Raises: DataError.
    """
    for name, passes in config.mid.items():
        if config.root is None or not passes or name in ("task", "easy"):
            continue
        if not exists(folder := join(config.root, name)):
            raise DataError(
                f"data.mid asks for {name}, but there is no {folder}. Put its files there, name "
                f"another data.root, or leave it out: data.mid.{name}=0."
            )


def mid_source(
    name: str, config: DataConfig, seed: int, split: str, refused: Counter[str] | None = None
) -> Sequence[Problem | Conversation]:
    """Return what one source of the mid mixture holds, in the order of its files.

    Args:
        name: "chat", "gsm8k", "mmlu", "arc", "task": the problems of `config.task`, or "easy":
            generated problems of one step.
        split: "train" or "validation". No source gives anything of its test split.
        refused: Rows that cannot be used are counted here, by reason.

    Raises:
        DataError: Its files cannot be used.
    """
    assert split in ("train", "validation"), split
    if name == "chat":
        return load_chat(config, split)
    if name == "gsm8k":
        return load_gsm8k(config, split)
    if name in ("mmlu", "arc"):
        load = load_mmlu if name == "mmlu" else load_arc
        loaded = load(config, split, refused)
        return loaded if split == "validation" else apart_from(load(config, "validation"), loaded)
    if name == "task":
        problems = load_problems(config, seed)
        if refused is not None:
            refused.update(problems.refused)
        return problems.train if split == "train" else problems.validation
    assert name == "easy", name
    easy = arithmetic_problems(config.model_copy(update={"difficulty": 1}), seed + 1)
    of_split = easy.train if split == "train" else easy.validation
    return apart_from(_held_out(config, seed), of_split)


def mixture(
    config: DataConfig, seed: int, split: str = "train", refused: Counter[str] | None = None
) -> list[Conversation]:
    """Return the mid stage's conversations, each source as often as `config.mid` says, shuffled.

    Args:
        config: `mid` maps a source to passes over it: 2.0 is all of it twice, 0.5 a random half.
        seed: Decides halves, orders of options, and the shuffle.
        split: "train", or "validation": there each source in use stands once, whole.
        refused: Rows that cannot be used are counted here, by reason.

    Raises:
        DataError: A source is unusable, or the mixture is empty.
    """
    mixed: list[Conversation] = []
    foreign = {name for name, passes in config.mid.items() if passes} - {"task", "easy"}
    held_out = _held_out(config, seed) if foreign and split == "train" else ()
    for name, passes in config.mid.items():
        if passes == 0:
            continue
        rng = random.Random(f"mid {seed} {name}")
        loaded = mid_source(name, config, seed, split, refused)
        if name in foreign and split == "train":
            loaded, before = apart_from(held_out, loaded), len(loaded)
            if refused is not None and len(loaded) < before:
                refused["question that the task holds out"] += before - len(loaded)
        permutes = config.permute_options and name == "task" and split == "train"
        for item in repeated(loaded, passes, rng) if split == "train" else loaded:
            if permutes and isinstance(item, Problem):
                item = shuffled_options(item, rng)
            mixed.append(_as_conversation(item))
    if not mixed:
        raise DataError(
            f"The {split} mixture of the mid stage is empty: data.mid is {config.mid}. "
            "Give a source passes, for example data.mid={task = 1.0}."
        )
    random.Random(f"mid {seed} order").shuffle(mixed)
    return mixed


def repeated(items: Sequence[T], passes: float, rng: random.Random) -> list[T]:
    """Return the items so many times over; a broken last pass takes a random part."""
    whole, rest = divmod(passes, 1)
    return [*items] * int(whole) + rng.sample(items, round(rest * len(items)))


def corpus_documents(config: DataConfig, seed: int, split: str = "train") -> Iterator[str]:
    """Yield the documents of `config.corpus`, generated ones among those read.

    Files and hub end after one pass; "arithmetic" alone never ends. Where both are named they
    alternate, even in characters, until the files end.

    Raises:
        DataError: A pattern matches nothing, a file is broken, or a split is empty.
    """
    read_from = tuple(pattern for pattern in config.corpus if pattern != "arithmetic")
    if not config.corpus:
        raise DataError(
            "data.corpus is empty, so there is no text to train on. "
            'Set data.corpus=["arithmetic"], ["hub"], or files.'
        )
    generated = fact_documents(config, seed, split)
    if not read_from:
        return generated
    read = documents(config.model_copy(update={"corpus": read_from}), seed, split)
    return read if read_from == config.corpus else _alternating(read, generated)


def _alternating(finite: Iterator[str], endless: Iterator[str]) -> Iterator[str]:
    ahead = 0  # characters by which the finite text leads
    for document in finite:
        yield document
        ahead += len(document)
        while ahead > 0:
            other = next(endless)
            yield other
            ahead -= len(other)


def _held_out(config: DataConfig, seed: int) -> Sequence[Problem]:
    """Return what no stage may train on: the task's validation and test problems."""
    splits = load_problems(config, seed)
    return [*splits.validation, *splits.test]


def _as_conversation(item: Problem | Conversation) -> Conversation:
    return to_conversation(item) if isinstance(item, Problem) else item
