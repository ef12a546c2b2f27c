"""Ray job: what stale rollouts cost by samples, and what allowing them buys by the clock.

    python ray_jobs/staleness.py OUT RUN_DIR [RUN_DIR ...] [--minutes N] [key=value ...]

Each RUN_DIR holds a finished SFT stage with a seed of its own. From each, RL runs with a staleness
of up to 0, 1, 2 and 4, with and without the correction; settings are those of RUN_DIR, or as given.
Runs that OUT holds already are not done again; after N minutes none is begun. At the end all that
OUT holds becomes OUT/staleness.md and OUT/staleness.png.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aquarl.cluster.launch import connected, run_stages
from aquarl.cluster.results import stands
from aquarl.config import Config, load_config, own_settings
from aquarl.observe.metrics import read_metrics

STALENESS = (0, 1, 2, 4)
WINDOW = 10
"""Steps: of the smoothed curves, and of the last rewards in the table."""

Rows = list[dict[str, Any]]


class Kind(NamedTuple):
    staleness: int
    is_corrected: bool

    def __str__(self) -> str:
        return f"{self.staleness}" if self.is_corrected else f"{self.staleness}, not corrected"


# Without staleness there is nothing to correct: that run stands for both.
KINDS = [Kind(s, is_corrected) for is_corrected in (True, False) for s in STALENESS]
KINDS.remove(Kind(0, False))


def runs(out: Path, sources: Sequence[str], overrides: list[str]) -> Iterator[Config]:
    """Yield the settings of every run, seed after seed, and put its SFT policy into its place."""
    for source in sources:
        for kind in KINDS:
            folder = out / f"{kind.staleness}-{kind.is_corrected}-{Path(source).name}"
            for part in ("tokenizer", "results", "checkpoints/sft"):
                if not (folder / part).exists():
                    shutil.copytree(f"{source}/{part}", folder / part)
            mine = [f"rl.max_staleness={kind.staleness}", f"run.dir={folder}"]
            mine.append(f"rl.correct_staleness={str(kind.is_corrected).lower()}")
            yield load_config(own_settings(source), [*overrides, *mine])


def results(out: Path) -> dict[Kind, list[Rows]]:
    """Return the steps of the finished runs: one list a seed, in order of their names."""
    found: dict[Kind, list[Rows]] = {kind: [] for kind in KINDS}
    for folder in sorted(path.parent.parent for path in out.glob("*/results/rl.json")):
        config = load_config(own_settings(str(folder)))
        kind = Kind(config.rl.max_staleness, config.rl.correct_staleness)
        found[kind].append(read_metrics(str(folder))["rl"])
    return found


def steps_of(rows: Rows) -> Rows:
    return [row for row in rows if "reward/mean" in row]


def mean(rows: Rows, name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def last_reward(rows: Rows) -> float:
    return mean(steps_of(rows)[-WINDOW:], "reward/mean")


def table(found: dict[Kind, list[Rows]]) -> str:
    """Return one line a setting, the mean over its seeds."""
    lines = [
        f"| staleness | runs | reward, last {WINDOW} steps | by seed | against 0 | greedy | age "
        "| KL | effective | waited | s a step |",
        "|---" * 11 + "|",
    ]
    for kind, seeds in found.items():
        if not seeds:
            continue
        on_policy = found[Kind(0, True)][: len(seeds)]
        gaps = [last_reward(a) - last_reward(b) for a, b in zip(seeds, on_policy, strict=False)]
        rows = [row for seed in seeds for row in steps_of(seed)]
        seconds = [row["time/wait_s"] + row["time/learn_s"] + row["time/publish_s"] for row in rows]
        cells = [
            str(kind),
            str(len(seeds)),
            f"{statistics.fmean(map(last_reward, seeds)):.3f}",
            ", ".join(f"{last_reward(seed):.3f}" for seed in seeds),
            f"{statistics.fmean(gaps):+.3f}",
            f"{statistics.fmean(seed[-1]['validation/accuracy'] for seed in seeds):.3f}",
            f"{mean(rows, 'rollout/staleness_mean'):.2f}",
            f"{mean(rows, 'policy/kl_from_sampler'):.1e}",
            f"{mean(rows, 'policy/effective_fraction'):.3f}",
            f"{mean(rows, 'time/wait_s') / statistics.fmean(seconds):.0%}",
            f"{statistics.median(seconds):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[Kind, list[Rows]], rollouts_per_step: int, path: Path) -> None:
    """Draw the mean over seeds of the smoothed rewards, by samples and by the clock."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_samples, by_clock) = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for kind, seeds in found.items():
        steps = [steps_of(rows) for rows in seeds]
        if not steps:
            continue
        ends = range(WINDOW, min(map(len, steps)) + 1)
        rewards = [
            statistics.fmean(mean(rows[end - WINDOW : end], "reward/mean") for rows in steps)
            for end in ends
        ]
        clock = [
            statistics.fmean(rows[end - 1]["time"] - rows[0]["time"] for rows in steps)
            for end in ends
        ]
        style: dict[str, Any] = {
            "color": f"C{STALENESS.index(kind.staleness)}",
            "linestyle": "-" if kind.is_corrected else ":",
            "label": f"{kind} ({len(steps)} runs)",
        }
        by_samples.plot([end * rollouts_per_step for end in ends], rewards, **style)
        by_clock.plot(clock, rewards, **style)
    by_samples.set(xlabel="sampled answers", ylabel=f"reward, mean of {WINDOW} steps")
    by_clock.set(xlabel="seconds since the first step")
    by_samples.legend(title="staleness at most")
    for axes in (by_samples, by_clock):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", help="run directories and key=value")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_intermixed_args()
    out, began = args.out.resolve(), time.monotonic()
    overrides = [word for word in args.sources if "=" in word]
    sources = [word for word in args.sources if "=" not in word]
    wanted = list(runs(out, sources, overrides))
    with connected(wanted[0]):
        for config in wanted:
            if not stands(config, "rl") and time.monotonic() - began < 60 * args.minutes:
                run_stages(config, ("rl",))
    found = results(out)
    rl = wanted[0].rl
    (out / "staleness.md").write_text(table(found))
    plot(found, rl.prompts_per_step * rl.rollouts_per_prompt, out / "staleness.png")
    print(table(found))


if __name__ == "__main__":
    main()
