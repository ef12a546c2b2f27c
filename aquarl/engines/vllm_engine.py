"""Prompts in, rollouts out, with vLLM: continuous batching over paged keys and values.

Worth it on GPUs (on CPUs `torch_engine` is the faster one). The engine runs inside this process:
no child processes, and weights are handed over as tensors. It starts without any weights; the
first `load_weights` brings them. vLLM sets up torch.distributed and takes hold of the threads of
its process, so a learner needs another one.

One request an answer, each with a seed of its own; prefix caching computes their prompt once, up
to its last whole block. vLLM is imported when a sampler is built, which takes some seconds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from aquarl.errors import ConfigError
from aquarl.model.flat_weights import load_flat
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.records import Prompt, Rollout, Sampling, Weights

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every worker would sit on the same cores
    "TORCHDYNAMO_DISABLE": "1",  # else the first answers wait for a C++ compiler
}
"""What vLLM reads once, when it is imported."""

CPU_BLOCK = 32
"""Positions in a block: the least its CPU attention takes. Only whole blocks are shared."""
CPU_CACHE_BYTES = 2 * 2**30
GPU_CACHE_SHARE = 0.5
"""At most, of the memory that is free when the engine starts, for keys and values."""
TOKENS_A_PASS = 8192
TEMPERATURES = (0.01, 2.0)
"""What vLLM samples at; it would move others into this range, or refuse them."""


class VllmSampler:
    """A `Sampler` (see `records`) that lets vLLM run the policy.

    Args:
        shape: Of the policy whose weights are going to be loaded.
        stop_id: The token that ends an answer; -1 for none, so that all are cut by length.
        device: "cpu" or "cuda".
        rows: Answers that are sampled at the same time; more of them wait for their turn.
        dtype: Of weights and activations, logits being fp32. None: fp32 on a CPU, else bf16.

    Raises:
        ConfigError: vLLM is not installed, or cannot run a model of this shape.
    """

    def __init__(
        self,
        shape: Shape,
        stop_id: int,
        device: str = "cpu",
        *,
        rows: int = 256,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.shape, self.stop_id, self.version = shape, stop_id, -1
        is_cpu = not device.startswith("cuda")
        dtype = dtype or (torch.float32 if is_cpu else torch.bfloat16)
        self._arrived = GPT(shape).to(dtype)
        """Where weights land and are checked before vLLM sees them."""
        self._llm = _start(shape, rows, is_cpu, dtype)

    def load_weights(self, weights: Weights) -> None:
        """See `Sampler.load_weights`. Forgets all prompts: their keys are of the old weights."""
        load_flat(self._arrived, weights)
        named = self._arrived.state_dict().items()
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named)})
        is_forgotten = self._llm.reset_prefix_cache()
        assert is_forgotten, "vLLM refuses this only while it is sampling"
        self.version = weights.version

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`.

        At temperature 0 the likeliest token is taken, `top_k` and `top_p` have no effect, and
        logprobs are those at temperature 1.

        Raises:
            ConfigError: A prompt is empty, too long, or not of this vocabulary, or vLLM does not
                sample at this temperature.
        """
        self._check([prompt.ids for prompt in prompts], sampling.max_new_tokens)
        check_temperature(sampling.temperature)
        stops = [] if self.stop_id < 0 else [self.stop_id]
        requests = [
            (
                prompt.ids,
                _params(
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_k=min(sampling.top_k, self.shape.vocab),
                    top_p=sampling.top_p,
                    seed=seed % 2**63,  # vLLM takes -1 for none at all
                    stop_token_ids=stops,
                    ignore_eos=True,  # transformers' default for the architecture: our token 1
                    logprobs=0,
                ),
            )
            for prompt, row in zip(prompts, seeds, strict=True)
            for seed in row
        ]
        answers = iter(self._generate(requests))
        return [[_rollout(next(answers)) for _ in row] for row in seeds]

    def letter_logprobs(
        self, prompts: Sequence[Sequence[int]], letter_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See `Sampler.letter_logprobs`."""
        self._check([*prompts, *letter_ids], 1)
        wanted = [
            _params(max_tokens=1, temperature=0.0, logprob_token_ids=list(ids))
            for ids in letter_ids
        ]
        answers = self._generate(list(zip(prompts, wanted, strict=True)))
        found = [dict(zip(a.logprobs.token_ids, a.logprobs.logprobs, strict=True)) for a in answers]
        return [[of[i] for i in ids] for of, ids in zip(found, letter_ids, strict=True)]

    def shutdown(self) -> None:
        """Give the memory and torch.distributed back. The sampler cannot be used afterwards."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()

    def _generate(self, requests: Sequence[tuple[Sequence[int], Any]]) -> list[Any]:
        """Return vLLM's one answer to each prompt with its parameters, in order."""
        prompts = [{"prompt_token_ids": list(ids)} for ids, _ in requests]
        params = [param for _, param in requests]
        return [done.outputs[0] for done in self._llm.generate(prompts, params, use_tqdm=False)]

    def _check(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Refuse what would end the engine: one wrong id is enough."""
        shape = self.shape
        if not all(rows):
            raise ConfigError("A prompt holds no token, so there is nothing to go on from.")
        low, high = min(map(min, rows)), max(map(max, rows))
        if low < 0 or high >= shape.vocab:
            raise ConfigError(
                f"A prompt holds the token {low if low < 0 else high}, but the model knows tokens "
                f"0 to {shape.vocab - 1}. Use the tokenizer that the model was trained with."
            )
        longest, room = max(map(len, rows)), _positions(shape)
        if longest + max_new_tokens > room:
            raise ConfigError(
                f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than the "
                f"{room} positions of a model with model.context={shape.context}. "
                "Lower max_new_tokens of rl or evaluate, or leave such problems out."
            )


def _start(shape: Shape, rows: int, is_cpu: bool, dtype: torch.dtype) -> Any:
    """Return vLLM's `LLM` for a policy of this shape, with weights that mean nothing yet."""
    require_vllm()
    os.environ.update(ENVIRONMENT | (CPU_ENVIRONMENT if is_cpu else {}))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, ModelRegistry

    from aquarl.engines.vllm_nanochat import ARCHITECTURE, NanochatForVllm

    _check_machine(shape, is_cpu)
    # The class itself: by its name, vLLM would start a process only to look at it.
    ModelRegistry.register_model(ARCHITECTURE, NanochatForVllm)
    positions = _positions(shape)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "nanochat",
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": positions,
        "head_dtype": "float32",
    }
    on_cpu = {
        "block_size": CPU_BLOCK,
        "enforce_eager": True,
        "enable_chunked_prefill": False,  # with seeds, a chunk ends in an error
    }
    # What must be free to start; the cache's size is its own.
    on_gpu = {"gpu_memory_utilization": 0.01}
    if is_cpu:
        _let_numba_be_searched()
    with TemporaryDirectory() as folder, _own_preload():
        Path(folder, "config.json").write_text(json.dumps(config))
        return LLM(
            folder,
            load_format="dummy",
            dtype=dtype,
            skip_tokenizer_init=True,
            generation_config="vllm",
            max_model_len=positions,
            max_num_seqs=rows,
            max_num_batched_tokens=max(TOKENS_A_PASS, positions),
            enable_prefix_caching=True,
            kv_cache_memory_bytes=_cache_bytes(shape, rows, is_cpu, dtype),
            logprobs_mode="processed_logprobs",  # of the distribution after temperature and top-k
            **(on_cpu if is_cpu else on_gpu),
        )


@contextmanager
def _own_preload() -> Iterator[None]:
    """Take back the LD_PRELOAD that vLLM sets for its children: ours would have it too."""
    before = os.environ.get("LD_PRELOAD", "")
    try:
        yield
    finally:
        os.environ["LD_PRELOAD"] = before


def _let_numba_be_searched() -> None:
    """vLLM's CPU build looks into everything that any module holds, for kernels to replace. The
    library under Numba, which our loops have loaded, answers to every name with a function of C's,
    to `__dict__` too, and vLLM trips over it."""
    if (ffi := sys.modules.get("llvmlite.binding.ffi")) is not None:
        ffi.lib._fntab["__dict__"] = {}


def require_vllm() -> None:
    """Raise ConfigError, saying what to type, if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM was asked for, but it is not installed here, so it cannot sample. "
            "On a GPU machine type .venv/bin/pip install -e '.[vllm]'; without a GPU type "
            "make setup-vllm, and then .venv-vllm/bin/aquarl in place of aquarl. "
            "Or stay with rl.engine=torch, which needs neither."
        )


def check_temperature(temperature: float) -> None:
    """Raise ConfigError if vLLM does not sample at this temperature."""
    low, high = TEMPERATURES
    if temperature and not low <= temperature <= high:
        raise ConfigError(
            f"The temperature is {temperature:g}, but vLLM samples from {low:g} to {high:g}, or at "
            "0 for the likeliest token. Choose one of these, or set rl.engine=torch."
        )


def _check_machine(shape: Shape, is_cpu: bool) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if current_platform.is_cpu() != is_cpu:
        built, wish = ("GPUs", "no GPU") if is_cpu else ("CPUs", "a GPU")
        raise ConfigError(
            f"The vLLM that is installed here was built for {built}, but a rollout worker is to "
            f"have {wish}. Set cluster.rollout_gpus={int(is_cpu)}, or rl.engine=torch."
        )
    widths = CPUAttentionBackend.get_supported_head_sizes()
    if is_cpu and shape.head_width not in widths:
        raise ConfigError(
            f"The model's heads are of width {shape.head_width}, but vLLM's attention on CPUs has "
            f"only {', '.join(map(str, widths))}. Set rl.engine=torch, or train a model with "
            "another model.heads."
        )


def _positions(shape: Shape) -> int:
    """Return how long prompt and answer may be together: as long as for `model.gpt`'s tables."""
    return 10 * shape.context


def _cache_bytes(shape: Shape, rows: int, is_cpu: bool, dtype: torch.dtype) -> int:
    """Return memory for keys and values: one longest row, and a training row for each answer.

    With less, answers wait or are begun anew, which costs time and changes no answer. On a CPU
    memory is taken only when it is first written to.
    """
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_width * dtype.itemsize
    wanted = token_bytes * (_positions(shape) + rows * shape.context)
    if is_cpu:
        return min(wanted, CPU_CACHE_BYTES)
    free, _ = torch.cuda.mem_get_info()
    return min(wanted, int(GPU_CACHE_SHARE * free))


def _params(**what: Any) -> Any:
    """Return vLLM's `SamplingParams`: ids and their logprobs, once, when the answer is whole."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    whole = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**what, detokenize=False, flat_logprobs=True, output_kind=whole)


def _rollout(answer: Any) -> Rollout:
    """Return vLLM's `CompletionOutput` as a rollout."""
    ids, logprobs = tuple(answer.token_ids), tuple(answer.logprobs.logprobs)
    assert tuple(answer.logprobs.token_ids) == ids, "one logprob a token, its own"
    return Rollout(ids, logprobs, stopped=answer.finish_reason == "stop")
