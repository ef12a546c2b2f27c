"""A line of `aquarl bench` says what was done, how long it took, and how far that is from a limit
that can be computed by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aquarl.bench import floor, pieces
from aquarl.bench.floor import Machine
from aquarl.bench.lines import PIECES, as_text, bench
from aquarl.bench.timing import measure, spread
from aquarl.bench.work import Work
from aquarl.cli import main
from aquarl.cluster.bench_ray import as_text as ray_as_text
from aquarl.cluster.bench_ray import bench_ray
from aquarl.errors import ConfigError

WORK = Work("1,32,2,512", prompts=2, samples=3, max_new=5, rows=2, context=16)
TOKENS = {"rollouts": 30, "learner": 30, "step": 30, "sft": 32}
HERE = {"device", "hardware", "threads", "gflops", "gb_per_s"}
FIGURES = {
    "tokens", "repeats", "wall_s", "cpu_s", "tokens_per_s", "tokens_per_cpu_s", "floor_s",
    "floor_share", "peak_memory_mb",
}  # fmt: skip
DONE = {"prompts", "samples", "max_new", "prompt_tokens"}


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine itself takes seconds, and no test needs its truth."""
    machine = Machine(flops=1e11, bytes=1e10)
    monkeypatch.setattr("aquarl.bench.lines.measure_machine", lambda device: machine)
    monkeypatch.setattr("aquarl.cluster.bench_ray.measure_machine", lambda device, clock: machine)
    monkeypatch.setattr("aquarl.bench.timing.measure_product", lambda device, clock: machine.flops)


@pytest.mark.parametrize("kind", PIECES)
def test_a_line_has_its_promised_keys_and_true_counts(kind: str) -> None:
    (line,) = bench(kind, WORK, engines=["torch"], repeats=2, threads=1, device="cpu")
    about = {"rows", "context"} if kind == "sft" else DONE
    engine = {"engine"} if kind in ("rollouts", "step") else set()
    assert line.keys() == {"bench", "size"} | about | engine | FIGURES | HERE
    assert (line["bench"], line["tokens"], line["repeats"]) == (kind, TOKENS[kind], 2)
    for seconds in (line["wall_s"], line["cpu_s"]):
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
    assert line["tokens_per_s"] == pytest.approx(
        line["tokens"] / line["wall_s"]["median"], rel=1e-2
    )
    share = line["floor_s"] / line["cpu_s"]["median"]
    assert line["floor_share"] == pytest.approx(share, rel=1e-2)
    assert 0 < line["floor_share"] < 1
    assert line["peak_memory_mb"] > 50, "python and torch alone"
    json.dumps(line)
    assert f"{kind} 1,32,2,512" in as_text(line)


def test_what_is_counted_is_done() -> None:
    sampled: Any = pieces.rollouts(WORK, "cpu", "torch").run()
    assert [[len(r.ids) for r in row] for row in sampled] == [[5] * 3] * 2
    learned: Any = pieces.learner(WORK, "cpu", "torch").run()
    assert learned["learner/grad_norm"] > 0, "a step without a gradient is no work"
    trained: Any = pieces.sft(WORK, "cpu", "torch").run()
    assert trained["tokens/trained"] == TOKENS["sft"]


def test_the_same_seed_is_the_same_work() -> None:
    again = Work("1,32,2,512", prompts=2, samples=3, max_new=5, rows=2, context=16)
    assert again.prompt_list == WORK.prompt_list
    assert again.drawn() == WORK.drawn()


def test_one_run_does_not_count_and_pieces_take_turns() -> None:
    ran: list[str] = []
    made = {name: pieces.Piece(partial(ran.append, name), 1, lambda machine: 0) for name in "ab"}
    measure(made, Machine(1, 1), repeats=2, device="cpu")
    assert ran == list("ababab")
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


# Floors by hand: one layer of width 4, 12 * 4^2 = 192 numbers in its matrices, 512 words.

TINY = Work("1,4,2,512", prompts=1, samples=2, max_new=2, rows=2, context=3)
NUMBERS = 192


def test_the_floor_of_a_supervised_step_is_its_multiplications() -> None:
    """6 positions; 2 rows of 3 * 4 / 2 pairs; Muon on four 4 x 4 and two 4 x 16 matrices."""
    forward = 2 * 6 * NUMBERS + 4 * 12 * 4 + 2 * 6 * 4 * 512
    square, wide = 4 * 16 * 4 + 2 * 64, 4 * 16 * 16 + 2 * 64
    muon = 5 * (4 * square + 2 * wide)
    assert floor.supervised(TINY, Machine(flops=1.0, bytes=math.inf)) == 3 * forward + muon


