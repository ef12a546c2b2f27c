"""The report says what the run directory holds, leaves out what was not run, and never crashes."""

import json
import math
import random
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from aquarl.config import Config, EvaluateConfig, to_toml
from aquarl.errors import DataError, StorageError
from aquarl.evaluate.evaluator import evaluate_policy, evaluation_summary
from aquarl.evaluate.plots import series
from aquarl.evaluate.report import write_report
from aquarl.observe.machine import environment
from aquarl.observe.metrics import JsonlSink
from aquarl.records import Problem, Sampling
from tests.fakes import ScriptedSampler, byte_tokenizer

PNG = b"\x89PNG\r\n\x1a\n"


def log_supervised(run_dir: str, stage: str, steps: int, first: float, last: float) -> None:
    rng, sink = random.Random(stage), JsonlSink(run_dir)
    for step in range(1, steps + 1):
        loss = last + (first - last) * math.exp(-4 * step / steps)
        metrics = {"loss/train": loss + rng.gauss(0, 0.08), "time/step_s": 0.4}
        if step % (steps // 5) == 0:
            metrics |= {"loss/validation": loss + 0.03, "loss/bits_per_byte": loss / 2.1}
        sink.log(stage, step, metrics)
    sink.close()


def log_rl(run_dir: str, steps: int) -> None:
    rng, sink = random.Random(7), JsonlSink(run_dir)
    for step in range(1, steps + 1):
        reward = 0.34 + 0.3 * (1 - math.exp(-2.5 * step / steps))
        metrics = {
            "reward/mean": min(1.0, max(0.0, reward + rng.gauss(0, 0.05))),
            "rollout/length_mean": 21 + 6 * step / steps + rng.gauss(0, 0.8),
            "rollout/cut_fraction": abs(0.08 * math.exp(-5 * step / steps) + rng.gauss(0, 0.01)),
            "loss/policy": rng.gauss(0, 0.01),
        }
        metrics |= {"time/step_s": 2.0, "time/wait_s": 0.5, "time/publish_s": 0.1}
        metrics |= {"time/learner_idle_fraction": 0.25, "time/rollout_idle_fraction": 0.4}
        metrics |= {"time/ended": 1e9 + 2 * step, "tokens/trained": 3000}
        if step % (steps // 4) == 0:
            validation = {"accuracy": 0.56, "low": 0.46, "high": 0.65, "n": 100}
            validation["majority_baseline"] = 0.23
            metrics |= {f"validation/{name}": value for name, value in validation.items()}
        sink.log("rl", step, metrics)
    sink.close()


def measured(n: int = 300) -> dict[str, Any]:
    """Return `results/evaluate.json` of three policies of rising skill, really evaluated."""
    rng, tokenizer = random.Random(0), byte_tokenizer()
    problems = []
    for i in range(n):
        letter = rng.choices("ABCDE", weights=[27, 21, 19, 18, 15])[0]
        options = tuple(f"{i}{x}" if x == letter else f"{x}" for x in "ABCDE")
        problems.append(Problem(f"p{i}", f"Which holds {i}?", options, letter))

    def policy(skill: float) -> ScriptedSampler:
        def answer(prompt: str, seed: int, sampling: Sampling) -> str:
            rng = random.Random(f"{prompt} {seed if sampling.temperature else ''}")
            number = prompt.split("Which holds ")[1].split("?")[0]
            right = next(x for x in "ABCDE" if f"{x}){number}" in prompt)
            if rng.random() < 0.05:
                return "a car"
            return f"Answer: {right if rng.random() < skill else rng.choice('AAABCDE')}"

        return ScriptedSampler(
            tokenizer, answer, lambda p: dict(zip("ABCDE", (0.3, 0.2, 0.2, 0.2, 0.1), strict=True))
        )

    config = EvaluateConfig(permutation_problems=60)
    return evaluation_summary(
        "test",
        {
            stage: evaluate_policy(problems, tokenizer, policy(skill), config, seed=0)
            for stage, skill in (("mid", 0.1), ("sft", 0.3), ("rl", 0.55))
        },
    )


def write_result(run_dir: str, stage: str, body: Any) -> None:
    fs, folder = fsspec.url_to_fs(run_dir)
    fs.makedirs(f"{folder}/results", exist_ok=True)
    fs.pipe_file(f"{folder}/results/{stage}.json", json.dumps(body).encode())


def make_run(run_dir: str) -> None:
    """Write what a whole run leaves behind."""
    for stage, steps, first, last in (
        ("base", 400, 6.2, 2.1),
        ("mid", 150, 2.6, 1.4),
        ("sft", 200, 1.5, 0.6),
    ):
        log_supervised(run_dir, stage, steps, first, last)
    log_rl(run_dir, 120)
    for stage, steps in (("base", 400), ("mid", 150), ("sft", 200), ("rl", 120)):
        result = {"stage": stage, "steps": steps, "wall_s": 1.8 * steps, "tokens": 8192 * steps}
        result |= {
            "learners": 2,
            "metrics": {},
            "refused": {"no rationale": 3} if stage == "sft" else {},
            "cut": 7 if stage == "mid" else 0,
            "ran_on": {
                "cpu": "Z80",
                "cores": 1,
                "memory_gib": 0.1,
                "nodes": 3,
                "cluster_cpus": 48.0,
                "gpus": ["H100"] * (stage == "rl"),
                "cluster_gpus": 8.0,
            },
            "rollout_workers": 2 if stage == "rl" else None,
        }
        if stage == "rl":
            result["stream"] = {"leases": 250, "reissued": 4, "set_aside": 1, "workers_replaced": 3}
        write_result(run_dir, stage, result)
    write_result(run_dir, "evaluate", measured())
    spans = "".join(
        json.dumps(
            {"step": step, "lease": 2 * step + i, "worker": f"rollout-{i}",
             "sampled": [1e9 + 2 * step, 1e9 + 2 * step + 1.2], "fetch_s": 0.1}
        ) + "\n"
        for step in range(1, 121)
        for i in (0, 1)
    )  # fmt: skip
    fs, folder = fsspec.url_to_fs(run_dir)
    fs.pipe_file(f"{folder}/ledger.jsonl", spans.encode())
    fs, folder = fsspec.url_to_fs(run_dir)
    fs.pipe_file(f"{folder}/config.toml", to_toml(Config()).encode())
    row = {
        "step": 119,
        "prompt": "Ann has 7.\nA)12",
        "answer": "7 + 5 = 12\nAnswer: A",
        "reward": 1.0,
    }
    fs.makedirs(f"{folder}/transcripts", exist_ok=True)
    fs.pipe_file(f"{folder}/transcripts/step_000119.jsonl", json.dumps(row).encode() + b"\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    make_run(str(folder))
    assert write_report(str(folder), price_per_hour=10.0) == f"{folder}/report.md"
    return folder


def test_the_page_states_each_accuracy_with_n_interval_and_baseline(run: Path) -> None:
    page = (run / "report.md").read_text()
    for stage, result in json.loads((run / "results/evaluate.json").read_text())["stages"].items():
        greedy = result["greedy"]
        accuracy, low, high = (100 * greedy[key] for key in ("accuracy", "low", "high"))
        assert f"| {stage} | 300 | {accuracy:.1f} % [{low:.1f}, {high:.1f}] |" in page
        assert f"| {100 * greedy['majority_baseline']:.1f} % |" in page
    assert "**mid** solves" in page
    assert "not distinguishable from the" in page.split("**mid** solves")[1].split("\n")[0]
    assert "above the" in page.split("**rl** solves")[1].split("\n")[0]


def test_the_page_compares_stages_on_the_same_problems(run: Path) -> None:
    page = (run / "report.md").read_text()
    test = json.loads((run / "results/evaluate.json").read_text())["comparisons"][1]
    assert f"{test['b_only']} solved by rl alone, {test['a_only']} by sft alone" in page
    assert f"McNemar's exact p = {test['p_value']:.2g}: that is unlikely to be chance" in page


def test_the_table_of_stages_holds_steps_tokens_time_and_cost(run: Path) -> None:
    page = (run / "report.md").read_text()
    # 400 steps of 8,192 tokens; 720 s = 12 min at 10.0 an hour
    assert "| base | 400 | 3,276,800 | - | 12 min | 2 | 2.00 | loss/train" in page
    assert "Rows left out of sft: no rationale: 3." in page
    assert page.count("whose end was not learned") == 1
    assert "of mid longer than model.context, whose end was not learned: 7 an epoch" in page


def test_the_page_says_where_stages_ran_how_fast_and_who_was_idle(run: Path) -> None:
    page = (run / "report.md").read_text()
    around = "1 core, 0.1 GiB, GPUs: {}; Ray: 3 nodes with 48 CPUs and 8 GPUs"
    assert f"- base, mid, sft: Z80, {around.format('none')}" in page
    assert f"- rl (2 rollout workers): Z80, {around.format('H100')}" in page
    assert "| rl | 120 | 983,040 | 1,500 |" in page  # 3,000 tokens in steps of 2 s
    assert "waited for groups 25.0 % of its steps' time" in page
    assert "without work 40.0 %" in page


def test_the_page_says_what_validation_found_and_what_died_on_the_way(run: Path) -> None:
    page = (run / "report.md").read_text()
    assert "validation 56.0 % [46.0, 65.0] of 100, baseline 23.0 %" in page
    assert "3 rollout workers died and had a successor; 4 leases had to be sampled again" in page
    assert "1 lease killed so many workers that RL went on without" in page


def test_every_picture_on_the_page_is_there_and_is_a_png(run: Path) -> None:
    page = (run / "report.md").read_text()
    names = json.loads((run / "report.json").read_text())["plots"]
    assert len(names) == 7
    for name in names:
        assert f"]({name})" in page
        assert (run / name).read_bytes().startswith(PNG)


def test_the_numbers_are_plain_json_without_the_lists_of_problems(run: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    report = json.loads((run / "report.json").read_text(), parse_constant=refuse)
    greedy = report["evaluation"]["stages"]["rl"]["greedy"]
    assert greedy["n"] == 300
    assert "is_correct" not in greedy
    assert report["stages"]["rl"]["final"]["reward/mean"] > 0.4
    assert report["environment"]["versions"]["torch"]


def test_a_report_is_made_again_in_place(run: Path) -> None:
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    write_report(str(run))
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_a_stage_still_running_is_shown_so_far_and_the_rest_is_left_out(tmp_path: Path) -> None:
    log_supervised(str(tmp_path), "base", 10, 6.0, 3.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "base", "step": 11, "loss/train": null}\n{"stage": "base", "st')
    page = Path(write_report(str(tmp_path))).read_text()
    assert "| base | 11 so far | - | - | - | - | loss/train" in page
    assert "Accuracy" not in page
    assert "cost" not in page
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "bits_per_byte.png",
        "loss.png",
    ]


def test_an_evaluation_alone_makes_a_report(tmp_path: Path) -> None:
    summary = measured(20)
    for result in summary["stages"].values():
        del result["sampled"], result["letter_logit"], result["permutation"]
    write_result(str(tmp_path), "evaluate", summary)
    page = Path(write_report(str(tmp_path))).read_text()
    assert "| rl | 20 |" in page
    assert "## Stages" not in page


def test_a_directory_without_a_run_is_refused_in_words(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="holds no metrics and no results"):
            write_report(str(folder))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_result_is_named_and_the_earlier_report_stands(tmp_path: Path) -> None:
    write_result(str(tmp_path), "sft", {"stage": "sft", "steps": 3})
    page = Path(write_report(str(tmp_path))).read_text()
    (tmp_path / "results/evaluate.json").write_text('{"split": "te')
    with pytest.raises(
        DataError, match=r"evaluate\.json is damaged .* run `aquarl evaluate` again"
    ):
        write_report(str(tmp_path))
    assert (tmp_path / "report.md").read_text() == page


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    write_result(str(tmp_path), "sft", {"stage": "sft", "steps": 3})
    (tmp_path / "report.json.writing").mkdir()  # stands in the way, also for root
    with pytest.raises(StorageError, match=r"Could not write .*report\.json"):
        write_report(str(tmp_path))


def test_a_run_in_a_bucket_is_reported_there() -> None:
    run_dir = "memory://bucket/runs/far"
    log_supervised(run_dir, "base", 10, 6.0, 3.0)
    write_result(run_dir, "base", {"stage": "base", "steps": 10, "wall_s": 4.0})
    assert write_report(run_dir) == f"{run_dir}/report.md"
    fs, folder = fsspec.url_to_fs(run_dir)
    assert "| base | 10 | - | - | 4.0 s | - |" in fs.cat_file(f"{folder}/report.md").decode()
    assert fs.cat_file(f"{folder}/plots/loss.png").startswith(PNG)


def test_a_bucket_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, *args: object, **settings: object) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails)
    with pytest.raises(
        StorageError, match=r"Could not read memory://there/metrics\.jsonl: no answer"
    ):
        write_report("memory://there")


def test_a_curve_skips_what_is_not_a_number() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "x": 2.0},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": 4, "x": math.inf},
    ]
    steps, values = series(rows, "x")
    assert (steps.tolist(), values.tolist()) == ([1], [2.0])


