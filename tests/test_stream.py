"""The stream's book-keeping: nothing lost, nothing trained twice, nothing too stale."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from aquarl.config import RLConfig
from aquarl.records import Lease, LeaseResult, Problem, Prompt, RolloutGroup, Sampling
from aquarl.rl.prompts import PromptSource
from aquarl.rl.stream import RolloutStream, describe, what_is_set_aside
from tests.fakes import byte_tokenizer, make_group

TOKENIZER = byte_tokenizer()
PROBLEMS = [Problem(f"p{i}", f"{i}?", ("a", "b"), "AB"[i % 2]) for i in range(10)]
GREEDY = Sampling(4, temperature=0.0)
SOURCE = PromptSource(PROBLEMS, TOKENIZER, seed=0)


def stream_of(**settings: object) -> RolloutStream:
    """Six prompts a step in leases of two, unless said otherwise."""
    plan = {"steps": 50, "prompts_per_step": 6, "prompts_per_lease": 2, "rollouts_per_prompt": 2}
    config = RLConfig(**(plan | {"max_staleness": 0} | settings))
    return RolloutStream(SOURCE, config)


def finished(lease: Lease, *rewards: Sequence[float]) -> LeaseResult:
    """What a worker would send: the rewards, for all prompts or each, stand for the sampling."""
    lease = SOURCE.filled(lease, rollouts=2)
    rewards_P = rewards if len(rewards) > 1 else (rewards or ((1.0, 0.0),)) * len(lease)
    return LeaseResult.of(
        [
            make_group(
                [], [[1], [2, 3]], rewards=row, lease=lease, index=i, version=lease.weights_version
            )
            for i, row in enumerate(rewards_P)
        ]
    )


def leased(stream: RolloutStream, worker: str = "w", now_s: float = 0.0) -> Lease:
    lease = stream.lease(worker, now_s)
    assert lease is not None
    return SOURCE.filled(lease, rollouts=2)


def submit(stream: RolloutStream, lease: Lease, *rewards: Sequence[float]) -> None:
    assert stream.submit(finished(lease, *rewards))


def work_off(stream: RolloutStream) -> list[Lease]:
    """Take and finish every lease there is."""
    leases = []
    while (lease := stream.lease("w", 0.0)) is not None:
        leases.append(SOURCE.filled(lease, rollouts=2))
        submit(stream, lease)
    return leases


def problems_of(groups: Iterable[RolloutGroup]) -> list[str]:
    return [group.prompt.problem_id for group in groups]


def groups_of(results: Iterable[LeaseResult] | None) -> list[RolloutGroup]:
    return [group for result in results or () for group in result.groups()]


def test_nothing_is_leased_before_there_are_weights() -> None:
    stream = stream_of(max_staleness=5)
    assert stream.lease("w", 0.0) is None
    stream.publish(0)
    assert stream.lease("w", 0.0) is not None


def test_a_lease_is_given_once_and_a_step_is_its_leases_in_order() -> None:
    stream = stream_of()
    stream.publish(0)
    leases = [leased(stream, f"w{i}") for i in range(3)]
    assert stream.lease("another", 0.0) is None
    assert len({lease.id for lease in leases}) == 3
    prompts = [prompt for lease in leases for prompt in lease.prompts]
    assert prompts == [SOURCE.prompt(position) for position in range(6)]
    assert [s for x in leases for s in x.seeds] == [SOURCE.seeds(p, 2) for p in range(6)]
    assert all((x.step, x.weights_version, x.attempt) == (0, 0, 0) for x in leases)


def test_a_step_is_given_when_it_is_complete_whatever_the_order_of_arrival() -> None:
    rng, orders = random.Random(0), set()
    for _ in range(10):
        stream = stream_of()
        stream.publish(0)
        results = [finished(leased(stream)) for _ in range(3)]
        rng.shuffle(results)
        for result in results:
            assert stream.step_share(0, 0, 1) is None
            assert stream.submit(result)
        share = stream.step_share(0, 0, 1)
        assert share is not None
        orders.add(tuple(problems_of(groups_of(share.results))))
    assert len(orders) == 1


def test_ranks_share_a_step_and_all_know_its_counts() -> None:
    stream = stream_of()
    stream.publish(0)
    work_off(stream)
    shares = [stream.step_share(0, rank, 4) for rank in range(4)]
    whole = stream.step_results(0)
    assert whole is not None
    held = [group for share in shares if share for group in groups_of(share.results)]
    assert sorted(problems_of(held)) == sorted(problems_of(groups_of(whole)))
    assert [share and problems_of(groups_of(share.results)) for share in shares] == [
        problems_of(groups_of(whole)[rank::4]) for rank in range(4)
    ]
    for share in shares:
        assert share is not None and groups_of(share.results)
        assert (share.tokens_in_step, share.rollouts_in_step) == (6 * 3, 6 * 2)
        assert share.metrics == describe(whole, 0) | {"reward/groups_set_aside": 0}


def test_a_lost_workers_lease_is_issued_again_as_it_was() -> None:
    stream = stream_of()
    stream.publish(0)
    lost, kept = leased(stream, "dies"), leased(stream, "lives")
    assert len(stream.lost("dies")) == 1
    again = leased(stream, "new")
    assert again == replace(lost, attempt=1, deaths=1)
    assert again.seeds == lost.seeds and again.prompts == lost.prompts
    assert leased(stream, "lives").id not in (lost.id, kept.id)
    assert stream.counts["reissued"] == 1


def test_a_lease_names_the_newest_weights_of_the_moment_it_is_given() -> None:
    stream = stream_of(max_staleness=1)
    stream.publish(0)
    early = leased(stream, "dies")
    stream.publish(1)
    assert leased(stream).weights_version == 1
    stream.lost("dies")
    assert leased(stream) == replace(early, attempt=1, deaths=1, weights_version=1)


def test_a_finished_lease_is_not_lost_with_its_worker() -> None:
    stream = stream_of()
    stream.publish(0)
    submit(stream, leased(stream, "dies"))
    assert stream.lost("dies") == []


def test_late_and_repeated_results_are_dropped_and_their_groups_counted() -> None:
    stream = stream_of()
    stream.publish(0)
    lease = leased(stream)
    submit(stream, lease)
    assert not stream.submit(finished(lease))  # a repeat
    work_off(stream)
    for step in (1, 2):
        stream.publish(step)
        assert stream.step_share(step, 0, 1) is None
        work_off(stream)
    assert not stream.submit(finished(lease))  # of a step long trained
    assert not stream.submit(replace(finished(lease), lease_id=999))  # of nobody
    assert stream.counts["late"] == 6


def test_who_takes_too_long_over_a_lease_is_named_and_its_time_begins_with_each() -> None:
    stream = stream_of(lease_timeout_s=60)
    stream.publish(0)
    submit(stream, leased(stream, "slow", now_s=30))
    slow = leased(stream, "slow", now_s=100)
    leased(stream, "later", now_s=120)
    assert stream.overdue(160) == set()
    assert stream.overdue(161) == {"slow"}
    assert [lease.id for lease in stream.lost("slow")] == [slow.id]
    assert stream.overdue(161) == set(), "nobody holds it now"
    again = leased(stream, "fast", now_s=170)
    assert (again.id, again.seeds, again.attempt) == (slow.id, slow.seeds, 1)
    assert stream.overdue(181) == {"later"}


def test_who_hangs_over_a_lease_is_named_after_a_rewind_too() -> None:
    stream = stream_of(lease_timeout_s=60)
    stream.publish(0)
    leased(stream, "hangs", now_s=100)
    leased(stream, "goes on", now_s=100)
    stream.rewind(0, 0)
    assert stream.lease("goes on", 110) is None
    assert stream.overdue(161) == {"hangs"}
    stream.lost("hangs")
    assert stream.overdue(1000) == set()


def test_what_lies_ready_for_a_step_is_a_share_of_what_may() -> None:
    """Two steps may be sampled ahead; those of the step just trained are not among them."""
    stream = stream_of(max_staleness=2)
    stream.publish(0)
    per_step = stream.config.prompts_per_step // stream.config.prompts_per_lease
    for _ in range(per_step):
        submit(stream, leased(stream))
    assert stream.step_share(0, 0, 1) is not None
    stream.publish(1)
    assert (stream.fullness(1), stream.depth) == (0.0, stream.config.prompts_per_step)
    for _ in range(2 * per_step):
        submit(stream, leased(stream))
    assert stream.fullness(1) == 1.0


def test_a_lease_that_workers_die_over_is_set_aside_and_its_step_goes_on() -> None:
    stream = stream_of(lease_deaths=2)
    stream.publish(0)
    first = leased(stream, "dies")
    assert [lease.deaths for lease in stream.lost("dies")] == [1]
    again = leased(stream, "dies too")
    assert (again.id, again.attempt, again.deaths) == (first.id, 1, 1)
    assert [(lease.id, lease.deaths) for lease in stream.lost("dies too")] == [(first.id, 2)]
    assert not stream.submit(finished(first)), "late: it is not wanted any more"
    others = work_off(stream)
    assert len(others) == 2 and first.id not in {lease.id for lease in others}

    share = stream.step_share(0, 0, 1)
    assert share is not None
    assert problems_of(groups_of(share.results)) == [
        p.problem_id for x in others for p in x.prompts
    ]
    assert (share.tokens_in_step, share.rollouts_in_step) == (4 * 3, 4 * 2), "of what is trained"
    assert share.metrics["reward/groups_set_aside"] == 2
    assert [lease.id for lease in stream.set_aside(0)] == [first.id]
    assert stream.counts["set_aside"] == 1
    assert stream.frontier(1) == 6, "the next step begins where it would have"


def test_the_deaths_of_other_leases_do_not_add_up() -> None:
    stream = stream_of(lease_deaths=2)
    stream.publish(0)
    for _ in range(3):
        lease = leased(stream, "dies")
        stream.lost("dies")
        submit(stream, leased(stream))  # the very lease, now finished
        assert stream.lost("w") == [], f"lease {lease.id} is no longer anybody's"
    assert stream.counts["set_aside"] == 0


def test_a_lease_once_set_aside_is_not_tried_again_when_a_learner_goes_back() -> None:
    stream = stream_of(lease_deaths=1)
    stream.publish(0)
    bad = leased(stream, "dies")
    stream.lost("dies")
    work_off(stream)
    before = stream.step_share(0, 0, 1)
    stream.rewind(step=0, position=0)
    stream.publish(0)
    given = work_off(stream)
    after = stream.step_share(0, 0, 1)
    assert bad.prompts not in [lease.prompts for lease in given] and len(given) == 2
    assert before is not None and after is not None
    assert problems_of(groups_of(after.results)) == problems_of(groups_of(before.results))
    assert after.metrics == before.metrics
    stream.publish(1)
    assert len(work_off(stream)) == 3, "the same problems in a later step are a new question"


def test_a_step_with_too_few_groups_for_its_ranks_passes_for_all_of_them() -> None:
    stream = stream_of(lease_deaths=1, prompts_per_step=4)
    stream.publish(0)
    leased(stream, "dies")
    stream.lost("dies")
    work_off(stream)
    shares = [stream.step_share(0, rank, 3) for rank in range(3)]
    assert [share and share.results for share in shares] == [(), (), ()]
    assert {share.rollouts_in_step for share in shares if share} == {0}
    assert stream.step_results(0) == [] and len(stream.set_aside(0)) == 2
    said = [what_is_set_aside(lease, deaths_allowed=1) for lease in stream.set_aside(0)]
    assert "1 rollout workers died over lease 0" in said[0]
    assert "with its whole step" in said[1] and "died" not in said[1]
    stream.publish(1)
    assert len(work_off(stream)) == 2


def test_in_place_of_a_lease_that_is_set_aside_others_are_refilled() -> None:
    stream = stream_of(lease_deaths=1, refill_uniform_groups=True)
    stream.publish(0)
    leased(stream, "dies")
    stream.lost("dies")
    assert len(work_off(stream)) == 3, "two of the step, and one for the one that is missing"
    share = stream.step_share(0, 0, 1)
    assert share is not None and len(groups_of(share.results)) == 6
    assert stream.frontier(1) == 8


def test_an_evaluation_goes_without_the_problems_that_workers_die_over() -> None:
    stream = stream_of(lease_deaths=1)
    stream.publish(0)
    prompts = [stream.source.prompt(position) for position in range(4)]
    stream.ask("e", prompts, [(0,)] * 4, GREEDY)
    bad = leased(stream, "dies")
    stream.lost("dies")
    submit(stream, leased(stream))
    left = [prompt for prompt in prompts if prompt not in bad.prompts]
    assert len(left) == 2 and [g.prompt for g in groups_of(stream.answers("e"))] == left


@pytest.mark.parametrize("eta", [0, 1, 2])
def test_no_group_is_staler_than_allowed_and_work_goes_as_far_ahead_as_it_may(eta: int) -> None:
    stream = stream_of(max_staleness=eta, steps=8)
    for version in range(8):
        stream.publish(version)
        leases = work_off(stream)
        assert all(lease.step - lease.weights_version <= eta for lease in leases)
        newest = min(version + eta, 7)
        assert stream.step_results(newest) is not None, "as far as the bound allows"
        assert stream.step_results(newest + 1) is None
        assert stream.step_share(version, 0, 1) is not None


@pytest.mark.parametrize("eta", [0, 1, 3])
def test_under_any_timing_every_problem_is_trained_once_an_epoch(eta: int) -> None:
    """Workers come, go, die, stall and repeat themselves at random; ten problems, six a step."""
    rng = random.Random(eta)
    stream = stream_of(max_staleness=eta, steps=15, lease_deaths=1_000)
    stream.publish(0)
    held: dict[str, Lease] = {}
    trained: list[str] = []
    step = now_s = 0
    while step < 15:
        now_s += 1
        worker = f"w{rng.randrange(4)}"
        event = rng.random()
        if event < 0.5:
            lease = held.get(worker) or stream.lease(worker, now_s)
            if lease is not None:
                assert lease.step - lease.weights_version <= eta
                held[worker] = lease
                for _ in range(rng.randrange(3)):
                    stream.submit(finished(lease))
                if rng.random() < 0.5:
                    held.pop(worker)
        elif event < 0.6:
            stream.lost(worker)
            held.pop(worker, None)
        elif event < 0.65:
            for late in stream.overdue(now_s + 1_000):  # all; they still send what they have
                stream.lost(late)
        else:
            share = stream.step_share(step, 0, 1)
            if share is not None:
                assert share.metrics["rollout/staleness_max"] <= eta
                trained += problems_of(groups_of(share.results))
                step += 1
                stream.publish(step)
        assert now_s < 100_000
    epochs = [Counter(trained[start : start + 10]) for start in range(0, 90, 10)]
    assert epochs == [Counter(p.id for p in PROBLEMS)] * 9
    assert trained == [SOURCE.prompt(position).problem_id for position in range(90)]


def test_a_rewound_stream_gives_the_same_steps_again() -> None:
    stream = stream_of(max_staleness=1)
    given: list[list[str]] = []
    for step in range(4):
        stream.publish(step)
        work_off(stream)
        share = stream.step_share(step, 0, 1)
        assert share is not None
        given.append(problems_of(groups_of(share.results)))
        if step == 1:
            frontier = stream.frontier(2)  # as saved after two updates
    assert frontier == 12
    stream.rewind(2, frontier)
    assert stream.depth == 0
    for step in (2, 3):
        stream.publish(step)
        work_off(stream)
        share = stream.step_share(step, 0, 1)
        assert share is not None and problems_of(groups_of(share.results)) == given[step]


def test_after_a_rewind_nothing_is_sampled_with_weights_of_updates_that_were_undone() -> None:
    stream = stream_of()
    for step in range(4):
        stream.publish(step)
        old = work_off(stream)
        stream.step_share(step, 0, 1)
    stream.rewind(2, 12)
    assert stream.lease("w", 0.0) is None, "version 3 is of a past that did not happen"
    assert not stream.submit(finished(old[0])), "nor is its work"
    stream.publish(2)
    assert leased(stream).weights_version == 2


def test_the_frontier_is_where_a_step_begins_opened_or_not() -> None:
    stream = stream_of(max_staleness=1)
    stream.publish(0)
    work_off(stream)
    assert [stream.frontier(step) for step in (0, 1, 2)] == [0, 6, 12]


def test_a_step_can_still_be_looked_at_while_another_rank_asks_for_the_next() -> None:
    stream = stream_of()
    stream.publish(0)
    work_off(stream)
    assert stream.step_share(0, 0, 2) is not None and stream.step_share(0, 1, 2) is not None
    assert stream.depth == 6
    stream.publish(1)
    assert stream.step_share(1, 1, 2) is None
    assert stream.step_results(0) is not None
    assert stream.depth == 0
    stream.step_share(2, 1, 2)
    assert stream.step_results(0) is None


def test_the_run_ends_with_its_last_step() -> None:
    stream = stream_of(max_staleness=5, steps=2)
    stream.publish(0)
    assert {lease.step for lease in work_off(stream)} == {0, 1}
    assert stream.lease("w", 0.0) is None


# Evaluations


def test_an_evaluation_goes_first_and_comes_back_in_its_order() -> None:
    stream = stream_of(rollout_workers=3)
    stream.publish(0)
    first = leased(stream, "busy")
    prompts = [PromptSource(PROBLEMS, TOKENIZER, seed=5).prompt(i) for i in range(5)]
    stream.ask("validation 0", prompts, [(0,)] * 5, GREEDY)
    asked = [leased(stream, f"w{i}") for i in range(3)]
    assert sorted(len(lease.prompts) for lease in asked) == [1, 2, 2]
    assert all(x.purpose == "validation 0" and x.sampling == GREEDY for x in asked)
    assert leased(stream, "w3").purpose == "train"
    assert stream.answers("validation 0") is None
    for lease in reversed(asked):
        submit(stream, lease)
    groups = groups_of(stream.answers("validation 0"))
    assert problems_of(groups) == [p.problem_id for p in prompts]
    assert stream.answers("validation 0") is None, "they are given once"
    submit(stream, first)


@pytest.mark.parametrize(
    ("answers", "prompts", "sizes"),
    [(1, 8, [2] * 4), (1, 24, [3] * 8), (1, 40, [4] * 10), (2, 24, [2] * 12), (1, 5, [2, 2, 1])],
    ids=["as in training", "an eighth", "no more answers than in training", "many answers", "few"],
)
@pytest.mark.parametrize("workers", [1, 4])
def test_an_evaluation_is_cut_in_eight_or_more_for_any_number_of_workers(
    workers: int, answers: int, prompts: int, sizes: list[int]
) -> None:
    """A lease of the training is of two prompts with two answers each."""
    stream = stream_of(rollout_workers=workers)
    stream.publish(0)
    asked = [stream.source.prompt(position) for position in range(prompts)]
    stream.ask("e", asked, [tuple(range(answers))] * prompts, GREEDY)
    assert [len(leased(stream, f"w{i}").prompts) for i in range(len(sizes))] == sizes


def test_an_evaluation_survives_the_death_of_its_worker() -> None:
    stream = stream_of()
    stream.publish(0)
    stream.ask("validation 0", [PromptSource(PROBLEMS, TOKENIZER, 0).prompt(0)], [(7,)], GREEDY)
    lost = leased(stream, "dies")
    stream.lost("dies")
    again = leased(stream, "new")
    assert again == replace(lost, attempt=1, deaths=1)
    submit(stream, again)
    assert stream.answers("validation 0") is not None


# Refilling


def test_uniform_groups_are_counted_and_trained_with_the_rest_by_default() -> None:
    stream = stream_of()
    stream.publish(0)
    submit(stream, leased(stream), (1, 1))
    work_off(stream)
    share = stream.step_share(0, 0, 1)
    assert share is not None and len(groups_of(share.results)) == 6
    assert share.metrics["reward/uniform_groups"] == 2


def test_refilling_samples_further_problems_in_place_of_uniform_groups() -> None:
    stream = stream_of(refill_uniform_groups=True)
    stream.publish(0)
    submit(stream, leased(stream), (1, 1))
    submit(stream, leased(stream), (0, 0))
    submit(stream, leased(stream))
    assert stream.step_share(0, 0, 1) is None and stream.has_work, "four useful ones are missing"
    refills = work_off(stream)
    assert [lease.step for lease in refills] == [0, 0]
    share = stream.step_share(0, 0, 1)
    assert share is not None and len(groups_of(share.results)) == 6
    assert (share.tokens_in_step, share.rollouts_in_step) == (18, 12)
    assert share.metrics["reward/groups"] == 10 and share.metrics["reward/uniform_groups"] == 4
    assert stream.frontier(1) == 10, "the next step begins after the refills"


def test_refilling_ends_where_nothing_helps() -> None:
    """A policy that solves everything: four times the step is sampled, then the step goes on."""
    stream = stream_of(refill_uniform_groups=True)
    stream.publish(0)
    leases = 0
    while (lease := stream.lease("w", 0.0)) is not None:
        submit(stream, lease, (1, 1))
        leases += 1
    assert leases == 4 * 3
    share = stream.step_share(0, 0, 1)
    assert share is not None and len(groups_of(share.results)) == 24


def test_each_rank_gets_a_group_even_where_few_are_useful() -> None:
    stream = stream_of(refill_uniform_groups=True)
    stream.publish(0)
    submit(stream, leased(stream))
    while (lease := stream.lease("w", 0.0)) is not None:
        submit(stream, lease, (1, 1))
    counted = set()
    for rank in range(3):
        share = stream.step_share(0, rank, 3)
        assert share is not None and groups_of(share.results)
        counted.add((share.tokens_in_step, share.rollouts_in_step))
        assert share.is_padding == (rank == 2), "two are useful"
    alone = stream.step_share(0, 0, 1)
    assert alone is not None and len(groups_of(alone.results)) == 2 and not alone.is_padding
    assert counted == {(alone.tokens_in_step, alone.rollouts_in_step)}, "the same gradient"
    one = stream.step_share(0, 0, 2)
    assert one is not None and len(groups_of(one.results)) == 1, (
        "two useful groups are enough for two"
    )


def test_which_problems_refill_does_not_depend_on_timing() -> None:
    """The next step opens only when the refills of this one are decided."""
    orders = set()
    for shuffle in range(6):
        stream = stream_of(refill_uniform_groups=True, max_staleness=2, steps=3)
        rng = random.Random(shuffle)
        trained: list[str] = []
        for step in range(3):
            stream.publish(step)
            held: list[Lease] = []
            while (share := stream.step_share(step, 0, 1)) is None:
                while len(held) < 2 and (given := stream.lease("w", 0.0)) is not None:
                    held.append(SOURCE.filled(given, rollouts=2))
                lease = held.pop(rng.randrange(len(held)))
                is_easy = [int(prompt.problem_id[1:]) % 3 == 0 for prompt in lease.prompts]
                submit(stream, lease, *((1.0, 1.0) if easy else (1.0, 0.0) for easy in is_easy))
            trained += problems_of(groups_of(share.results))
            for lease in held:
                submit(stream, lease)
        orders.add(tuple(trained))
    assert len(orders) == 1


def test_a_step_is_described_by_hand() -> None:
    right = replace(make_group([], [[1], [2, 3]]).rollouts[0], letter="A")
    wrong = replace(
        right, letter="B", reward=0.0, stopped=False, ids=(1, 2, 3), logprobs=(-1.0,) * 3
    )
    none = replace(wrong, letter=None)
    group = make_group([], [[1], [2]], version=4)
    results = [
        LeaseResult.of([replace(group, rollouts=(right, wrong), sample_s=1.5, fetch_s=0.25)]),
        LeaseResult.of(
            [replace(group, rollouts=(none, none), weights_version=5, worker="another")]
        ),
    ]
    assert describe(results, step=5) == {
        "reward/mean": 0.25,
        "reward/accuracy": 0.25,
        "reward/committed_fraction": 0.5,
        "reward/uniform_groups": 1,
        "reward/groups": 2,
        "rollout/length_mean": 2.5,
        "rollout/cut_fraction": 0.75,
        "rollout/staleness_mean": 0.5,
        "rollout/staleness_max": 1,
        "rollout/staleness_0": 0.6,
        "rollout/staleness_1": 0.4,
        "time/sample_s": 1.5,
        "time/sample_per_worker_s": 0.75,
        "time/fetch_s": 0.25,
    }


def test_where_weights_changed_on_the_way_each_token_counts_by_its_own() -> None:
    """Seven tokens: of the first answer by version 3, 4, 4, of the second all by the group's 3."""
    group = make_group([], [[1, 2, 3], [1, 2, 3, 4]], version=3)
    first = replace(group.rollouts[0], versions=(3, 4, 4))
    told = LeaseResult.of([replace(group, rollouts=(first, group.rollouts[1]))])
    seen = describe([told], step=5)
    assert (seen["rollout/staleness_1"], seen["rollout/staleness_2"]) == (2 / 7, 5 / 7)
    assert seen["rollout/staleness_max"] == 2, "the bound is about the oldest token"


