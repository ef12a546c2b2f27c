"""Metrics arrive whole, come back in order, and watching never stops a run."""

import io
import json
import logging
import math
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
from rich.console import Console

from aquarl.config import Config
from aquarl.observe.metrics import (
    ConsoleSink,
    JsonlSink,
    Sinks,
    WandbSink,
    headline,
    make_sinks,
    read_metrics,
    wandb_mode,
)
from aquarl.observe.transcripts import forget_transcripts, write_transcripts
from aquarl.records import LeaseResult, Prompt, Rollout, RolloutGroup
from tests.fakes import byte_tokenizer


def steps(run_dir: str, stage: str) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)[stage]]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    sink = JsonlSink(str(tmp_path / "run"))
    sink.log("sft", 40, {"loss/train": 1.5})
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert (row["stage"], row["step"], row["loss/train"]) == ("sft", 40, 1.5)
    assert abs(row["time"] - (tmp_path / "run/metrics.jsonl").stat().st_mtime) < 60


def test_a_number_that_is_not_finite_is_null_and_the_line_stays_json(tmp_path: Path) -> None:
    JsonlSink(str(tmp_path)).log("sft", 1, {"loss/train": math.nan, "x": math.inf, "y": 1})
    row = read_metrics(str(tmp_path))["sft"][0]
    assert (row["loss/train"], row["x"], row["y"]) == (None, None, 1.0)


def test_a_resumed_stage_replaces_the_steps_it_does_again(tmp_path: Path) -> None:
    first = JsonlSink(str(tmp_path))
    for step in (1, 2, 3):
        first.log("rl", step, {"reward/mean": 0.1 * step})
    first.log("sft", 3, {"loss/train": 1.0})
    resumed = JsonlSink(str(tmp_path))
    resumed.begin("rl", 2)
    resumed.log("rl", 2, {"reward/mean": 0.9})
    resumed.log("rl", 2, {"validation/accuracy": 0.5})
    assert steps(str(tmp_path), "rl") == [1, 2] and steps(str(tmp_path), "sft") == [3]
    (_, row) = read_metrics(str(tmp_path))["rl"]
    assert (row["reward/mean"], row["validation/accuracy"]) == (0.9, 0.5)


def test_of_a_stage_that_is_made_again_nothing_old_is_left(tmp_path: Path) -> None:
    for steps_of_stage in (5, 2):
        sink = JsonlSink(str(tmp_path))
        sink.begin("sft", 0)
        for step in range(steps_of_stage):
            sink.log("sft", step, {f"of {steps_of_stage}": step})
    rows = read_metrics(str(tmp_path))["sft"]
    assert [row.keys() - {"stage", "time"} for row in rows] == [{"step", "of 2"}] * 2
    sink.begin("sft", 0)
    assert read_metrics(str(tmp_path)) == {}


def test_half_a_line_of_a_killed_process_costs_only_itself(tmp_path: Path) -> None:
    JsonlSink(str(tmp_path)).log("sft", 1, {"loss/train": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 2, "loss/tr')
    JsonlSink(str(tmp_path)).log("sft", 3, {"loss/train": 0.5})
    assert steps(str(tmp_path), "sft") == [1, 3]


def test_lines_refused_for_want_of_room_are_written_whole_when_there_is_some(
    tmp_path: Path,
) -> None:
    sink = JsonlSink(str(tmp_path))
    sink.log("sft", 1, {})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))  # room for ten bytes more
    try:
        for step in (2, 3):
            with pytest.raises(OSError, match="too large"):
                sink.log("sft", step, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    sink.log("sft", 4, {})
    assert steps(str(tmp_path), "sft") == [1, 2, 3, 4]


def test_in_a_bucket_rows_are_gathered_and_what_stood_there_stays() -> None:
    run_dir = "memory://bucket/metrics-run"
    for start in (1, 11):
        sink = JsonlSink(run_dir, every_s=1000.0)
        for step in range(start, start + 10):
            sink.log("base", step, {})
        # only the first row went at once; one write for each of the others would be too many
        assert steps(run_dir, "base")[-1] == start
        sink.close()
    assert steps(run_dir, "base") == list(range(1, 21))


def test_a_run_that_logged_nothing_has_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(str(tmp_path)) == {}


class BrokenSink:
    def begin(self, stage: str, step: int) -> None:
        raise ConnectionError("the service is away")

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("the service is away")

    def close(self) -> None:
        raise ConnectionError("the service is away")


def test_a_failing_sink_warns_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Sinks([BrokenSink(), JsonlSink(str(tmp_path))]) as sinks:
        for step in (1, 2, 3):
            sinks.log("sft", step, {"loss/train": 1.0})
    assert steps(str(tmp_path), "sft") == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "BrokenSink failed (the service is away); the run goes on."
    ]


