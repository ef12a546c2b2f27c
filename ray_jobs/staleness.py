"""Ray job: what stale rollouts cost by samples, and what allowing them buys by the clock.

    python ray_jobs/staleness.py OUT RUN_DIR [RUN_DIR ...]
        [--live] [--staleness N] [--minutes N] [key=value ...]

Each RUN_DIR holds a finished SFT stage with a seed of its own. From each, RL runs with a staleness
of 0, 1, 2 and 4 (or those given, one an option), with and without the correction; settings are
those of RUN_DIR, or as given.

- Without --live every step trains on rollouts of exactly so many versions before: what staleness
  costs. The clock plays no part, so a run is one process, and as many run as there are CPUs.
- With --live learner and rollout workers run beside each other, and staleness is bounded, not
  forced: what it buys.

Runs that OUT holds already are not done again; after N minutes none is begun. At the end all that
OUT holds becomes OUT/staleness.md and OUT/staleness.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray

from aquarl.cluster.connection import connected
from aquarl.cluster.launch import run_stages
from aquarl.cluster.results import copy_up_to_sft, finished_policy
from aquarl.config import Config, load_config, own_settings
from aquarl.data.tokenizer import Tokenizer
from aquarl.engines.torch_engine import TorchSampler
from aquarl.model.gpt import GPT
from aquarl.observe.metrics import read_metrics
from aquarl.records import Weights
from aquarl.rl.learner import Learner
from aquarl.rl.loop import InProcess, train_policy, validate
from aquarl.rl.prompts import PromptSource
from aquarl.rl.stream import RolloutStream
from aquarl.tasks.base import to_prompt
from aquarl.tasks.catalog import load_problems

STALENESS = (0, 1, 2, 4)
WINDOW = 10
"""Steps: of the smoothed curves, and of the last rewards in the table."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom."""

Rows = list[dict[str, Any]]
"""The metrics of a run's steps, in order."""


class Kind(NamedTuple):
    mode: str
    """"exact" or "live"."""
    staleness: int
    is_corrected: bool

    def __str__(self) -> str:
        return f"{self.staleness}" if self.is_corrected else f"{self.staleness}, not corrected"

    @property
    def file(self) -> str:
        return f"{self.mode}-{self.staleness}-{'corrected' if self.is_corrected else 'plain'}"


# Without staleness there is nothing to correct: that run stands for both.
KINDS = [
    Kind(mode, staleness, is_corrected)
    for mode in ("exact", "live")
    for is_corrected in (True, False)
    for staleness in STALENESS
    if staleness or is_corrected
]


class Delayed(InProcess):
    """Samples every step with the weights of exactly `max_staleness` updates before it."""

    def publish(self, weights: Weights) -> None:
        if not hasattr(self, "_newest"):
            self._newest = deque[Weights](maxlen=self.stream.config.max_staleness + 1)
        self._newest.append(weights)
        super().publish(self._newest[0])

    def catch_up(self) -> None:
        super().publish(self._newest[-1])


def exact(config: Config) -> Rows:
    """Run RL in this process. The last row has the validation of the last policy, too."""
    tokenizer = Tokenizer.load(f"{config.run.dir}/tokenizer")
    splits = load_problems(config.data, config.run.seed)
    model = finished_policy(config.run.dir, "sft", tokenizer.fingerprint)
    source = PromptSource(splits.train, tokenizer, config.run.seed, config.data.permute_options)
    stream = Delayed(
        RolloutStream(source, config.rl),
        TorchSampler(GPT(model.shape), tokenizer.end_of_turn),
    )
    rows: Rows = []
    train_policy(
        config.rl,
        stream,
        Learner(model, config.rl),
        validation=[],
        log=lambda step, metrics: rows.append(metrics) if metrics else None,
        save=lambda learner, frontier: None,
    )
    stream.catch_up()
    held_out = [to_prompt(p, tokenizer) for p in splits.validation[: config.rl.eval_problems]]
    rows[-1] |= validate(stream, held_out, config.rl, config.rl.steps)
    return rows


def live(config: Config, source: str) -> Rows:
    """Run RL on Ray, in a run directory of its own, from the SFT stage of another."""
    shutil.rmtree(config.run.dir, ignore_errors=True)  # of a try that was stopped
    copy_up_to_sft(Path(source), Path(config.run.dir))
    run_stages(config, ("rl",))
    rows = read_metrics(config.run.dir)["rl"]
    steps = [row for row in rows if "reward/mean" in row]
    began = steps[0]["time"]
    return [
        *(row | {"time/since_first_s": row["time"] - began} for row in steps[:-1]),
        rows[-1] | steps[-1] | {"time/since_first_s": steps[-1]["time"] - began},
    ]


def work(
    out: Path,
    sources: Sequence[str],
    overrides: list[str],
    kinds: Sequence[Kind],
    may_begin: Callable[[], Any],
) -> None:
    """Do the runs that are missing of these kinds, all of one mode, seed after seed."""
    is_live = kinds[0].mode == "live"

    def missing() -> Iterator[tuple[Path, Config, str]]:
        for source in sources:
            for kind in kinds:
                path = out / f"{kind.file}-{Path(source).name}.json"
                if not path.exists() and may_begin():
                    folder = out / "runs" / path.stem if is_live else Path(source).resolve()
                    mine = [f"rl.max_staleness={kind.staleness}", f"run.dir={folder}"]
                    mine.append(f"rl.correct_staleness={str(kind.is_corrected).lower()}")
                    yield path, load_config(own_settings(source), [*overrides, *mine]), source

    if is_live:
        for path, config, source in missing():
            path.write_text(json.dumps(live(config, source)))
        return
    running: dict[Any, Path] = {}
    for path, config, _ in missing():
        running[ray.remote(num_cpus=1)(exact).remote(config)] = path
        if len(running) == int(ray.cluster_resources()["CPU"]):
            _keep_one(running)
    while running:
        _keep_one(running)


