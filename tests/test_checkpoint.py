"""A checkpoint is whole or it is not there, whatever happens while it is written."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from aquarl.cluster.results import finished_policy
from aquarl.cluster.stages import _load_into
from aquarl.config import OptimConfig
from aquarl.errors import CheckpointError, ConfigError, StorageError
from aquarl.model import checkpoint
from aquarl.model.checkpoint import (
    check_checkpoint,
    checkpoint_folder,
    checkpoints,
    latest_checkpoint,
    load_model,
    load_training,
    read_meta,
    save_checkpoint,
    stage_folder,
)
from aquarl.model.gpt import GPT
from aquarl.model.optim import Optimizer
from aquarl.storage import get, put
from tests.fakes import random_ids, random_model, small_disk

FILES = ("weights.safetensors", "training.pt", "meta.json")


def save(run_dir: str, step: int, model: GPT | None = None, stage: str = "sft") -> str:
    """Save a checkpoint whose weights tell its step, and return its folder."""
    folder = checkpoint_folder(run_dir, stage, step)
    save_checkpoint(
        folder,
        model or random_model(seed=step),
        stage=stage,
        step=step,
        tokenizer_fingerprint="words",
        training={"step": step, "momentum": torch.full((1_000,), float(step))},
        facts={"frontier": 10 * step},
    )
    return folder


def is_whole(folder: str, step: int) -> bool:
    """Whether everything in it is what `save` wrote for that step. Raises: CheckpointError."""
    saved, made = load_model(folder, "words").state_dict(), random_model(seed=step).state_dict()
    return (
        all(torch.equal(saved[name], weight) for name, weight in made.items())
        and load_training(folder)["momentum"].eq(step).all().item()
        and read_meta(folder)["facts"] == {"frontier": 10 * step}
    )


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = random_model()
    optimizer = Optimizer(model, OptimConfig())
    model.logits(model(random_ids((2, 8)))).square().mean().backward()
    optimizer.step(lr=1.0, step=0)
    folder, rng = str(tmp_path / "step_000001"), torch.get_rng_state()
    save_checkpoint(
        folder,
        model,
        stage="sft",
        step=1,
        tokenizer_fingerprint="words",
        training={"optimizer": optimizer.state_dict(), "rng": rng},
    )
    loaded = load_model(folder)
    assert loaded.shape == model.shape
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    training = load_training(folder)
    assert torch.equal(training["rng"], rng)
    other = Optimizer(loaded, OptimConfig())
    other.load_state_dict(training["optimizer"])
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "grown", "altered at its start", "altered", "gone"])
def test_a_damaged_checkpoint_is_refused_and_passed_over(
    tmp_path: Path, name: str, damage: str
) -> None:
    run = str(tmp_path)
    before, newest = save(run, 100), save(run, 200)
    file = Path(newest) / name
    body = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(body[: len(body) // 2])
    elif damage == "grown":
        file.write_bytes(bytes(body) + b"x")
    elif damage == "gone":
        file.unlink()
    else:
        body[0 if damage.endswith("start") else len(body) // 2] ^= 1
        file.write_bytes(body)
    takes: dict[Callable[[str], Any], Sequence[str]] = {
        check_checkpoint: FILES,
        load_model: ("weights.safetensors", "meta.json"),
        load_training: ("training.pt", "meta.json"),
        read_meta: ("meta.json",),
    }
    for load, files in takes.items():
        if name in files:
            with pytest.raises(CheckpointError, match="step_000200"):
                load(newest)
        else:
            load(newest)  # reads no more than it takes
    assert latest_checkpoint(stage_folder(run, "sft")) == before
    assert is_whole(before, 100)


def test_no_single_flipped_bit_of_the_meta_goes_unnoticed(tmp_path: Path) -> None:
    file = Path(save(str(tmp_path), 1)) / "meta.json"
    whole, meta = file.read_bytes(), read_meta(str(file.parent))
    for at in range(0, len(whole), 3):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                assert read_meta(str(file.parent)) == meta  # another blank between two words, say
            except CheckpointError:
                continue


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = save(str(tmp_path), 1)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        load_model(folder, "other words")
    with pytest.raises(CheckpointError, match="another vocabulary"):
        finished_policy(str(tmp_path), "sft", "other words")
    assert is_whole(folder, 1)


def test_weights_of_another_shape_than_the_meta_says_are_refused(tmp_path: Path) -> None:
    folder = save(str(tmp_path), 1)
    file = Path(folder) / "meta.json"
    meta = json.loads(file.read_text())
    meta["shape"]["layers"] = 3
    meta["crc32"] = checkpoint._sum_of(meta)
    file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="do not have the shape"):
        load_model(folder)


def test_a_policy_without_training_state_can_be_used_but_not_resumed(tmp_path: Path) -> None:
    folder = str(tmp_path / "step_000001")
    save_checkpoint(folder, random_model(), stage="sft", step=1, tokenizer_fingerprint="words")
    load_model(folder, "words")
    with pytest.raises(CheckpointError, match="not the state to go on training"):
        load_training(folder)


def test_a_run_without_checkpoints_says_which_stage_to_run(tmp_path: Path) -> None:
    assert latest_checkpoint(stage_folder(str(tmp_path), "sft")) is None
    with pytest.raises(CheckpointError, match="Run `aquarl sft`"):
        finished_policy(str(tmp_path), "sft", "words")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_model(str(tmp_path / "nothing"))


def test_checkpoints_come_oldest_first_and_nothing_else_counts(tmp_path: Path) -> None:
    stage = tmp_path / "checkpoints" / "sft"
    for name in ("step_1000000", "step_999975", "step_000030.writing", "notes", "step_000100"):
        (stage / name).mkdir(parents=True)
    found = [Path(folder).name for folder in checkpoints(str(stage))]
    assert found == ["step_000100", "step_999975", "step_1000000"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(str(tmp_path), 5, model=random_model(seed=77))
    assert is_whole(save(str(tmp_path), 5), 5)
    assert [p.name for p in (tmp_path / "checkpoints/sft").iterdir()] == ["step_000005"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"file/run.*Not a directory"):
        save(str(tmp_path / "file" / "run"), 1)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_full_disk_leaves_every_earlier_checkpoint_whole(tmp_path: Path) -> None:
    """There is room for two checkpoints and a half."""
    with small_disk(tmp_path, kibibytes=320) as disk:
        run = str(disk)
        saved = [save(run, 1), save(run, 2)]
        for step in (3, 2):  # a new one, and one over an old one
            with pytest.raises(StorageError, match="No space left on device") as refused:
                save(run, step)
            assert f"step_{step:06d}" in str(refused.value) and "run.dir" in str(refused.value)
            assert checkpoints(stage_folder(run, "sft")) == saved
            assert not list(disk.rglob("*.writing")), "what did not fit is cleared away"
            assert all(is_whole(folder, step) for step, folder in enumerate(saved, start=1))
        shutil.rmtree(saved[0])
        assert is_whole(save(run, 3), 3), "with some space the same save succeeds"


def keep_saving(run_dir: str) -> None:
    torch.set_num_threads(1)
    for step in range(1, 10_000):
        save(run_dir, step % 7)  # new folders first, then over old ones


def test_a_process_killed_while_saving_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aquarl.model.checkpoint"])
    for round_ in range(8):
        run = str(tmp_path / str(round_))
        process = context.Process(target=keep_saving, args=(run,))
        process.start()
        deadline = time.monotonic() + 60
        while len(checkpoints(stage_folder(run, "sft"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.004 * round_)
        process.kill()
        process.join()
        folders = checkpoints(stage_folder(run, "sft"))
        assert folders, "at least one was finished before"
        assert all(is_whole(folder, int(folder[-6:])) for folder in folders)
        assert is_whole(save(run, 6), 6), "and saving goes on over whatever was left"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server of its own, spoken to through s3fs as any other."""
    moto = pytest.importorskip("moto.server", reason="the dev extra brings moto[server]")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("checkpoints-test")
        yield "s3://checkpoints-test"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_bucket_holds_checkpoints_like_a_disk(bucket: str) -> None:
    run = f"{bucket}/runs/one"
    first, second = save(run, 1), save(run, 2)
    stage = stage_folder(run, "sft")
    assert checkpoints(stage) == [first, second]
    assert is_whole(first, 1) and is_whole(second, 2)
    finished = finished_policy(run, "sft", "words").state_dict()
    torch.testing.assert_close(finished, random_model(seed=2).state_dict(), rtol=0, atol=0)


