"""Numbers in, lines, bars and curves out: where a stage's metrics go to be seen.

A stage calls `sinks.log(stage, step, metrics)` and knows nothing else. `metrics.jsonl` in the run
directory is the one that counts: `read_metrics` gives it back to `evaluate.report`; the console
and W&B are for watching. Watching never steers: a sink that fails warns once and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import fsspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from aquarl.config import Config
from aquarl.storage import get, put

logger = logging.getLogger(__name__)

HEADLINES = (
    "reward/mean",
    "validation/accuracy",
    "loss/",
    "rollout/length",
    "throughput",
    "time/step",
)
"""What the console shows first, by the beginnings of names."""
BEGINS = "begins"
"""In a row of `metrics.jsonl`: the stage starts, or goes on, at this step."""


class Sink(Protocol):
    """A place where metrics go."""

    def begin(self, stage: str, step: int) -> None:
        """Hear that a stage starts, or goes on, after so many steps.

        What was logged of later ones is of a policy that is no more.
        """
        ...

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step. Several calls for one step add up."""
        ...

    def close(self) -> None:
        """Write what is held back and let go."""
        ...


class Sinks:
    """Several sinks as one. What one of them raises is said once and stops neither run nor others.

    It is a context manager: leaving it closes every sink.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)
        self._warned: set[int] = set()

    def begin(self, stage: str, step: int) -> None:
        for sink in self._sinks:
            self._try(sink, sink.begin, stage, step)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            self._try(sink, sink.log, stage, step, metrics)

    def close(self) -> None:
        for sink in self._sinks:
            self._try(sink, sink.close)

    def _try(self, sink: Sink, act: Callable[..., None], *args: Any) -> None:
        try:
            act(*args)
        except Exception as error:
            if id(sink) not in self._warned:
                self._warned.add(id(sink))
                name = type(sink).__name__
                logger.warning("%s failed (%s); the run goes on.", name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def make_sinks(config: Config) -> Sinks:
    """Return the sinks a configuration asks for: the file always, the console, W&B if wanted."""
    steps = {stage: getattr(config, stage).steps for stage in ("base", "mid", "sft", "rl")}
    return Sinks([JsonlSink(config.run.dir), ConsoleSink(steps), make_trackers(config)])


def make_trackers(config: Config) -> Sinks:
    """Return the services that a configuration asks for: W&B if wanted."""
    return Sinks([WandbSink(config)] if wandb_mode(config) != "off" else [])


class JsonlSink:
    """Appends to `metrics.jsonl`, one object a call, flushed.

    A bucket cannot append: there the whole file is written again, at most every `every_s` seconds.
    Lines that could not be written are kept and tried again with the next, so a full disk that
    is emptied in time costs nothing. A number that is not finite is written as null.
    """

    def __init__(self, run_dir: str, every_s: float = 30.0) -> None:
        self._fs, folder = fsspec.url_to_fs(run_dir)
        self._path = f"{folder.rstrip('/')}/metrics.jsonl"
        self._is_local = "file" in self._fs.protocol
        self._every_s = 0.0 if self._is_local else every_s
        self._pending: list[bytes] = []
        self._written: bytes | None = None
        """Of a bucket's file: what stands there."""
        self._flushed_at = -math.inf

    def begin(self, stage: str, step: int) -> None:
        self.log(stage, step, {BEGINS: 1})

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        row: dict[str, Any] = {"stage": stage, "step": step, "time": round(time.time(), 3)}
        row |= {name: _finite(value) for name, value in metrics.items()}
        self._pending.append(json.dumps(row).encode() + b"\n")
        if time.monotonic() - self._flushed_at >= self._every_s:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        new = b"".join(self._pending)
        if new and self._is_local:
            self._append(new)
        elif new:
            if self._written is None:
                self._written = _whole(self._fs.cat_file(self._path)) if self._exists() else b""
            self._fs.pipe_file(self._path, self._written + new)
            self._written += new
        self._pending.clear()
        self._flushed_at = time.monotonic()

    def _exists(self) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path))

    def _append(self, new: bytes) -> None:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        with open(self._path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # a killed process left half a line
                    new = b"\n" + new
            try:
                while new:  # a full disk takes a part first and refuses the rest
                    new = new[file.write(new) or 0 :]
            except OSError:
                file.truncate(end)  # whole lines only: these are tried again
                raise


def read_metrics(run_dir: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each stage in order of step; empty where no stage has logged.

    Rows of one step are merged. Where a stage begins, resumed or made again, its rows from that
    step on are forgotten: the policy that they tell of is no more.
    Half a line, left by a killed process, is passed over. Raises: StorageError, where nobody can
    tell what is there.
    """
    try:
        lines = get(f"{run_dir.rstrip('/')}/metrics.jsonl").splitlines()
    except FileNotFoundError:
        return {}
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            steps = stages.setdefault(str(row["stage"]), {})
            if row.pop(BEGINS, None):
                for gone in [step for step in steps if step >= row["step"]]:
                    del steps[gone]
                continue
            steps.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            continue
    return {
        stage: [steps[step] for step in sorted(steps)] for stage, steps in stages.items() if steps
    }


class ConsoleSink:
    """A progress bar for each stage on a terminal; elsewhere a line now and then.

    Args:
        steps: Stage to its number of steps. Of a stage without steps only its end is shown.
        every_s: Off a terminal, the least seconds between two lines. The first and the last of a
            stage are always shown.
    """

    def __init__(
        self, steps: Mapping[str, int], console: Console | None = None, every_s: float = 5.0
    ) -> None:
        self._steps, self._every_s = steps, every_s
        self._console = console or Console(stderr=True)  # stdout is for results
        self._stage, self._held = "", ""
        self._shown_at = -math.inf
        self._progress: Progress | None = None

    def begin(self, stage: str, step: int) -> None:
        pass  # its bar shows where it stands

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._steps:
            return
        if stage != self._stage:
            self.close()
            self._stage = stage
        if self._console.is_terminal:
            self._show_bar(stage, step, headline(metrics))
            return
        self._held = f"{stage:>5} {step}/{self._steps[stage]}  {headline(metrics)}"
        if time.monotonic() - self._shown_at >= self._every_s:
            self._show_line()

    def close(self) -> None:
        self._show_line()
        if self._progress:
            self._progress.stop()
            self._progress = None
        self._stage, self._shown_at = "", -math.inf

    def _show_line(self) -> None:
        if self._held:
            self._console.print(self._held, highlight=False, markup=False, soft_wrap=True)
            self._held, self._shown_at = "", time.monotonic()

    def _show_bar(self, stage: str, step: int, numbers: str) -> None:
        if self._progress is None:
            whole = Column(no_wrap=True)  # in a narrow window the numbers give way, not the bar
            self._progress = Progress(
                TextColumn("{task.description:>5}", table_column=whole),
                BarColumn(bar_width=24, table_column=whole),
                MofNCompleteColumn(table_column=whole),
                TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
                TextColumn(
                    "{task.fields[numbers]}",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self._console,
                expand=True,
                transient=True,
                refresh_per_second=4,
            )
            self._progress.add_task(stage, total=self._steps[stage], numbers="")
            self._progress.start()
        # A step with little to say (a save, say) leaves the last numbers standing.
        fields: dict[str, Any] = {"numbers": numbers} if numbers else {}
        self._progress.update(self._progress.task_ids[0], completed=step, **fields)


def headline(metrics: Mapping[str, float], most: int = 5) -> str:
    """Return the numbers a person looks at first: "loss/train 2.31  time/step_s 0.4"."""

    def rank(name: str) -> int:
        return next((i for i, start in enumerate(HEADLINES) if name.startswith(start)), 99)

    names = sorted(metrics, key=rank)[:most]  # stable: equals stay as they were logged
    return "  ".join(f"{name} {float(metrics[name]):.4g}" for name in names)


class WandbSink:
    """One W&B run for each stage, all in a group named like the run directory.

    Ids are kept in `wandb.json` of the run directory, so a resumed stage goes on in its own run;
    one that begins anew has a new one.
    Where nobody is logged in or the service is away, curves are kept as W&B's offline runs, which
    `wandb sync` sends later. That is found out once: it may not slow down every stage.

    Args:
        patience_s: The longest to wait for the service, at the start and at the end of a stage.
    """

    def __init__(self, config: Config, patience_s: float = 30.0) -> None:
        self._config, self._mode, self._patience_s = config, wandb_mode(config), patience_s
        self._fs, folder = fsspec.url_to_fs(config.run.dir)
        self._folder = folder.rstrip("/")
        self._runs: dict[str, Any] = {}

    def begin(self, stage: str, step: int) -> None:
        if step == 0 and stage not in self._runs:
            self._id(stage, is_new=True)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        if stage not in self._runs:
            self._runs[stage] = None
            self._runs[stage] = self._start(stage)
        if self._runs[stage] is not None:
            # An axis of our own: W&B's drops steps that a resumed stage does again.
            self._runs[stage].log({"step": step, **metrics})

    def close(self) -> None:
        runs = [run for run in self._runs.values() if run is not None]
        self._runs.clear()
        for run in runs:
            run.finish()

    def _start(self, stage: str) -> Any:
        """Return the stage's run: where it cannot be online, offline, saying why."""
        import wandb  # a second to import: only for those who want it

        if self._mode != "online":
            return self._init(stage)
        try:
            if not wandb.login(
                prompt=False, verify=False
            ):  # never ask: nobody may be there, and all waits
                raise wandb.errors.AuthenticationError("nobody is logged in: `wandb login`")
            return self._init(stage)
        except wandb.errors.Error as error:
            self._mode = "offline"
            wandb.teardown()  # it still holds the id of the run that did not start
            run = self._init(stage)
            folder = os.path.dirname(os.path.dirname(run.dir))
            logger.warning(
                "W&B cannot be used (%s). The curves of this run are kept in %s; "
                "`wandb sync %s/offline-run-*` sends them.",
                *(str(error).split("\n", 1)[0], folder, folder),
            )
            return run

    def _init(self, stage: str) -> Any:
        import wandb

        is_local = "file" in self._fs.protocol
        if is_local:
            os.makedirs(self._folder, exist_ok=True)
        group = self._folder.rsplit("/", 1)[-1]
        run = wandb.init(
            project=self._config.track.project,
            group=group,
            name=f"{group}-{stage}",
            job_type=stage,
            id=self._id(stage),
            resume="allow",
            reinit="create_new",
            mode=self._mode,  # type: ignore[arg-type]
            dir=self._folder if is_local else None,
            config=self._config.model_dump(mode="json"),
            settings=wandb.Settings(
                init_timeout=self._patience_s,
                finish_timeout=self._patience_s,
                finish_timeout_raises=False,
                silent=True,
            ),
        )
        run.define_metric("*", step_metric="step")
        return run

    def _id(self, stage: str, *, is_new: bool = False) -> str:
        path = f"{self._config.run.dir.rstrip('/')}/wandb.json"
        try:
            ids = json.loads(get(path))
        except (FileNotFoundError, ValueError):
            ids = {}
        if is_new or stage not in ids:
            ids[stage] = secrets.token_hex(6)
            put(path, json.dumps(ids).encode())
        return str(ids[stage])


def wandb_mode(config: Config) -> str:
    """Return "off", "offline" or "online": WANDB_MODE where it is set, else the configuration's."""
    mode = os.environ.get("WANDB_MODE", "").lower() or config.track.wandb
    return {"disabled": "off", "dryrun": "offline"}.get(mode, mode)


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _whole(text: bytes) -> bytes:
    return text if not text or text.endswith(b"\n") else text + b"\n"
