"""Metrics and measures of a run in, PNG pictures out; `report.py` puts them on its page.

Each function returns the bytes of one picture, or None where the run has nothing to draw.
Drawn without pyplot, so nothing global is touched and no display is needed.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

Rows = dict[str, list[dict[str, Any]]]
"""Metrics by stage, as `observe.metrics.read_metrics` gives them."""

COLOURS = {"base": "#0072B2", "mid": "#009E73", "sft": "#E69F00", "rl": "#D55E00"}
"""One colour a stage, in every picture; told apart by colour-blind eyes too (Okabe and Ito)."""
INK, FAINT = "#333333", "#999999"


STEPS_SHOWN, WORKERS_SHOWN = 6, 16
"""Of the timeline."""


def all_plots(
    metrics: Rows, ledger: list[dict[str, Any]], evaluation: dict[str, Any]
) -> dict[str, bytes]:
    """Return the pictures of a run by file name, leaving out those with nothing to show.

    Args:
        metrics: Rows of each stage in order of step.
        ledger: Rows of `ledger.jsonl`.
        evaluation: What `results/evaluate.json` holds, or {}.
    """
    stages = evaluation.get("stages", {})
    makers: dict[str, Callable[[], bytes | None]] = {
        "accuracy.png": lambda: accuracy_plot(stages),
        "letters.png": lambda: letters_plot(stages),
        "reward.png": lambda: reward_plot(metrics),
        "length.png": lambda: length_plot(metrics),
        "rl_timeline.png": lambda: timeline_plot(metrics.get("rl", []), ledger),
        "loss.png": lambda: curves_plot(
            metrics, ("loss/train", "loss/validation"), "loss (nats a token)"
        ),
        "bits_per_byte.png": lambda: curves_plot(
            metrics, ("loss/bits_per_byte",), "validation: bits a byte"
        ),
    }
    pictures = {name: make() for name, make in makers.items()}
    return {name: picture for name, picture in pictures.items() if picture}


def curves_plot(metrics: Rows, names: Sequence[str], what: str) -> bytes | None:
    """Return one panel a stage; the first name light with its average, the others with marks."""
    shown = [
        stage for stage, rows in metrics.items() if any(len(series(rows, n)[0]) for n in names)
    ]
    if not shown:
        return None
    figure = Figure(figsize=(max(5, 0.6 + 2.6 * len(shown)), 3.1), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, stage in zip(panels, shown, strict=True):
        for name in names:
            steps, values = series(metrics[stage], name)
            if name.endswith("train"):
                _noisy(panel, steps, values, COLOURS.get(stage, INK), "training")
            else:
                label = name.rsplit("/", 1)[-1].replace("_", " ")
                colour = INK if len(names) > 1 else COLOURS.get(stage, INK)
                panel.plot(steps, values, "o-", color=colour, ms=4, lw=1.2, label=label)
        _dress(panel, stage, "step", what if panel is panels[0] else "")
        panel.set_yscale("log")  # a stage that starts where another ended is a flat line otherwise
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.tick_params(which="minor", colors=INK, labelsize=8)
        if len(names) > 1:
            panel.legend(frameon=False, fontsize=8)
    return _png(figure)


def reward_plot(metrics: Rows) -> bytes | None:
    """Return the sampled reward of RL step by step, and the accuracy measured on the way."""
    steps, values = series(metrics.get("rl", []), "reward/mean")
    if not len(steps):
        return None
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    panel = figure.subplots()
    _noisy(panel, steps, values, COLOURS["rl"], "mean reward of training rollouts")
    at, accuracies = series(metrics["rl"], "validation/accuracy")
    if len(at):
        panel.plot(at, accuracies, "o-", color=INK, ms=4.5, lw=1, label="validation accuracy")
        (at, low), (_, high) = (series(metrics["rl"], f"validation/{x}") for x in ("low", "high"))
        panel.fill_between(at, low, high, color=INK, alpha=0.12, lw=0, label="its 95 % interval")
        _baseline(panel, series(metrics["rl"], "validation/majority_baseline")[1].tolist()[:1])
    _dress(panel, "rl: reward and accuracy on the way", "step", "reward; share right")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def length_plot(metrics: Rows) -> bytes | None:
    """Return the length of RL's answers, and the share of them that the limit cut."""
    rows = metrics.get("rl", [])
    steps, lengths = series(rows, "rollout/length_mean")
    if not len(steps):
        return None
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    _noisy(upper, steps, lengths, COLOURS["rl"], "")
    _dress(upper, "rl: length of an answer", "", "tokens, mean")
    _noisy(lower, *series(rows, "rollout/cut_fraction"), INK, "")
    _dress(lower, "", "step", "cut by the limit")
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.set_ylim(bottom=0)
    return _png(figure)


