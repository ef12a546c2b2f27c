"""The learner scores what was sampled, as the sampler did, and a step is a step however cut."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aquarl.config import RLConfig
from aquarl.engines.torch_engine import TorchSampler
from aquarl.model.flat_weights import load_flat
from aquarl.model.gpt import GPT
from aquarl.records import Metrics, Prompt, RolloutGroup, Sampling, TrainBatch
from aquarl.rl.batch import build_batch
from aquarl.rl.learner import Learner, Scorer, Sums
from tests.fakes import make_group, packed, random_ids, random_model

VOCAB, STOP, G = 40, 3, 5


def policy(seed: int = 0) -> GPT:
    return random_model(VOCAB, seed=seed, context=16)


def sampled_groups(
    model: GPT,
    P: int = 6,
    temperature: float = 1.0,
    advantages: bool = True,
    sampler: TorchSampler | None = None,
) -> list[RolloutGroup]:
    """Groups that the model itself sampled, with rewards that differ within each."""
    prompts = [
        Prompt(f"p{p}", tuple(random_ids((2 + p,), VOCAB, seed=p).tolist()), "ABCDE", "A")
        for p in range(P)
    ]
    seeds = [[100 * p + g for g in range(G)] for p in range(P)]
    if sampler is None:
        copy = random_model(VOCAB, context=16)
        copy.load_state_dict(model.state_dict())
        sampler = TorchSampler(copy, STOP)
    rollouts_PG = sampler.sample(prompts, seeds, Sampling(12, temperature))
    groups = []
    for p, (prompt, row) in enumerate(zip(prompts, rollouts_PG, strict=True)):
        rewarded = tuple(replace(r, reward=float((p + g) % 3 == 0)) for g, r in enumerate(row))
        mean = sum(r.reward for r in rewarded) / G
        worth = tuple(r.reward - mean for r in rewarded) if advantages else (0.0,) * G
        groups.append(RolloutGroup(p, 0, 0, prompt, rewarded, worth, weights_version=0))
    return groups


def counts(groups: list[RolloutGroup]) -> tuple[int, int]:
    rollouts = [r for group in groups for r in group.rollouts]
    return sum(len(r.ids) for r in rollouts), len(rollouts)


def plain_logprobs(model: GPT, groups: list[RolloutGroup], temperature: float) -> list[Tensor]:
    """For each rollout, one forward pass over its whole prompt and answer."""
    found = []
    for group in groups:
        for rollout in group.rollouts:
            ids, start = torch.tensor([*group.prompt.ids, *rollout.ids]), len(group.prompt.ids)
            logits = model.logits(model(ids[None, :-1]))[0, start - 1 :] / temperature
            found.append(logits.log_softmax(dim=-1).gather(1, ids[start:, None])[:, 0])
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_plain_rows_and_so_are_their_gradients(temperature: float) -> None:
    groups = sampled_groups(policy())
    gradients = []
    for is_shared in (False, True):
        model = policy()
        expected = plain_logprobs(model, groups, temperature)
        if is_shared:
            batch = build_batch(packed(groups), *counts(groups))
            logprobs_BT, _ = Scorer(model, temperature)(batch)
            assert logprobs_BT[~batch.is_sampled_BT].count_nonzero() == 0
            scored = list(logprobs_BT[batch.is_sampled_BT].split([len(e) for e in expected]))
            torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-5)
            expected = scored
        weights = [torch.linspace(-1, 1, len(e)) + b for b, e in enumerate(expected)]
        torch.stack(
            [(e * w).sum() for e, w in zip(expected, weights, strict=True)]
        ).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None and plain.norm() > 0, name
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-3, atol=1e-4 * plain.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_learner_and_sampler_mean_the_same_distribution(temperature: float) -> None:
    model = policy()
    groups = sampled_groups(model, P=8, temperature=temperature)
    batch = build_batch(packed(groups), *counts(groups))
    logprobs_BT, entropy = Scorer(model, temperature)(batch)
    gap_BT = (logprobs_BT - batch.behaviour_logprobs_BT).abs()
    assert gap_BT[batch.is_sampled_BT].mean() < 1e-4
    assert gap_BT.max() < 1e-3
    assert 0 < entropy.item() / batch.tokens_in_step < torch.tensor(VOCAB).log()


def test_a_sampler_in_bf16_stays_near_the_learner() -> None:
    """As on a GPU: the mismatch is rounding, under 0.01 nats a token (k3)."""
    learner = Learner(policy(), RLConfig())
    sampler = TorchSampler(policy(seed=7), STOP, dtype=torch.bfloat16)
    sampler.load_weights(learner.weights())
    groups = sampled_groups(learner.model, P=8, sampler=sampler)
    metrics = learner.update(packed(groups), *counts(groups))
    assert 1e-4 < metrics["policy/logprob_gap"] < 0.03
    assert 0 < metrics["policy/kl_from_sampler"] < 0.01


def test_an_answer_of_one_token_is_scored_from_its_prompt_alone() -> None:
    model = policy()
    groups = [make_group([1, 2, 3], [[7], [STOP]]), make_group([4], [[5], [6]])]
    logprobs_BT, _ = Scorer(model, 1.0)(build_batch(packed(groups), 4, 4))
    assert logprobs_BT.shape == (4, 1)
    expected = torch.stack(plain_logprobs(model, groups, 1.0))
    torch.testing.assert_close(logprobs_BT, expected, rtol=1e-4, atol=1e-5)


def updated(groups: list[RolloutGroup], steps: int = 1, **settings: object) -> dict[str, Tensor]:
    learner = Learner(policy(), RLConfig(warmdown=0.0, **settings))
    for _ in range(steps):
        learner.update(packed(groups), *counts(groups))
    return dict(learner.model.state_dict())


@pytest.mark.parametrize("loss", ["reinforce", "ppo", "gspo", "cispo"])
def test_a_step_is_the_same_however_many_prompts_go_at_once(loss: str) -> None:
    groups = sampled_groups(policy())
    # AdamW turns the sign of a rounding into a whole step: compare where gradients are not 0.
    whole = updated(groups, loss=loss, micro_prompts=6)
    for micro_prompts in (1, 4):
        part = updated(groups, loss=loss, micro_prompts=micro_prompts)
        torch.testing.assert_close(
            part["transformer.h.0.mlp.c_fc.weight"],
            whole["transformer.h.0.mlp.c_fc.weight"],
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            part["lm_head.weight"], whole["lm_head.weight"], rtol=1e-3, atol=1e-3
        )


class Recorded(nn.Module):
    """In the place of DDP: keeps a rank's gradients instead of exchanging them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object) -> object:
        return self.module(*args)


