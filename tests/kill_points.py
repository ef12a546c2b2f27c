"""Parts of a run that kill their own process at chosen points: what `tests/test_chaos.py` hires.

The run is the real one; it is only given these classes in place of its own. Files in the run
directory say what happens: one in `armed/` is a point at which a process dies of SIGKILL, or hangs
where its name says so, after removing that file, so that each happens once; whoever takes up a
lease with a problem named in `poison` dies every time, the first time of an error if there is a
file `mild`; with a file `broken` no worker can start; a file `scale to` holds how many are wanted
from the first such step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psutil import Process

from aquarl.cluster import rollout_pool, stream_actor
from aquarl.cluster.rollout_pool import RolloutWorker
from aquarl.cluster.stream_actor import StreamActor
from aquarl.config import Config
from aquarl.records import LeaseResult, StepShare, Weights

if TYPE_CHECKING:  # every process of a run imports this file, and few of them need torch
    import pytest

    from aquarl.cluster.learner_group import Member

POINTS = (
    "lease", "submit", "batch taken", "after backward", "checkpoint write",
    "publishing learner", "publishing stream", "sampling hangs", "learning hangs", "loading hangs",
)  # fmt: skip
FROM_STEP = 3
"""Points lie in this step or later: behind the checkpoint of step 2, before the next. But for that
in what is loaded before the first step."""


def arm(run: Path, *points: str) -> None:
    (run / "armed").mkdir()
    for point in points:
        (run / "armed" / point).touch()


def armed(run: str | Path) -> list[str]:
    """Return the points at which nobody has died yet."""
    return sorted(path.name for path in Path(run, "armed").glob("*"))


def die_once(run_dir: str, point: str) -> None:
    try:
        Path(run_dir, "armed", point).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def hang_once(run_dir: str, point: str) -> None:
    with suppress(FileNotFoundError):
        Path(run_dir, "armed", point).unlink()
        time.sleep(3600)


def employ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next run of this process hire the parts below."""
    from aquarl.cluster import learner_group

    run_group = learner_group.run_group
    monkeypatch.setattr(stream_actor, "StreamActor", MortalStream)
    monkeypatch.setattr(
        learner_group, "run_group", lambda config, work: run_group(config, MortalWork(work))
    )


class MortalWorker(RolloutWorker):
    def __init__(
        self, name: str, config: Config, source: Any, make_sampler: Any, stream: Any
    ) -> None:
        def broken() -> Any:
            raise RuntimeError(Path(config.run.dir, "broken").read_text())

        is_broken = Path(config.run.dir, "broken").is_file()
        super().__init__(name, config, source, broken if is_broken else make_sampler, stream)
        self._run_dir, sample = config.run.dir, self._sampler.sample
        poison = Path(config.run.dir, "poison")
        self._poison = poison.read_text().split() if poison.is_file() else []

        def mortal(prompts: Any, seeds: Any, sampling: Any) -> Any:
            if any(prompt.problem_id in self._poison for prompt in prompts):
                if (mild := Path(self._run_dir, "mild")).exists():
                    mild.unlink()
                    raise RuntimeError("out of cards")
                os.kill(os.getpid(), signal.SIGKILL)
            is_training = sampling.temperature > 0
            if is_training and self._sampler.version >= FROM_STEP:
                die_once(self._run_dir, "lease")
                hang_once(self._run_dir, "sampling hangs")
            return sample(prompts, seeds, sampling)

        self._sampler.sample = mortal  # type: ignore[method-assign]

    def run(self) -> Iterator[LeaseResult]:
        for result in super().run():
            yield result
            is_training = result.packed.answers_PG.shape[1] > 1
            if is_training and result.weights_version >= FROM_STEP:  # it is on its way
                die_once(self._run_dir, "submit")


class MortalArrival:
    """A learner's work of which a learner dies while it unpacks it; else it does nothing."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __setstate__(self, state: dict[str, str]) -> None:
        vars(self).update(state)
        if Process().cmdline()[0].startswith("ray::RayTrainWorker"):  # the controller has it too
            for point in armed(self.run_dir)[:1]:
                die_once(self.run_dir, point)

    def __call__(self, config: Config, member: Member) -> None:
        Path(self.run_dir, "arrived").touch()


def employ_evaluation_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next evaluation of this process hire the ones below."""
    from aquarl.cluster import evaluation

    class MortalEvaluationWorker(evaluation.EvaluationWorker):
        def __init__(self, name: str, config: Config, *args: Any) -> None:
            super().__init__(name, config, *args)
            self._run_dir = config.run.dir

        def sample(self, *args: Any) -> Any:
            die_once(self._run_dir, "evaluation")
            return super().sample(*args)

    monkeypatch.setattr(evaluation, "EvaluationWorker", MortalEvaluationWorker)


class MortalStream(StreamActor):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        rollout_pool.RolloutWorker = MortalWorker  # type: ignore[misc]  # here only

    async def publish(self, learner: str, weights: Weights) -> None:
        await super().publish(
            learner, weights
        )  # workers may have them by now; the learner is not told
        scale_to = Path(self._config.run.dir, "scale to")
        if weights.version == FROM_STEP and scale_to.exists():
            await self.scale(int(scale_to.read_text()))
            scale_to.unlink()
        if weights.version > FROM_STEP:
            die_once(self._config.run.dir, "publishing stream")


class MortalWork:
    """What a learner does, in a process that may die of it."""

    def __init__(self, work: Callable[[Config, Member], None]) -> None:
        self.work = work

    def __call__(self, config: Config, member: Member) -> None:
        from aquarl import storage
        from aquarl.cluster.stages import RayStream
        from aquarl.model import checkpoint
        from aquarl.rl.learner import Learner, Sums

        run = config.run.dir
        next_step, publish = RayStream.next_step, RayStream.publish
        backward, pipe, get = Learner._backward, storage._pipe, storage.get

        def mortal_get(path: str) -> bytes:
            if path.endswith("weights.safetensors"):
                hang_once(run, "loading hangs")
            return get(path)

        def mortal_next_step(self: RayStream, step: int, rank: int, world: int) -> StepShare:
            share = next_step(self, step, rank, world)
            if step >= FROM_STEP:
                die_once(run, "batch taken")
                die_once(run, f"batch taken, rank {rank}")
            return share

        def mortal_backward(self: Learner, batch: Any, sums: Sums, share: float = 1.0) -> None:
            backward(self, batch, sums, share)
            if self.step >= FROM_STEP:
                die_once(run, "after backward")
                die_once(run, f"after backward, rank {member.rank}")
                hang_once(run, "learning hangs")

        def mortal_pipe(fs: Any, path: str, body: bytes) -> None:
            pipe(fs, path, body)
            if "rl/step_000004" in path and path.endswith("weights.safetensors"):
                die_once(run, "checkpoint write")  # the rest of the folder is missing

        def mortal_publish(self: RayStream, weights: Weights) -> None:
            if weights.version > FROM_STEP and "publishing learner" in armed(run):
                self._actor.publish.remote(self._learner, weights)
                die_once(run, "publishing learner")
            publish(self, weights)

        RayStream.next_step = mortal_next_step  # type: ignore[method-assign]
        RayStream.publish = mortal_publish  # type: ignore[method-assign]
        Learner._backward = mortal_backward  # type: ignore[method-assign]
        storage._pipe = mortal_pipe
        checkpoint.get = mortal_get
        self.work(config, member)
