"""Groups of rollouts in, a few of them as readable text out: `transcripts/step_NNNNNN.jsonl`.

A reward curve cannot show what a policy has found out; its answers can. The first learner writes a
few every step for people to read; the report shows the last.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import fsspec

from aquarl.records import LeaseResult
from aquarl.storage import what


class Decoder(Protocol):
    """Of a tokenizer, what is needed to read ids."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_answer(self, ids: Sequence[int]) -> str: ...


def write_transcripts(
    run_dir: str, step: int, results: Sequence[LeaseResult], tokenizer: Decoder, how_many: int
) -> None:
    """Write some rollouts of a step, the best of one group, the worst of the next, and so on.

    Args:
        results: Of one step; the groups shown are spread evenly over theirs.
        how_many: Rollouts to write; with 0 there is no file.

    A place that cannot be written to is warned of, once; the run goes on.
    """
    rows = list(_rows(results, tokenizer, how_many))
    if not rows:
        return
    text = "".join(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
    fs, folder = fsspec.url_to_fs(run_dir)
    folder = f"{folder.rstrip('/')}/transcripts"
    try:
        fs.makedirs(folder, exist_ok=True)
        fs.pipe_file(f"{folder}/step_{step:06d}.jsonl", text.encode())
    except Exception as error:  # a bucket can fail in as many ways as there are clients
        warnings.warn(f"No transcripts in {folder}: {what(error)}", stacklevel=2)


def forget_transcripts(run_dir: str, step: int) -> None:
    """Remove what was written from this step on, where RL begins: other answers will stand there.

    A place that cannot be cleared is warned of; the run goes on.
    """
    fs, folder = fsspec.url_to_fs(run_dir)
    folder = f"{folder.rstrip('/')}/transcripts"
    try:
        fs.invalidate_cache()
        for path in fs.glob(f"{folder}/step_*.jsonl"):
            if int(path.rsplit("/step_", 1)[-1].removesuffix(".jsonl")) >= step:
                fs.rm_file(path)
    except Exception as error:  # a bucket can fail in as many ways as there are clients
        warnings.warn(f"Old transcripts are left in {folder}: {what(error)}", stacklevel=2)


def _rows(
    results: Sequence[LeaseResult], tokenizer: Decoder, how_many: int
) -> Iterator[dict[str, Any]]:
    groups = [(result, place) for result in results for place in range(len(result))]
    for i in range(min(how_many, len(groups))):
        result, place = groups[i * len(groups) // min(how_many, len(groups))]
        (group,) = result.only([place]).groups()
        rewards = [rollout.reward for rollout in group.rollouts]
        shown = rewards.index(max(rewards) if i % 2 == 0 else min(rewards))
        rollout = group.rollouts[shown]
        yield {
            "problem": group.prompt.problem_id,
            "prompt": tokenizer.decode(group.prompt.ids),
            "answer": tokenizer.decode_answer(rollout.ids),
            "letter": rollout.letter,
            "right_letter": group.prompt.answer_letter,
            "reward": rollout.reward,
            "advantage": round(group.advantages[shown], 4),
            "rewards_of_group": rewards,
            "tokens": len(rollout.ids),
            "stopped": rollout.stopped,
            "weights_version": group.weights_version,
            "worker": group.worker,
        }
