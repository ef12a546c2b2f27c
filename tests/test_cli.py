"""Bad input through the door that people use: one sentence, status 2, and nothing damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from aquarl.cli import main
from aquarl.cluster.connection import namespace
from aquarl.cluster.control import settings
from aquarl.cluster.results import alone_in
from aquarl.config import DataConfig, load_config, to_toml, with_absolute_paths
from aquarl.errors import DataError
from aquarl.observe.ledger import Ledger
from aquarl.storage import put

GOOD = {"question": "What is 1 + 1?", "options": ["1", "2", "3"], "correct": "B", "rationale": "2"}

Refuse = Callable[..., str]


PROGRESS = re.compile(r" +\w+ \d+/\d+  ")
"""What a slow stage says on the way."""


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that has to fail, and return the one sentence it says."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(list(argv)) == 2
        lines = capsys.readouterr().err.splitlines()
        (said,) = [line for line in lines if not PROGRESS.match(line)]
        assert said.startswith("aquarl")
        return said

    return run


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., str]:
    """Write rows, or lines as they are, into a JSONL file."""

    def write(*lines: object) -> str:
        path = tmp_path / "problems.jsonl"
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(text))
        return str(path)

    return write


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What needs no cluster.


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rl", "rl.step=10"], "Did you mean rl.steps?"),
        (["rl", "rl.steps"], "not of the form key=value"),
        (["rl", "rl.steps=-1"], "rl.steps is -1"),
        (["rl", "rl.rollouts_per_prompt=1"], "at least 2 are needed"),
        (["rl", "rl.top_k=50"], "rl.top_k"),
        (["reinforce"], "invalid choice: 'reinforce'"),
        (["rl", "--jsn"], "there is no option --jsn"),
        (["rl", "--config", "nowhere.toml"], "There is no file nowhere.toml"),
        (["rl", "--config", "no_such_preset"], "no preset of that name"),
        (["grade", "nowhere.jsonl"], "There is no nowhere.jsonl"),
        (["export", "out", "run.dir=nowhere", "--stage", "sft"], "nowhere"),
        (["export"], "arguments are required: out. `aquarl export --help`"),
        (["chat", "run.dir=nowhere"], "nowhere/tokenizer. Run `aquarl tokenizer`"),
        (["report", "run.dir=nowhere"], "nothing to report"),
        (["submit", "dance"], "There is no job 'dance'"),
        (["chat", "run.dir=nowhere", "--stage", "stf"], "invalid choice: 'stf'"),
        (["rl", "run.dir=gx://bucket/run"], "gx://bucket/run/config.toml cannot be reached"),
        (
            ["rl", "--config", "demo", "run.dir=gx://bucket/run"],
            "gx://bucket/run cannot be reached",
        ),
        (["rl", "--config", "gx://bucket/my.toml"], "gx://bucket/my.toml cannot be reached"),
        (["scale", "0"], "needs at least 1 rollout worker, not 0"),
        (["scale", "100000"], "100000 rollout workers were asked for"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(
    refused: Refuse, argv: list[str], said: str
) -> None:
    assert said in refused(*argv)


def test_a_broken_config_is_named_with_its_line(refused: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[rl]\nsteps = = 3\n")
    said = refused("rl", "--config", str(path))
    assert "mine.toml is not valid TOML" in said and "line 2" in said


def test_settings_stand_before_and_after_options(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["rl", "rl.steps=7", "--config", tiny, "sft.steps=8", "--dry-run", "mid.steps=9"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert all(f"steps = {n}\n" in printed for n in (7, 8, 9))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"completion": "Answer: A"', "line 2, is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"completion": "Answer: A", "correct": "F"}', "one upper-case letter"),
        ('{"correct": "A"}', 'no text under "completion"'),
    ],
)
def test_grade_names_the_line_it_cannot_read(
    refused: Refuse, problems: Callable[..., str], line: str, said: str
) -> None:
    path = problems({"completion": "Answer: A", "correct": "A"}, line)
    assert said in refused("grade", path)


def test_help_and_grade_start_without_torch_or_ray(problems: Callable[..., str]) -> None:
    path = problems({"completion": "so 2.\nAnswer: B", "correct": "B"})
    code = (
        "import sys; from aquarl.cli import main; status = main(['grade', sys.argv[1]]); "
        "assert not {'torch', 'ray', 'matplotlib', 'datasets'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean reward 1.0000 over 1 answers" in done.stdout


def test_a_cluster_that_takes_a_job_and_says_nothing_is_given_up(
    refused: Refuse, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquarl.cluster.control.LOST_AFTER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"cluster.address=http://127.0.0.1:{silent.getsockname()[1]}"
        said = refused("submit", "rl", "--config", tiny, f"run.dir={tmp_path}/run", address)
    assert "No cluster takes jobs at http://127.0.0.1" in said


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path, tiny: str) -> None:
    """As a process of its own: this one is in a cluster already."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "aquarl.cli", "tokenizer", "--config", tiny),
            *(f"run.dir={tmp_path}/run", "cluster.address=127.0.0.1:1"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "There is no Ray cluster to join at 127.0.0.1:1" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# What is found out on the cluster.


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([GOOD, '{"question": '], "line 2, is not JSON"),
        ([GOOD, "[" * 100_000], "nested too deeply"),
        ([""], "is empty"),
        ([{**GOOD, "correct": "E"}], "label not among the options"),
    ],
)
def test_broken_problems_are_named(
    refused: Refuse, problems: Callable[..., str], tiny: str, tmp_path: Path,
    lines: list[object], said: str,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    task = f"data.task={problems(*lines)}"
    assert said in refused("tokenizer", "--config", tiny, f"run.dir={run}", task)
    assert not (run / "results").exists() and not (run / "tokenizer").exists()


@pytest.mark.usefixtures("ray_here")
def test_a_file_that_is_missing_is_named(refused: Refuse, tiny: str, tmp_path: Path) -> None:
    here = ["tokenizer", "--config", tiny, f"run.dir={tmp_path}/run"]
    assert "nowhere.jsonl" in refused(*here, "data.task=nowhere.jsonl")
    assert "nowhere.txt" in refused(*here, "data.corpus=['nowhere.txt']")
    assert "Did you mean aqua?" in refused(*here, "data.task=aquaa")


@pytest.mark.usefixtures("ray_here")
def test_a_vocabulary_too_large_for_the_corpus_is_refused(
    refused: Refuse, tiny: str, tmp_path: Path
) -> None:
    said = refused(
        "tokenizer", "--config", tiny, f"run.dir={tmp_path}/run", "tokenizer.vocab_size=60000"
    )
    assert "tokenizer.vocab_size is 60000" in said


@pytest.mark.usefixtures("ray_here")
def test_a_stage_without_the_one_before_is_refused(
    refused: Refuse, tiny: str, tmp_path: Path
) -> None:
    said = refused("sft", "--config", tiny, f"run.dir={tmp_path}/run")
    assert "sft starts from the result of mid" in said and "aquarl pipeline" in said


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("rl.rollout_workers=99",), "need 50 CPUs, but this machine has 4"),
        (("cluster.learner_gpus=1",), "GPUs, but this machine has 0"),
        (("cluster.rollout_gpus=1",), "cluster.rollout_gpus=0"),
    ],
)
def test_more_than_the_machine_has_is_refused_and_not_waited_for(
    refused: Refuse, tiny: str, unfinished: Path, settings: tuple[str, ...], said: str
) -> None:
    assert said in refused("rl", "--config", tiny, f"run.dir={unfinished}", *settings)


