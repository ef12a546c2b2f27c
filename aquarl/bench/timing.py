"""Pieces of work in, a line of figures each out: medians with their spread, beside the floor.

Several pieces are run in turn, and the matrix product that their floors are made of with them, so
that a neighbour on the machine slows all of them alike.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aquarl.bench.floor import Machine, clock_of, measure_product
from aquarl.bench.pieces import Piece
from aquarl.observe.machine import cpu_model

Figures = dict[str, Any]
PROCESSES = Path("/proc")


def measure(
    pieces: Mapping[str, Piece], machine: Machine, repeats: int, device: str
) -> dict[str, Figures]:
    """Run each piece `repeats` times in turn, after one run that does not count.

    Returns:
        By name: seconds of wall and CPU time (all threads of this process) as
        {median, low, high}, tokens per second of both, the floor and how much of the time it is,
        by the product's rate meanwhile;
        the most memory that the process (its part of a GPU) held while the piece ran.
    """
    wall: dict[str, list[float]] = {name: [] for name in pieces}
    cpu: dict[str, list[float]] = {name: [] for name in pieces}
    peak = dict.fromkeys(pieces, 0.0)
    rates = []
    for repeat in range(repeats + 1):
        rates.append(measure_product(torch.device(device), clock_of(torch.device(device))))
        for name, piece in pieces.items():
            _settle(device)
            _forget_peak(device)
            wall_from, cpu_from = time.perf_counter(), time.process_time()
            piece.run()
            _settle(device)
            peak[name] = max(peak[name], _peak_bytes(device))
            if repeat:
                wall[name].append(time.perf_counter() - wall_from)
                cpu[name].append(time.process_time() - cpu_from)
    is_gpu = device.startswith("cuda")
    machine = replace(machine, flops=statistics.median(rates))
    lines = {}
    for name, piece in pieces.items():
        floor_s = piece.floor_s(machine)
        wall_s, cpu_s = spread(wall[name]), spread(cpu[name])
        taken = (wall_s if is_gpu else cpu_s)["median"]
        lines[name] = {
            "tokens": piece.tokens,
            "repeats": repeats,
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "tokens_per_s": round(piece.tokens / wall_s["median"], 1),
            "tokens_per_cpu_s": round(piece.tokens / max(cpu_s["median"], 1e-9), 1),
            "floor_s": _rounded(floor_s),
            "floor_share": _rounded(floor_s / taken),
            "peak_memory_mb": round(peak[name] / 1e6),
            "gflops": round(machine.flops / 1e9, 1),
            "gb_per_s": round(machine.bytes / 1e9, 1),
        }
    return lines


def spread(values: list[float]) -> dict[str, float]:
    """Return median, least and greatest."""
    return {
        "median": _rounded(statistics.median(values)),
        "low": _rounded(min(values)),
        "high": _rounded(max(values)),
    }


def hardware(device: str) -> str:
    """Return what it ran on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {os.cpu_count()} cores"


def _settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak("self")


def _peak_bytes(device: str) -> float:
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device))
    return peak_bytes("self")


def forget_peak(process: int | str) -> None:
    """Count a process's most memory anew from what it holds now, where Linux does so."""
    if PROCESSES.is_dir():
        (PROCESSES / f"{process}/clear_refs").write_text("5")


def peak_bytes(process: int | str) -> float:
    """Return the most memory that a process has held; on macOS, this one's since its start."""
    if PROCESSES.is_dir():
        lines = (PROCESSES / f"{process}/status").read_text().splitlines()
        peaks = [1024 * float(x.split()[1]) for x in lines if x.startswith("VmHWM:")]
        return max(peaks, default=0.0)  # one that has ended has none
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
