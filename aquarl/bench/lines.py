"""What `aquarl bench` was asked in, one line of figures an engine out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from aquarl.bench import pieces
from aquarl.bench.floor import measure_machine
from aquarl.bench.pieces import Piece
from aquarl.bench.timing import hardware, measure
from aquarl.bench.work import Work
from aquarl.errors import ConfigError
from aquarl.model.modes import keep_memory
from aquarl.model.products import use_threads

PIECES: dict[str, Callable[[Work, str, str], Piece]] = {
    "rollouts": pieces.rollouts,
    "learner": pieces.learner,
    "step": pieces.step,
    "sft": pieces.sft,
}
WITH_ENGINE = ("rollouts", "step")


def bench(
    kind: str, work: Work, *, engines: Sequence[str], repeats: int, threads: int, device: str
) -> list[dict[str, Any]]:
    """Measure one kind of work, with each engine in turn, and return a line each.

    Raises:
        ConfigError: The work cannot be done, or not on this machine.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda was asked for, but torch sees no CUDA device here. Leave it out to "
            "measure the CPU, or see `aquarl doctor` for what is missing."
        )
    use_threads(threads)
    machine = measure_machine(torch.device(device))
    keep_memory()  # not what that took
    names = tuple(engines) if kind in WITH_ENGINE else ("torch",)
    made = {engine: PIECES[kind](work, device, engine) for engine in names}
    lines = measure(made, machine, repeats, device)
    about = {
        "bench": kind,
        "size": work.size,
        "prompts": work.prompts,
        "samples": work.samples,
        "max_new": work.max_new,
        "prompt_tokens": sum(len(prompt.ids) for prompt in work.prompt_list),
    }
    if kind == "sft":
        about = {"bench": kind, "size": work.size, "rows": work.rows, "context": work.context}
    here = {
        "device": device,
        "hardware": hardware(device),
        "threads": threads,
    }
    engine_of = {name: {"engine": name} if kind in WITH_ENGINE else {} for name in names}
    return [about | engine_of[name] | line | here for name, line in lines.items()]


def as_text(line: dict[str, Any]) -> str:
    """Return a line for people."""
    wall_s, cpu_s = line["wall_s"], line["cpu_s"]
    what = " ".join(filter(None, (line["bench"], line["size"], line.get("engine"))))
    return (
        f"{what}: {line['tokens_per_cpu_s']:,.0f} tokens per CPU second "
        f"({cpu_s['median']:.3g} s [{cpu_s['low']:.3g}, {cpu_s['high']:.3g}]), "
        f"{line['tokens_per_s']:,.0f} per second ({wall_s['median']:.3g} s), "
        f"floor {line['floor_s']:.3g} s = {line['floor_share']:.0%} of the time; "
        f"{line['hardware']}, {line['threads']} threads"
    )
