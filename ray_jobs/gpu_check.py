"""Is the GPU path right, and how fast is it? One script for the first minutes on a new machine.

    python ray_jobs/gpu_check.py [--out gpu_check] [--minutes 7]
    TRITON_INTERPRET=1 python ray_jobs/gpu_check.py --device cpu --small

First what must hold: a bf16 policy near its fp32 self, tokens from recorded CUDA graphs as those
computed one by one, but for rounding, a learner's gradient near that of plain fp32, an all-reduce
through NCCL (gloo on a CPU). Then `aquarl bench`'s rollouts, learner, step and sft at depth 8 with
65,536 words, the RL step of 16 prompts x 16 answers x 256 tokens, and a profile of it. Last, where
vLLM is installed, its policy beside ours before and after new weights, and both engines' rollouts.
Writes OUT.json and OUT.md after each part; what does not fit into the minutes is left out and
named. Ends with status 1 if anything is wrong, with 2 where there is no CUDA device. Without one,
`--device cpu` wants Triton and its interpreter: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from aquarl.bench import pieces
from aquarl.bench.lines import PIECES, as_text, bench
from aquarl.bench.timing import hardware
from aquarl.bench.work import NEVER, Work
from aquarl.engines.torch_engine import TorchSampler
from aquarl.engines.vllm_engine import VllmSampler
from aquarl.model.flat_weights import flatten
from aquarl.model.gpt import GPT
from aquarl.model.modes import keep_memory
from aquarl.records import Rollout
from aquarl.rl.batch import microbatches
from aquarl.rl.learner import Learner, on_device

Check = Callable[[Work, str], dict[str, Any]]

BF16_GAP = 0.05
"""Nats a token, mean: how far a bf16 policy may be from its fp32 self on the same tokens."""
GRADIENT_GAP = 0.1
"""Of any weight's gradient, relative: bf16 keeps 8 bits, and each passes through many products."""
MISMATCH = 0.01
"""Nats a token: the KL divergence of what vLLM samples from what the learner means."""


def check_precision(work: Work, device: str) -> dict[str, Any]:
    """The sampler's log-probabilities in bf16 beside the learner's forward pass in fp32."""
    sampler = _sampler(work, device, torch.bfloat16)
    rollouts_PG = sampler.sample(work.prompt_list, work.seeds, work.sampling)
    gap = float(_off(work, rollouts_PG, work.model(), device).abs().mean())
    return {"holds": gap < BF16_GAP, "mean_gap_nats": gap, "allowed": BF16_GAP}


