"""A run in Google Cloud Storage is the run of a disk: real gcsfs, an emulator of the service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from aquarl.cli import main
from aquarl.cluster.results import finished_checkpoint, finished_policy
from aquarl.cluster.stages import token_folder
from aquarl.config import DataConfig, load_config
from aquarl.data.corpus import documents
from aquarl.data.files import read_column, read_rows
from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import DataError, StorageError
from aquarl.evaluate.report import write_report
from aquarl.model.checkpoint import (
    checkpoint_folder,
    checkpoints,
    latest_checkpoint,
    load_model,
    load_training,
    save_checkpoint,
    stage_folder,
)
from aquarl.model.gpt import GPT
from aquarl.observe.ledger import Ledger
from aquarl.observe.metrics import JsonlSink, read_metrics
from aquarl.records import LeaseResult
from aquarl.serve.export import export
from aquarl.storage import put
from tests.fakes import byte_tokenizer, make_group, random_model

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tokenizer", "base", "mid", "sft", "rl")


@pytest.fixture
def run_dir(bucket: str) -> str:
    """A place in the bucket where nothing is yet."""
    return f"{bucket}/runs/{uuid.uuid4().hex}"


def write(path: str, body: bytes) -> None:
    fs, where = fsspec.url_to_fs(path)
    fs.pipe_file(where, body)


def read(path: str) -> bytes:
    fs, where = fsspec.url_to_fs(path)
    return bytes(fs.cat_file(where))


def save(run_dir: str, step: int) -> str:
    """Save a policy whose weights tell its step, and return its folder."""
    save_checkpoint(
        checkpoint_folder(run_dir, "sft", step),
        random_model(vocab=byte_tokenizer().vocab_size, seed=step),
        stage="sft",
        step=step,
        tokenizer_fingerprint=byte_tokenizer().fingerprint,
        training={"momentum": torch.full((1_000,), float(step))},
    )
    return checkpoint_folder(run_dir, "sft", step)


def assert_is_of_step(model: GPT, step: int) -> None:
    made = random_model(vocab=byte_tokenizer().vocab_size, seed=step).state_dict()
    torch.testing.assert_close(model.state_dict(), made, rtol=0, atol=0)


def test_a_checkpoint_comes_back_bit_for_bit(run_dir: str) -> None:
    first, second = save(run_dir, 1), save(run_dir, 2)
    assert checkpoints(stage_folder(run_dir, "sft")) == [first, second]
    assert_is_of_step(load_model(first, byte_tokenizer().fingerprint), 1)
    assert load_training(first)["momentum"].eq(1).all()
    assert_is_of_step(finished_policy(run_dir, "sft", byte_tokenizer().fingerprint), 2)


def test_a_checkpoint_counts_only_with_its_meta(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(run_dir, 1)
    fs, _ = fsspec.url_to_fs(run_dir)
    send = fs.pipe_file

    def until_the_line_breaks(path: str, value: bytes) -> None:
        if path.endswith("meta.json"):
            raise OSError("connection lost")
        send(path, value)

    monkeypatch.setattr(fs, "pipe_file", until_the_line_breaks)
    with pytest.raises(StorageError, match="connection lost"):
        save(run_dir, 2)
    monkeypatch.undo()
    assert latest_checkpoint(stage_folder(run_dir, "sft")) == first

    second = save(run_dir, 2)  # over whatever was left
    assert latest_checkpoint(stage_folder(run_dir, "sft")) == second
    fs.rm(f"{second.removeprefix('gs://')}/meta.json")
    assert latest_checkpoint(stage_folder(run_dir, "sft")) == first


def test_a_bucket_that_is_missing_is_named_and_never_made(bucket: str) -> None:
    with pytest.raises(StorageError, match=r"gcloud storage buckets create gs://mistyped`"):
        put("gs://mistyped/runs/one/config.toml", b"")
    assert not fsspec.url_to_fs(bucket)[0].exists("gs://mistyped")


def test_a_tokenizer_comes_back_with_its_fingerprint(run_dir: str) -> None:
    trained = Tokenizer.train(["naïve café, 你好: 12 * 12 = 144\n"] * 50, vocab_size=280)
    trained.save(f"{run_dir}/tokenizer")
    loaded = Tokenizer.load(f"{run_dir}/tokenizer")
    assert (loaded.ranks, loaded.fingerprint) == (trained.ranks, trained.fingerprint)


def test_a_corpus_is_read_from_the_bucket(run_dir: str) -> None:
    texts = [f"document {i}\n\nsecond line" for i in range(80)]
    write(f"{run_dir}/text/a.txt", "\n<|doc|>\n".join(texts[:20]).encode())
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[20:40])
    write(f"{run_dir}/text/b.jsonl", lines.encode())
    assert [row["text"] for _, row in read_rows(f"{run_dir}/text/b.jsonl")] == texts[20:40]
    packed = zstandard.ZstdCompressor().compress("\n<|doc|>\n".join(texts[40:60]).encode())
    write(f"{run_dir}/text/c.txt.zst", packed)
    shard = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[60:]}), shard, row_group_size=7)
    whole = shard.getvalue().to_pybytes()
    write(f"{run_dir}/text/d.parquet", whole)

    for patterns in (("text",), ("text/*.txt*", "text/b.jsonl", "text/d.parquet")):
        config = DataConfig(root=run_dir, corpus=patterns, validation_fraction=0.2)
        splits = [list(documents(config, 0, split)) for split in ("train", "validation")]
        assert all(splits) and sorted(splits[0] + splits[1]) == sorted(texts)

    with pytest.raises(DataError, match=r"There is no gs://.*b\.json\. .*Did you mean b\.jsonl\?"):
        list(read_rows(f"{run_dir}/text/b.json"))
    write(f"{run_dir}/text/d.parquet", whole[:-9])
    with pytest.raises(DataError, match=r"gs://.*d\.parquet is not a whole parquet file"):
        list(read_column(f"{run_dir}/text/d.parquet", "text"))


def test_a_ledger_takes_back_what_came_after_the_checkpoint(run_dir: str) -> None:
    ledger = Ledger(run_dir, 0)
    for step in range(3):
        ledger.add(step, [LeaseResult.of([make_group([1], [[2], [3]])])])
    ledger.write()
    resumed = Ledger(run_dir, 2)  # the checkpoint is of step 2: step 2 itself is trained again
    resumed.add(2, [LeaseResult.of([make_group([1], [[2], [3]], rewards=[0.0, 1.0])])])
    resumed.write()
    rows = [json.loads(line) for line in read(f"{run_dir}/ledger.jsonl").splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["rewards"] for row in rows] == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def test_a_resumed_curve_goes_on_from_what_stands_there(run_dir: str) -> None:
    for steps in ((1, 2), (2, 3)):
        sink = JsonlSink(run_dir)
        for step in steps:
            sink.log("sft", step, {"loss/train": 1 / step})
        sink.close()
    assert [row["step"] for row in read_metrics(run_dir)["sft"]] == [1, 2, 3]
    assert read(f"{run_dir}/metrics.jsonl").count(b"\n") == 4


def test_an_export_from_bucket_to_bucket_is_that_of_a_disk(run_dir: str, tmp_path: Path) -> None:
    for folder in (run_dir, str(tmp_path)):
        byte_tokenizer().save(f"{folder}/tokenizer")
        save(folder, 7)
        export(finished_checkpoint(folder, "sft"), f"{folder}/exported", "nanochat")
    on_disk = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    fs, where = fsspec.url_to_fs(f"{run_dir}/exported")
    assert {Path(path).name: fs.cat_file(path) for path in fs.find(where)} == on_disk


@pytest.mark.slow
def test_a_whole_pipeline_in_a_bucket_makes_what_it_makes_on_a_disk(
    run_dir: str, finished_run: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--config", tiny, f"run.dir={run_dir}"]
    # A Ray of its own: one that runs already gave its workers another environment.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "aquarl.cli", "pipeline", *here],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    config = load_config(tiny, [f"run.dir={run_dir}"])
    assert not token_folder(config).exists(), "the encoded corpus is of use to nobody any more"

    for stage in ("base", "mid", "sft", "rl"):
        newest = latest_checkpoint(f"{run_dir}/checkpoints/{stage}")
        there = latest_checkpoint(f"{finished_run}/checkpoints/{stage}")
        assert newest is not None and there is not None
        assert newest.rsplit("/", 1)[1] == Path(there).name
        assert read(f"{newest}/weights.safetensors") == read(f"{there}/weights.safetensors"), stage
    problems = [
        [json.loads(line)["problem"] for line in read(f"{run}/ledger.jsonl").splitlines()]
        for run in (run_dir, finished_run)
    ]
    assert problems[0] == problems[1]

    report, on_disk = (json.loads(read(f"{run}/report.json")) for run in (run_dir, finished_run))
    assert report["evaluation"]["comparisons"] == on_disk["evaluation"]["comparisons"]
    assert report["plots"] == on_disk["plots"]
    for name in report["plots"]:
        assert read(f"{run_dir}/{name}").startswith(b"\x89PNG")

    assert write_report(run_dir) == f"{run_dir}/report.md"  # again, over the one that stands
    capsys.readouterr()
    for stage in STAGES:
        assert main([stage, *here]) == 0
    assert capsys.readouterr().err.count("stands already") == len(STAGES)
