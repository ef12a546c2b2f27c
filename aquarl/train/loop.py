"""The one supervised loop: rows in, a trained policy and its checkpoints out.

`base.py`, `mid.py` and `sft.py` say what the rows are; `cluster/stages.py` runs this on
any number of Ray Train workers. A step is the same step however many share it: each rank takes its
slice of the rows, and the loss is divided by the trained tokens of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aquarl.config import SupervisedConfig
from aquarl.data.batches import IGNORED, Rows, RowSource
from aquarl.data.tokenizer import Tokenizer
from aquarl.model.attention import WithinDocuments, causal
from aquarl.model.gpt import GPT
from aquarl.model.head import token_logprobs
from aquarl.model.modes import accumulating, autocast
from aquarl.model.optim import Optimizer, clip_gradients, finite, lr_at
from aquarl.observe.machine import peak_flops
from aquarl.records import Metrics

Parallel = Callable[[nn.Module], nn.Module]
"""How a module is shared among workers: DDP, or nothing."""


class NextTokenLoss(nn.Module):
    """Rows in, the summed negative log-likelihood (nats) of their trained tokens out.

    The head runs only on positions that are trained.
    """

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Rows) -> Tensor:
        return self.nll_N(rows).sum()

    def nll_N(self, rows: Rows) -> Tensor:
        """(N,) fp32: one number a trained token, in row order."""
        attend = causal if rows.documents_BT is None else WithinDocuments(rows.documents_BT)
        hidden_BTD = self.model(rows.ids_BT, attend)
        is_trained_BT = rows.targets_BT != IGNORED
        logprobs_N, _ = token_logprobs(
            self.model, hidden_BTD[is_trained_BT], rows.targets_BT[is_trained_BT]
        )
        return -logprobs_N


@dataclass
class SupervisedTrainer:
    """Everything a supervised stage carries from step to step. `step` is all its position."""

    model: GPT
    config: SupervisedConfig
    train: RowSource
    validation: RowSource
    tokenizer: Tokenizer
    parallel: Parallel = lambda module: module
    rank: int = 0
    world: int = 1
    step: int = 0

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.loss = NextTokenLoss(self.model)
        self.shared_loss = self.parallel(self.loss)
        self.optimizer = Optimizer(self.model, self.config)
        self.bytes_V = torch.tensor(self.tokenizer.bytes_per_token, device=self.device)
        counts = self.model.count()
        self.flops_per_token = counts["flops_per_token"]
        """Of a position whose next token is trained."""
        self.head_flops_per_token = counts["head_flops_per_token"]
        """Of these, what others are spared."""
        self.peak_flops = peak_flops(self.device)

    @property
    def rows_in_step(self) -> int:
        return max(self.world, self.config.rows_in_step(self.train.context))

    def update(self) -> Metrics:
        """Do one optimizer step. Returns what to plot about it."""
        started = time.perf_counter()
        pieces = list(self._my_rows())
        trained_here = sum(piece.trained_tokens for piece in pieces)
        tokens_in_step = max(1, self._sum_over_ranks(trained_here))  # by chance there may be none
        loss: float | Tensor = 0.0
        for i, piece in enumerate(pieces):
            is_last = i == len(pieces) - 1
            with accumulating(self.shared_loss, sync=is_last), autocast(self.device):
                # DDP averages over ranks; the count is the whole step's: multiply it back.
                part = self.shared_loss(piece.to(self.device)) * (self.world / tokens_in_step)
            part.backward()
            loss = loss + part.detach().double() / self.world  # a number would be waited for
        grad_norm = clip_gradients(self.model, self.config.clip_norm)
        lr = lr_at(self.step, self.config.steps, self.config)
        self.optimizer.step(lr, self.step)
        self.step += 1
        metrics = {
            "loss/train": self._sum_over_ranks(float(loss)),
            "learner/grad_norm": finite(grad_norm, self.step),
        }
        seconds = time.perf_counter() - started  # now that a GPU is done with all of it
        positions = self.rows_in_step * self.train.context
        metrics |= {
            "learner/lr": lr,
            "tokens/trained": tokens_in_step,
            "throughput/tokens_per_s": positions / seconds,
            "time/step_s": seconds,
        }
        if self.peak_flops:  # model FLOPs utilisation, arXiv:2204.02311 appendix B
            spared = self.head_flops_per_token * (positions - tokens_in_step)
            flops = self.flops_per_token * positions - spared
            metrics["throughput/mfu"] = flops / (seconds * self.peak_flops * self.world)
        return metrics

    @torch.no_grad()
    def validate(self) -> Metrics:
        """Return loss (nats a token) and bits per byte of text on the validation rows.

        Bits per byte counts only tokens that stand for bytes, so it can be compared between
        vocabularies; special tokens have none.
        """
        rows_each = max(1, self.config.eval_rows // self.world)
        first = self.rank * rows_each
        nats = tokens = byte_nats = text_bytes = 0.0
        for start in range(first, first + rows_each, self.config.micro_rows):
            count = min(self.config.micro_rows, first + rows_each - start)
            rows = self.validation.rows(start, count).to(self.device)
            with autocast(self.device):
                nll_N = self.loss.nll_N(rows)
            bytes_N = self.bytes_V[rows.targets_BT[rows.targets_BT != IGNORED]]
            nats += float(nll_N.sum())
            tokens += nll_N.numel()
            byte_nats += float(nll_N[bytes_N > 0].sum())
            text_bytes += float(bytes_N.sum())
        nats, tokens, byte_nats, text_bytes = map(
            self._sum_over_ranks, (nats, tokens, byte_nats, text_bytes)
        )
        return {
            "loss/validation": nats / max(tokens, 1),
            "loss/bits_per_byte": byte_nats / max(text_bytes, 1) / log(2),
        }

    def state(self) -> dict[str, Any]:
        """Return what an exact resume needs beside the weights."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])

    def _my_rows(self) -> Iterator[Rows]:
        """Yield this rank's microbatches of the step."""
        first, rows = self.step * self.rows_in_step, self.rows_in_step
        start = first + self.rank * rows // self.world
        end = first + (self.rank + 1) * rows // self.world
        assert start < end, "a rank without rows would not join in exchanging gradients"
        for at in range(start, end, self.config.micro_rows):
            yield self.train.rows(at, min(self.config.micro_rows, end - at))

    def _sum_over_ranks(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)


def train_stage(
    trainer: SupervisedTrainer,
    *,
    log: Callable[[int, Metrics], None],
    save: Callable[[SupervisedTrainer], None],
) -> None:
    """Train until `config.steps`. Starts at `trainer.step`, so it also resumes."""
    config = trainer.config
    while trainer.step < config.steps:
        if trainer.step % config.eval_every == 0:
            log(trainer.step, trainer.validate())
        log(trainer.step, trainer.update())
        if trainer.step % config.save_every == 0 or trainer.step == config.steps:
            save(trainer)
    log(trainer.step, trainer.validate())
