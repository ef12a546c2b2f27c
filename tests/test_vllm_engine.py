"""vLLM says what our own engine and transformers say: same tokens, same log-probabilities.

Needs an environment of its own (`make test-vllm`). vLLM keeps its state in globals, so the process
holds one engine at a time, which the tests of one model share.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aquarl.cli import main
from aquarl.cluster.doctor import check_vllm
from aquarl.cluster.results import copy_up_to_sft
from aquarl.engines.torch_engine import TorchSampler
from aquarl.engines.vllm_engine import VllmSampler
from aquarl.errors import ConfigError
from aquarl.model.flat_weights import flatten
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.records import Prompt, Rollout, Sampling
from aquarl.serve.hf import hf_config, hf_state
from tests.conftest import eventually, rows
from tests.fakes import byte_tokenizer, random_ids, random_model

VOCAB, STOP, CONTEXT = byte_tokenizer().vocab_size, 3, 32
NEW = 24
ROOT = Path(__file__).resolve().parent.parent

vllm = pytest.mark.vllm
FP32 = pytest.mark.parametrize("engine", [(4, "float32"), (2, "float32")], indirect=True, ids=str)
BF16 = pytest.mark.parametrize("engine", [(2, "bfloat16")], indirect=True, ids=str)
"""How many key heads (of 4 heads), and in what precision."""


def policy(kv_heads: int, seed: int = 0) -> GPT:
    """A model that is sure of little: its answers differ, and some of them end early."""
    return random_model(VOCAB, width=128, kv_heads=kv_heads, context=CONTEXT, seed=seed)


def prompts(lengths: Sequence[int] = (5, 1, 40, 70)) -> list[Prompt]:
    """Some longer than a block of vLLM's cache, or two: these are what it keeps and shares."""
    return [
        Prompt(f"p{p}", tuple(random_ids((n,), VOCAB, seed=p).tolist()), "ABCDE", "A")
        for p, n in enumerate(lengths)
    ]


def seeds(P: int = 4, G: int = 6) -> list[list[int]]:
    return [[1_000 * p + g for g in range(G)] for p in range(P)]


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[VllmSampler]:
    """The engine for `policy` of the asked kind, without weights or with those of another test."""
    kv_heads, dtype = request.param
    sampler = VllmSampler(policy(kv_heads).shape, STOP, rows=32, dtype=getattr(torch, dtype))
    yield sampler
    sampler.shutdown()


def take(engine: VllmSampler, seed: int) -> GPT:
    """Give the engine the weights of a policy, and return that."""
    model = policy(engine.shape.kv_heads, seed)
    engine.load_weights(flatten(model, version=seed))
    return model


def ids_of(rollouts_PG: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.ids for rollout in row] for row in rollouts_PG]


@torch.inference_mode()
def logprob_gaps(
    model: GPT, asked: Sequence[Prompt], rollouts_PG: list[list[Rollout]], temperature: float
) -> Tensor:
    """Return our log-probability of each sampled token minus the sampler's, all in one row."""
    gaps = []
    for prompt, row in zip(asked, rollouts_PG, strict=True):
        for rollout in row:
            ids_1T = torch.tensor([[*prompt.ids, *rollout.ids]])
            logits_TV = model.logits(model(ids_1T[:, :-1]))[0, len(prompt.ids) - 1 :]
            logprobs_TV = (logits_TV / temperature).log_softmax(dim=-1)
            ours_T = logprobs_TV.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
            gaps.append(ours_T - torch.tensor(rollout.logprobs))
    return torch.cat(gaps)