def test_the_stream_passes_results_on_as_they_came_and_the_learner_finds_all_in_them() -> None:
    """Some groups teach nothing and are refilled, so what the learner gets is cut from results."""
    stream = stream_of(refill_uniform_groups=True)
    stream.publish(0)
    sent: list[LeaseResult] = []
    useful: list[RolloutGroup] = []
    while (lease := stream.lease("w", 0.0)) is not None:
        groups = []
        for group in finished(lease, (1.0, 0.0), (0.0, float(lease.id % 2))).groups():
            told = (
                replace(group.rollouts[0], letter="A", versions=(1,)),
                replace(group.rollouts[1], logprobs=(-0.5, -1e-8), stopped=False),
            )
            groups.append(replace(group, rollouts=told, worker="w", sampled=(1.5, 2.5)))
            if told[0].reward != told[1].reward:
                useful.append(groups[-1])
        sent.append(LeaseResult.of(groups))
        assert stream.submit(pickle.loads(pickle.dumps(sent[-1])))
    share = stream.step_share(0, 0, 1)
    assert share is not None and len(groups_of(share.results)) == len(useful) == 6 < 2 * len(sent)
    near = [  # log-probabilities are float32 values in any engine; here one is not
        replace(
            group,
            rollouts=tuple(
                replace(rollout, logprobs=tuple(float(np.float32(x)) for x in rollout.logprobs))
                for rollout in group.rollouts
            ),
        )
        for group in useful
    ]
    assert groups_of(pickle.loads(pickle.dumps(share)).results) == near
    assert share.metrics == describe(sent, 0) | {"reward/groups_set_aside": 0}


