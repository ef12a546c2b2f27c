"""Which kind of rollout worker is hired next: a pool may hold several, on CPUs and on GPUs.

All answer the same leases; whoever is faster takes more of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aquarl.config import Config, RolloutKind


def kinds_of(config: Config) -> tuple[RolloutKind, ...]:
    """Return the kinds of RL's rollout workers: those listed, or the one that evaluation has."""
    return config.cluster.rollout_kinds or (evaluation_kind(config),)


def evaluation_kind(config: Config) -> RolloutKind:
    """Return the one kind of worker that evaluates."""
    cluster = config.cluster
    return RolloutKind(
        engine=config.rl.engine, cpus=cluster.rollout_cpus, gpus=cluster.rollout_gpus
    )


def next_kind(kinds: Sequence[RolloutKind], held: Counter[int]) -> int:
    """Return which kind to hire next. `held`: the number of each that there is, by its place."""
    short = (i for i, kind in enumerate(kinds) if held[i] < kind.count)
    return next(short, len(kinds) - 1)


def first_kinds(config: Config, workers: int) -> list[RolloutKind]:
    """Return the kind of each of the first so many workers."""
    kinds, held = kinds_of(config), Counter[int]()
    for _ in range(workers):
        held[next_kind(kinds, held)] += 1
    return [kinds[i] for i in held.elements()]


def for_kind(config: Config, kind: RolloutKind) -> Config:
    """Return the settings as a worker of this kind sees them."""
    rl, cluster = config.rl, config.cluster
    is_torch = kind.engine == "torch"
    rl = rl.model_copy(
        update={"engine": kind.engine, "inflight_updates": rl.inflight_updates and is_torch}
    )
    cluster = cluster.model_copy(update={"rollout_cpus": kind.cpus, "rollout_gpus": kind.gpus})
    return config.model_copy(update={"rl": rl, "cluster": cluster})