def check_graphs(work: Work, device: str) -> dict[str, Any]:
    """Tokens from recorded kernels and from the usual operations, in fp32.

    They round differently, so where a uniform number stands on the border of two tokens, one may
    draw the other: its neighbour. From there on a row goes its own way.
    """
    results: list[list[Rollout]] = []
    for is_static in (True, False):
        sampler = _sampler(work, device, torch.float32, is_static)
        rows = sampler.sample(work.prompt_list, work.seeds, work.sampling)
        results.append([rollout for row in rows for rollout in row])
    same, far, gap = 0, 0, 0.0
    for ours, theirs in zip(*results, strict=True):
        pairs = list(zip(ours.ids, theirs.ids, strict=True))
        first = next((t for t, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same += first == len(pairs)
        far += first < len(pairs) and abs(pairs[first][0] - pairs[first][1]) > 1
        gaps = [abs(ours.logprobs[t] - theirs.logprobs[t]) for t in range(first)]
        gap = max(gap, *gaps, 0.0)
    holds = far == 0 and same >= len(results[0]) // 2 and gap < 1e-3
    return {
        "holds": holds,
        "rows": len(results[0]),
        "same_rows": same,
        "left_for_no_neighbour": far,
        "largest_gap_nats": gap,
    }


def check_gradient(work: Work, device: str) -> dict[str, Any]:
    """A learner's gradient on the device (on a GPU: bf16, FlashAttention, fused head) beside that
    of plain operations in fp32 on the CPU."""
    found, work = [], replace(work, prompts=2, samples=4, max_new=16)  # a CPU does it, too
    for where in (device, "cpu"):
        learner = Learner(work.model().to(where), work.rl_config)
        [batch] = microbatches(work.groups(work.drawn()), work.prompts, 1, 1)
        learner._backward(on_device(batch, learner.device), {})
        weights = learner.model.named_parameters()
        found.append({name: w.grad.cpu() for name, w in weights if w.grad is not None})
    ours, exact = found
    off = {name: float((ours[name] - g).norm() / g.norm()) for name, g in exact.items()}
    worst = max(off, key=off.__getitem__)
    return {
        "holds": all(gap < GRADIENT_GAP for gap in off.values()),  # nan is not
        "worst": worst,
        "relative_gap": off[worst],
        "allowed": GRADIENT_GAP,
    }


def check_collective(work: Work, device: str) -> dict[str, Any]:
    """One rank alone sums its gradient with nobody's: the library is there and starts."""
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, f"file://{folder}/meet", rank=0, world_size=1)
        numbers = torch.arange(8.0, device=device)
        dist.all_reduce(numbers)
        dist.destroy_process_group()
    return {"holds": numbers.tolist() == list(range(8)), "backend": backend}


def check_vllm(work: Work, device: str) -> dict[str, Any]:
    """Its log-probabilities beside the learner's forward pass in fp32, with weights, then others.

    What it kept of the first weights, or of the prompts under them, would show in the second gap.
    """
    sampler = VllmSampler(work.shape, NEVER, device, rows=work.prompts * work.samples)
    gaps, mismatches = [], []
    for version in (0, 1):
        model = replace(work, seed=work.seed + version).model()
        sampler.load_weights(flatten(model, version))
        rollouts_PG = sampler.sample(work.prompt_list, work.seeds, work.sampling)
        off_N = _off(work, rollouts_PG, model, device)
        gaps.append(float(off_N.abs().mean()))
        mismatches.append(float(-off_N.mean()))
    sampler.shutdown()
    return {
        "holds": max(gaps) < BF16_GAP and max(map(abs, mismatches)) < MISMATCH,
        "mean_gaps_nats": gaps,
        "mismatch_nats": mismatches,
        "allowed": MISMATCH,
    }


CHECKS: dict[str, Check] = {
    "bf16 near fp32": check_precision,
    "recorded decoding = usual decoding": check_graphs,
    "learner's gradient near the plain one": check_gradient,
    "all-reduce": check_collective,
}


def profiled(work: Work, device: str) -> list[dict[str, Any]]:
    """Return where one RL step's time goes: the ten heaviest operators."""
    piece = pieces.step(work, device, "torch")
    piece.run()
    is_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    with profile(activities=activities) as seen:
        piece.run()
    times = {
        event.key: (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1e3
        for event in seen.key_averages()
    }
    heaviest = sorted(times, key=times.__getitem__, reverse=True)[:10]
    return [{"operator": name, "ms": round(times[name], 3)} for name in heaviest]


def _off(work: Work, rollouts_PG: Sequence[Sequence[Rollout]], model: GPT, device: str) -> Tensor:
    """Return the log-probability of each sampled token as the model in fp32 has it, less the one
    that its sampler told."""
    exact, off = model.to(device), []
    with torch.inference_mode():
        for prompt, row in zip(work.prompt_list, rollouts_PG, strict=True):
            L = len(prompt.ids)
            ids_GT = torch.tensor([prompt.ids + r.ids for r in row], device=device)
            logprobs_GTV = exact.logits(exact(ids_GT[:, :-1])[:, L - 1 :]).log_softmax(dim=-1)
            logprobs_GT = logprobs_GTV.gather(2, ids_GT[:, L:, None])[..., 0]
            sampled_GT = torch.tensor([r.logprobs for r in row], device=device)
            off.append((logprobs_GT - sampled_GT).flatten())
    return torch.cat(off)


def _sampler(
    work: Work, device: str, dtype: torch.dtype, is_static: bool | None = None
) -> TorchSampler:
    sampler = TorchSampler(work.model(), NEVER, device, dtype, is_static)
    sampler.load_weights(flatten(work.model(), 0))
    return sampler


def run(device: str, *, small: bool, minutes: float, out: str | None = None) -> dict[str, Any]:
    """Do all of it, in order of what matters most. Returns what goes into OUT.json, where all that
    is known so far is written after each part."""
    began = time.monotonic()
    torch.set_num_threads(1)
    keep_memory()
    size = "1,64,2,512" if small else "d8"
    counts: dict[str, Any] = {}
    if small:
        counts = {"prompts": 2, "samples": 2, "max_new": 4, "rows": 2, "context": 16}
    checked = Work(size, **(counts or {"prompts": 4, "samples": 8, "max_new": 64}))
    measured = Work(size, **(counts or {"max_new": 256, "micro_prompts": 16, "context": 2048}))
    result: dict[str, Any] = {"hardware": hardware(device), "torch": torch.__version__}
    result |= {"checks": {}, "bench": [], "left_out": []}

    def in_time(name: str, work: Callable[[], Any]) -> Any:
        if time.monotonic() - began > 60 * minutes:
            result["left_out"].append(name)
            return None
        print(f"{time.monotonic() - began:6.1f} s  {name}", file=sys.stderr, flush=True)
        try:
            return work()
        except Exception as error:  # one part's fault must not take the others' figures along
            result["checks"][name] = {"holds": False, "error": f"{type(error).__name__}: {error}"}
            return None

    def write() -> None:
        result["seconds"] = round(time.monotonic() - began, 1)
        if out:
            Path(f"{out}.json").write_text(json.dumps(result, indent=1))
            Path(f"{out}.md").write_text(as_page(result))

    result["profile"] = []

    def hold(name: str, check: Check) -> None:
        if (seen := in_time(name, partial(check, checked, device))) is not None:
            result["checks"][name] = seen
        write()

    for name, check in CHECKS.items():
        hold(name, check)
    settings: dict[str, Any] = {"repeats": 3, "threads": 1, "device": device}
    for kind in ("step", *(kind for kind in PIECES if kind != "step")):
        lines = in_time(
            f"bench {kind}", partial(bench, kind, measured, engines=["torch"], **settings)
        )
        result["bench"] += lines or []
        write()
    result["profile"] = in_time("profile of a step", partial(profiled, measured, device)) or []
    write()
    if find_spec("vllm"):  # last: it takes hold of its process
        hold("vLLM near the learner", check_vllm)
        both = partial(bench, "rollouts", measured, engines=["torch", "vllm"], **settings)
        result["bench"] += in_time("bench rollouts vllm", both) or []
        write()
    return result


def as_page(result: dict[str, Any]) -> str:
    """Return OUT.md."""
    checks = [
        f"| {name} | {'holds' if seen['holds'] else '**does not hold**'} | "
        f"{', '.join(f'{key} {value}' for key, value in seen.items() if key != 'holds')} |"
        for name, seen in result["checks"].items()
    ]
    left_out = [f"Left out for want of time: {', '.join(result['left_out'])}."]
    return "\n".join(
        [
            f"# {result['hardware']}, torch {result['torch']}, {result['seconds']} s",
            "",
            "| check | | |",
            "|---|---|---|",
            *checks,
            "",
            *(f"- {as_text(line)}" for line in result["bench"]),
            "",
            "| operator of one RL step | ms |",
            "|---|---|",
            *(f"| {row['operator']} | {row['ms']} |" for row in result["profile"]),
            "",
            *(left_out if result["left_out"] else []),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a check does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a policy and a step of no size")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin nothing after so many")
    parser.add_argument("--out", default="gpu_check", help="where to write, without .json and .md")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch sees no CUDA device here, so there is nothing to check. "
            "`TRITON_INTERPRET=1 ... --device cpu --small` tries the script itself.",
            file=sys.stderr,
        )
        return 2
    result = run(args.device, small=args.small, minutes=args.minutes, out=args.out)
    print(as_page(result))
    return 0 if all(seen["holds"] for seen in result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
