"""A supervised step is the same step however it is cut, shared, or interrupted."""

from __future__ import annotations

import math
import multiprocessing
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aquarl.config import SupervisedConfig
from aquarl.data.batches import IGNORED, PackedRows, Rows, RowSource
from aquarl.errors import ConfigError
from aquarl.model.gpt import GPT
from aquarl.model.modes import compile_policy
from aquarl.model.shape import Shape
from aquarl.observe.machine import peak_flops
from aquarl.records import Conversation, Message, Metrics
from aquarl.train.loop import NextTokenLoss, SupervisedTrainer, train_stage
from tests.fakes import byte_tokenizer, random_model

TOKENIZER = byte_tokenizer(b"th", b"the")
CONTEXT = 24


def echo(word: str) -> Conversation:
    return Conversation((Message("user", word), Message("assistant", word.upper())))


ECHOES = [echo(f"{a}{b}") for a in "abcdef" for b in ("x", "yy", "the")]


def rows() -> PackedRows:
    return PackedRows(lambda epoch: ECHOES, TOKENIZER, CONTEXT, seed=0)


def trainer(
    *,
    rank: int = 0,
    world: int = 1,
    parallel: object = None,
    model: GPT | None = None,
    validation: RowSource | None = None,
    **settings: object,
) -> SupervisedTrainer:
    plan = {"steps": 20, "batch_tokens": 7 * CONTEXT, "micro_rows": 16, "eval_rows": 4}
    return SupervisedTrainer(
        model or random_model(TOKENIZER.vocab_size, context=CONTEXT),
        SupervisedConfig(**(plan | settings)),
        rows(),
        validation or rows(),
        TOKENIZER,
        parallel or (lambda module: module),  # type: ignore[arg-type]
        rank,
        world,
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_policy_has_the_same_gradients() -> None:
    plain, made = (
        trainer(model=random_model(TOKENIZER.vocab_size, layers=1, context=CONTEXT))
        for _ in range(2)
    )
    compile_policy(made.model, "on")
    expected = gradients(plain)
    assert any(grad.abs().max() > 0.01 for grad in expected.values())
    torch.testing.assert_close(gradients(made), expected, rtol=1e-4, atol=1e-5)
    assert made.validate() == pytest.approx(plain.validate(), rel=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"], "it is compiled in one piece"


def test_a_policy_cannot_be_compiled_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"apt-get install g\+\+"):
        compile_policy(random_model(TOKENIZER.vocab_size, context=CONTEXT), "on")


def gradients(made: SupervisedTrainer) -> dict[str, Tensor]:
    """The gradients of one step, before clipping, instead of the step."""
    kept: dict[str, Tensor] = {}

    def keep(lr: float, step: int) -> None:
        for name, p in made.model.named_parameters():
            assert p.grad is not None
            kept[name] = p.grad.clone()

    made.config = made.config.model_copy(update={"clip_norm": 1e9})
    made.optimizer.step = keep  # type: ignore[method-assign]
    made.update()
    return kept


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 6])
def test_microbatches_give_the_gradient_of_the_whole_batch(micro_rows: int) -> None:
    whole = gradients(trainer(micro_rows=7))
    cut = gradients(trainer(micro_rows=micro_rows))
    for name, gradient in whole.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(cut[name], gradient, rtol=1e-3, atol=1e-5 * gradient.norm())


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7, 9])
def test_ranks_share_the_rows_of_a_step_and_each_has_some(world: int) -> None:
    """Seven rows, or as many as there are ranks."""
    for step in (0, 3):
        taken: list[Rows] = []
        for rank in range(world):
            made = trainer(rank=rank, world=world, micro_rows=2)
            made.step = step
            pieces = list(made._my_rows())
            assert pieces, "a rank without rows would keep the others waiting for its gradients"
            taken += pieces
        n = max(7, world)
        expected = rows().rows(step * n, n)
        assert torch.equal(torch.cat([piece.ids_BT for piece in taken]), expected.ids_BT)
        assert torch.equal(torch.cat([piece.targets_BT for piece in taken]), expected.targets_BT)