@pytest.mark.parametrize("loss", ["reinforce", "gspo"])
def test_the_mean_of_the_ranks_gradients_is_the_gradient_of_the_step(loss: str) -> None:
    """What DDP does with them. Ranks have unequal numbers of tokens."""
    groups = sampled_groups(policy())
    config = RLConfig(loss=loss, kl_weight=0.1, micro_prompts=2)

    def gradients(rank: int, world: int) -> dict[str, Tensor]:
        learner = Learner(
            policy(), config, reference=policy(9), parallel=Recorded, rank=rank, world=world
        )
        kept: dict[str, Tensor] = {}

        def keep(lr: float, step: int) -> None:
            for name, p in learner.model.named_parameters():
                assert p.grad is not None
                kept[name] = p.grad.clone()

        learner.config = config.model_copy(update={"clip_norm": 1e9})
        learner.optimizer.step = keep  # type: ignore[method-assign]
        learner.update(packed(groups[rank::world]), *counts(groups))
        return kept

    whole = gradients(0, 1)
    ranks = [gradients(rank, 4) for rank in range(4)]
    for name, gradient in whole.items():
        mean = torch.stack([rank[name] for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5 * gradient.norm())


def count_rows(learner: Learner) -> list[int]:
    """Return a list that will hold the rows of each backward pass."""
    rows: list[int] = []
    backward = learner._backward

    def counted(batch: TrainBatch, sums: Sums, share: float = 1.0) -> None:
        rows.append(len(batch.advantages_B))
        backward(batch, sums, share)

    learner._backward = counted  # type: ignore[method-assign]
    return rows


def test_groups_that_teach_nothing_cost_no_gradient_and_are_counted_as_ever() -> None:
    """The same step whether they are gone back through, as KL of weight next to 0 makes it, or
    not."""
    groups = [
        replace(group, advantages=(0.0,) * G) if p % 2 else group
        for p, group in enumerate(sampled_groups(policy()))
    ]
    metrics, norms, rows = [], [], []
    for kl_weight in (0.0, 1e-30):
        learner = Learner(policy(), RLConfig(kl_weight=kl_weight), reference=policy())
        gone_back = count_rows(learner)
        found = learner.update(packed(groups), *counts(groups))
        norms.append(found.pop("learner/grad_norm"))
        metrics.append(
            {k: v for k, v in found.items() if k not in ("policy/kl_from_sft", "time/learn_s")}
        )
        rows.append(sum(gone_back))
    assert rows == [3 * G, 6 * G]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-7)