def test_a_stop_by_the_user_is_not_swallowed() -> None:
    class Interrupted(BrokenSink):
        def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([Interrupted()]).log("sft", 1, {})


def console(is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=is_terminal, width=160), out


def test_off_a_terminal_the_first_and_last_step_are_lines_and_the_rest_waits() -> None:
    screen, out = console(is_terminal=False)
    sink = ConsoleSink({"sft": 100, "rl": 5}, screen, every_s=1000.0)
    for step in range(1, 101):
        sink.log("sft", step, {"time/step_s": 0.5, "loss/train": 1 / step})
    sink.log("rl", 1, {"reward/mean": 0.25})
    sink.close()
    assert out.getvalue().splitlines() == [
        "  sft 1/100  loss/train 1  time/step_s 0.5",
        "  sft 100/100  loss/train 0.01  time/step_s 0.5",
        "   rl 1/5  reward/mean 0.25",
    ]


def test_on_a_terminal_each_stage_gets_a_bar_with_its_numbers() -> None:
    screen, out = console(is_terminal=True)
    sink = ConsoleSink({"sft": 2, "rl": 9}, screen)
    sink.log("tokenizer", 0, {"vocabulary": 512})  # it has no steps to show
    sink.log("sft", 2, {"loss/train": 0.125})
    sink.log("rl", 7, {"reward/mean": 0.5})
    sink.close()
    for shown in ("sft", "2/2", "loss/train 0.125", "rl", "reward/mean 0.5"):
        assert shown in out.getvalue()
    assert "vocabulary" not in out.getvalue()


def test_the_headline_puts_reward_and_loss_before_the_rest() -> None:
    numbers = {"time/step_s": 0.1, "a/b": 2, "loss/train": 3.14159, "reward/mean": 0.5}
    assert headline(numbers, most=3) == "reward/mean 0.5  loss/train 3.142  time/step_s 0.1"


