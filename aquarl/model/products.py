"""Matrices in, their product out, by the faster of two libraries.

On AMD's processors torch's fp32 products are MKL's, and large ones are a tenth faster by NumPy,
whose are OpenBLAS's (an EPYC of 2021; `ray_jobs/LOG.md`, 2026-11-28). Tensors and arrays share
their memory, so nothing is copied. With several threads torch does all of them: the threads of two
libraries would wait for each other's cores.

Shapes: N rows, D columns of what comes in, X of what goes out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import ThreadpoolController
from torch import Tensor

LARGE = 1 << 26
"""Multiplications of a product from which on NumPy's was faster."""


def use_threads(count: int) -> None:
    """Have this process compute with so many threads."""
    torch.set_num_threads(count)
    ThreadpoolController().select(internal_api="openblas").limit(limits=count)


def linear(x: Tensor, weight_XD: Tensor) -> Tensor:
    """Return (..., X) of x (..., D), with gradients for both."""
    if not is_numpys(x, len(weight_XD)):
        return F.linear(x, weight_XD)
    y_NX: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_XD)
    return y_NX.view(*x.shape[:-1], -1)


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the product of two matrices, without a gradient."""
    if not is_numpys(a, b.shape[1]):
        return torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    np.matmul(a.detach().numpy(), b.detach().numpy(), out=out.numpy())
    return out


def is_numpys(x: Tensor, columns: int) -> bool:
    """Whether NumPy is to multiply this by a matrix of so many columns."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler is to see nothing of what follows
        and x.numel() * columns >= LARGE
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and _is_numpy_faster()
        and torch.get_num_threads() == 1
    )


@cache
def _is_numpy_faster() -> bool:
    about = Path("/proc/cpuinfo")
    if not about.exists() or "AuthenticAMD" not in about.read_text():
        return False
    return bool(ThreadpoolController().select(internal_api="openblas").lib_controllers)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_XD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_XD)
        return mm(x_ND, weight_XD.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_XD = ctx.saved_tensors
        return mm(grads[0], weight_XD), mm(grads[0].T, x_ND)