@pytest.fixture
def unfinished(finished_run: Path, tmp_path: Path) -> Iterator[Path]:
    """A run whose RL is still to be done. What is there must be there afterwards, as it is."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for name in ("checkpoints/rl", "transcripts"):
        shutil.rmtree(run / name)
    for name in ("results/rl.json", "ledger.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    before = everything_in(run)
    yield run
    after = everything_in(run)
    assert {path: after.get(path) for path in before} == before


def test_prompts_that_do_not_fit_are_named_and_nothing_is_lost(
    refused: Refuse, tiny: str, unfinished: Path
) -> None:
    said = refused("rl", "--config", tiny, f"run.dir={unfinished}", "rl.max_new_tokens=5000")
    assert "5000 new ones are more than the" in said and "Lower max_new_tokens" in said


def test_a_pool_that_no_cluster_can_start_is_given_up_with_a_reason(
    refused: Refuse, tiny: str, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a named cluster, which could grow, so that only the deadline can tell."""
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that could grow")
    settings = (
        "rl.rollout_workers=1",
        "cluster.rollout_cpus=64",
        "rl.wait_timeout_s=1",
        "rl.lease_timeout_s=0.5",
    )
    said = refused("rl", "--config", tiny, f"run.dir={unfinished}", *settings)
    assert "No rollout worker has come up in 1 s" in said and "64 CPUs" in said
    (left,) = (unfinished / "stacks").iterdir()
    assert str(left) in said
    assert "in _until" in left.read_text() and '"wanted": 1' in left.read_text()


