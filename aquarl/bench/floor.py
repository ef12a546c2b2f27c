"""Work in, the time below which this machine cannot do it out.

Multiplications at the rate of one large matrix product, bytes at the rate of one large copy, both
measured here and now. What the floor leaves out (norms, softmax, sampling, Python) is what an
implementation can lose.

Shapes: see `records`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aquarl.bench.work import Work
from aquarl.model.products import mm
from aquarl.model.shape import Shape


@dataclass(frozen=True)
class Machine:
    """What this machine does per second, at best."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float = 0.0) -> float:
        """Return the longer of computing this and moving that."""
        return max(flops / self.flops, moved / self.bytes)


Clock = Callable[[], float]


def clock_of(device: torch.device) -> Clock:
    """Return what a piece of work is timed with: of a CPU the seconds that it is used, whatever
    else runs there and however many threads take part; of a GPU those of the wall."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def measure_machine(device: torch.device, clock: Clock | None = None) -> Machine:
    """Return its matrix and memory rates, in the precision that a policy uses there.

    Args:
        clock: What the work is timed with; `clock_of` the device without it.
    """
    clock = clock or clock_of(device)
    is_gpu = device.type == "cuda"
    source = torch.empty(1 << (32 if is_gpu else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel()
    return Machine(
        flops=measure_product(device, clock),
        bytes=moved / _seconds(lambda: target.copy_(source), device, clock),
    )


def measure_product(device: torch.device, clock: Clock) -> float:
    """Return the FLOPs a second of a large matrix product: on a shared machine another in every
    minute, so it is measured in turn with what is held against it."""
    dtype, side = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(lambda: mm(a, b, out=out), device, clock)


def _seconds(
    work: Callable[[], object], device: torch.device, clock: Clock, repeats: int = 7
) -> float:
    taken = []
    for _ in range(repeats + 2):
        started = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - started)
    return statistics.median(taken[2:])


def rollouts(work: Work, machine: Machine, bytes_a_number: int) -> float:
    """Seconds to prefill each prompt once and to decode all answers together."""
    shape, answers = work.shape, work.prompts * work.samples
    lengths = [len(prompt.ids) for prompt in work.prompt_list]
    prefill = sum(_blocks(shape, n, n * (n + 1) / 2) for n in lengths)
    seconds = machine.seconds(prefill + _head(shape, work.prompts))
    weights = _numbers_of_blocks(shape) + shape.width * shape.vocab
    kv_width = 2 * shape.layers * shape.kv_heads * shape.head_width
    for t in range(1, work.max_new):
        pairs = sum(n + t for n in lengths) * work.samples
        flops = _blocks(shape, answers, pairs) + _head(shape, answers)
        cached = kv_width * (sum(lengths) + answers * t)  # a prompt's keys are read once
        seconds += machine.seconds(flops, bytes_a_number * (weights + cached))
    return seconds


def learner(work: Work, machine: Machine) -> float:
    """Seconds of one RL step's forward and backward, each prompt once a group, and optimizer."""
    shape, T, answers = work.shape, work.max_new, work.prompts * work.samples
    flops = 0.0
    for prompt in work.prompt_list:
        n = len(prompt.ids)
        pairs = n * (n + 1) / 2 + work.samples * ((T - 1) * n + T * (T - 1) / 2)
        flops += _blocks(shape, n + work.samples * (T - 1), pairs)
    flops += _head(shape, answers * T)
    return machine.seconds(3 * flops + _muon(shape))


def supervised(work: Work, machine: Machine) -> float:
    """Seconds of one supervised step over `rows` full rows, every position trained."""
    positions, T = work.rows * work.context, work.context
    flops = _blocks(work.shape, positions, work.rows * T * (T + 1) / 2)
    return machine.seconds(3 * (flops + _head(work.shape, positions)) + _muon(work.shape))


def copies(numbers: int, machine: Machine, count: int, bytes_a_number: int) -> float:
    """Seconds to copy the weights so many times: read once, written once each."""
    return machine.seconds(0.0, 2.0 * count * numbers * bytes_a_number)


def _numbers_of_blocks(shape: Shape) -> int:
    D, kv = shape.width, shape.kv_heads * shape.head_width
    return shape.layers * (2 * D * D + 2 * D * kv + 8 * D * D)


def _blocks(shape: Shape, positions: float, pairs: float) -> float:
    """FLOPs forward: matrices for each position, attention for each (query, key) pair."""
    return 2 * positions * _numbers_of_blocks(shape) + 4 * pairs * shape.layers * shape.width


def _head(shape: Shape, positions: float) -> float:
    return 2.0 * positions * shape.width * shape.vocab


def _muon(shape: Shape) -> float:
    """FLOPs of five Newton-Schulz iterations on every matrix."""
    D, kv = shape.width, shape.kv_heads * shape.head_width
    matrices = [(D, D), (D, D), (kv, D), (kv, D), (D, 4 * D), (D, 4 * D)]
    each = (4 * min(m) ** 2 * max(m) + 2 * min(m) ** 3 for m in matrices)
    return 5.0 * shape.layers * sum(each)