def test_the_floor_of_decoding_is_reading_weights_and_caches_once() -> None:
    """Two answers of two tokens: the second comes from one pass, over n + 1 positions each."""
    n = len(TINY.prompt_list[0].ids)
    cached = 2 * 4 * (n + 2 * 1)  # keys and values of width 4; the prompt's serve both answers
    moved = 4 * (NUMBERS + 4 * 512 + cached)
    assert floor.rollouts(TINY, Machine(flops=math.inf, bytes=1.0), 4) == moved


def test_the_floor_of_sampling_computes_each_prompt_once() -> None:
    n = len(TINY.prompt_list[0].ids)
    prefill = 2 * n * NUMBERS + 4 * (n * (n + 1) / 2) * 4 + 2 * 4 * 512
    decode = 2 * 2 * NUMBERS + 4 * 2 * (n + 1) * 4 + 2 * 2 * 4 * 512
    assert floor.rollouts(TINY, Machine(flops=1.0, bytes=math.inf), 4) == prefill + decode


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("d3", "Write one of d2, d4, d8, or LAYERS,WIDTH,HEADS,VOCABULARY"),
        ("4,256,4", "LAYERS,WIDTH,HEADS,VOCABULARY"),
        ("2,30,4,512", "each head needs an even part of the width"),
        ("2,32,4,100", "Write that or more"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    size: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "sft", "--size", size]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompts", "said"),
    [(500, "--prompts asks for 500"), (2, "problems of .* are too little text")],
)
def test_a_file_that_is_too_small_is_refused(prompts: int, said: str, tmp_path: Any) -> None:
    problem = {"question": "What is 2 + 3?", "options": ["4", "5"], "answer_letter": "B"}
    file = tmp_path / "few.jsonl"
    lines = [problem | {"question": f"What is {i} + 3?"} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigError, match=said):
        Work("d2", prompts=prompts, problems=str(file)).prompt_list  # noqa: B018


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--prompts", "2", "--samples", "2", "--max-new", "3", "--repeats", "1"]
    assert main(["bench", "rollouts", "--size", "1,32,2,512", *counts, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 12


@pytest.mark.slow
def test_rays_part_is_measured_on_the_very_same_steps(
    ray_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bench_ray` itself asserts that both ways end with the same weights, to the bit."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (line,) = bench_ray("ray", WORK, workers=1, repeats=2, threads=1)
    assert line["tokens"] > 0 and line["ratio"] > 0
    assert "CPU seconds" in ray_as_text(line)
    assert line["peak_memory_mb"] > 50
    (line,) = bench_ray("sync", WORK, workers=2, repeats=2, threads=1)
    assert line["megabytes"] == round(4 * (2 * 512 * 32 + 12 * 32 * 32) / 1e6, 2)
    assert line["wall_s"]["low"] >= line["flatten_s"]["low"] > 0
    assert "MB in" in ray_as_text(line)
    assert line["cpu_s"]["low"] > 0 and line["peak_memory_mb"] > 50
    lines = bench_ray("workers", WORK, workers=2, repeats=1, threads=1)
    assert [line["workers"] for line in lines] == [1, 2]
    assert lines[0]["ratio"] == 1.0 and lines[1]["tokens_per_s"]["median"] > 0
    assert all(line["cpu_s"]["low"] > 0 and line["peak_memory_mb"] > 50 for line in lines)
    assert not list(tmp_path.iterdir())


def test_the_peak_is_of_the_piece_and_not_of_what_was_before() -> None:
    """100 MB that one of two pieces holds while it runs; 400 MB were held and freed before. In a
    process of its own: once one keeps what it frees, as benchmarks do, all is held."""
    script = """
import json, torch
from aquarl.bench.floor import Machine
from aquarl.bench.pieces import Piece
from aquarl.bench.timing import measure
before = torch.ones(100 << 20)
del before
runs = {"plain": lambda: None, "large": lambda: torch.ones(25 << 20)}
pieces = {name: Piece(run, 1, lambda machine: 1.0) for name, run in runs.items()}
lines = measure(pieces, Machine(1.0, 1.0), 2, "cpu")
print(json.dumps({name: line["peak_memory_mb"] for name, line in lines.items()}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    peaks = json.loads(done.stdout)
    assert 90 < peaks["large"] - peaks["plain"] < 150 and peaks["plain"] < 400


@pytest.mark.parametrize("more", [("--device", "cuda"), ("--engine", "vllm")])
def test_what_rays_part_does_not_measure_is_refused(
    more: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "sync", *more]) == 2
    assert "Leave out --device and --engine" in capsys.readouterr().err
