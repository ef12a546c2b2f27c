"""The stream's numbers as Ray metrics: what Prometheus scrapes and the dashboards show.

Exact sums are counters (Ray's histograms approximate theirs); means are their quotients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ray.util import metrics

from aquarl.records import Lease, LeaseResult


class StreamMetrics:
    """Held by the stream actor, one set a run."""

    def __init__(self, run: str) -> None:
        tags = {"run": run}

        def gauge(name: str, about: str) -> metrics.Gauge:
            metric = metrics.Gauge(f"aquarl_{name}", about, ("run",))
            metric.set_default_tags(tags)
            return metric

        def counter(name: str, about: str) -> metrics.Counter:
            metric = metrics.Counter(f"aquarl_{name}", about, ("run",))
            metric.set_default_tags(tags)
            return metric

        self._depth = gauge("stream_depth_groups", "Groups that are in and not yet trained.")
        self._workers = gauge("rollout_workers", "Rollout workers that are up.")
        self._wanted = gauge("rollout_workers_wanted", "Rollout workers that there are to be.")
        self._wait_share = gauge("wait_share", "Of its last step, how much the learner waited.")
        self._version = gauge("weights_version", "Newest published weights.")
        self._staleness = gauge("staleness", "Versions behind, of the newest group.")
        self._groups = counter("groups_total", "Groups accepted.")
        self._rollouts = counter("rollouts_total", "Rollouts accepted.")
        self._tokens = counter("sampled_tokens_total", "Tokens of accepted rollouts.")
        self._lost = counter("rollout_workers_lost_total", "Rollout workers that died.")
        self._set_aside = counter("leases_set_aside_total", "Leases that workers died over.")
        self._reward = counter("reward_total", "Sum of rewards of accepted rollouts.")
        self._waiting: dict[str, float] = defaultdict(float)
        self._behind = 0

    def accepted(self, result: LeaseResult, newest_version: int) -> None:
        """Count its groups. Ray is told with the next `state`, as each call of its takes long."""
        self._waiting["groups"] += len(result)
        self._waiting["rollouts"] += result.packed.answers_PG.size
        self._waiting["tokens"] += len(result.packed.tokens_M)
        self._waiting["reward"] += float(result.packed.answers_PG["reward"].sum())
        self._behind = newest_version - result.weights_version

    def lost(self, set_aside: Sequence[Lease]) -> None:
        """Count a worker that died, and the leases that are set aside for it."""
        self._lost.inc()
        if set_aside:
            self._set_aside.inc(len(set_aside))

    def state(
        self, *, depth: int, workers: int, wanted: int, wait_share: float, version: int
    ) -> None:
        """Tell Ray how things stand, and what was accepted since it was told last."""
        for total, name in (
            (self._groups, "groups"),
            (self._rollouts, "rollouts"),
            (self._tokens, "tokens"),
            (self._reward, "reward"),
        ):
            if self._waiting[name]:  # Ray refuses to add 0
                total.inc(self._waiting[name])
        self._waiting.clear()
        self._staleness.set(self._behind)  # a gauge is shown for as long as it is set again
        self._depth.set(depth)
        self._workers.set(workers)
        self._wanted.set(wanted)
        self._wait_share.set(wait_share)
        self._version.set(version)
