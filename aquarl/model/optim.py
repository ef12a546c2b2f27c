"""Gradients in, updated weights out: Muon for the blocks' matrices, AdamW for the two embeddings.

Groups and learning-rate scaling are nanochat's (October 2025): AdamW rates scale with
(width / 768)^-1/2, a Muon update with max(1, rows / columns)^1/2.

Source: Muon, kellerjordan.github.io/posts/muon; nanochat/gpt.py `setup_optimizers`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from aquarl.config import OptimConfig
from aquarl.errors import DivergedError
from aquarl.model.gpt import GPT

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MOMENTUM_WARMUP_STEPS = 300


class _Plain(torch.optim.Optimizer):
    """An optimizer that `torch.compile` is never to look into. Torch's own import the compiler, a
    second or two, only to tell it so."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(_Plain, torch.optim.AdamW):
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class Muon(_Plain):
    """`torch.optim.Muon`, with all matrices of one shape in one batch.

    Its Newton-Schulz iterates in bf16 on GPUs, as torch's, and in fp32 on CPUs, which mostly have
    to emulate bf16: at depth 2 torch's took 100-180 ms a step there, more than half of forward and
    backward together. On an H200 at depth 8 torch's 1,300 small kernels took 26 ms, a fifth of what
    the learner's step takes now.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch allows one
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                if updates.is_cuda:
                    updates = updates.bfloat16()
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(updates), strict=True):
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return (n, rows, columns) with all singular values moved near 1.

    Quintic Newton-Schulz iteration with Keller Jordan's coefficients.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Optimizer:
    """Muon and AdamW behind one step, with the learning rate as a fraction of its peak."""

    def __init__(self, model: GPT, config: OptimConfig) -> None:
        width_scale = (model.shape.width / 768) ** -0.5
        matrices = list(model.transformer.h.parameters())
        adamw_groups: list[dict[str, Any]] = [
            {
                "params": list(model.lm_head.parameters()),
                "lr": config.unembedding_lr * width_scale,
                "weight_decay": config.weight_decay,
            },
            {
                "params": list(model.transformer.wte.parameters()),
                "lr": config.embedding_lr * width_scale,
                "weight_decay": config.weight_decay,
            },
        ]
        self.muon: torch.optim.Optimizer | None = None
        if config.optimizer == "adamw":
            adamw_groups.append({"params": matrices, "lr": config.matrix_lr, "weight_decay": 0.0})
        else:
            self.muon = Muon(matrices, lr=config.matrix_lr)
        adamw = AdamW(adamw_groups, betas=(0.8, 0.95), eps=1e-10, fused=True)
        self._all = [adamw] + ([self.muon] if self.muon else [])
        for group in self._groups():
            group["peak_lr"] = group["lr"] * config.lr_scale

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._all for group in optimizer.param_groups]

    def step(self, lr: float, step: int) -> None:
        """Update the weights and forget their gradients.

        Args:
            lr: As a fraction of the peak of each group.
            step: Muon's momentum rises from 0.85 to 0.95 over the first 300 of these.
        """
        for group in self._groups():
            group["lr"] = group["peak_lr"] * lr
        if self.muon:
            share = min(step / MOMENTUM_WARMUP_STEPS, 1.0)
            for group in self.muon.param_groups:
                group["momentum"] = 0.85 + 0.10 * share
        for optimizer in self._all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self._all)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self._all):
            optimizer.load_state_dict(state[str(i)])


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step as a fraction of its peak: up, constant, linear down."""
    rising, falling = config.warmup * steps, config.warmdown * steps
    if step < rising:
        return min((step + 1) / rising, 1.0)  # `rising` may be no whole number
    if step < steps - falling:
        return 1.0
    share_left = (steps - step) / falling
    return share_left + (1 - share_left) * config.final_lr


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm`. Returns it before, as a
    tensor: a GPU would have to be waited for."""
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def finite(grad_norm: Tensor, step: int) -> float:
    """Return the norm as a number, having waited for it. Raises: DivergedError, if it is none: the
    weights are not numbers any more, and nothing saves them."""
    if not math.isfinite(norm := float(grad_norm)):
        raise DivergedError(
            f"The gradient of step {step} is {norm}: training has diverged, and is ended before "
            "such weights are saved. The last checkpoint is whole. Choose another run.dir, or "
            "delete that stage's folder in checkpoints/, and start the same command with a lower "
            "learning rate: halve the stage's lr_scale."
        )
    return norm
