"""The engine's tokens are those of a loop that computes everything anew, whoever sits beside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aquarl.engines.torch_engine import TorchSampler
from aquarl.errors import ConfigError
from aquarl.model.attention import Continuation, Prefix
from aquarl.model.drawing import draw, draw_from_any
from aquarl.model.flat_weights import flatten
from aquarl.model.gpt import GPT, SOFT_CAP
from aquarl.records import Prompt, Rollout, Sampling, Weights
from tests.fakes import random_ids, random_model

VOCAB, STOP = 24, 3
NEW = 20


def policy(seed: int = 0, **shape: int) -> GPT:
    """A model that is sure of little, so that answers differ, and often says the stop token."""
    model = random_model(VOCAB, seed=seed, context=16, **shape)
    with torch.no_grad():
        model.lm_head.weight[STOP].mul_(2.5)
    return model


def prompts(lengths: tuple[int, ...] = (4, 1, 9, 6)) -> list[Prompt]:
    return [
        Prompt(f"p{p}", tuple(random_ids((n,), VOCAB, seed=p).tolist()), "ABCDE", "A")
        for p, n in enumerate(lengths)
    ]


def seeds(P: int = 4, G: int = 6) -> list[list[int]]:
    return [[1_000 * p + g for g in range(G)] for p in range(P)]


@torch.inference_mode()
def reference(model: GPT, prompt: Prompt, seed: int, sampling: Sampling) -> Rollout:
    """Sample one answer the slow way: every token from a forward pass over the whole sequence."""
    uniforms = torch.rand(sampling.max_new_tokens, generator=torch.manual_seed(seed))
    ids, logprobs = list(prompt.ids), []
    for u in uniforms:
        logits = model.logits(model(torch.tensor([ids])))[0, -1]
        if sampling.top_k:
            kept = logits.topk(sampling.top_k).indices
            logits = torch.full_like(logits, -torch.inf).scatter(0, kept, logits[kept])
        chances = (logits / (sampling.temperature or 1.0)).softmax(dim=0)
        if sampling.top_p < 1:
            falling, order = chances.sort(descending=True)
            kept = order[: int((falling.cumsum(0) < sampling.top_p).sum()) + 1]
            chances = torch.zeros_like(chances).scatter(0, kept, chances[kept])
            chances = chances / chances.sum()
        if sampling.temperature:
            token = int((chances.cumsum(0) > u * chances.sum()).nonzero()[0])
        else:
            token = int(chances.argmax())
        ids.append(token)
        logprobs.append(float(chances[token].log()))
        if token == STOP:
            break
    return Rollout(tuple(ids[len(prompt.ids) :]), tuple(logprobs), stopped=ids[-1] == STOP)


def assert_same(rollouts: list[Rollout], expected: list[Rollout]) -> None:
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert (ours.ids, ours.stopped) == (theirs.ids, theirs.stopped)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(NEW, temperature=0.0),
        Sampling(NEW, temperature=1.0),
        Sampling(NEW, temperature=0.7, top_k=5),
        Sampling(NEW, temperature=0.7, top_p=0.8),
    ],
    ids=["greedy", "sampled", "top k", "top p"],
)
def test_tokens_are_those_of_a_loop_that_recomputes_everything(sampling: Sampling) -> None:
    model = policy()
    rollouts_PG = TorchSampler(model, STOP).sample(prompts(), seeds(), sampling)
    for prompt, row, seed_row in zip(prompts(), rollouts_PG, seeds(), strict=True):
        assert_same(row, [reference(model, prompt, seed, sampling) for seed in seed_row])


def test_tokens_are_the_same_where_no_loops_are_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU for which there are no kernels."""
    expected = TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW))
    for module in ("engines.decoder", "model.drawing"):
        monkeypatch.setattr(f"aquarl.{module}.has_loops", lambda x: False)
    monkeypatch.setattr("aquarl.engines.torch_engine.COMPACT_BELOW", 1.0)
    rows = TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW))
    for ours, theirs in zip(rows, expected, strict=True):
        assert_same(ours, theirs)


def test_answers_stop_at_different_lengths_here() -> None:
    """What makes the other tests worth something: rows finish early, late, and not at all."""
    rows = TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW))
    flat = [rollout for row in rows for rollout in row]
    lengths = {len(rollout.ids) for rollout in flat}
    assert len(lengths) > 6 and NEW in lengths
    assert {rollout.stopped for rollout in flat} == {True, False}


def test_the_stop_token_is_the_last_of_an_answer_and_nowhere_else() -> None:
    rows = TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW))
    for rollout in (rollout for row in rows for rollout in row):
        assert rollout.stopped == (rollout.ids[-1] == STOP)
        assert STOP not in rollout.ids[:-1]
        assert len(rollout.ids) == len(rollout.logprobs)
        assert rollout.stopped or len(rollout.ids) == NEW


