"""One real Ray for the whole test session, and a configuration that runs in seconds on it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from aquarl.records import Metrics

# Before Ray or torch are imported; workers inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray looks for new logs of workers twice a second, to print them at drivers; no test reads that.
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "3600")
# Ray starts a worker for each CPU before anybody asks for one; many tests need fewer.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# A shell that starts this in the background has it ignore Ctrl-C, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

PATIENCE_S = 300
"""How long a test waits for what should come. No promise of speed: a shared machine keeps none."""


def pytest_configure(config: pytest.Config) -> None:
    """Have kernels interpreted, on a CPU, unless it is a GPU's tests that were asked for."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


TINY = """
[data]
train_problems = 48
held_out_problems = 16
largest_number = 9
[tokenizer]
train_chars = 20000
vocab_size = 400
[model]
width = 64
heads = 1
context = 128
[base]
steps = 4
batch_tokens = 512
eval_rows = 4
save_every = 2
[mid]
steps = 10
batch_tokens = 1024
eval_rows = 4
[sft]
steps = 10
batch_tokens = 1024
eval_rows = 4
[rl]
steps = 6
prompts_per_step = 8
prompts_per_lease = 4
rollouts_per_prompt = 4
max_new_tokens = 16
eval_every = 3
eval_problems = 8
save_every = 2
max_staleness = 0
lr_scale = 0.1
wait_timeout_s = 60
lease_timeout_s = 50
[evaluate]
problems = 12
permutation_problems = 4
max_new_tokens = 16
samples = 2
k = [1, 2]
prompts_per_batch = 6
[cluster]
learner_cpus = 0.5
rollout_cpus = 0.5
start_timeout_s = 60
"""


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Any]:
    """A Ray of this test session alone, with 4 CPUs by its own account."""
    import ray

    assert not ray.is_initialized()
    ray.init(
        address="local",
        num_cpus=4,
        namespace="tests",
        log_to_driver=False,
        logging_level="error",
        object_store_memory=200 << 20,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a configuration whose whole pipeline takes seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="session")
def finished_run(ray_here: Any, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a whole pipeline in it. Read it, or copy it; do not write to it."""
    from aquarl.cli import main

    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["pipeline", "--config", tiny, f"run.dir={folder}"]) == 0
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def eventually(look: Callable[[], Any], every: float = 0.05) -> Any:
    """Return what `look` returns once that is truthy.

    Args:
        every: Seconds between two looks. A look that is a command takes from what it waits for.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (seen := look()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(every)
    return seen


@pytest.fixture
def after_sft(finished_run: Path, tmp_path: Path) -> Path:
    """A run directory in which everything but RL is finished."""
    from aquarl.cluster.results import copy_up_to_sft

    folder = tmp_path / "run"
    copy_up_to_sft(finished_run, folder)
    return folder


def weights(run: Path, stage: str = "rl") -> dict[str, Tensor]:
    """Return what a stage ended with."""
    from aquarl.cluster.results import finished_policy
    from aquarl.data.tokenizer import Tokenizer

    words = Tokenizer.load(f"{run}/tokenizer")
    return finished_policy(str(run), stage, words.fingerprint).state_dict()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].equal(b[name]), name


@pytest.fixture(scope="session")
def in_process(finished_run: Path, tiny: str) -> tuple[dict[str, Tensor], list[Metrics]]:
    """Weights and numbers of the RL stage without any cluster."""
    return rl_in_process(tiny, finished_run)


def rl_in_process(tiny: str, run: Path, *settings: str) -> tuple[dict[str, Tensor], list[Metrics]]:
    """Return weights and numbers of an RL stage without any cluster, from a run's SFT stage on."""
    from aquarl.cluster.results import finished_policy
    from aquarl.config import load_config
    from aquarl.data.tokenizer import Tokenizer
    from aquarl.engines.torch_engine import TorchSampler
    from aquarl.model.gpt import GPT
    from aquarl.rl.learner import Learner
    from aquarl.rl.loop import InProcess, train_policy
    from aquarl.rl.prompts import PromptSource
    from aquarl.rl.stream import RolloutStream
    from aquarl.tasks.base import to_prompt
    from aquarl.tasks.catalog import load_problems

    config = load_config(tiny, [f"run.dir={run}", *settings])
    words = Tokenizer.load(f"{run}/tokenizer")
    splits = load_problems(config.data, config.run.seed)
    model = finished_policy(str(run), "sft", words.fingerprint)
    stream = InProcess(
        RolloutStream(PromptSource(splits.train, words, config.run.seed), config.rl),
        TorchSampler(GPT(model.shape), words.end_of_turn, "cpu"),
    )
    seen: list[Metrics] = []
    train_policy(
        config.rl,
        stream,
        Learner(model, config.rl),
        validation=[to_prompt(problem, words) for problem in splits.validation[:8]],
        log=lambda step, metrics: seen.append(metrics),
        save=lambda learner, frontier: None,
    )
    return model.state_dict(), seen


def run_rl(tiny: str, run: Path, *settings: str) -> int:
    """Run the RL stage. Returns the exit status."""
    from aquarl.cli import main

    return main(["rl", "--config", tiny, f"run.dir={run}", *settings])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Google's storage here, for this process and those it starts, with an empty bucket in it.

    The emulator speaks the JSON API over HTTP, from memory, without credentials. It knows nothing
    of hierarchical buckets, which gcsfs asks about over gRPC, so that question is switched off.
    """
    import fsspec

    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="the dev extra brings gcp-storage-emulator"
    )
    from gcsfs.core import GCSFileSystem

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    usual = fsspec.get_filesystem_class("gs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # of encoded text
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("FSSPEC_GS_TOKEN", "anon")  # read by processes that start from now on
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # the same for this one
        fsspec.register_implementation("gs", GCSFileSystem, clobber=True)
        GCSFileSystem.clear_instance_cache()
        with emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="aquarl"):
            yield "gs://aquarl"
        GCSFileSystem.clear_instance_cache()
        fsspec.register_implementation("gs", usual, clobber=True)
