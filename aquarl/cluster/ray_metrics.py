"""The stream's numbers as Ray metrics: what Prometheus scrapes and the dashboards show.

Exact sums are counters (Ray's histograms approximate theirs); means are their quotients.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge

from aquarl.records import Lease, RolloutGroup


class StreamMetrics:
    """Held by the stream actor, one set a run."""

    def __init__(self, run: str) -> None:
        tags = {"run": run}

        def gauge(name: str, about: str) -> Gauge:
            metric = Gauge(f"aquarl_{name}", about, ("run",))
            metric.set_default_tags(tags)
            return metric

        def counter(name: str, about: str) -> Counter:
            metric = Counter(f"aquarl_{name}", about, ("run",))
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

    def accepted(self, groups: Sequence[RolloutGroup], newest_version: int) -> None:
        """Count groups that came together. Once, as each call of Ray's takes microseconds."""
        seen = [group.glance for group in groups]
        self._groups.inc(len(groups))
        self._rollouts.inc(sum(len(glance.lengths) for glance in seen))
        self._tokens.inc(sum(sum(glance.lengths) for glance in seen))
        if reward := sum(sum(glance.rewards) for glance in seen):
            self._reward.inc(reward)  # Ray refuses to add 0
        self._staleness.set(newest_version - groups[-1].weights_version)

    def lost(self, set_aside: Sequence[Lease]) -> None:
        """Count a worker that died, and the leases that are set aside for it."""
        self._lost.inc()
        if set_aside:
            self._set_aside.inc(len(set_aside))

    def state(
        self, *, depth: int, workers: int, wanted: int, wait_share: float, version: int
    ) -> None:
        self._depth.set(depth)
        self._workers.set(workers)
        self._wanted.set(wanted)
        self._wait_share.set(wait_share)
        self._version.set(version)