@torch.inference_mode()
def greedy_of_transformers(model: GPT, asked: Sequence[Prompt]) -> list[tuple[int, ...]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.NanoChatConfig(**hf_config(model.shape, byte_tokenizer()))
    theirs = transformers.NanoChatForCausalLM(config).eval()
    theirs.load_state_dict(hf_state(model), strict=True)
    return [
        tuple(
            theirs.generate(
                torch.tensor([prompt.ids]),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=STOP,
                pad_token_id=STOP,
            )[0, len(prompt.ids) :].tolist()
        )
        for prompt in asked
    ]


# The same policy.


@vllm
@FP32
def test_greedy_tokens_are_ours_and_transformers_before_and_after_new_weights(
    engine: VllmSampler,
) -> None:
    """The same prompts each time: what vLLM keeps of them must go with the weights."""
    seen = []
    for seed in (0, 1, 0):
        model = take(engine, seed)
        found = engine.sample(prompts(), seeds(G=1), Sampling(NEW, temperature=0.0))
        expected = TorchSampler(model, STOP).sample(
            prompts(), seeds(G=1), Sampling(NEW, temperature=0.0)
        )
        assert ids_of(found) == ids_of(expected)
        assert [ids for (ids,) in ids_of(found)] == greedy_of_transformers(model, prompts())
        assert logprob_gaps(model, prompts(), found, 1.0).abs().max() < 1e-3
        seen.append(ids_of(found))
    assert seen[0] == seen[2] != seen[1]


@vllm
@FP32
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_of_the_distribution_sampled_before_and_after_new_weights(
    engine: VllmSampler, temperature: float
) -> None:
    for seed in (0, 1):
        model = take(engine, seed)
        found = engine.sample(prompts(), seeds(), Sampling(NEW, temperature))
        gaps = logprob_gaps(model, prompts(), found, temperature)
        assert gaps.abs().max() < 1e-3 and len(gaps) > 400
        assert len(set(ids_of(found)[3])) == 6  # answers to one prompt differ
        assert engine.version == seed


@vllm
@FP32
@pytest.mark.parametrize("is_share", [False, True])
def test_top_k_and_top_p_leave_the_likeliest_and_their_logprobs(
    engine: VllmSampler, is_share: bool
) -> None:
    model = take(engine, 0)
    with torch.inference_mode():
        logits_V = model.logits(model(torch.tensor([prompts()[2].ids])))[0, -1] / 0.5
    best = logits_V.topk(2)
    share = float(logits_V.softmax(0)[best.indices].sum()) - 1e-4
    only = {"top_p": share} if is_share else {"top_k": 2}
    (row,) = engine.sample(prompts()[2:3], [list(range(40))], Sampling(1, 0.5, **only))
    expected = dict(zip(best.indices.tolist(), best.values.log_softmax(0).tolist(), strict=True))
    assert {rollout.ids[0] for rollout in row} <= set(expected)
    for rollout in row:
        assert rollout.logprobs[0] == pytest.approx(expected[rollout.ids[0]], abs=1e-3)


@vllm
@FP32
def test_the_soft_cap_is_honoured(engine: VllmSampler) -> None:
    model = take(engine, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)
    engine.load_weights(flatten(model, version=0))
    asked, everything = [list(prompt.ids) for prompt in prompts()], [list(range(100))] * 4
    ours = torch.tensor(TorchSampler(model, STOP).letter_logprobs(asked, everything))
    theirs = torch.tensor(engine.letter_logprobs(asked, everything))
    assert (theirs - ours).abs().max() < 1e-3
    assert theirs.max() - theirs.min() < 31  # twice the cap of 15 and rounding
    with torch.inference_mode():
        hidden_D = model(torch.tensor(asked[:1]))[0, -1]
        uncapped = (hidden_D @ model.lm_head.weight.T).log_softmax(0)[:100]
    assert (theirs[0] - uncapped).abs().max() > 1.0


@vllm
@FP32
def test_letter_logprobs_are_ours_before_and_after_new_weights(engine: VllmSampler) -> None:
    asked = [list(prompt.ids) for prompt in prompts()]
    wanted = [[1, 2], [5], [0, 3, VOCAB - 1], [7, 8, 9, 10, 11]]
    for seed in (0, 1):
        model = take(engine, seed)
        expected = TorchSampler(model, STOP).letter_logprobs(asked, wanted)
        for row, ours in zip(engine.letter_logprobs(asked, wanted), expected, strict=True):
            assert row == pytest.approx(ours, abs=1e-3)


@vllm
@BF16
def test_in_bf16_the_mismatch_is_under_a_hundredth_of_a_nat(engine: VllmSampler) -> None:
    """What a GPU's sampler does to a learner in fp32: KL by the estimator that the run logs."""
    for seed in (0, 1):
        model = take(engine, seed)
        found = engine.sample(prompts(), seeds(G=16), Sampling(NEW))
        gaps = logprob_gaps(model, prompts(), found, 1.0)
        assert 0 < (gaps.exp() - 1 - gaps).mean() < 0.01
        assert len(gaps) > 500 and gaps.abs().max() > 1e-3  # it is not fp32 after all


# The contract of a sampler.


@vllm
@FP32
def test_a_seed_gives_its_answer_whatever_else_is_asked(engine: VllmSampler) -> None:
    take(engine, 0)
    sampling = Sampling(NEW)
    together = ids_of(engine.sample(prompts(), seeds(), sampling))
    assert ids_of(engine.sample(prompts(), seeds(), sampling)) == together
    backwards = engine.sample(prompts()[::-1], seeds()[::-1], sampling)
    assert ids_of(backwards) == together[::-1]
    for p, prompt in enumerate(prompts()):
        assert ids_of(engine.sample([prompt], [seeds()[p][4:5]], sampling)) == [together[p][4:5]]
    crowd = ids_of(engine.sample(prompts(), seeds(G=30), sampling))  # more than `rows` at a time
    assert [row[:6] for row in crowd] == together
    others = [[seed + 500 for seed in row] for row in seeds()]
    assert ids_of(engine.sample(prompts(), others, sampling)) != together


@vllm
@FP32
def test_the_stop_token_is_sampled_and_ends_an_answer(engine: VllmSampler) -> None:
    take(engine, 0)
    rollouts = [r for row in engine.sample(prompts(), seeds(G=16), Sampling(NEW)) for r in row]
    for rollout in rollouts:
        assert rollout.stopped == (rollout.ids[-1] == STOP)
        assert STOP not in rollout.ids[:-1]
        assert rollout.stopped or len(rollout.ids) == NEW
        assert len(rollout.ids) == len(rollout.logprobs)
    assert {rollout.stopped for rollout in rollouts} == {True, False}


@vllm
@FP32
def test_without_a_stop_token_every_answer_is_cut_by_length(
    engine: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(engine, 0)
    monkeypatch.setattr(engine, "stop_id", -1)
    rollouts = [r for row in engine.sample(prompts(), seeds(G=16), Sampling(NEW)) for r in row]
    assert {(len(rollout.ids), rollout.stopped) for rollout in rollouts} == {(NEW, False)}
    assert any(STOP in rollout.ids for rollout in rollouts)


@vllm
@FP32
def test_damaged_weights_leave_the_old_ones(engine: VllmSampler) -> None:
    take(engine, 0)
    expected = engine.sample(prompts(), seeds(), Sampling(NEW))
    weights = flatten(policy(engine.shape.kv_heads, seed=1), version=5)
    with pytest.raises(ValueError, match="arrived damaged"):
        engine.load_weights(replace(weights, checksum=weights.checksum ^ 1))
    assert engine.version == 0
    assert ids_of(engine.sample(prompts(), seeds(), Sampling(NEW))) == ids_of(expected)


# What is refused, and leaves the engine as it was.

ROOM = 10 * CONTEXT


@vllm
@FP32
@pytest.mark.parametrize(
    ("ids", "sampling", "sentence"),
    [
        ((1,) * (ROOM - 19), Sampling(20), rf"{ROOM - 19} tokens and 20 new .* than the {ROOM} "),
        ((1, VOCAB), Sampling(2), rf"the token {VOCAB}, but the model knows tokens 0 to"),
        ((-1, 1), Sampling(2), "the token -1, but the model knows tokens 0 to"),
        ((), Sampling(2), "holds no token"),
        ((1, 2), Sampling(2, temperature=2.5), r"temperature is 2\.5, but vLLM samples from 0\.01"),
        ((1, 2), Sampling(2, temperature=0.001), "temperature is 0.001, but vLLM samples from"),
    ],
    ids=["too long", "foreign token", "negative token", "empty", "too hot", "too cold"],
)
def test_refused_requests_say_why_and_harm_nothing(
    engine: VllmSampler, ids: tuple[int, ...], sampling: Sampling, sentence: str
) -> None:
    take(engine, 0)
    expected = ids_of(engine.sample(prompts(), seeds(), Sampling(NEW)))
    asked = [*prompts(), Prompt("odd", ids, "ABCDE", "A")]
    with pytest.raises(ConfigError, match=sentence):
        engine.sample(asked, seeds(5), sampling)
    assert ids_of(engine.sample(prompts(), seeds(), Sampling(NEW))) == expected


@vllm
@FP32
def test_a_prompt_may_fill_the_room_to_the_last_position(engine: VllmSampler) -> None:
    model = take(engine, 0)
    asked = prompts((ROOM - NEW,))
    found = engine.sample(asked, [[1, 2]], Sampling(NEW))
    assert logprob_gaps(model, asked, found, 1.0).abs().max() < 1e-3


@vllm
def test_a_head_width_that_vllm_has_no_kernel_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"heads are of width 48, but .* Set rl\.engine=torch"):
        VllmSampler(Shape(VOCAB, 2, 96, 2, 2, CONTEXT), STOP)


@vllm
def test_the_cpu_build_is_not_asked_for_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"built for CPUs, .* Set cluster\.rollout_gpus=0"):
        VllmSampler(policy(4).shape, STOP, "cuda")


