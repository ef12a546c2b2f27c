"""A run directory in, one page about it out: `report.md`, its pictures, and `report.json`.

Reads only what the run wrote (`config.toml`, `metrics.jsonl`, `ledger.jsonl`, `results/*.json`,
`transcripts/`), so it can be made again at any time and from anywhere. `serve.hf` takes the figures
of a model card from `report.json`. What was not run is left out.
"""

from __future__ import annotations

import fnmatch
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aquarl.errors import DataError
from aquarl.evaluate.page import markdown
from aquarl.evaluate.plots import all_plots
from aquarl.observe.ledger import read_ledger
from aquarl.observe.machine import environment
from aquarl.observe.metrics import read_metrics
from aquarl.storage import find, get, put

STAGES = ("tokenizer", "base", "mid", "sft", "rl")
FINAL = (
    "loss/train",
    "loss/validation",
    "loss/bits_per_byte",
    "reward/mean",
)
"""Metrics whose last value stands in the table of stages."""
PER_PROBLEM = ("problem_ids", "chosen", "is_correct")
"""Lists that stay in `results/evaluate.json`."""


def write_report(run_dir: str, price_per_hour: float = 0.0) -> str:
    """Write `report.md`, `report.json` and `plots/*.png` into a run directory.

    Everything is made before anything is written, so a failure leaves an earlier report whole.

    Args:
        price_per_hour: Of the cluster, in any currency. 0: the page has no column for cost.

    Returns:
        The path of `report.md`.

    Raises:
        DataError: The directory holds nothing of a run, or a result in it is damaged.
        StorageError: The report cannot be written there, or nobody can tell what is there.
    """
    facts = gather(run_dir, price_per_hour)
    plots = all_plots(facts.pop("curves"), facts.pop("ledger"), facts["evaluation"])
    facts["plots"] = [f"plots/{name}" for name in plots]
    page = markdown(facts)
    numbers = json.dumps(_finite(_without_lists(facts)), indent=1, ensure_ascii=False)
    files = {f"plots/{name}": picture for name, picture in plots.items()}
    files |= {"report.json": numbers.encode(), "report.md": page.encode()}
    for name, body in files.items():
        put(f"{run_dir.rstrip('/')}/{name}", body)
    return f"{run_dir.rstrip('/')}/report.md"


def gather(run_dir: str, price_per_hour: float = 0.0) -> dict[str, Any]:
    """Return everything that the page is made of. Raises: DataError, as in `write_report`."""
    folder = run_dir.rstrip("/")
    curves = read_metrics(run_dir)
    results = {stage: _result(f"{folder}/results/{stage}.json") for stage in STAGES}
    evaluation = _result(f"{folder}/results/evaluate.json")
    if not curves and not evaluation and not any(results.values()):
        raise DataError(
            f"{run_dir} holds no metrics and no results, so there is nothing to report. "
            f"Run a stage first, for example `aquarl pipeline run.dir={run_dir}`, "
            "or name another directory with run.dir=..."
        )
    if evaluation.get("stages"):
        evaluation = _of_what_stands(evaluation, results)
    stages = {
        stage: _stage_facts(stage, results[stage], curves.get(stage, []), price_per_hour)
        for stage in STAGES
        if results[stage] or stage in curves
    }
    return {
        "run": folder.rsplit("/", 1)[-1],
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": stages,
        "evaluation": evaluation,
        "environment": environment(),
        "transcript": _last_transcript(folder),
        "config": _text(f"{folder}/config.toml"),
        "ledger": read_ledger(run_dir),
        "curves": {stage: curves[stage] for stage in (*STAGES, *curves) if stage in curves},
    }