@pytest.mark.slow
def test_a_learner_group_that_no_cluster_can_start_is_given_up_with_a_reason(
    refused: Refuse, tiny: str, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "a cluster that could grow")
    settings = ("cluster.learner_cpus=64", "cluster.start_timeout_s=1", "cluster.max_failures=0")
    said = refused("rl", "--config", tiny, f"run.dir={unfinished}", *settings)
    assert "64" in said and "cluster.start_timeout_s" in said


# What stands in a run directory and is not as it was.


@pytest.mark.parametrize(
    ("setting", "before"), [("model.depth=3", "2"), ("base.matrix_lr=0.03", "0.02")]
)
def test_an_unfinished_stage_is_not_gone_on_with_under_other_settings(
    refused: Refuse, finished_run: Path, tiny: str, tmp_path: Path, setting: str, before: str
) -> None:
    run = tmp_path / "run"
    for part in ("tokenizer", "checkpoints/base"):
        shutil.copytree(finished_run / part, run / part)
    (run / "results").mkdir()
    shutil.copy(finished_run / "results/tokenizer.json", run / "results")
    there = everything_in(run)
    said = refused("base", "--config", tiny, f"run.dir={run}", setting)
    key, value = setting.split("=")
    assert f"an unfinished base stage with {key}={before}, not {value}." in said
    assert f"delete {run}/checkpoints/base to make" in said
    assert everything_in(run) == there