@pytest.mark.parametrize(
    ("environment", "setting", "mode"),
    [
        (None, "off", "off"),
        (None, "offline", "offline"),
        ("offline", "off", "offline"),
        ("disabled", "online", "off"),
        ("", "online", "online"),
    ],
)
def test_the_environment_decides_about_wandb_before_the_configuration(
    environment: str | None, setting: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert wandb_mode(Config.model_validate({"track": {"wandb": setting}})) == mode


def test_without_wandb_nothing_of_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with make_sinks(Config.model_validate({"run": {"dir": str(tmp_path)}})) as sinks:
        sinks.log("sft", 1, {"loss/train": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def wandb_records(folder: Path) -> Iterator[Any]:
    """Yield what W&B's own offline file holds: protobuf records in a LevelDB log."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at, body = path.read_bytes(), 7, b""  # 7 bytes say whose file it is
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no record begins in the last bytes of a block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        body += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(body)
            body = b""
            yield record


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that were logged to a run."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in wandb_records(folder)
        if record.history.item
    ]


def test_wandb_keeps_one_run_a_stage_and_a_resumed_stage_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = Config.model_validate({"run": {"dir": str(tmp_path / "night")}})
    sink = WandbSink(config)
    sink.log("sft", 1, {"loss/train": 1.5})
    sink.log("sft", 2, {"loss/train": 1.25})
    sink.log("rl", 1, {"reward/mean": 0.5})
    sink.close()
    ids = json.loads((tmp_path / "night/wandb.json").read_text())
    assert set(ids) == {"sft", "rl"}
    (sft,) = (tmp_path / "night/wandb").glob(f"offline-run-*-{ids['sft']}")
    rows = wandb_history(sft)
    assert [(row["step"], row["loss/train"]) for row in rows] == [(1, 1.5), (2, 1.25)]
    about = next(record.run for record in wandb_records(sft) if record.run.run_id)
    assert (about.run_group, about.display_name, about.job_type) == ("night", "night-sft", "sft")
    settings = {update.key: json.loads(update.value_json) for update in about.config.update}
    assert settings["sft"] == config.model_dump(mode="json")["sft"]

    resumed = WandbSink(config)
    resumed.begin("sft", 2)
    resumed.log("sft", 2, {"loss/train": 1.25})
    resumed.close()
    assert json.loads((tmp_path / "night/wandb.json").read_text()) == ids

    anew = WandbSink(config)
    anew.begin("sft", 0)
    anew.log("sft", 0, {"loss/train": 1.75})
    anew.begin("sft", 0)  # the learners were started again: the run that is open goes on
    anew.log("sft", 0, {"loss/train": 1.75})
    anew.close()
    now = json.loads((tmp_path / "night/wandb.json").read_text())
    assert now["rl"] == ids["rl"] and now["sft"] != ids["sft"]
    (sft,) = (tmp_path / "night/wandb").glob(f"offline-run-*-{now['sft']}")
    assert [row["step"] for row in wandb_history(sft)] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("account", "why"),
    [
        ({}, "nobody is logged in"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "deadline exceeded"),
    ],
    ids=["nobody logged in", "service away"],
)
def test_curves_are_kept_offline_where_wandb_cannot_be_used(
    account: dict[str, str], why: str, tmp_path: Path
) -> None:
    code = (
        "import sys; from aquarl.config import Config; from aquarl.observe.metrics import *\n"
        "about = {'run': {'dir': sys.argv[1]}, 'track': {'wandb': 'online'}}\n"
        "sink = WandbSink(Config.model_validate(about), patience_s=1.0)\n"
        "for stage in ('sft', 'rl'):\n"
        "    with Sinks([sink]) as sinks:\n"
        "        sinks.log(stage, 1, {'loss/train': 1.5})\n"
    )
    usual = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = usual | {"HOME": str(tmp_path)} | account
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("W&B cannot be used") == 1 and why in said and "`wandb sync" in said
    with pytest.raises(ProcessLookupError):  # W&B's own processes are gone with ours
        os.killpg(process.pid, 0)
    kept = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert [wandb_history(run)[0]["loss/train"] for run in kept] == [1.5, 1.5]


def test_a_wandb_that_cannot_start_is_tried_once_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "sideways")  # W&B itself refuses this
    sink = WandbSink(Config.model_validate({"run": {"dir": str(tmp_path)}}))
    with pytest.raises(Exception, match="sideways"):
        sink.log("sft", 1, {"loss/train": 1.0})
    sink.log("sft", 2, {"loss/train": 1.0})
    sink.close()


def make_group(index: int, rewards: tuple[float, ...]) -> RolloutGroup:
    tokenizer = byte_tokenizer()
    rollouts = []
    for g, reward in enumerate(rewards):
        ids = (*tokenizer.encode(f"é {g}\nAnswer: A"), tokenizer.end_of_turn)
        rollouts.append(Rollout(ids, (0.0,) * len(ids), True, letter="A", reward=reward))
    return RolloutGroup(
        lease_id=0,
        index=index,
        step=3,
        prompt=Prompt(f"p{index}", tuple(tokenizer.encode("Which?\nA)1")), "ABCDE", "A"),
        rollouts=tuple(rollouts),
        advantages=tuple(reward - 0.5 for reward in rewards),
        weights_version=3,
    )


RESULTS = [LeaseResult.of([make_group(0, (0.0, 1.0))])]


def test_transcripts_show_the_best_and_the_worst_as_text(tmp_path: Path) -> None:
    groups = [make_group(i, (0.0, 1.0)) for i in range(4)]
    results = [LeaseResult.of(groups[:3]), LeaseResult.of(groups[3:])]
    write_transcripts(str(tmp_path), 3, results, byte_tokenizer(), how_many=2)
    lines = (tmp_path / "transcripts/step_000003.jsonl").read_text().splitlines()
    best, worst = map(json.loads, lines)
    assert (best["problem"], best["reward"], best["advantage"]) == ("p0", 1.0, 0.5)
    assert (worst["problem"], worst["reward"], worst["advantage"]) == ("p2", 0.0, -0.5)
    assert best["prompt"] == "Which?\nA)1"
    assert best["answer"] == "é 1\nAnswer: A"
    assert "é" in lines[0]


def test_no_transcripts_are_written_when_none_are_wanted(tmp_path: Path) -> None:
    write_transcripts(
        str(tmp_path),
        3,
        RESULTS,
        byte_tokenizer(),
        how_many=0,
    )
    assert list(tmp_path.iterdir()) == []


def test_where_rl_begins_the_transcripts_from_there_on_are_forgotten(tmp_path: Path) -> None:
    forget_transcripts(str(tmp_path), 0)  # there are none yet
    for step in (2, 3, 4):
        write_transcripts(str(tmp_path), step, RESULTS, byte_tokenizer(), how_many=1)
    forget_transcripts(str(tmp_path), 3)
    (left,) = (tmp_path / "transcripts").iterdir()
    assert left.name == "step_000002.jsonl"


def test_transcripts_that_cannot_be_written_are_only_warned_of(tmp_path: Path) -> None:
    (tmp_path / "transcripts").write_text("a file stands in the way")
    with pytest.warns(UserWarning, match="No transcripts"):
        write_transcripts(str(tmp_path), 3, RESULTS, byte_tokenizer(), 1)


def test_transcripts_of_a_bucket_go_to_the_bucket() -> None:
    write_transcripts("memory://bucket/talk", 12, RESULTS, byte_tokenizer(), how_many=5)
    fs, folder = fsspec.url_to_fs("memory://bucket/talk/transcripts")
    assert len(fs.cat_file(f"{folder}/step_000012.jsonl").splitlines()) == 1