def rank_of_a_group(rank: int, world: int, folder: str) -> None:
    """One process of a gloo group: three steps with DDP, as `cluster.learner_group` runs them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    made = trainer(rank=rank, world=world, parallel=nn.parallel.DistributedDataParallel)
    curve = [{**made.update(), **made.validate()} for _ in range(3)]
    if rank == 0:
        torch.save({"curve": curve, "weights": made.model.state_dict()}, f"{folder}/result.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Seven rows a step: three for one of them, four for the other."""
    world = 2
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aquarl.train.loop"])
    group = [
        context.Process(target=rank_of_a_group, args=(rank, world, str(tmp_path)))
        for rank in range(world)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(timeout=120)
        assert process.exitcode == 0
    result = torch.load(tmp_path / "result.pt")
    alone = trainer()
    for shared in result["curve"]:
        expected = {**alone.update(), **alone.validate()}
        for name in ("loss/train", "learner/grad_norm", "tokens/trained"):
            assert shared[name] == pytest.approx(expected[name], rel=1e-4), name


def test_mfu_is_logged_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer()
    assert "throughput/mfu" not in ours.update(), "a CPU's is not"
    ours.peak_flops = 1e12
    metrics = ours.update()
    counts, positions = ours.model.count(), ours.rows_in_step * CONTEXT
    assert metrics["tokens/trained"] < positions, "the head is spared where nothing is trained"
    untrained = positions - metrics["tokens/trained"]
    flops = positions * counts["flops_per_token"] - untrained * counts["head_flops_per_token"]
    assert metrics["throughput/mfu"] == pytest.approx(flops / metrics["time/step_s"] / 1e12)
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("?", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


def test_the_loss_divides_by_the_tokens_that_are_trained() -> None:
    """A fresh model finds all tokens equally likely: ln V a token, whatever is padding."""
    fresh = GPT(Shape(TOKENIZER.vocab_size, 1, 32, 2, 2, CONTEXT)).init_weights(0)
    made = trainer(model=fresh)
    metrics = made.update()
    assert metrics["loss/train"] == pytest.approx(math.log(TOKENIZER.vocab_size), rel=1e-5)
    first = rows().rows(0, 7)
    assert metrics["tokens/trained"] == int((first.targets_BT != IGNORED).sum())


def test_bits_per_byte_counts_text_and_can_be_compared_between_vocabularies() -> None:
    """By hand: "the" is one token of three bytes, "x" one of one; the end of turn is no text."""
    fresh = GPT(Shape(TOKENIZER.vocab_size, 1, 32, 2, 2, CONTEXT)).init_weights(0)
    said = Conversation((Message("user", "?"), Message("assistant", "thex")))
    source = PackedRows(lambda epoch: [said], TOKENIZER, CONTEXT, seed=0)
    metrics = trainer(model=fresh, validation=source).validate()
    assert metrics["loss/validation"] == pytest.approx(math.log(TOKENIZER.vocab_size), rel=1e-5)
    bits = 2 * math.log2(TOKENIZER.vocab_size) / 4
    assert metrics["loss/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_validation_changes_nothing() -> None:
    made = trainer()
    made.update()
    before = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    assert made.validate() == made.validate()
    torch.testing.assert_close(dict(made.model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in made.model.parameters())


@torch.no_grad()
def test_packed_conversations_do_not_see_one_another() -> None:
    """Each conversation's losses are those it has in a row of its own."""
    loss = NextTokenLoss(random_model(TOKENIZER.vocab_size, context=CONTEXT))
    together = rows().rows(0, 3)
    assert together.documents_BT is not None and int(together.documents_BT.max()) > 1
    apart = []
    for ids, targets, documents in zip(
        together.ids_BT, together.targets_BT, together.documents_BT, strict=True
    ):
        for number in range(1, int(documents.max()) + 1):
            here = documents == number
            apart.append(loss.nll_N(Rows(ids[here][None], targets[here][None], None)))
    torch.testing.assert_close(loss.nll_N(together), torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stopped_at", [1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    optimizer: str, stopped_at: int
) -> None:
    settings: dict[str, Any] = {"steps": 7, "optimizer": optimizer, "micro_rows": 3}
    whole = trainer(**settings)
    expected = [whole.update() for _ in range(7)]

    first = trainer(**settings)
    for _ in range(stopped_at):
        first.update()
    torch.manual_seed(99)  # whatever happened to the process in between
    resumed = trainer(**settings, model=random_model(TOKENIZER.vocab_size, context=CONTEXT, seed=9))
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load_state(first.state())
    curve = [resumed.update() for _ in range(7 - stopped_at)]

    assert [m["loss/train"] for m in curve] == [m["loss/train"] for m in expected[stopped_at:]]
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    ours, theirs = resumed.state(), whole.state()
    torch.testing.assert_close(ours["optimizer"], theirs["optimizer"], rtol=0, atol=0)
    assert ours["step"] == theirs["step"] == 7


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_tiny_task_is_learned(optimizer: str) -> None:
    """Upper case of what was said: from ln V to nearly sure."""
    fresh = GPT(Shape(TOKENIZER.vocab_size, 2, 32, 2, 2, CONTEXT)).init_weights(0)
    rate = {"muon": 0.02, "adamw": 0.005}[optimizer]
    made = trainer(
        model=fresh, steps=80, optimizer=optimizer, matrix_lr=rate, batch_tokens=12 * CONTEXT
    )
    losses = [made.update()["loss/train"] for _ in range(80)]
    assert losses[0] > 5
    assert losses[-1] < 0.5


class Seen:
    """What a stage reported: where it logged what, and at which steps it saved."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, str]] = []
        self.saved: list[int] = []

    def log(self, step: int, metrics: Metrics) -> None:
        self.logged.append((step, "loss" if "loss/train" in metrics else "validation"))

    def save(self, made: SupervisedTrainer) -> None:
        self.saved.append(made.step)


def stage_from(step: int, steps: int = 5) -> Seen:
    made, seen = trainer(steps=steps, eval_every=2, save_every=3), Seen()
    made.step = step
    train_stage(made, log=seen.log, save=seen.save)
    return seen


def steps_of(seen: Seen, kind: str) -> Sequence[int]:
    return [step for step, what in seen.logged if what == kind]


def test_a_stage_logs_every_step_and_saves_its_last() -> None:
    seen = stage_from(0)
    assert steps_of(seen, "loss") == [0, 1, 2, 3, 4]
    assert steps_of(seen, "validation") == [0, 2, 4, 5]
    assert seen.saved == [3, 5]


def test_a_stage_goes_on_where_it_stood_and_a_finished_one_only_validates() -> None:
    seen = stage_from(3)
    assert (steps_of(seen, "loss"), seen.saved) == ([3, 4], [5])
    done = stage_from(5)
    assert (steps_of(done, "loss"), steps_of(done, "validation"), done.saved) == ([], [5], [])


def test_a_step_that_by_chance_trains_nothing_is_harmless() -> None:
    """A row may hold only conversations that are cut before their answer."""
    said = [echo("x"), Conversation((Message("user", "?" * 60), Message("assistant", "yes")))]
    made = trainer(batch_tokens=CONTEXT, optimizer="adamw")
    made.train = PackedRows(lambda epoch: said, TOKENIZER, CONTEXT, seed=0)
    metrics = [made.update() for _ in range(4)]
    assert {m["tokens/trained"] > 1 for m in metrics} == {True, False}
    assert all(math.isfinite(m["loss/train"]) for m in metrics)
    assert all(p.isfinite().all() for p in made.model.parameters())