def accuracy_plot(stages: dict[str, Any]) -> bytes | None:
    """Return each stage's accuracies with their 95 % intervals, and the majority baseline."""
    if not stages:
        return None
    ways = [
        ("greedy", "greedy", "o", "full"),
        ("sampled", "sampled (pass@1)", "s", "full"),
        ("letter_logit", "letter logit, no text", "D", "none"),
    ]
    figure = Figure(figsize=(max(8.4, 2.4 + 1.7 * len(stages)), 3.8), layout="constrained")
    panel = figure.subplots()
    for place, (stage, result) in enumerate(stages.items()):
        for i, (way, label, mark, fill) in enumerate(ways):
            if way not in result:
                continue
            measured, x = result[way], place + 0.22 * (i - 1)
            low, high, accuracy = (measured[key] for key in ("low", "high", "accuracy"))
            colour = COLOURS.get(stage, INK)
            panel.errorbar(
                x, accuracy, [[max(0, accuracy - low)], [max(0, high - accuracy)]],
                fmt=mark, color=colour, ms=7, lw=1.6, capsize=3, fillstyle=fill,
            )  # fmt: skip
            panel.annotate(
                f"{accuracy:.1%}", (x, high), (0, 4), textcoords="offset points",
                ha="center", fontsize=8, color=INK,
            )  # fmt: skip
            if place == 0:
                panel.plot([], [], mark, color=FAINT, ms=6, fillstyle=fill, label=label)
    _baseline(panel, [r["greedy"]["majority_baseline"] for r in stages.values() if "greedy" in r])
    n = max(result["n"] for result in stages.values())
    _dress(panel, f"accuracy on {n} problems, 95 % intervals", "", "problems solved")
    panel.set_xticks(range(len(stages)), list(stages), fontsize=10)
    panel.set_xlim(-0.6, len(stages) - 0.4)
    panel.set_ylim(0, min(1.05, max(0.5, panel.get_ylim()[1] + 0.06)))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def letters_plot(stages: dict[str, Any]) -> bytes | None:
    """Return how often each stage chose each letter, beside how often each was right."""
    chosen = {s: r["greedy"]["letters"] for s, r in stages.items() if "greedy" in r}
    if not chosen:
        return None
    first = next(iter(stages.values()))["greedy"]
    bars = [(f"{stage} says", COLOURS.get(stage, INK), counts) for stage, counts in chosen.items()]
    if right := first.get("right_letters"):
        bars.insert(0, ("right", "#CCCCCC", right))
    letters = sorted({letter for _, _, counts in bars for letter in counts})
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panel = figure.subplots()
    width = 0.8 / len(bars)
    for i, (label, colour, counts) in enumerate(bars):
        x = np.arange(len(letters)) + (i - (len(bars) - 1) / 2) * width
        heights = [counts.get(letter, 0) / first["n"] for letter in letters]
        panel.bar(x, heights, width * 0.92, color=colour, label=label)
    _dress(panel, "letters chosen (greedy)", "", "share of problems")
    panel.set_xticks(range(len(letters)), letters)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def timeline_plot(rows: list[dict[str, Any]], ledger: list[dict[str, Any]]) -> bytes | None:
    """Return who was busy when over some steps in the middle of RL: the learner, each worker.

    The clocks of the machines are taken to agree.
    """
    timed = [row for row in rows if "time/ended" in row]
    spans: dict[tuple[str, int], tuple[float, float, int]] = {}
    fetched: Counter[tuple[str, int]] = Counter()
    """Seconds that a worker took new weights for, before a lease."""
    for row in ledger:
        if any(row.get("sampled", ())):
            lease = row["worker"], row["lease"]
            spans[lease] = (*row["sampled"], row["step"])
            fetched[lease] += row.get("fetch_s", 0.0)
    if not timed or not spans:
        return None
    first = max(0, (len(timed) - STEPS_SHOWN) // 2)
    shown = timed[first : first + STEPS_SHOWN]
    start, end = shown[0]["time/ended"] - shown[0]["time/step_s"], shown[-1]["time/ended"]
    workers = sorted({worker for worker, _ in spans})
    lines = [*reversed(workers[:WORKERS_SHOWN]), "learner"]

    figure = Figure(figsize=(8.4, 1.6 + 0.34 * len(lines)), layout="constrained")
    panel = figure.subplots()

    def bar(line: str, since: float, seconds: float, **look: Any) -> None:
        left, right = max(since, start), min(since + seconds, end)
        if right > left and line in lines:
            panel.barh(lines.index(line), right - left, 0.62, left - start, **look)

    for lease, (since, until, step) in spans.items():
        bar(lease[0], since, until - since, color="#0072B2" if step % 2 else "#56B4E9")
        bar(lease[0], since - fetched[lease], fetched[lease], color="#CC79A7")
    for row in timed:
        at = row["time/ended"] - row["time/step_s"]
        learn_s = row["time/step_s"] - row["time/wait_s"] - row["time/publish_s"]
        if seconds := row.get("time/validate_s"):
            bar("learner", at - seconds, seconds, color="#F0E442")
        bar("learner", at, row["time/wait_s"], color="#E6E6E6")
        bar("learner", at + row["time/wait_s"], learn_s, color=COLOURS["rl"])
        bar("learner", row["time/ended"] - row["time/publish_s"], row["time/publish_s"], color=INK)
        middle = at + row["time/wait_s"] + learn_s / 2 - start
        if learn_s > 0.03 * (end - start) and 0 < middle < end - start:
            panel.text(
                middle, len(lines) - 1, row["step"], ha="center", va="center", fontsize=8, color="w"
            )
    for colour, label in (
        (COLOURS["rl"], "learns (step)"),
        ("#E6E6E6", "waits for groups"),
        (INK, "publishes weights"),
        ("#F0E442", "validates"),
        ("#0072B2", "samples for odd steps"),
        ("#56B4E9", "samples for even steps"),
        ("#CC79A7", "fetches weights"),
    ):
        panel.barh(0, 0, color=colour, label=label)
    steps = f"steps {shown[0]['step']} to {shown[-1]['step']}"
    left_out = len(workers) - WORKERS_SHOWN
    if left_out > 0:
        steps += f", {left_out} workers not shown"
    _dress(panel, f"rl: who is busy when ({steps})", "seconds", "")
    panel.set_xlim(0, end - start)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8))
    panel.set_yticks(range(len(lines)), lines)
    panel.grid(visible=False)
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which a number was logged, and its finite values."""
    pairs = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _noisy(panel: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Draw a noisy series light, and over it its average over a tenth of the steps around."""
    n, half = len(values), len(values) // 20
    if half == 0:
        panel.plot(steps, values, "-", color=colour, lw=1.6, label=label)
        return
    sums = np.cumsum(np.insert(values, 0, 0.0))
    places = np.arange(n)  # centred, so that a falling curve is not drawn late
    starts, ends = np.maximum(places - half, 0), np.minimum(places + half + 1, n)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    panel.plot(steps, values, "-", color=colour, lw=0.8, alpha=0.3)
    panel.plot(steps, means, "-", color=colour, lw=2, label=label)


def _baseline(panel: Axes, baselines: Sequence[float]) -> None:
    if baselines:
        label = f"always the commonest letter ({baselines[0]:.0%})"
        panel.axhline(baselines[0], color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1.5, label=label)


def _dress(panel: Axes, title: str, x: str, y: str) -> None:
    panel.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    panel.set_xlabel(x, color=INK, fontsize=9)
    panel.set_ylabel(y, color=INK, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.tick_params(colors=INK, labelsize=8)
    panel.grid(axis="y", which="both", color="#E6E6E6", lw=0.8)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
