"""Work in, what Ray adds to it out: `aquarl bench sync|ray|workers`.

sync      new weights, from a learner to every sampler that waits for them
ray       RL steps through stream actor and rollout worker, beside the same steps in one process
workers   sampling by two rollout workers, beside one

All three go through the classes that a run uses. The learner is in this process, where a run has
it in a Ray Train worker, which takes no part in a step. `bench/` measures what needs no Ray.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray.exceptions import GetTimeoutError

from aquarl.bench import floor
from aquarl.bench.floor import Machine, measure_machine
from aquarl.bench.timing import forget_peak, hardware, peak_bytes, spread
from aquarl.bench.work import Work
from aquarl.cluster.connection import connected
from aquarl.cluster.launch import hired_stream
from aquarl.cluster.results import tokenizer_folder
from aquarl.cluster.stages import RayStream
from aquarl.config import Config
from aquarl.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from aquarl.engines.torch_engine import TorchSampler
from aquarl.errors import ClusterError, ConfigError
from aquarl.model.gpt import GPT
from aquarl.model.modes import keep_memory
from aquarl.model.products import use_threads
from aquarl.model.shape import Shape
from aquarl.records import PackedGroups
from aquarl.rl.learner import Learner
from aquarl.rl.loop import InProcess, LearnerStream
from aquarl.rl.prompts import PromptSource
from aquarl.rl.stream import RolloutStream
from aquarl.tasks.catalog import load_problems

Line = dict[str, Any]

STEPS_AHEAD = 8
"""What `workers` samples without new weights: as many steps as the staleness bound may allow."""

START_TIMEOUT_S = 120.0
PATIENCE_S = 600.0
"""For any one answer."""

ACTORS = ("StreamActor", "RolloutStream", "RolloutWorker", "_Receiver")
"""What Ray calls the processes of a step's actors, by class or by what they call themselves."""


def bench_ray(kind: str, work: Work, *, workers: int, repeats: int, threads: int) -> list[Line]:
    """Measure one of the three on a Ray of this command alone. Returns a line or two.

    Raises:
        ConfigError: The work cannot be done.
    """
    use_threads(threads)
    machine = measure_machine(torch.device("cpu"), time.perf_counter)
    keep_memory()
    about = {"bench": kind, "size": work.size}
    here = {
        "hardware": hardware("cpu"),
        "threads": threads,
        "gflops": round(machine.flops / 1e9, 1),
        "gb_per_s": round(machine.bytes / 1e9, 1),
    }
    with tempfile.TemporaryDirectory(prefix="aquarl_bench_") as folder:
        try:
            lines = list(KINDS[kind](work, f"{folder}/run", machine, workers, repeats, threads))
        except GetTimeoutError as error:
            raise ClusterError(
                f"Ray has not answered `aquarl bench {kind}` for {PATIENCE_S:.0f} s. Is the "
                "machine busy with something else? Try a smaller --size or fewer --workers."
            ) from error
    return [about | line | here for line in lines]


def _sync(
    work: Work, folder: str, machine: Machine, workers: int, repeats: int, threads: int
) -> Iterator[Line]:
    config = _config(work, folder, threads, rollout_workers=1)
    learner = Learner(work.model(), config.rl)
    parts: dict[str, list[float]] = {}
    with _ray(config), hired_stream(config, wanted=True) as actor:
        stream = RayStream(config, actor)
        ray.get(actor.scale.remote(0), timeout=PATIENCE_S)  # nobody samples meanwhile
        stream.begin(work.shape)
        stream.rewind(0, 0)
        hired = ray.remote(num_cpus=0)(_Receiver)
        receivers: list[Any] = [hired.remote(work.shape, actor, threads) for _ in range(workers)]
        stream.publish(learner.weights())  # a first time before the clock runs
        ray.get([receiver.take.remote() for receiver in receivers], timeout=PATIENCE_S)
        use = _Use()
        for _ in range(repeats):
            learner.step += 1
            use.begin()
            started = time.perf_counter()
            weights = learner.weights()
            flattened = time.perf_counter()
            taken = [receiver.take.remote() for receiver in receivers]  # they wait for it
            stream.publish(weights)
            published = time.perf_counter()
            seconds = ray.get(taken, timeout=PATIENCE_S)
            seen = {
                "wall_s": time.perf_counter() - started,
                "flatten_s": flattened - started,
                "publish_s": published - flattened,
                "fetch_s": max(fetch for fetch, _ in seconds),
                "load_s": max(load for _, load in seconds),
            }
            seen["cpu_s"] = use.end()["ours"]
            for name, value in seen.items():
                parts.setdefault(name, []).append(value)
    numbers = weights.buffer.size
    # Into the flat buffer, into shared memory, and into each sampler.
    floor_s = floor.copies(numbers, machine, 2 + workers, weights.buffer.itemsize)
    line = {name: spread(values) for name, values in parts.items()}
    yield {
        "workers": workers,
        "megabytes": round(weights.buffer.nbytes / 1e6, 2),
        "repeats": repeats,
        **line,
        "peak_memory_mb": use.peak_mb,
        "floor_s": float(f"{floor_s:.4g}"),
        "floor_share": float(f"{floor_s / line['wall_s']['median']:.4g}"),
    }