@vllm
@pytest.mark.parametrize("setting", ["rl.temperature=3", "evaluate.temperature=3"])
def test_a_temperature_that_vllm_does_not_sample_at_ends_the_command_at_once(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", f"run.dir={tmp_path}/run", "rl.engine=vllm", setting]) == 2
    assert "but vLLM samples from 0.01 to 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@vllm
def test_doctor_finds_vllm_here() -> None:
    found = check_vllm()
    assert (found.state, found.what) == ("ok", "0.32.0")


@pytest.mark.parametrize("command", ["demo", "pipeline", "rl", "evaluate"])
def test_without_vllm_a_command_that_would_sample_ends_at_once(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    monkeypatch.setattr("ray.init", lambda **settings: pytest.fail("Ray was started"))
    run = tmp_path / "run"
    assert main([command, f"run.dir={run}", "rl.engine=vllm"]) == 2
    said = capsys.readouterr().err
    assert "vLLM was asked for, but it is not installed here" in said
    assert "make setup-vllm" in said and "rl.engine=torch" in said and "Traceback" not in said
    assert not run.exists()


# Through the doors.


def aquarl(*argv: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command: a process of its own, for an engine of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "aquarl.cli", *argv],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(mark: str) -> Iterator[Path]:
    """Yield what /proc has of each process with this in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while we look, or not be ours
            if mark.encode() in (folder / "environ").read_bytes():
                yield folder


def who_holds_vllm(mark: str) -> Iterator[str]:
    """Yield the actor, or else the command, of each process that has loaded vLLM's kernels."""
    for process in processes(mark):
        with suppress(OSError):
            if "/vllm/_C" in (process / "maps").read_text():
                title = (process / "cmdline").read_text()
                actor = re.search(r"RolloutWorker|EvaluationWorker", title)
                if title:  # one that is ending has none any more
                    yield actor[0] if actor else title


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one run is, of several tests."""
    return tmp_path_factory.mktemp("vllm")


@vllm
def test_a_run_samples_with_vllm_and_leaves_no_process(tiny: str, folder: Path) -> None:
    """All that a run starts inherits its environment, so a mark there finds orphans, too."""
    run, mark = folder / "run", str(folder)
    running = aquarl(
        "pipeline", "--config", tiny, f"run.dir={run}", "rl.engine=vllm", AQUARL_TEST_RUN=mark
    )
    holders: set[str] = set()
    try:
        while running.returncode is None:
            holders |= set(who_holds_vllm(mark))
            with suppress(subprocess.TimeoutExpired):
                _, said = running.communicate(timeout=0.2)
    finally:
        running.terminate()  # where this test is itself stopped
    assert running.returncode == 0, said
    assert holders == {"RolloutWorker", "EvaluationWorker"}  # neither learner nor a child of theirs
    eventually(lambda: not list(processes(mark)))
    assert_samples_as_it_learns(run)


@vllm
def test_both_engines_serve_one_run(tiny: str, folder: Path, tmp_path: Path) -> None:
    """It goes on until groups of either one have been trained on."""
    run, ledger = tmp_path / "run", tmp_path / "run" / "ledger.jsonl"
    copy_up_to_sft(folder / "run", run)
    kinds = 'cluster.rollout_kinds=[{engine="vllm",cpus=0.5},{engine="torch",cpus=0.5}]'
    running = aquarl(
        "rl", "--config", tiny, f"run.dir={run}", "rl.rollout_workers=2", kinds, "rl.steps=100000"
    )
    try:
        eventually(
            lambda: (
                running.poll() is not None
                or (ledger.exists() and len({row["worker"] for row in rows(ledger)}) == 2)
            )
        )
    finally:
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
    assert {row["worker"] for row in rows(ledger)} == {"rollout-0", "rollout-1"}, said
    assert_samples_as_it_learns(run)


def assert_samples_as_it_learns(run: Path) -> None:
    """What was sampled has the probability that the learner gives it, in fp32."""
    steps = [row for row in rows(run / "metrics.jsonl") if "policy/logprob_gap" in row]
    assert len(steps) >= 6
    assert 0 < max(step["policy/logprob_gap"] for step in steps) < 1e-4
    assert max(step["policy/kl_from_sampler"] for step in steps) < 1e-6


@vllm
def test_bench_measures_both_engines_side_by_side() -> None:
    measured, said = aquarl(
        "bench", "step", "--engine", "torch", "vllm", "--size", "1,64,2,512",
        "--prompts", "2", "--samples", "2", "--max-new", "8", "--repeats", "1", "--json",
    ).communicate()  # fmt: skip
    lines = [json.loads(line) for line in measured.splitlines()]
    assert [(line["engine"], line["tokens"]) for line in lines] == [("torch", 32), ("vllm", 32)], (
        said
    )
    assert all(line["tokens_per_cpu_s"] > 0 for line in lines)