def test_the_environment_names_processor_memory_and_versions() -> None:
    facts = environment()
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["cpu"]
    assert {"python", "torch", "ray"} <= set(facts["versions"])


def test_what_was_measured_of_a_policy_that_is_no_more_is_left_out(tmp_path: Path) -> None:
    evaluation = measured(60)
    for stage, result in evaluation["stages"].items():
        write_result(str(tmp_path), stage, {"steps": 9, "finished": 5.0})
        result["checkpoint"] = {"stage": stage, "step": 9, "finished": 5.0}
    write_result(str(tmp_path), "evaluate", evaluation)
    write_report(str(tmp_path))
    assert "is no more" not in (tmp_path / "report.md").read_text()

    write_result(str(tmp_path), "rl", {"steps": 9, "finished": 6.0})  # made again
    write_report(str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert "What was measured of rl is of a policy that is no more" in page
    assert "**sft** (step 9) solves" in page and "**rl** (step 9) solves" not in page
    assert "**sft against mid**" in page and "**rl against sft**" not in page
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"]["outdated"] == ["rl"]

    for stage in ("mid", "sft", "rl"):  # all deleted
        (tmp_path / f"results/{stage}.json").unlink()
    write_report(str(tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert "measured of mid, sft, rl is of a policy" in page and "solves" not in page