def test_a_bucket_that_is_missing_is_named_and_never_made(bucket: str) -> None:
    fs, _ = fsspec.url_to_fs(bucket)
    said = r"no bucket s3://mistyped\..*aws s3 mb s3://mistyped"
    with pytest.raises(StorageError, match=said):
        save("s3://mistyped/runs/one", 1)  # many files together
    with pytest.raises(StorageError, match=said):
        put("s3://mistyped/runs/one/config.toml", b"")
    assert not fs.exists("s3://mistyped")


def test_in_a_bucket_nothing_counts_until_the_meta_is_there(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{bucket}/runs/two"
    first = save(run, 1)
    fs, _ = fsspec.url_to_fs(run)
    write = fs.pipe_file

    def until_the_line_breaks(path: str, value: bytes) -> None:
        if path.endswith("meta.json"):
            raise OSError("connection lost")
        write(path, value)

    monkeypatch.setattr(fs, "pipe_file", until_the_line_breaks)
    with pytest.raises(StorageError, match="connection lost"):
        save(run, 2)
    assert latest_checkpoint(stage_folder(run, "sft")) == first
    assert is_whole(first, 1)


class _Calls:
    """What pickles as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_training_state_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    """With sums that fit, as whoever plants it would write them."""
    mark = tmp_path / "it ran"
    save_checkpoint(
        f"{tmp_path}/planted", random_model(), stage="sft", step=1, tokenizer_fingerprint="words",
        training={"momentum": _Calls(mark)},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"training\.pt .* it could run any code"):
        load_training(f"{tmp_path}/planted")
    assert not mark.exists()
    torch.load(tmp_path / "planted/training.pt", weights_only=False)
    assert mark.exists(), "loaded as a pickle it would have run"


def test_a_stage_of_another_size_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = save(str(tmp_path), step=1)
    with pytest.raises(
        ConfigError, match=r"width=32.* ask for .*width=64.* Choose another run.dir"
    ):
        _load_into(random_model(width=64), folder, "words")


def test_a_training_state_of_a_gpu_is_loaded_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    folder = save(str(tmp_path), step=3)
    monkeypatch.undo()
    with (
        pytest.raises(RuntimeError, match="CUDA")
        if not torch.cuda.is_available()
        else nullcontext()
    ):
        torch.load(f"{folder}/training.pt", weights_only=True)
    assert load_training(folder)["momentum"].device.type == "cpu"


def test_what_cannot_be_read_is_told_from_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        get(f"{tmp_path}/none")
    with pytest.raises(StorageError, match=r"Could not read .*: Is a directory"):
        get(str(tmp_path))