def test_a_rollout_does_not_depend_on_its_neighbours() -> None:
    sampler, sampling = TorchSampler(policy(), STOP), Sampling(NEW)
    together = sampler.sample(prompts(), seeds(), sampling)
    for p, prompt in enumerate(prompts()):
        assert_same(sampler.sample([prompt], [seeds()[p]], sampling)[0], together[p])
    alone = sampler.sample(prompts()[2:3], [[seeds()[2][4]]], sampling)
    assert_same(alone[0], together[2][4:5])
    backwards = sampler.sample(prompts()[::-1], seeds()[::-1], sampling)
    for p, row in enumerate(backwards[::-1]):
        assert_same(row, together[p])


@pytest.mark.parametrize("below", [0.0, 0.5, 1.0])
def test_dropping_finished_rows_changes_no_result(
    below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0: rows are never dropped while one is open; 1: at every step."""
    expected = TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW))
    monkeypatch.setattr("aquarl.engines.torch_engine.COMPACT_BELOW", below)
    rows = TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW))
    for ours, theirs in zip(rows, expected, strict=True):
        assert_same(ours, theirs)


def test_the_same_lease_gives_the_same_rollouts_bit_for_bit() -> None:
    first = TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW))
    torch.manual_seed(99)  # no global state takes part
    assert TorchSampler(policy(), STOP).sample(prompts(), seeds(), Sampling(NEW)) == first
    other = [[seed + 1 for seed in row] for row in seeds()]
    assert TorchSampler(policy(), STOP).sample(prompts(), other, Sampling(NEW)) != first


def test_one_new_token_is_enough() -> None:
    (row,) = TorchSampler(policy(), STOP).sample(prompts()[:1], [[1, 2]], Sampling(1))
    assert [len(rollout.ids) for rollout in row] == [1, 1]


def test_drawn_tokens_follow_the_distribution() -> None:
    """20,000 draws against their chances: chi-square under its 99.99 % bound, 23 degrees."""
    logits_V = torch.randn(VOCAB, generator=torch.manual_seed(0))
    uniforms_B = torch.rand(20_000, generator=torch.manual_seed(1))
    raw_V = ((logits_V / SOFT_CAP + 1) / 2).logit()
    for drawn_by, given_V, temperature in (
        (draw, raw_V, 1.0),
        (draw, raw_V, 0.5),
        (draw, raw_V, 0.1),  # too cold for exponentials without a maximum
        (draw_from_any, logits_V, 1.0),
    ):
        ids_B, logprobs_B = drawn_by(
            given_V.repeat(20_000, 1), uniforms_B, Sampling(1, temperature)
        )
        chances_V = (logits_V / temperature).softmax(dim=0)
        torch.testing.assert_close(logprobs_B, chances_V.log()[ids_B], rtol=1e-5, atol=1e-4)
        expected_V = 20_000 * chances_V
        counts_V = torch.bincount(ids_B, minlength=VOCAB)
        is_met_V = expected_V > 1  # where fewer are expected, chi-square means nothing
        gaps_V = (counts_V - expected_V)[is_met_V]
        assert (gaps_V.square() / expected_V[is_met_V]).sum() < 58.6


def test_a_token_of_no_chance_is_never_drawn() -> None:
    """Not even by the smallest and largest numbers a generator gives."""
    logits_BV = torch.zeros(4, 6)
    logits_BV[:, [0, 5]] = -torch.inf
    extremes_B = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24, 0.5])
    ids_B, logprobs_B = draw_from_any(logits_BV, extremes_B, Sampling(1))
    assert set(ids_B.tolist()) <= {1, 2, 3, 4}
    assert logprobs_B.isfinite().all()


def test_a_larger_vocabulary_has_no_holes() -> None:
    """fp32 sums over 65,536 tokens: the largest uniform number still finds a possible token."""
    logits_BV = torch.randn(8, 65_536, generator=torch.manual_seed(0)) * 3
    logits_BV[:, -1_000:] = -torch.inf
    ids_B, logprobs_B = draw_from_any(logits_BV, torch.full((8,), 1 - 2.0**-24), Sampling(1))
    assert (ids_B < 64_536).all() and logprobs_B.isfinite().all()


@pytest.mark.parametrize("vocab", [5, 32, 33, 4_096])
def test_every_uniform_number_finds_the_token_that_the_sum_says(vocab: int) -> None:
    """In fp64, over the whole row at once; the smallest and largest numbers are among them."""
    raw_BV = 4 * torch.randn(200, vocab, generator=torch.manual_seed(vocab))
    uniforms_B = torch.rand(200, generator=torch.manual_seed(1))
    uniforms_B[:2] = torch.tensor([0.0, 1 - 2.0**-24])
    ids_B, logprobs_B = draw(raw_BV.clone(), uniforms_B, Sampling(1))
    chances_BV = ((2 * raw_BV.double().sigmoid() - 1) * SOFT_CAP).softmax(dim=1)
    sums_BV = chances_BV.cumsum(dim=1)
    above_B = sums_BV.gather(1, ids_B[:, None])[:, 0]
    below_B = above_B - chances_BV.gather(1, ids_B[:, None])[:, 0]
    assert (below_B - 1e-5 <= uniforms_B).all() and (uniforms_B <= above_B + 1e-5).all()
    torch.testing.assert_close(
        logprobs_B, chances_BV.log().gather(1, ids_B[:, None])[:, 0].float(), rtol=0, atol=2e-5
    )


def test_letter_logprobs_are_those_of_the_next_token() -> None:
    model = policy()
    rows = [list(prompt.ids) for prompt in prompts()]
    wanted = [[1, 2], [5], [0, 3, 23], [7, 7]]
    found = TorchSampler(model, STOP).letter_logprobs(rows, wanted)
    for row, ids, logprobs in zip(rows, wanted, found, strict=True):
        expected: Tensor = model.logits(model(torch.tensor([row])))[0, -1].log_softmax(dim=-1)
        assert logprobs == pytest.approx(expected[ids].tolist(), abs=1e-4)


def test_new_weights_are_taken_with_their_version_and_damaged_ones_are_not() -> None:
    sampler = TorchSampler(policy(seed=0), STOP)
    assert sampler.version == -1
    expected = TorchSampler(policy(seed=1), STOP).sample(prompts(), seeds(), Sampling(NEW))
    weights = flatten(policy(seed=1), version=4)
    sampler.load_weights(weights)
    assert sampler.version == 4
    assert sampler.sample(prompts(), seeds(), Sampling(NEW)) == expected
    with pytest.raises(ValueError, match="arrived damaged"):
        sampler.load_weights(replace(weights, version=5, checksum=weights.checksum ^ 1))
    assert sampler.version == 4
    assert sampler.sample(prompts(), seeds(), Sampling(NEW)) == expected


@torch.inference_mode()
def mixed(prompt: Prompt, seed: int, models: list[GPT], T: int) -> Rollout:
    """Sample one answer, token t by `models[t]` over the keys and values of those before."""
    prefix = Prefix(torch.tensor([len(prompt.ids)]))
    hidden_1D = models[0](torch.tensor([prompt.ids]), prefix)[:, -1]
    logits_1V, answer = models[0].logits(hidden_1D), Continuation(prefix, 1, room=T)
    uniforms_T = torch.rand(T, generator=torch.manual_seed(seed))
    ids, logprobs = [], []
    for t in range(T):
        id_1, logprob_1 = draw_from_any(logits_1V, uniforms_T[t : t + 1], Sampling(T))
        ids.append(int(id_1))
        logprobs.append(float(logprob_1))
        if t == T - 1 or ids[-1] == STOP:
            break
        hidden_11D = models[t + 1](id_1[:, None], answer, answer.positions_BT(1))
        answer.advance(1)
        logits_1V = models[t + 1].logits(hidden_11D[:, 0])
    return Rollout(tuple(ids), tuple(logprobs), stopped=ids[-1] == STOP)


def test_weights_may_change_inside_a_generation_and_each_token_says_whose_it_is() -> None:
    """Tokens 0-4 by version 7, from token 5 on by version 8, over the keys of both."""
    old, new = policy(seed=0), policy(seed=1)
    sampler = TorchSampler(GPT(old.shape), STOP)
    sampler.load_weights(flatten(old, version=7))
    asked = 0

    def newer_weights() -> Weights | None:
        nonlocal asked
        asked += 1
        return flatten(new, version=8) if asked == 5 else None

    sampler.newer_weights = newer_weights
    rows = sampler.sample(prompts(), seeds(), Sampling(NEW))
    assert sampler.version == 8
    lengths = set()
    for prompt, row, seed_row in zip(prompts(), rows, seeds(), strict=True):
        expected = [mixed(prompt, seed, [old] * 5 + [new] * NEW, NEW) for seed in seed_row]
        assert_same(row, expected)
        for rollout in row:
            n = len(rollout.ids)
            lengths.add(n)
            assert rollout.versions == ((7,) * 5 + (8,) * (n - 5) if n > 5 else ())
    assert min(lengths) <= 5 < max(lengths), "some answers were finished before the change"


def test_what_does_not_fit_into_the_positions_is_refused() -> None:
    """Context 16, so 160 positions."""
    sampler = TorchSampler(policy(), STOP)
    long = prompts((141,))
    sampler.sample(long, [[0]], Sampling(19))
    with pytest.raises(ConfigError, match=r"141 tokens and 20 new ones .* Lower max_new_tokens"):
        sampler.sample(long, [[0]], Sampling(20))
