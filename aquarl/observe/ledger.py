"""Trained groups in, `ledger.jsonl` out: the proof that no problem was skipped or trained twice.

It also says who sampled each group and when, from which `evaluate.report` draws the timeline.

One line a group, in the order of training, and one a problem that was set aside because workers
died over it. A learner that goes back to a checkpoint takes back the lines after it, so the file
always tells of the policy that is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from aquarl.errors import DataError
from aquarl.records import Lease, LeaseResult
from aquarl.storage import get, put


class Ledger:
    """Held by the learner's first rank. Lines reach the file when the checkpoint does.

    What is in the file is not kept in memory: a long run would grow with it.
    """

    def __init__(self, run_dir: str, step: int) -> None:
        """Open the ledger of a run that stands at this step, taking back what came after it.

        Raises: DataError, when a line is damaged; StorageError, where nobody can tell.
        """
        self._path = f"{run_dir}/ledger.jsonl"
        self._lines: list[str] = []
        """Of the steps since the last checkpoint."""
        lines = self._written().splitlines(True)
        rows = zip(lines, _rows(lines, self._path), strict=True)
        self._bytes = sum(len(line) for line, row in rows if row["step"] < step)
        """How much of the file stands; steps are in order, so what does not is its end."""

    def _written(self) -> bytes:
        try:
            return get(self._path)
        except FileNotFoundError:
            return b""

    def add(
        self, step: int, results: Sequence[LeaseResult], set_aside: Sequence[Lease] = ()
    ) -> None:
        """Note the groups that were trained in a step, and the leases that it went without."""
        self._lines += [
            json.dumps(
                {
                    "step": step,
                    "lease": result.lease_id,
                    "place": place,
                    "problem": problem,
                    "weights_version": result.weights_version,
                    "worker": result.worker,
                    "sampled": [round(moment, 3) for moment in result.sampled],
                    "fetch_s": round(result.fetch_s, 4),
                    "rewards": rewards,
                }
            )
            for result in results
            for place, (problem, _, _), rewards in zip(
                result.index_P,
                result.asked_P,
                result.packed.answers_PG["reward"].tolist(),
                strict=True,
            )
        ] + [
            json.dumps(
                {
                    "step": step,
                    "lease": lease.id,
                    "place": place,
                    "problem": prompt.problem_id,
                    "set_aside_after_deaths": lease.deaths,
                }
            )
            for lease in set_aside
            for place, prompt in enumerate(lease.prompts)
        ]

    def write(self) -> None:
        """Make the file say all of it. Raises: StorageError."""
        new = "".join(f"{line}\n" for line in self._lines).encode()
        body = self._written()[: self._bytes] + new
        put(self._path, body)
        self._lines, self._bytes = [], len(body)


def read_ledger(run_dir: str) -> list[dict[str, Any]]:
    """Return the rows of a run's ledger in the order of training; none before RL.

    Raises: DataError, when a line is damaged; StorageError, where nobody can tell.
    """
    place = f"{run_dir.rstrip('/')}/ledger.jsonl"
    try:
        return list(_rows(get(place).splitlines(), place))
    except FileNotFoundError:
        return []


def _rows(lines: Sequence[bytes], place: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(
                f"Line {number} of {place} is damaged ({error}), so it cannot be told what was "
                "trained. Move that file away to do without it."
            ) from error
