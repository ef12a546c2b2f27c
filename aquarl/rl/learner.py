"""Rollout groups in, a better policy out: one optimizer step at a time.

Each prompt is computed once, forward and backward, and shared by its G answers; the head runs
only on positions whose next token was sampled. Temperature and soft-cap are the sampler's, so
both mean the same distribution. Groups whose rewards are all equal have no gradient: they are
scored for the record, and not gone back through.

Shapes: P prompts, G rollouts per prompt, B = P * G rows, T positions, N tokens in all, M of
them sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aquarl.config import RLConfig
from aquarl.model.flat_weights import flatten
from aquarl.model.gpt import GPT
from aquarl.model.head import token_logprobs
from aquarl.model.modes import accumulating, autocast, sent
from aquarl.model.optim import Optimizer, clip_gradients, finite, lr_at
from aquarl.model.packed import Packed
from aquarl.records import Metrics, PackedGroups, TrainBatch, Weights
from aquarl.rl.batch import microbatches
from aquarl.rl.losses import effective_fraction, kl_penalty, policy_loss

Sums = dict[str, float | Tensor]


class Scorer(nn.Module):
    """A batch in, its sampled tokens' log-probabilities (B, T) and the mean entropy out."""

    def __init__(self, model: GPT, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """Return logprobs_BT in nats, 0 where nothing was sampled, and the entropy summed over
        the sampled tokens (nats, no gradient)."""
        packed = Packed(batch.lengths, batch.ids_N.device, self.model.shape.head_width)
        ids_N, positions_N, before_M = batch.ids_N, batch.positions_N, batch.before_M
        if (order_N := packed.order_N()) is not None:
            ids_N, positions_N = ids_N[order_N], positions_N[order_N]
            before_M = order_N.argsort()[before_M]
        hidden_1ND = self.model(ids_N[None], packed, positions_N[None])
        logprobs_M, entropy_M = token_logprobs(
            self.model, hidden_1ND[0, before_M], batch.sampled_ids_M, self.temperature
        )
        logprobs_BT = torch.zeros_like(batch.behaviour_logprobs_BT)
        return logprobs_BT.masked_scatter(batch.is_sampled_BT, logprobs_M), entropy_M.sum()


class Learner:
    """The policy being trained on one rank, with its optimizer. `step` is also its version."""

    def __init__(
        self,
        model: GPT,
        config: RLConfig,
        *,
        reference: GPT | None = None,
        parallel: Any = lambda module: module,
        total: Callable[[Metrics], Metrics] = dict,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """
        Args:
            model: The policy, on its device.
            reference: Frozen policy for the KL term; needed where `config.kl_weight` > 0.
            parallel: How the scorer is shared among ranks: DDP, or nothing.
            total: Adds numbers up over all ranks.
        """
        assert reference is not None or not config.kl_weight
        self.model, self.config, self.rank, self.world = model, config, rank, world
        self.device = next(model.parameters()).device
        self.alone = Scorer(model, config.temperature)
        self.scorer, self._total = parallel(self.alone), total
        self.reference = Scorer(reference, config.temperature) if reference else None
        self.optimizer = Optimizer(model, config)
        self.step = 0

    def update(
        self,
        groups: PackedGroups | None,
        tokens_in_step: int,
        rollouts_in_step: int,
        is_padding: bool = False,
    ) -> Metrics:
        """Do one optimizer step on this rank's groups. Returns means over the step's tokens.

        Args:
            groups: Those of this rank; none where the whole step was set aside, which passes
                without an update.
            tokens_in_step, rollouts_in_step: Counts over all ranks.
            is_padding: Take part in the step without a share in its gradient and its sums.
        """
        if groups is None:
            self.step += 1
            return {}
        started = time.perf_counter()
        sums: Sums = {}
        share = 0.0 if is_padding else 1.0
        steep, flat = self._by_gradient(groups)
        size = self.config.micro_prompts
        last = (len(steep) - 1) // size
        for i, batch in enumerate(microbatches(steep, size, tokens_in_step, rollouts_in_step)):
            with accumulating(self.scorer, sync=i == last):
                self._backward(on_device(batch, self.device), sums, share)
        with torch.no_grad():
            for batch in microbatches(flat, size, tokens_in_step, rollouts_in_step):
                self._loss(self.alone, on_device(batch, self.device), sums)
        grad_norm = clip_gradients(self.model, self.config.clip_norm)
        lr = lr_at(self.step, self.config.steps, self.config)
        self.optimizer.step(lr, self.step)
        self.step += 1
        metrics = self._total({name: share * float(value) for name, value in sums.items()})
        metrics["policy/effective_fraction"] = effective_fraction(
            metrics["policy/ratio_mean"], metrics.pop("policy/ratio_square")
        )
        return metrics | {
            "learner/grad_norm": finite(grad_norm, self.step),
            "learner/lr": lr,
            "time/learn_s": time.perf_counter() - started,
        }

    def weights(self) -> Weights:
        """Return the policy as one buffer, versioned by the step: from a GPU in bf16, in which
        samplers on GPUs compute. Those on CPUs, of a mixed pool, sample from the same numbers."""
        is_gpu = self.device.type == "cuda"
        return flatten(self.model, self.step, torch.bfloat16 if is_gpu else torch.float32)

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _by_gradient(self, groups: PackedGroups) -> tuple[PackedGroups, PackedGroups]:
        """Part those that teach from those whose gradient is 0, which are only looked at."""
        is_steep_P = np.abs(groups.answers_PG["advantage"]).max(axis=1) > 0
        if self.config.kl_weight:
            is_steep_P[:] = True
        if not is_steep_P.any():  # one is taken for all: every rank has to exchange gradients
            is_steep_P[0] = True
        steep, flat = (np.flatnonzero(is_P).tolist() for is_P in (is_steep_P, ~is_steep_P))
        return groups.only(steep), groups.only(flat)

    def _backward(self, batch: TrainBatch, sums: Sums, share: float = 1.0) -> None:
        # DDP averages over ranks, but the counts are the whole step's: multiply it back.
        (self._loss(self.scorer, batch, sums) * (self.world * share)).backward()

    def _loss(self, scorer: nn.Module, batch: TrainBatch, sums: Sums) -> Tensor:
        """Return a microbatch's share of the step's loss, and add what to plot to the sums."""
        with autocast(self.device):
            logprobs_BT, entropy = scorer(batch)
        loss, plots = policy_loss(logprobs_BT, batch, self.config)
        plots = plots | {"policy/entropy": entropy / batch.tokens_in_step}
        if self.reference and self.config.kl_weight:
            with torch.no_grad(), autocast(self.device):
                reference_logprobs_BT, _ = self.reference(batch)
            penalty = kl_penalty(logprobs_BT, reference_logprobs_BT, batch)
            loss = loss + self.config.kl_weight * penalty
            plots["policy/kl_from_sft"] = penalty.detach()
        plots["loss/policy"] = loss.detach()
        for name, value in plots.items():  # as tensors: a number would have to be waited for
            sums[name] = sums.get(name, 0.0) + value.double()
        return loss


def on_device(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """Return the batch with all its tensors there; a GPU fetches them while this goes on."""
    tensors: dict[str, Any] = {
        name: sent(value, device)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    return replace(batch, **tensors)