def _keep_one(running: dict[Any, Path]) -> None:
    (done,), _ = ray.wait(list(running))
    running.pop(done).write_text(json.dumps(ray.get(done)))


def results(out: Path) -> dict[Kind, dict[str, Rows]]:
    """Return the steps of the finished runs, by kind and by the name of their source."""
    return {
        kind: {
            path.stem.removeprefix(f"{kind.file}-"): json.loads(path.read_text())
            for path in sorted(out.glob(f"{kind.file}-*.json"))
        }
        for kind in KINDS
    }


def mean(rows: Rows, name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def last_reward(rows: Rows) -> float:
    return mean(rows[-WINDOW:], "reward/mean")


def with_interval(values: Sequence[float]) -> str:
    """Return the mean of some seeds' differences and the half of its 95 % interval."""
    if len(values) < 2:
        return "-"
    degrees = min(len(values) - 1, len(T_95))
    half = T_95[degrees - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):+.3f} ± {half:.3f}"


def table(found: dict[Kind, dict[str, Rows]]) -> str:
    """Return one line a kind, the mean over its seeds; `against 0` is paired by seed, with its 95 %
    interval over the seeds."""
    lines = [
        f"| mode | staleness | runs | reward, last {WINDOW} steps | by seed | against 0 | greedy "
        "| age | KL | effective | waited | s a step |",
        "|---" * 12 + "|",
    ]
    for kind, seeds in found.items():
        if not seeds:
            continue
        on_policy = found[Kind(kind.mode, 0, True)]
        gaps = [
            last_reward(rows) - last_reward(on_policy[seed])
            for seed, rows in seeds.items()
            if seed in on_policy
        ]
        every = [row for rows in seeds.values() for row in rows]
        seconds = [
            row["time/wait_s"] + row["time/learn_s"] + row["time/publish_s"] for row in every
        ]
        is_live = kind.mode == "live"  # else the clock says nothing
        cells = [
            kind.mode,
            str(kind),
            str(len(seeds)),
            f"{statistics.fmean(map(last_reward, seeds.values())):.3f}",
            ", ".join(f"{last_reward(rows):.3f}" for rows in seeds.values()),
            with_interval(gaps) if kind.staleness else "-",
            f"{statistics.fmean(r[-1]['validation/accuracy'] for r in seeds.values()):.3f}",
            f"{mean(every, 'rollout/staleness_mean'):.2f}",
            f"{mean(every, 'policy/kl_from_sampler'):.1e}",
            f"{mean(every, 'policy/effective_fraction'):.3f}",
            f"{mean(every, 'time/wait_s') / statistics.fmean(seconds):.0%}" if is_live else "-",
            f"{statistics.median(seconds):.2f}" if is_live else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict[Kind, dict[str, Rows]], rollouts_per_step: int, path: Path) -> None:
    """Draw the mean over seeds of the smoothed rewards: by samples, and by the clock. Shaded: from
    the least to the most of the seeds, of the corrected ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not any(found.values()):
        return
    modes = list(dict.fromkeys(kind.mode for kind, seeds in found.items() if seeds))
    figure, row = pyplot.subplots(
        1, len(modes), figsize=(6.5 * len(modes), 5), sharey=True, squeeze=False
    )
    by_mode = dict(zip(modes, row[0], strict=True))
    for kind, seeds in found.items():
        if not seeds:
            continue
        runs = list(seeds.values())
        ends = range(WINDOW, min(map(len, runs)) + 1)
        of_seeds = [
            [mean(rows[end - WINDOW : end], "reward/mean") for rows in runs] for end in ends
        ]
        if kind.mode == "live":
            x = [statistics.fmean(r[end - 1]["time/since_first_s"] for r in runs) for end in ends]
        else:
            x = [end * rollouts_per_step for end in ends]
        colour = f"C{STALENESS.index(kind.staleness)}"
        if kind.is_corrected:
            by_mode[kind.mode].fill_between(
                x, list(map(min, of_seeds)), list(map(max, of_seeds)), color=colour, alpha=0.1
            )
        by_mode[kind.mode].plot(
            x,
            list(map(statistics.fmean, of_seeds)),
            color=colour,
            linestyle="-" if kind.is_corrected else ":",
            label=f"{kind} ({len(runs)} runs)",
        )
    about = {
        "exact": ("staleness, exactly", "sampled answers"),
        "live": ("staleness, at most (live)", "seconds since the first step"),
    }
    for mode, axes in by_mode.items():
        title, x_label = about[mode]
        axes.set(title=title, xlabel=x_label, ylabel=f"reward, mean of {WINDOW} steps")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", help="run directories and key=value")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--staleness", type=int, choices=STALENESS, action="append")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_intermixed_args()
    out, ends_at = args.out.resolve(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    overrides = [word for word in args.sources if "=" in word]
    sources = [word for word in args.sources if "=" not in word]
    config = load_config(own_settings(sources[0]), overrides)
    with connected(config):
        mode, wanted = "live" if args.live else "exact", args.staleness or STALENESS
        kinds = [kind for kind in KINDS if kind.mode == mode and kind.staleness in wanted]
        work(out, sources, overrides, kinds, lambda: time.monotonic() < ends_at)
    found = results(out)
    (out / "staleness.md").write_text(table(found))
    plot(found, config.rl.prompts_per_step * config.rl.rollouts_per_prompt, out / "staleness.png")
    print(table(found))


if __name__ == "__main__":
    main()