def _of_what_stands(
    evaluation: dict[str, Any], results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return an evaluation without the figures of what was made again, or deleted, since then.

    Their stages are named under `outdated`.
    """

    def is_outdated(stage: str, measured: dict[str, Any]) -> bool:
        checkpoint = measured.get("checkpoint", {})
        stands = results.get(stage, {}).get("finished")
        return stage in STAGES and checkpoint.get("finished", stands) != stands

    stages = evaluation["stages"]
    outdated = [stage for stage in stages if is_outdated(stage, stages[stage])]
    kept = {
        stage: measured
        for stage, measured in stages.items()
        if stage not in outdated and "greedy" in measured
    }
    tests = [
        test for test in evaluation.get("comparisons", []) if {test["a"], test["b"]} <= kept.keys()
    ]
    return evaluation | {"stages": kept, "comparisons": tests, "outdated": outdated}


def _stage_facts(
    stage: str, result: dict[str, Any], rows: list[dict[str, Any]], price_per_hour: float
) -> dict[str, Any]:
    final = {name: _last(rows, name, result.get("metrics", {})) for name in FINAL}
    wall_s = result.get("wall_s")
    return {
        "is_finished": bool(result),
        "finished": result.get("finished"),
        "steps": result.get("steps", (rows[-1]["step"] if rows else 0) or None),
        "tokens": result.get("tokens"),
        "wall_s": wall_s,
        "tokens_per_s": _tokens_per_s(rows),
        "mfu": _mean_in_time(rows, "throughput/mfu"),
        "learners": result.get("learners"),
        "rollout_workers": result.get("rollout_workers"),
        "ran_on": result.get("ran_on", {}),
        "idle": {
            "learner": _mean_in_time(rows, "time/learner_idle_fraction"),
            "rollout_workers": _mean_in_time(rows, "time/rollout_idle_fraction"),
        },
        "cost": wall_s / 3600 * price_per_hour if wall_s and price_per_hour else None,
        "final": {name: value for name, value in final.items() if value is not None},
        "metrics": result.get("metrics") or _last_of_each(rows),
        "stream": result.get("stream", {}),
        "refused": result.get("refused", {}),
        "cut": result.get("cut", 0),
    }


def _tokens_per_s(rows: list[dict[str, Any]]) -> float | None:
    """Return tokens a second of learner steps: positions in training, sampled tokens in RL."""
    if any("throughput/tokens_per_s" in row for row in rows):
        return _mean_in_time(rows, "throughput/tokens_per_s")
    steps = [row for row in rows[1:] if "time/step_s" in row and "tokens/trained" in row]
    seconds = sum(row["time/step_s"] for row in steps)
    return sum(row["tokens/trained"] for row in steps) / seconds if seconds else None


def _mean_in_time(rows: list[dict[str, Any]], name: str) -> float | None:
    """Return the mean of a number weighted by its step's seconds, without the first: it starts
    workers and compiles."""
    steps = [row for row in rows[1:] if row.get(name) is not None and row.get("time/step_s")]
    seconds = sum(row["time/step_s"] for row in steps)
    return sum(row[name] * row["time/step_s"] for row in steps) / seconds if seconds else None


def _last(rows: list[dict[str, Any]], name: str, summary: dict[str, Any]) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return summary.get(name, values[-1] if values else None)


def _last_of_each(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for row in rows for name, value in row.items()}


def _result(path: str) -> dict[str, Any]:
    text = _text(path)
    try:
        result = json.loads(text) if text else {}
        if not isinstance(result, dict):
            raise ValueError(f"it holds a {type(result).__name__}")
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}), so its stage cannot be reported. "
            f"Delete that file and run `aquarl {Path(path).stem}` again."
        ) from error
    return result


def _text(path: str) -> str:
    try:
        return get(path).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _last_transcript(folder: str) -> dict[str, Any]:
    names = [path.rsplit("/", 1)[-1] for path in find(f"{folder}/transcripts")]
    names = sorted(fnmatch.filter(names, "step_*.jsonl"))
    try:
        text = _text(f"{folder}/transcripts/{names[-1]}") if names else ""
        row = json.loads(text.splitlines()[0]) if text else {}
    except (ValueError, IndexError):
        return {}
    return row if isinstance(row, dict) else {}


def _without_lists(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_lists(value) if isinstance(value, dict) else value
        for key, value in facts.items()
        if key not in PER_PROBLEM
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