class _Receiver:
    """A sampler that takes what the stream has, as a rollout worker does inside a generation."""

    def __init__(self, shape: Shape, stream: Any, threads: int) -> None:
        use_threads(threads)
        keep_memory()
        self._sampler, self._stream = TorchSampler(GPT(shape), -1), stream
        self._have: tuple[int, int] | None = None

    def take(self) -> tuple[float, float]:
        """Wait for weights that are new here and load them. Returns the seconds to fetch them,
        from when they were told of, and to load them."""
        offer = ray.get(self._stream.newer.remote(self._have), timeout=PATIENCE_S)
        assert offer.weights is not None, "the stream waits longer than a publish takes"
        told = time.perf_counter()
        weights = ray.get(offer.weights, timeout=PATIENCE_S)
        fetched = time.perf_counter()
        self._sampler.load_weights(weights)
        self._have = offer.identity
        return fetched - told, time.perf_counter() - fetched


def _ray_share(
    work: Work, folder: str, machine: Machine, workers: int, repeats: int, threads: int
) -> Iterator[Line]:
    config = _config(work, folder, threads, rollout_workers=1)
    words = Tokenizer.load(tokenizer_folder(config))
    splits = load_problems(config.data, config.run.seed)
    source = PromptSource(splits.train, words, config.run.seed, config.data.permute_options)
    sampler = TorchSampler(GPT(work.shape), words.end_of_turn)
    alone = InProcess(RolloutStream(source, config.rl), sampler)
    seconds: dict[str, list[float]] = {"ray": [], "alone": [], "rest": []}
    with _ray(config), hired_stream(config, wanted=True) as actor:
        through = RayStream(config, actor)
        through.begin(work.shape)
        through.rewind(0, 0)
        ways: dict[str, tuple[LearnerStream, Learner]] = {
            "ray": (through, Learner(work.model(), config.rl)),
            "alone": (alone, Learner(work.model(), config.rl)),
        }
        _until_up(through, 1)
        use, tokens = _Use(), 0
        for repeat in range(repeats + 1):
            for name, (stream, learner) in ways.items():
                use.begin()
                # First of all: with new weights the worker samples at once, which belongs here.
                stream.publish(learner.weights())
                share = stream.next_step(learner.step, rank=0, world=1)
                assert share.packed is not None, "nothing was set aside"
                groups = _that_teach(share.packed, learner.step)
                seen = learner.update(groups, share.tokens_in_step, share.rollouts_in_step)
                spent = use.end()
                assert seen["learner/grad_norm"] > 0, "as a step that teaches"
                if repeat:
                    is_ray = name == "ray"
                    seconds[name].append(spent["ours" if is_ray else "here"])
                    if is_ray:
                        seconds["rest"].append(spent["rest"])
                        tokens += share.tokens_in_step
    ray_s, alone_s = spread(seconds["ray"]), spread(seconds["alone"])
    sums = {learner.weights().checksum for _, learner in ways.values()}
    assert len(sums) == 1, "both ways train the same policy to the bit"
    yield {
        "workers": 1,
        "repeats": repeats,
        "tokens": tokens // repeats,
        "cpu_s": ray_s,
        "cpu_s_in_one_process": alone_s,
        "ratio": round(ray_s["median"] / alone_s["median"], 4),
        "cpu_s_of_other_ray_processes": spread(seconds["rest"]),
        "peak_memory_mb": use.peak_mb,
    }