def test_a_damaged_ledger_is_named(refused: Refuse, finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write("{\n")
    said = refused("report", f"run.dir={run}")
    assert "Line 49 of" in said and "ledger.jsonl is damaged" in said
    with pytest.raises(DataError, match=r"ledger\.jsonl is damaged"):  # on going on with RL
        Ledger(str(run), 3)


@pytest.fixture
def without_test(tmp_path: Path) -> str:
    """A task whose test split is empty."""
    folder = tmp_path / "two splits"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [GOOD | {"question": f"{split} {n}?"} for n in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_an_empty_split_is_refused_before_anything_is_measured(
    refused: Refuse, finished_run: Path, tiny: str, without_test: str
) -> None:
    here = ["evaluate", "--config", tiny, f"run.dir={finished_run}", f"data.task={without_test}"]
    said = refused(*here, "evaluate.split=test")
    assert "test split" in said and "evaluate.split=validation" in said


def test_problems_that_a_policy_was_trained_on_are_not_put_to_it(
    refused: Refuse, problems: Callable[..., str], tmp_path: Path
) -> None:
    """The test split of a fifth held out is, of a twentieth, all training."""
    file = problems(*(GOOD | {"question": f"What is {n}?"} for n in range(200)))
    made_with = {"run": {"seed": 0}, "data": DataConfig(task=file).model_dump()}
    record = {"finished": 1.0, "settings": made_with, "steps": 1}
    put(f"{tmp_path}/run/results/rl.json", json.dumps(record).encode())
    here = ["evaluate", f"run.dir={tmp_path}/run", "evaluate.stages=['rl']", f"data.task={file}"]
    said = refused(*here, "data.validation_fraction=0.2")
    assert "was trained on every problem of this test split" in said
    assert f"its own: data.task={file} data.validation_fraction=0.05" in said


def test_a_stage_is_not_mixed_with_another_than_it_was_made_from(
    refused: Refuse, finished_run: Path, tiny: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    here = ["--config", tiny, f"run.dir={run}"]
    record = run / "results/sft.json"
    made_again = json.loads(record.read_text())
    made_again["finished"] += 1e6
    record.write_text(json.dumps(made_again))
    said = refused("rl", *here)
    assert "made from another sft" in said and f"Delete {run}/results/rl.json and" in said
    record.unlink()
    said = refused("pipeline", *here)
    assert "a finished rl stage, but not the sft stage that it was made from" in said
    assert not record.exists()


def test_two_commands_do_not_train_in_one_run_directory(
    refused: Refuse, unfinished: Path, tiny: str
) -> None:
    here = ("rl", "--config", tiny, f"run.dir={unfinished}")
    with alone_in(str(unfinished)):
        assert "Another command is training in" in refused(*here)

    class Other:
        """Has the name that a run's stream has in its cluster."""

        def is_up(self) -> bool:
            return True

    config = with_absolute_paths(load_config(tiny, [f"run.dir={unfinished}"]))
    hired: Any = ray.remote(num_cpus=0)(Other)
    other = hired.options(name="stream", namespace=namespace(config)).remote()
    ray.get(other.is_up.remote())
    try:
        assert "Another command is training in" in refused(*here)
    finally:
        ray.kill(other)


def test_what_a_pipeline_could_not_evaluate_is_refused_before_it_trains(
    refused: Refuse, tiny: str, without_test: str, tmp_path: Path
) -> None:
    here = ["pipeline", "--config", tiny, f"run.dir={tmp_path}/run"]
    said = refused(*here, f"data.task={without_test}", "evaluate.split=test")
    assert "test split" in said and "evaluate.split=validation" in said
    said = refused(*here, f"--against={tmp_path}/nobody:sft")
    assert f"no whole checkpoint of the sft stage in {tmp_path}/nobody" in said
    said = refused(*here, f"--against={tmp_path}/nobody:stf")
    assert "the stage 'stf', but there are only base, mid, sft, rl" in said
    assert not (tmp_path / "run").exists()


def test_a_final_checkpoint_that_is_damaged_is_never_replaced_by_an_earlier_one(
    refused: Refuse, finished_run: Path, tiny: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    last = run / "checkpoints/rl/step_000006/weights.safetensors"
    last.write_bytes(last.read_bytes()[:1000])
    said = refused("evaluate", "--config", tiny, f"run.dir={run}")
    assert "1000 bytes" in said and "step_000006" in said and "aquarl rl" in said


def test_another_vocabulary_is_refused(
    refused: Refuse, finished_run: Path, tiny: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "tokenizer")
    (run / "results/tokenizer.json").unlink()
    more = "tokenizer.vocab_size=390"
    assert main(["tokenizer", "--config", tiny, f"run.dir={run}", more]) == 0
    said = refused("evaluate", "--config", tiny, f"run.dir={run}", more)
    assert "another vocabulary" in said


@pytest.mark.parametrize("record", ['{"stage": ', "{}", "[]"])
def test_a_damaged_record_of_a_stage_is_named(
    record: str, refused: Refuse, finished_run: Path, tiny: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "results/rl.json").write_text(record)
    said = refused("rl", "--config", tiny, f"run.dir={run}")
    assert "results/rl.json is damaged" in said


def test_a_run_directory_that_cannot_be_written_is_named(
    refused: Refuse, tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    said = refused("tokenizer", "--config", tiny, f"run.dir={tmp_path}/file/run")
    assert "Could not write" in said or "cannot" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_a_stage_with_a_sentence_and_keeps_what_was_saved(
    refused: Refuse, tiny: str, finished_run: Path, tmp_path: Path
) -> None:
    """RL on a disk with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    one = sum(
        len(body) for body in everything_in(finished_run / "checkpoints/rl/step_000002").values()
    )
    used = sum(
        len(body)
        for name in ("tokenizer", "results", "checkpoints/sft", "transcripts")
        for body in everything_in(finished_run / name).values()
    )
    size = used + int(1.5 * one) + 120_000
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        run = disk / "run"
        for name in ("tokenizer", "results", "checkpoints/sft"):
            shutil.copytree(finished_run / name, run / name)
        (run / "results/rl.json").unlink()
        said = refused("rl", "--config", tiny, f"run.dir={run}")
        assert "No space left on device" in said and "Free some space" in said
        left = sorted(path.name for path in (run / "checkpoints/rl").iterdir())
        assert left == ["step_000002"]
        for name, body in everything_in(finished_run / "checkpoints/rl/step_000002").items():
            assert (run / Path(name).relative_to(finished_run)).read_bytes() == body
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_job_has_the_settings_it_was_given_whatever_its_run_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its words, without a file: defaults are not said, and the run's own settings do not count."""
    run = f"{tmp_path}/a run"
    own = load_config(None, ["evaluate.split=validation", f'run.dir="{run}"', "model.kv_heads=1"])
    put(f"{run}/config.toml", to_toml(own).encode())
    asked = load_config(None, [f'run.dir="{run}"', "rl.steps=7"])
    assert main(["evaluate", "--dry-run", "--config", "defaults", *settings(asked)]) == 0
    assert capsys.readouterr().out == to_toml(asked)
    assert main(["evaluate", "--dry-run", f'run.dir="{run}"']) == 0
    assert capsys.readouterr().out == to_toml(own)