def test_a_result_without_some_of_its_groups_is_refused_and_its_lease_stays_open() -> None:
    stream = stream_of()
    stream.publish(0)
    lease = leased(stream)
    with pytest.raises(ValueError, match="1 groups came for 2 prompts"):
        stream.submit(finished(lease).only([0]))
    submit(stream, lease)


def test_a_learner_that_goes_back_leaves_results_with_tokens_of_older_weights() -> None:
    """A worker changes weights while it samples: those of before are newer than those of now."""
    stream = stream_of(max_staleness=2)
    stream.publish(7)
    result = finished(leased(stream))
    stream.rewind(5, 30)
    stream.publish(5)
    (group, other) = result.groups()
    rollouts = replace(group.rollouts[0], versions=(5,)), group.rollouts[1]
    mixed = [replace(group, rollouts=rollouts), other]
    assert list(LeaseResult.of(mixed).groups()) == mixed
    assert not stream.submit(LeaseResult.of(mixed))


def test_a_result_with_some_of_its_groups_has_all_that_is_theirs() -> None:
    lengths = [[1, 2], [3, 1], [2, 2], [1, 4]]
    groups = [
        replace(
            make_group(range(p + 1), [range(n) for n in row], logprob=-p - 0.5),
            index=p,
            prompt=Prompt(f"p{p}", tuple(range(p + 1)), "ABCD", "ABCD"[p]),
        )
        for p, row in enumerate(lengths)
    ]
    late = replace(groups[1].rollouts[0], versions=(0, 2, 2)), groups[1].rollouts[1]
    for some in (groups, [groups[0], replace(groups[1], rollouts=late), *groups[2:]]):
        whole = LeaseResult.of(some)
        assert whole.only(range(4)) is whole
        for places in ([0], [1, 3], [3, 0], [2, 1, 0]):
            assert list(whole.only(places).groups()) == [some[p] for p in places]