def _that_teach(groups: PackedGroups, seed: int) -> PackedGroups:
    """Return the groups with advantages drawn for them: a random policy's answers are all wrong,
    and a step of such would be half a step."""
    answers_PG = groups.answers_PG.copy()
    answers_PG["advantage"] = np.random.default_rng(seed).normal(size=answers_PG.shape)
    return replace(groups, answers_PG=answers_PG)


def _two_workers(
    work: Work, folder: str, machine: Machine, workers: int, repeats: int, threads: int
) -> Iterator[Line]:
    rates: dict[int, list[float]] = {1: [], workers: []}
    cpu_s: dict[int, list[float]] = {1: [], workers: []}
    configs = {
        count: _config(
            work,
            f"{folder}_{count}",
            threads,
            rollout_workers=count,
            max_staleness=STEPS_AHEAD,
            prompts_per_lease=max(1, work.prompts // 4),
        )
        for count in rates
    }
    learner = Learner(work.model(), configs[1].rl)
    with _ray(configs[1]), ExitStack() as stack:
        streams = {}
        for count, config in configs.items():
            actor = stack.enter_context(hired_stream(config, wanted=True))
            streams[count] = RayStream(config, actor)
            streams[count].begin(work.shape)
        for count, stream in streams.items():
            _until_up(stream, count)
        uses = {count: _Use() for count in streams}
        for repeat in range(repeats + 1):
            for count, stream in streams.items():
                uses[count].begin()
                sampled_per_s = _sampled_per_second(stream, learner)
                spent = uses[count].end()
                if repeat:
                    rates[count].append(sampled_per_s)
                    cpu_s[count].append(spent["ours"])
    medians = {count: spread(values) for count, values in rates.items()}
    for count, rate in medians.items():
        yield {
            "workers": count,
            "repeats": repeats,
            "tokens_per_s": rate,
            "ratio": round(rate["median"] / medians[1]["median"], 4),
            "cpu_s": spread(cpu_s[count]),
            "peak_memory_mb": uses[count].peak_mb,
        }


def _sampled_per_second(stream: RayStream, learner: Learner) -> float:
    """Return tokens a wall second of `STEPS_AHEAD` steps, counted after a first one."""
    stream.rewind(0, 0)
    stream.publish(learner.weights())
    stream.next_step(0, rank=0, world=1)
    started, tokens = time.perf_counter(), 0
    for step in range(1, STEPS_AHEAD + 1):
        tokens += stream.next_step(step, rank=0, world=1).tokens_in_step
    return tokens / (time.perf_counter() - started)


KINDS: dict[str, Callable[[Work, str, Machine, int, int, int], Iterator[Line]]] = {
    "sync": _sync,
    "ray": _ray_share,
    "workers": _two_workers,
}


def as_text(line: Line) -> str:
    """Return a line for people."""
    what = f"{line['bench']} {line['size']}, {line['workers']} workers: "
    if line["bench"] == "sync":
        parts = ", ".join(
            f"{part} {line[part + '_s']['median'] * 1e3:.1f}"
            for part in ("flatten", "publish", "fetch", "load")
        )
        wall_s = line["wall_s"]
        said = (
            f"{line['megabytes']} MB in {wall_s['median'] * 1e3:.1f} ms "
            f"[{wall_s['low'] * 1e3:.1f}, {wall_s['high'] * 1e3:.1f}] ({parts}; CPU "
            f"{line['cpu_s']['median'] * 1e3:.1f}), "
            f"floor {line['floor_s'] * 1e3:.2f} ms = {line['floor_share']:.0%} of the time"
        )
    elif line["bench"] == "ray":
        cpu_s, alone_s = line["cpu_s"], line["cpu_s_in_one_process"]
        said = (
            f"a step takes {cpu_s['median']:.3g} CPU seconds [{cpu_s['low']:.3g}, "
            f"{cpu_s['high']:.3g}], {alone_s['median']:.3g} in one process, ratio "
            f"{line['ratio']:.3f}; Ray's other processes "
            f"{line['cpu_s_of_other_ray_processes']['median']:.2g} s meanwhile"
        )
    else:
        rate = line["tokens_per_s"]
        said = (
            f"{rate['median']:,.0f} tokens per second [{rate['low']:,.0f}, {rate['high']:,.0f}], "
            f"{line['ratio']:.2f} times that of one"
        )
    return f"{what}{said}; {line['hardware']}, {line['threads']} threads"


def _config(work: Work, folder: str, threads: int, **rl: Any) -> Config:
    """Return the settings of a run with this work, whose tokenizer is written there.

    Raises:
        ConfigError: More rows are asked for than the problems hold.
    """
    words = _as_large(work.tokenizer, work.shape.vocab)
    plan = work.rl_config.model_dump(mode="json") | {"max_staleness": 0, "wait_timeout_s": 600} | rl
    config = Config.model_validate(
        {
            "run": {"dir": folder, "seed": work.seed},
            "data": {} if work.problems is None else {"task": work.problems},
            "model": {"context": work.shape.context},
            "rl": plan,
            # A fraction, so that Ray has a place for all of them, however few cores there are.
            "cluster": {"rollout_cpus": 0.25, "threads": threads},
        }
    )
    words.save(tokenizer_folder(config))
    return config


def _as_large(words: Tokenizer, vocab: int) -> Tokenizer:
    """Return a tokenizer of just so many tokens: those it lacks never occur in text."""
    missing = vocab - words.vocab_size
    if missing < 0:
        raise ConfigError(
            f"A vocabulary of {vocab} is smaller than the {words.vocab_size} tokens of the "
            f"prompts. Ask for a --size with {words.vocab_size} or more."
        )
    known = len(words.ranks)
    assert words.vocab_size == known + len(SPECIAL_TOKENS)
    filling = {b"\xff\xfe" + f"{i:06}".encode(): known + i for i in range(missing)}
    return Tokenizer(words.ranks | filling, words.pattern)


@contextmanager
def _ray(config: Config) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    with connected(config):
        yield


def _until_up(stream: RayStream, workers: int) -> None:
    """Wait until so many workers ask for work. Raises: ClusterError, when they do not come."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while len(stream.status()["workers"]) < workers:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{workers} rollout workers did not start in {START_TIMEOUT_S:.0f} s. The machine "
                "is busy with other work, or has too little memory; measure when it is quiet."
            )
        time.sleep(0.1)


class _Use:
    """What is used of the machine between a moment and another."""

    def __init__(self) -> None:
        self._actors = _actors_of_a_step()
        self.peak_mb = 0
        """The most memory that one of these processes held in any of the times, shared with others
        included."""

    def begin(self) -> None:
        for process in self._processes():
            with suppress(OSError):  # it has ended
                forget_peak(process)
        self._before = _cpu_seconds(self._actors)

    def end(self) -> dict[str, float]:
        """Return CPU seconds since: of this process ("here"), of it and the actors ("ours"), and of
        whatever else Ray started ("rest")."""
        after = _cpu_seconds(self._actors)
        spent = {part: after[part] - self._before[part] for part in after}
        for process in self._processes():
            with suppress(OSError):
                self.peak_mb = max(self.peak_mb, round(peak_bytes(process) / 1e6))
        return {
            "here": spent["here"],
            "ours": spent["here"] + spent["actors"],
            "rest": spent["rest"],
        }

    def _processes(self) -> list[int | str]:
        return ["self", *self._actors]


def _actors_of_a_step() -> set[int]:
    """Return the process ids of stream, rollout workers and Ray's own core on this machine."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            title = " ".join(child.cmdline()[:1])
            is_ours = title.startswith(tuple(f"ray::{name}" for name in ACTORS))
            if is_ours or title.endswith(("/raylet", "/gcs_server")):
                found.add(child.pid)
    return found


def _cpu_seconds(actors: set[int]) -> dict[str, float]:
    """Return CPU seconds so far of this process, of these, and of whatever else Ray started."""
    seconds = {"here": time.process_time(), "actors": 0.0, "rest": 0.0}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            part = "actors" if child.pid in actors else "rest"
            seconds[part] += times.user + times.system
    return seconds
