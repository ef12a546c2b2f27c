"""The whole path at tiny size, as a user types it, on a real Ray."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from aquarl.cli import main
from aquarl.cluster.results import finished_policy
from aquarl.config import load_config
from aquarl.data.tokenizer import Tokenizer
from aquarl.evaluate.report import write_report
from aquarl.model.checkpoint import checkpoints, latest_checkpoint
from aquarl.observe.metrics import read_metrics
from aquarl.records import Conversation, Message, Sampling
from aquarl.rl.prompts import PromptSource
from aquarl.serve.chat import reply, stream_text
from aquarl.tasks.catalog import load_problems, not_trained_on
from tests.conftest import rows
from tests.fakes import REAL, real_data

pytestmark = pytest.mark.usefixtures("ray_here")
STEPS = {"base": 4, "mid": 10, "sft": 10, "rl": 6}


def test_every_stage_leaves_its_result_its_curve_and_a_whole_checkpoint(finished_run: Path) -> None:
    words = Tokenizer.load(f"{finished_run}/tokenizer")
    curves = read_metrics(str(finished_run))
    for stage, steps in STEPS.items():
        result = json.loads((finished_run / f"results/{stage}.json").read_text())
        assert (result["stage"], result["steps"]) == (stage, steps)
        assert result["wall_s"] == pytest.approx(result["finished"] - result["started"])
        assert result["tokens"] > 0
        assert [row["step"] for row in curves[stage]] == list(range(steps + 1))
        newest = latest_checkpoint(f"{finished_run}/checkpoints/{stage}")
        assert newest is not None and newest.endswith(f"step_{steps:06d}")
        assert finished_policy(str(finished_run), stage, words.fingerprint).shape.width == 64


def test_the_time_of_the_stages_adds_up_to_that_of_the_command(finished_run: Path) -> None:
    results = [
        json.loads((finished_run / f"results/{stage}.json").read_text())
        for stage in ("tokenizer", *STEPS)
    ]
    whole = results[-1]["finished"] - results[0]["started"]
    assert sum(result["wall_s"] for result in results) == pytest.approx(whole, abs=0.5)


def test_each_problem_of_an_epoch_is_trained_exactly_once(finished_run: Path, tiny: str) -> None:
    config = load_config(tiny, [f"run.dir={finished_run}"])
    trained = rows(finished_run / "ledger.jsonl")
    assert Counter(row["step"] for row in trained) == {step: 8 for step in range(6)}
    # 48 problems and 6 steps of 8 prompts: exactly one epoch.
    problems = load_problems(config.data, config.run.seed).train
    assert Counter(row["problem"] for row in trained) == {problem.id: 1 for problem in problems}
    words = Tokenizer.load(f"{finished_run}/tokenizer")
    source = PromptSource(problems, words, config.run.seed, config.data.permute_options)
    assert [row["problem"] for row in trained] == [source.prompt(i).problem_id for i in range(48)]
    assert all(row["weights_version"] == row["step"] for row in trained)  # max_staleness = 0


def test_the_ledger_and_the_curve_tell_the_same_rewards(finished_run: Path) -> None:
    curve = {row["step"]: row for row in read_metrics(str(finished_run))["rl"]}
    for step in range(6):
        rewards = [
            reward
            for row in rows(finished_run / "ledger.jsonl")
            if row["step"] == step
            for reward in row["rewards"]
        ]
        assert sum(rewards) / len(rewards) == pytest.approx(curve[step]["reward/mean"])


def test_transcripts_of_every_step_can_be_read(finished_run: Path) -> None:
    for step in range(6):
        shown = rows(finished_run / f"transcripts/step_{step:06d}.jsonl")
        assert len(shown) == 2
        assert all(row["step"] == step and row["right_letter"] in "ABCDE" for row in shown)


def test_the_report_is_there_in_all_its_parts(finished_run: Path) -> None:
    page = (finished_run / "report.md").read_text()
    report = json.loads((finished_run / "report.json").read_text())
    assert set(report["evaluation"]["stages"]) == {"sft", "rl"}
    plots = sorted((finished_run / "plots").iterdir())
    assert plots and all(plot.stat().st_size > 1000 for plot in plots)
    assert all(f"plots/{plot.name}" in page for plot in plots if plot.suffix == ".png")


def test_a_second_run_skips_every_stage(
    finished_run: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished_run / "checkpoints").rglob("*")}
    stages = [["tokenizer"], ["base"], ["mid"], ["sft"], ["rl"]]
    for stage in stages:
        assert main([*stage, "--config", tiny, f"run.dir={finished_run}"]) == 0
    said = capsys.readouterr()
    assert said.err.count("stands already") == 5 and "done" not in said.err
    assert said.out == ""
    after = {path: path.stat().st_mtime_ns for path in (finished_run / "checkpoints").rglob("*")}
    assert after == before


def test_other_settings_are_refused_and_what_may_change_is_not(
    finished_run: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["rl", "--config", tiny, f"run.dir={finished_run}"]
    assert main([*here, "sft.steps=9"]) == 2
    said = capsys.readouterr().err
    assert "finished rl stage with sft.steps=10, not 9" in said and "run.dir" in said
    assert main([*here, "rl.rollout_workers=2", "rl.save_every=1"]) == 0


def test_evaluate_prints_one_json_object_and_nothing_else(
    finished_run: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["evaluate", "--config", tiny, f"run.dir={finished_run}", "--json"]
    assert main(here) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((finished_run / "results/evaluate.json").read_text())
    greedy = printed["stages"]["rl"]["greedy"]
    assert greedy["n"] == 12 and greedy["low"] <= greedy["accuracy"] <= greedy["high"]


def test_a_policy_answers_at_the_terminal(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "What is 2 + 3?"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
    likeliest = ("--temperature", "0", "--max-new-tokens", "7", "--stage", "sft")
    assert main(["chat", f"run.dir={finished_run}", *likeliest]) == 0
    printed = capsys.readouterr().out
    words = Tokenizer.load(f"{finished_run}/tokenizer")
    prompt = words.render_prompt(Conversation((Message("user", question),), source="chat"))
    policy = finished_policy(str(finished_run), "sft", words.fingerprint)
    ids = reply(policy, words, prompt, Sampling(7, 0.0), torch.Generator())
    said = "".join(stream_text(words, ids))
    assert said and f"policy> {said}" in printed


def test_a_pipeline_prints_one_json_object_and_says_the_rest_on_stderr(
    after_sft: Path, tiny: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline", "--config", tiny, f"run.dir={after_sft}", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads((after_sft / "results/evaluate.json").read_text())
    assert out.count("\n") == 1
    assert err.count("stands already") == 4 and " rl 6/6 " in err and "rl  done in" in err
    assert f"The report is {after_sft}/report.md" in err


def test_the_evaluation_names_the_checkpoints_that_it_measured(finished_run: Path) -> None:
    evaluation = json.loads((finished_run / "results/evaluate.json").read_text())
    for stage, result in evaluation["stages"].items():
        made = json.loads((finished_run / f"results/{stage}.json").read_text())["finished"]
        assert result["checkpoint"] == {"stage": stage, "step": STEPS[stage], "finished": made}


def test_every_stage_says_where_it_ran(finished_run: Path) -> None:
    stages = json.loads((finished_run / "report.json").read_text())["stages"]
    for about in stages.values():
        ran_on = about["ran_on"]
        assert (ran_on["nodes"], ran_on["cluster_cpus"]) == (1, 4)  # what `ray_here` starts
        assert ran_on["cpu"] and ran_on["cores"] == os.cpu_count()
    assert stages["rl"]["rollout_workers"] == load_config(None, []).rl.rollout_workers.min


def test_the_times_of_steps_and_of_workers_fit_one_another(finished_run: Path) -> None:
    result = json.loads((finished_run / "results/rl.json").read_text())
    curve = [row for row in read_metrics(str(finished_run))["rl"] if "time/ended" in row]
    for row in curve:
        parts = row["time/wait_s"] + row["time/learn_s"] + row["time/publish_s"]
        assert parts == pytest.approx(row["time/step_s"], rel=0.05, abs=0.05)
        assert 0 <= row["time/learner_idle_fraction"] < 1
    # New weights every step (max_staleness = 0); where a validation comes first, it fetches them.
    assert all(row["time/fetch_s"] > 0 for row in curve if row["step"] % 3)
    ended = {row["step"]: row["time/ended"] for row in curve}
    spans: dict[str, set[tuple[float, float]]] = {}
    for row in rows(finished_run / "ledger.jsonl"):
        since, until = row["sampled"]
        assert result["started"] < since < until < ended[row["step"]]
        if row["step"]:  # on-policy: only after the step before
            assert since > ended[row["step"] - 1] - 0.1
        spans.setdefault(row["worker"], set()).add((since, until))
    for of_one in spans.values():  # a worker does one thing at a time
        ordered = sorted(of_one)
        assert all(a[1] <= b[0] + 0.002 for a, b in pairwise(ordered))
    assert "plots/rl_timeline.png" in (finished_run / "report.md").read_text()


def test_a_run_against_its_own_copy_differs_in_nothing(
    finished_run: Path,
    tiny: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On more problems than were held out when they were made, less those of training."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    here = ["evaluate", "--config", tiny, f"run.dir={copy}", "--json", "evaluate.stages=['rl']"]
    assert main([*here, "--against", f"{finished_run}:rl", "data.held_out_problems=300"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    then, now = (load_config(tiny, [f"data.held_out_problems={n}"]).data for n in (16, 300))
    unseen = len(not_trained_on(then, 0, load_problems(now, 0).test))
    assert 0 < printed["left_out"] == 300 - unseen
    left_out = " of the split left out: a policy measured here was made with other settings"
    write_report(str(copy))
    page = (copy / "report.md").read_text()
    assert left_out in page and "but those of data.held_out_problems=300.**" in page
    assert left_out not in (finished_run / "report.md").read_text()
    compared = printed["comparisons"][-1]
    assert (compared["a"], compared["b"]) == (f"{finished_run}:rl", "rl")
    assert compared["p_value"] == 1.0 and compared["difference"] == 0.0
    kept = json.loads((copy / "wandb.json").read_text())["evaluate"]
    assert list((copy / "wandb").glob(f"offline-run-*-{kept}"))


def test_the_tokenizer_has_a_run_of_its_own_and_says_how_it_compresses(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = (f"run.dir={run}", "tokenizer.vocab_size=480", "track.wandb=offline")
    assert main(["tokenizer", "--config", tiny, *settings]) == 0
    assert "vocabulary 480  bytes_per_token " in capsys.readouterr().err
    kept = json.loads((run / "wandb.json").read_text())["tokenizer"]
    assert list((run / "wandb").glob(f"offline-run-*-{kept}"))
    result = json.loads((run / "results/tokenizer.json").read_text())
    assert 1.5 < result["metrics"]["bytes_per_token"] < 8


@pytest.mark.slow
def test_stages_one_by_one_give_the_weights_of_the_pipeline_and_so_does_one_that_is_resumed(
    finished_run: Path, tiny: str, tmp_path: Path
) -> None:
    folder = tmp_path / "one by one"
    halfway = "checkpoints/base/step_000002"
    shutil.copytree(finished_run / halfway, folder / halfway)
    for stage in ("tokenizer", "base", "mid"):
        assert main([stage, "--config", tiny, f"run.dir={folder}"]) == 0
    curve = read_metrics(str(folder))["base"]
    assert [row["step"] for row in curve if "loss/train" in row] == [2, 3]
    for stage in ("base", "mid"):
        here, there = (
            Path(str(latest_checkpoint(f"{run}/checkpoints/{stage}"))) / "weights.safetensors"
            for run in (folder, finished_run)
        )
        assert here.read_bytes() == there.read_bytes()
    assert len(checkpoints(f"{folder}/checkpoints/base")) == 2


@pytest.mark.slow
@real_data("aqua")
def test_real_files_go_from_text_to_report(tmp_path: Path) -> None:
    """Some rows of each file that README names, with the preset that it names."""
    data, run = tmp_path / "data", tmp_path / "run"
    rows_of = {
        "aqua/train.json": 300, "aqua/dev.json": 40, "chat/chat.jsonl": 40,
        "gsm8k/train.jsonl": 40, "mmlu/val.jsonl": 40, "mmlu/dev.jsonl": 20,
    }  # fmt: skip
    for name, count in rows_of.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        with (REAL / name).open() as source:
            (data / name).write_text("".join(islice(source, count)))
    (data / "corpus").mkdir()
    shutil.copy(min((REAL / "corpus").glob("*.zst"), key=os.path.getsize), data / "corpus")
    small = (
        "data.validation_fraction=0.3", "tokenizer.train_chars=300000",
        "tokenizer.vocab_size=1000", "model.width=64",
        "model.heads=1", "base.steps=2", "mid.steps=2", "sft.steps=2", "rl.steps=2",
        "rl.max_new_tokens=8", "evaluate.max_new_tokens=8", "evaluate.samples=2", "evaluate.k=[1]",
        "evaluate.permutation_problems=4", "cluster.learner_cpus=0.5", "cluster.rollout_cpus=0.5",
    )  # fmt: skip
    preset = ["--config", "ray_jobs/aqua_cpu.toml", f"data.root={data}", f"run.dir={run}"]
    assert main(["pipeline", *preset, *small]) == 0
    measured = json.loads((run / "results/evaluate.json").read_text())
    assert (measured["split"], measured["n"]) == ("validation", 40)
    letters = Counter(
        json.loads(line)["correct"] for line in (data / "aqua/dev.json").read_text().splitlines()
    )
    for stage in ("sft", "rl"):
        greedy = measured["stages"][stage]["greedy"]
        assert greedy["majority_baseline"] == max(letters.values()) / 40
        assert greedy["low"] <= greedy["accuracy"] <= greedy["high"]
    assert "Accuracy (validation split)" in (run / "report.md").read_text()
