"""What the README shows is what happens: its own data set as an example, and its commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from aquarl.cli import COMMANDS, main
from aquarl.config import DataConfig
from aquarl.tasks.arithmetic import arithmetic_problems
from aquarl.tasks.base import to_conversation
from aquarl.tasks.catalog import load_problems

README = (Path(__file__).parent.parent / "README.md").read_text()


def example_line() -> str:
    found = re.search(r"```json\n(\{.*\})\n```", README)
    assert found is not None
    return found.group(1)


def my_problems(folder: Path) -> Path:
    """The README's line, and more of the same shape."""
    lines = [example_line()]
    made = arithmetic_problems(DataConfig(train_problems=80, held_out_problems=1), seed=3)
    for problem in made.train:
        messages = [vars(message) for message in to_conversation(problem).messages]
        lines.append(
            json.dumps(
                {
                    "messages": messages,
                    "letters": list(problem.letters),
                    "answer_letter": problem.answer_letter,
                }
            )
        )
    path = folder / "my_problems.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_readmes_example_line_is_a_problem_with_options(tmp_path: Path) -> None:
    splits = load_problems(
        DataConfig(task=str(my_problems(tmp_path)), validation_fraction=0.2), seed=0
    )
    everything = [*splits.train, *splits.validation, *splits.test]
    assert len(everything) == 81 and not splits.refused
    mine = next(problem for problem in everything if problem.question == "What is 2 + 3?")
    assert mine.options == ("4", "5", "6", "7", "8")
    assert mine.answer_letter == "B"


def test_the_readmes_example_runs_from_text_to_report(
    ray_here: object, tiny: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    task = my_problems(tmp_path)
    overrides = [f"data.task={task}", "data.validation_fraction=0.2", "data.mid={task=1.0}"]
    assert main(["pipeline", "--config", tiny, f"run.dir={run}", *overrides]) == 0
    assert "greedy" in (run / "report.md").read_text().lower()


@pytest.mark.parametrize("word", sorted(set(re.findall(r"aquarl ([a-z][a-z-]+)", README))))
def test_every_command_the_readme_names_exists(word: str) -> None:
    prose = {"takes", "writes"}
    assert word in COMMANDS or word in prose