def test_a_rank_that_only_pads_has_no_share_in_gradient_and_sums() -> None:
    """What KL would make of its group otherwise is in the test of that term."""
    groups = sampled_groups(policy(), advantages=False)[:1]

    def with_another_rank(sums: Metrics) -> Metrics:
        return {name: value + 0.5 for name, value in sums.items()}

    learner = Learner(
        policy(), RLConfig(kl_weight=0.5), reference=policy(seed=5), total=with_another_rank
    )
    metrics = learner.update(packed(groups), *counts(groups), is_padding=True)
    assert metrics["learner/grad_norm"] == 0
    for name in ("policy/kl_from_sft", "policy/ratio_mean", "policy/entropy", "loss/policy"):
        assert metrics[name] == 0.5, "the other rank's alone"


def test_a_step_without_advantages_changes_nothing_but_the_step() -> None:
    groups = sampled_groups(policy(), advantages=False)
    learner = Learner(policy(), RLConfig(optimizer="adamw"))
    metrics = learner.update(packed(groups), *counts(groups))
    assert metrics["learner/grad_norm"] == 0
    torch.testing.assert_close(learner.model.state_dict(), policy().state_dict(), rtol=0, atol=0)
    assert learner.step == 1


@pytest.mark.parametrize("loss", ["reinforce", "ppo", "gspo", "cispo"])
def test_what_was_rewarded_becomes_likelier_and_the_rest_less(loss: str) -> None:
    groups = sampled_groups(policy())
    batch = build_batch(packed(groups), *counts(groups))
    learner = Learner(policy(), RLConfig(loss=loss, lr_scale=0.1))
    before, _ = learner.scorer(batch)
    metrics = learner.update(packed(groups), *counts(groups))
    after, _ = learner.scorer(batch)
    gained = ((after - before).sum(dim=1) * batch.advantages_B).sum()
    assert gained > 0
    assert metrics["policy/logprob_gap"] < 1e-4, "on-policy: nothing moved before the step"
    assert metrics["policy/clipped_fraction"] == 0


def test_the_kl_term_is_logged_apart_and_is_0_at_the_reference() -> None:
    groups = sampled_groups(policy(), advantages=False)
    config = RLConfig(kl_weight=0.5)
    same = Learner(policy(), config, reference=policy()).update(packed(groups), *counts(groups))
    assert same["policy/kl_from_sft"] == pytest.approx(0, abs=1e-9)
    far = Learner(policy(), config, reference=policy(seed=5)).update(
        packed(groups), *counts(groups)
    )
    assert far["policy/kl_from_sft"] > 0.1
    assert far["loss/policy"] == pytest.approx(0.5 * far["policy/kl_from_sft"], rel=1e-4)


def test_a_resumed_learner_goes_on_bit_for_bit() -> None:
    groups, config = sampled_groups(policy()), RLConfig(steps=6)
    whole, first = Learner(policy(), config), Learner(policy(), config)
    for _ in range(5):
        whole.update(packed(groups), *counts(groups))
    for _ in range(3):
        first.update(packed(groups), *counts(groups))
    resumed = Learner(policy(seed=8), config)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load_state(first.state())
    assert resumed.step == 3
    for _ in range(2):
        resumed.update(packed(groups), *counts(groups))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.state(), whole.state(), rtol=0, atol=0)


def test_published_weights_are_the_policys_and_carry_its_step() -> None:
    groups, learner = sampled_groups(policy()), Learner(policy(), RLConfig())
    assert learner.weights().version == 0
    learner.update(packed(groups), *counts(groups))
    received = policy(seed=4)
    load_flat(received, learner.weights())
    assert learner.weights().version == 1
    torch.testing.assert_close(received.state_dict(), learner.model.state_dict(), rtol=0, atol=0)


def rank_of_a_group(rank: int, world: int, folder: str) -> None:
    """One process of a gloo group: three steps with DDP, as `cluster.learner_group` runs them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    ddp = nn.parallel.DistributedDataParallel
    learner = Learner(policy(), RLConfig(micro_prompts=2), parallel=ddp, rank=rank, world=world)
    groups = sampled_groups(policy(), P=7)
    norms = [
        learner.update(packed(groups[rank::world]), *counts(groups))["learner/grad_norm"]
        for _ in range(3)
    ]
    torch.save(norms, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_as_one_does(tmp_path: Path) -> None:
    """Four prompts for one of them, three for the other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aquarl.rl.learner"])
    group = [context.Process(target=rank_of_a_group, args=(r, 2, str(tmp_path))) for r in (0, 1)]
    for process in group:
        process.start()
    for process in group:
        process.join(timeout=120)
        assert process.exitcode == 0
    groups, alone = sampled_groups(policy(), P=7), Learner(policy(), RLConfig(micro_prompts=2))
    expected = [
        alone.update(packed(groups), *counts(groups))["learner/grad_norm"] for _ in range(3)
    ]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-3)
