"""Who is hired next in a pool of several kinds."""

from __future__ import annotations

from collections import Counter

import pytest

from aquarl.cluster.kinds import evaluation_kind, first_kinds, for_kind, kinds_of, next_kind
from aquarl.cluster.launch import check_engine
from aquarl.config import load_config
from aquarl.errors import ConfigError

MIXED = load_config(
    None,
    [
        "rl.inflight_updates=true",
        "cluster.rollout_kinds=[{count=2, engine='vllm', gpus=1}, {cpus=0.5}, {cpus=3}]",
    ],
)


def test_without_a_list_there_is_the_one_kind_that_the_settings_describe() -> None:
    config = load_config(None, ["rl.engine=vllm", "cluster.rollout_gpus=1"])
    assert [(k.engine, k.cpus, k.gpus) for k in first_kinds(config, 3)] == [("vllm", 1, 1)] * 3


def test_kinds_are_hired_in_order_up_to_their_count_and_the_last_without_end() -> None:
    assert [(k.cpus, k.gpus) for k in first_kinds(MIXED, 6)] == [
        (1, 1), (1, 1), (0.5, 0), (3, 0), (3, 0), (3, 0),
    ]  # fmt: skip


def test_what_died_is_replaced_by_its_own_kind() -> None:
    assert next_kind(kinds_of(MIXED), Counter({0: 1, 1: 1, 2: 2})) == 0
    assert next_kind(kinds_of(MIXED), Counter({0: 2, 2: 1})) == 1


def test_a_worker_sees_the_settings_of_its_kind() -> None:
    first, second = (for_kind(MIXED, kind) for kind in kinds_of(MIXED)[:2])
    assert (first.rl.engine, first.cluster.rollout_gpus) == ("vllm", 1)
    assert not first.rl.inflight_updates, "vLLM takes new weights between leases only"
    assert (second.rl.engine, second.cluster.rollout_cpus) == ("torch", 0.5)
    assert second.rl.inflight_updates


def test_evaluation_needs_nothing_of_the_kinds_that_rl_has() -> None:
    check_engine(MIXED, (evaluation_kind(MIXED),), MIXED.evaluate.temperature)
    with pytest.raises(ConfigError, match="vLLM was asked for"):
        check_engine(MIXED, kinds_of(MIXED), MIXED.rl.temperature)
    kind = evaluation_kind(MIXED)
    assert (kind.engine, kind.cpus, kind.gpus) == ("torch", 1, 0)
