"""Prompts in, rollouts out, with plain torch on any device: the engine that runs everywhere.

All prompts of a call are one batch. Each is computed once and its keys and values are shared by
its G answers; `decoder.py` does the rest of the model's work, `drawing.py` draws. Finished rows are
dropped from the batch. Every row has a generator of its own, so what is drawn does not depend on
its neighbours. On a GPU the same is recorded once and replayed (`graphs.py`).

Weights may change inside a generation: `newer_weights` is asked before every token. The keys and
values that older ones made are kept (arXiv:2509.19128, "in-flight weight updates"); each token is
drawn from what the mixture gives, and its log-probability and weights version say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aquarl.engines.decoder import Answers, Decoder, begin
from aquarl.errors import ConfigError
from aquarl.model.attention import Prefix
from aquarl.model.drawing import draw
from aquarl.model.flat_weights import load_flat
from aquarl.model.gpt import GPT
from aquarl.model.modes import has_triton
from aquarl.records import Prompt, Rollout, Sampling, Weights

if TYPE_CHECKING:  # what they are made of, Triton, comes with torch for GPUs alone
    from aquarl.engines.graphs import Form, StaticBatch

LOOK_EVERY = 8
"""Tokens between two looks at which rows are finished. On a GPU each look is a wait, except"""
FETCH_EVERY = 4
"""where tensors keep their shapes: then these so many are looked at while the next are drawn."""

COMPACT_BELOW = 0.8
"""Rows are copied together once this share of them, or less, is still needed."""

FORMS_KEPT = 3
"""Of static batches: training, an evaluation, and its last prompts, which are fewer."""

PROMPTS_TOGETHER = {"cpu": 4, "cuda": 1 << 20}
"""Prompts of like length that are padded to one length: few on a CPU, which computes padding."""


class TorchSampler:
    """A `Sampler` (see `records`) that runs `GPT` itself.

    Args:
        model: Taken over: moved to the device and into the precision.
        stop_id: The token that ends an answer.
        dtype: bf16 on a GPU and fp32 elsewhere, unless it is said.
        is_static: Tensors keep their shapes, which on a GPU are recorded as CUDA graphs
            (`graphs.py`); so on a GPU, if Triton is there, and not elsewhere, unless it is said.
    """

    def __init__(
        self,
        model: GPT,
        stop_id: int,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        is_static: bool | None = None,
    ) -> None:
        is_gpu = device.startswith("cuda")
        dtype = dtype or (torch.bfloat16 if is_gpu else torch.float32)
        self._is_static = is_gpu and has_triton() if is_static is None else is_static
        self._static: dict[Form, StaticBatch] = {}
        self.model = model.to(device).in_precision(dtype).eval().requires_grad_(False)
        self.decoder = Decoder(self.model)
        self.stop_id, self.device, self.version = stop_id, torch.device(device), -1
        self.newer_weights: Callable[[], Weights | None] = lambda: None

    def load_weights(self, weights: Weights) -> None:
        load_flat(self.model, weights)
        self.decoder.refresh()
        self.version = weights.version

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`. Raises: ConfigError, when a prompt is too long for the model."""
        P, G = len(prompts), len(seeds[0])
        self._check_room(prompts, sampling.max_new_tokens)
        by_length = sorted(range(P), key=lambda p: len(prompts[p].ids))
        rows = [prompts[p].ids for p in by_length]
        sample = self._sample_static if self._is_static else self._sample
        drawn_B = sample(rows, [seeds[p] for p in by_length], sampling)
        rollouts_of = {p: drawn_B[n * G : (n + 1) * G] for n, p in enumerate(by_length)}
        return [rollouts_of[p] for p in range(P)]

    def _sample(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Rollout]:
        P, G, T = len(rows), len(seeds[0]), sampling.max_new_tokens
        prefixes, last_hidden_PD = self._prefill(rows)
        uniforms_TB = _uniforms(seeds, T).T.to(self.device)
        answers = begin(self.decoder, prefixes, G, room=T)
        batch = _Batch(P, G, T, self.stop_id, self.device)
        raw_BV = self.decoder.raw(last_hidden_PD).repeat_interleave(G, dim=0)
        for t, uniforms_B in enumerate(uniforms_TB):
            ids_B, logprobs_B = draw(raw_BV, uniforms_B[batch.rows_B], sampling)
            batch.record(ids_B, logprobs_B, self.version)
            is_time = t % LOOK_EVERY == 0
            if t == T - 1 or (is_time and batch.is_done):
                break
            if is_time and (kept_B := batch.compact(answers)) is not None:
                ids_B = ids_B[kept_B]
            if (weights := self.newer_weights()) is not None:
                self.load_weights(weights)
            raw_BV = self.decoder.raw(answers.step(ids_B))
        return batch.rollouts()

    def _sample_static(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Rollout]:
        """As `_sample`, with finished rows going on unheard until all are."""
        from aquarl.engines.graphs import Form

        P, G, T = len(rows), len(seeds[0]), sampling.max_new_tokens
        static = self._static_for(Form.holding(P, G, sampling), max(map(len, rows)))
        static.begin(rows)
        static.uniforms_TB[:, : P * G] = _uniforms(seeds, T).T.to(self.device)
        drawn = _Drawn(P * G, self.stop_id)
        for t in range(T):
            drawn.versions_T.append(self.version)
            if (weights := self.newer_weights()) is not None:
                self.load_weights(weights)  # `token` draws from what the old ones computed
            static.token()
            if (t + 1) % FETCH_EVERY == 0:
                drawn.fetch(static.ids_TB, static.logprobs_TB)
                if drawn.is_done:
                    break
        drawn.fetch(static.ids_TB, static.logprobs_TB)
        return drawn.rollouts()

    def _static_for(self, form: Form, longest: int) -> StaticBatch:
        """Return the batch of a form with room for such a prompt, made anew where there is none."""
        from aquarl.engines.graphs import StaticBatch

        static = self._static.pop(form, None)
        if static is None or static.length < longest:
            del static  # its room is the new one's
            while len(self._static) >= FORMS_KEPT:
                del self._static[next(iter(self._static))]  # the one that was used least lately
            static = StaticBatch(self.decoder, form, longest)
        self._static[form] = static
        return static

    @torch.inference_mode()
    def letter_logprobs(
        self, prompts: Sequence[Sequence[int]], letter_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See `Sampler.letter_logprobs`."""
        _, last_hidden_PD = self._prefill(prompts)
        logprobs_PV = self.model.logits(last_hidden_PD).log_softmax(dim=-1)
        return [logprobs_PV[p, list(ids)].tolist() for p, ids in enumerate(letter_ids)]

    def _prefill(self, rows: Sequence[Sequence[int]]) -> tuple[list[Prefix], Tensor]:
        """Return the computed prompts and the hidden state (P, D) after each one's last token."""
        prefixes, last_hidden = [], []
        together = PROMPTS_TOGETHER[self.device.type]
        for start in range(0, len(rows), together):
            ids_PT, lengths_P = pad(rows[start : start + together], self.device)
            prefixes.append(Prefix(lengths_P))
            hidden_PTD = self.model(ids_PT, prefixes[-1])
            last_hidden.append(hidden_PTD[torch.arange(len(ids_PT)), lengths_P - 1])
        return prefixes, torch.cat(last_hidden)

    def _check_room(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        longest, room = max(len(p.ids) for p in prompts), len(self.model.turns)
        if longest + max_new_tokens > room:
            raise ConfigError(
                f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than the "
                f"{room} positions of a model with model.context={self.model.shape.context}. "
                "Lower max_new_tokens of rl or evaluate, or leave such problems out."
            )


class _Batch:
    """Which rows are still being sampled, and what all rows have drawn so far."""

    def __init__(self, P: int, G: int, T: int, stop_id: int, device: torch.device) -> None:
        self.G, self.stop_id = G, stop_id
        self.shape = P, G
        """Of the running batch: prompts, and rows of each."""
        self.rows_B = torch.arange(P * G, device=device)
        """For each row of the running batch, its place p * G + g in the whole."""
        self.ids_TB = torch.full((T, P * G), stop_id, device=device)
        """What a row has drawn; after it was dropped, the stop token."""
        self.logprobs_TB = torch.zeros(T, P * G, device=device)
        self.versions_T: list[int] = []
        """See `_rollouts`."""

    def record(self, ids_B: Tensor, logprobs_B: Tensor, version: int) -> None:
        t = len(self.versions_T)
        self.versions_T.append(version)
        self.ids_TB[t].index_copy_(0, self.rows_B, ids_B)
        self.logprobs_TB[t].index_copy_(0, self.rows_B, logprobs_B)

    @property
    def is_open_PG(self) -> Tensor:
        """Over the running batch: row has not drawn the stop token yet."""
        drawn_TB = self.ids_TB[: len(self.versions_T), self.rows_B]
        return (drawn_TB != self.stop_id).all(dim=0).view(self.shape)

    @property
    def is_done(self) -> bool:
        return not bool(self.is_open_PG.any())

    def compact(self, answers: Answers) -> Tensor | None:
        """Drop prompts that are finished and the places no prompt needs any more.

        Every prompt keeps as many rows as the one with the most open rows, so the batch stays
        (P, G). Returns which rows of the old batch are left, or None where none were dropped.
        """
        is_open_PG = self.is_open_PG
        open_per_prompt_P = is_open_PG.sum(dim=1)
        prompts = open_per_prompt_P.nonzero()[:, 0]
        G = int(open_per_prompt_P.max())
        old_P, old_G = self.shape
        if len(prompts) * G > COMPACT_BELOW * old_P * old_G:
            return None
        kept_PG = (~is_open_PG[prompts]).to(torch.int8).argsort(dim=1, stable=True)[:, :G]
        answers.keep(prompts, kept_PG)
        kept_B = (prompts[:, None] * old_G + kept_PG).flatten()
        self.rows_B, self.shape = self.rows_B[kept_B], (len(prompts), G)
        return kept_B

    def rollouts(self) -> list[Rollout]:
        ids_BT, logprobs_BT = self.ids_TB.T.tolist(), self.logprobs_TB.T.tolist()
        return _rollouts(ids_BT, logprobs_BT, self.versions_T, self.stop_id)


class _Drawn:
    """What the rows of a static batch have drawn, fetched while a GPU draws what comes next."""

    def __init__(self, B: int, stop_id: int) -> None:
        self._stop_id = stop_id
        self._ids_BT: list[list[int]] = [[] for _ in range(B)]
        self._logprobs_BT: list[list[float]] = [[] for _ in range(B)]
        self._is_stopped_B = torch.zeros(B, dtype=torch.bool)
        self._coming: _Coming | None = None
        self._asked = 0
        """Tokens of each row that were read, or are coming."""
        self.versions_T: list[int] = []
        """See `_rollouts`."""

    def fetch(self, ids_TB: Tensor, logprobs_TB: Tensor) -> None:
        """Have the tokens sent that were drawn since, and read those that were sent before."""
        new = slice(self._asked, len(self.versions_T)), slice(len(self._ids_BT))
        coming = _Coming(ids_TB[new], logprobs_TB[new])
        self._asked = len(self.versions_T)
        self._read()
        self._coming = coming

    def _read(self) -> None:
        if self._coming is None:
            return
        ids_TB, logprobs_TB = self._coming.wait()
        self._is_stopped_B |= (ids_TB == self._stop_id).any(dim=0)
        for row, more in zip(self._ids_BT, ids_TB.T.tolist(), strict=True):
            row += more
        for chances, also in zip(self._logprobs_BT, logprobs_TB.T.tolist(), strict=True):
            chances += also

    @property
    def is_done(self) -> bool:
        """Whether all rows have drawn the stop token, of what was read."""
        return bool(self._is_stopped_B.all())

    def rollouts(self) -> list[Rollout]:
        self._read()
        return _rollouts(self._ids_BT, self._logprobs_BT, self.versions_T, self._stop_id)


class _Coming:
    """Tensors on their way from a device."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrival = torch.cuda.Event() if tensors[0].is_cuda else None
        if self._arrival:
            self._arrival.record()

    def wait(self) -> list[Tensor]:
        if self._arrival:
            self._arrival.synchronize()
        return self._tensors


def _rollouts(
    ids_BT: list[list[int]],
    logprobs_BT: list[list[float]],
    versions_T: Sequence[int],
    stop_id: int,
) -> list[Rollout]:
    """Cut each row after its stop token.

    Args:
        versions_T: All rows draw their token t from the same weights.
    """
    found = []
    for ids, logprobs in zip(ids_BT, logprobs_BT, strict=True):
        was_stopped = stop_id in ids
        n = ids.index(stop_id) + 1 if was_stopped else len(versions_T)
        versions = tuple(versions_T[:n]) if versions_T[0] != versions_T[n - 1] else ()
        found.append(Rollout(tuple(ids[:n]), tuple(logprobs[:n]), was_stopped, versions))
    return found


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ragged rows as (P, T) int64, padded with 0 on the right, and their lengths (P,)."""
    lengths_P = torch.tensor([len(row) for row in rows])
    ids_PT = torch.zeros(len(rows), int(lengths_P.max()), dtype=torch.long)
    for p, row in enumerate(rows):
        ids_PT[p, : len(row)] = torch.tensor(row)
    return ids_PT.to(device), lengths_P.to(device)


def _uniforms(seeds: Sequence[Sequence[int]], T: int) -> Tensor:
    """Return (B, T) uniform numbers; row b comes from seed b alone."""
    generator = torch.Generator()
    rows = [torch.rand(T, generator=generator.manual_seed(seed)) for row in seeds for seed in row]
    return torch.stack(rows)
