"""Prompts in, rollouts out, with plain torch on any device: the engine that runs everywhere.

All prompts of a call are one batch. Each is computed once and its keys and values are shared by
its G answers; the answers' cache is allocated once; finished rows are dropped from the batch.
Every row has a generator of its own, so what is drawn does not depend on its neighbours.

Draws by inverting the distribution function: one uniform number a token.

Weights may change inside a generation: `newer_weights` is asked before every token. The keys and
values that older ones made are kept (arXiv:2509.19128, "in-flight weight updates"); each token is
drawn from what the mixture gives, and its log-probability and weights version say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aquarl.errors import ConfigError
from aquarl.model.attention import Continuation, Prefix
from aquarl.model.flat_weights import load_flat
from aquarl.model.gpt import GPT
from aquarl.records import Prompt, Rollout, Sampling, Weights

COMPACT_BELOW = 0.8
"""Rows are copied together once this share of them, or less, is still needed."""


class TorchSampler:
    """A `Sampler` (see `records`) that runs `GPT` itself.

    Args:
        model: Taken over: moved to the device and, on a GPU, to bf16.
        stop_id: The token that ends an answer.
    """

    def __init__(self, model: GPT, stop_id: int, device: str = "cpu") -> None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = model.to(device, dtype).eval().requires_grad_(False)
        self.stop_id, self.device, self.version = stop_id, torch.device(device), -1
        self.newer_weights: Callable[[], Weights | None] = lambda: None

    def load_weights(self, weights: Weights) -> None:
        load_flat(self.model, weights)
        self.version = weights.version

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Rollout]]:
        """See `Sampler.sample`. Raises: ConfigError, when a prompt is too long for the model."""
        P, G, T = len(prompts), len(seeds[0]), sampling.max_new_tokens
        self._check_room(prompts, T)
        prefix, last_hidden_PD = self._prefill([prompt.ids for prompt in prompts])
        batch = _Batch(P, G, T, self.device)
        uniforms_BT = _uniforms(seeds, T).to(self.device)
        answers = Continuation(prefix, G, room=T)
        logits_BV = self.model.logits(last_hidden_PD).repeat_interleave(G, dim=0)

        for t in range(T):
            ids_B, logprobs_B = draw(logits_BV, uniforms_BT[batch.rows_B, t], sampling)
            batch.record(t, ids_B, logprobs_B, ids_B == self.stop_id, self.version)
            if t == T - 1 or batch.is_done:
                break
            if (kept_B := batch.compact(answers)) is not None:
                ids_B = ids_B[kept_B]
            if (weights := self.newer_weights()) is not None:
                self.load_weights(weights)
            hidden_B1D = self.model(ids_B[:, None], answers, answers.positions_BT(1))
            answers.advance(1)
            logits_BV = self.model.logits(hidden_B1D[:, 0])
        return batch.rollouts()

    @torch.inference_mode()
    def letter_logprobs(
        self, prompts: Sequence[Sequence[int]], letter_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """See `Sampler.letter_logprobs`."""
        _, last_hidden_PD = self._prefill(prompts)
        logprobs_PV = self.model.logits(last_hidden_PD).log_softmax(dim=-1)
        return [logprobs_PV[p, list(ids)].tolist() for p, ids in enumerate(letter_ids)]

    def _prefill(self, rows: Sequence[Sequence[int]]) -> tuple[Prefix, Tensor]:
        """Return the computed prompts and the hidden state (P, D) after each one's last token."""
        ids_PT, lengths_P = pad(rows, self.device)
        prefix = Prefix(lengths_P)
        hidden_PTD = self.model(ids_PT, prefix)
        return prefix, hidden_PTD[torch.arange(len(rows), device=self.device), lengths_P - 1]

    def _check_room(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        longest, room = max(len(p.ids) for p in prompts), self.model.cos.shape[0]
        if longest + max_new_tokens > room:
            raise ConfigError(
                f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than the "
                f"{room} positions of a model with model.context={self.model.shape.context}. "
                "Lower max_new_tokens, or leave such problems out."
            )


class _Batch:
    """Which rows are still being sampled, and what all rows have drawn so far."""

    def __init__(self, P: int, G: int, T: int, device: torch.device) -> None:
        self.G = G
        self.rows_B = torch.arange(P * G, device=device)
        """For each row of the running batch, its place p * G + g in the whole."""
        self.is_open_PG = torch.ones(P, G, dtype=torch.bool, device=device)
        """Over the running batch: row not finished yet."""
        self.ids_BT = torch.zeros(P * G, T, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros(P * G, T, device=device)
        self.lengths_B = torch.full((P * G,), T, device=device)
        self.is_stopped_B = torch.zeros(P * G, dtype=torch.bool, device=device)
        self.versions_T: list[int] = []
        """All rows draw their token t from the same weights."""

    def record(
        self, t: int, ids_B: Tensor, logprobs_B: Tensor, is_stop_B: Tensor, version: int
    ) -> None:
        self.versions_T.append(version)
        self.ids_BT[self.rows_B, t] = ids_B
        self.logprobs_BT[self.rows_B, t] = logprobs_B
        is_open_B = self.is_open_PG.view(-1)
        ended = self.rows_B[is_open_B & is_stop_B]
        self.lengths_B[ended] = t + 1
        self.is_stopped_B[ended] = True
        self.is_open_PG &= ~is_stop_B.view(self.is_open_PG.shape)

    @property
    def is_done(self) -> bool:
        return not bool(self.is_open_PG.any())

    def compact(self, answers: Continuation) -> Tensor | None:
        """Drop prompts that are finished and the places no prompt needs any more.

        Every prompt keeps as many rows as the one with the most open rows, so the batch stays
        (P, G). Returns which rows of the old batch are left, or None where none were dropped.
        """
        open_per_prompt_P = self.is_open_PG.sum(dim=1)
        prompts = open_per_prompt_P.nonzero()[:, 0]
        G = int(open_per_prompt_P.max())
        old_P, old_G = self.is_open_PG.shape
        if len(prompts) * G > COMPACT_BELOW * old_P * old_G:
            return None
        order_PG = (~self.is_open_PG[prompts]).to(torch.int8).argsort(dim=1, stable=True)[:, :G]
        kept_B = (prompts[:, None] * old_G + order_PG).reshape(-1)
        answers.keep(prompts, kept_B, G)
        self.rows_B = self.rows_B[kept_B]
        self.is_open_PG = self.is_open_PG.view(-1)[kept_B].view(-1, G)
        return kept_B

    def rollouts(self) -> list[list[Rollout]]:
        lengths, stopped = self.lengths_B.tolist(), self.is_stopped_B.tolist()
        ids, logprobs = self.ids_BT.tolist(), self.logprobs_BT.tolist()
        flat = [
            Rollout(tuple(i[:n]), tuple(p[:n]), was_stopped, self._versions(n))
            for i, p, n, was_stopped in zip(ids, logprobs, lengths, stopped, strict=True)
        ]
        return [flat[start : start + self.G] for start in range(0, len(flat), self.G)]

    def _versions(self, n: int) -> tuple[int, ...]:
        """Return the versions of an answer's n tokens, or nothing where they are all the same."""
        versions = tuple(self.versions_T[:n])
        return versions if versions[0] != versions[-1] else ()


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return one id a row and its log-probability in the distribution it was drawn from.

    Args:
        logits_BV: (B, V) fp32.
        uniforms_B: (B,) in [0, 1).
        sampling: Temperature 0 takes the likeliest token and gives its logprob at temperature 1.
    """
    if sampling.temperature > 0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        kth_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    logprobs_BV = logits_BV.log_softmax(dim=-1)
    if sampling.temperature > 0:
        cumulative_BV = logprobs_BV.exp().cumsum(dim=-1)
        thresholds_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
        # right=True: never a token of probability 0, whose step in the sum is flat.
        ids_B1 = torch.searchsorted(cumulative_BV, thresholds_B1, right=True)
        ids_B1 = ids_B1.clamp(max=logits_BV.shape[1] - 1)
    else:
        ids_B1 = logprobs_BV.argmax(dim=-1, keepdim=True)
    return ids_B1[:, 0], logprobs_BV.gather(1, ids_B1)[:, 0]


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
