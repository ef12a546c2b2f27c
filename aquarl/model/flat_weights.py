"""A policy as one contiguous, versioned, checksummed buffer, and back: how weights travel.

The learner flattens, the stream keeps the buffer, every sampler loads it when a lease asks for a
newer version. One buffer is read from shared memory without a copy (a dict of tensors took three
to five times as long).
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from aquarl.model.checkpoint import named
from aquarl.model.gpt import GPT
from aquarl.records import Weights


def flatten(model: GPT, version: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Return all weights as one buffer: float32, or bfloat16 seen as uint16."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in named(model).values()])
    buffer = _as_numpy(flat.to("cpu", dtype))
    return Weights(version=version, checksum=checksum(buffer), buffer=buffer)


def load_flat(model: GPT, weights: Weights) -> None:
    """Copy a buffer into a model of the same shape.

    Raises:
        ValueError: The buffer is damaged or has another length. The model is as it was.
    """
    if checksum(weights.buffer) != weights.checksum:
        raise ValueError(f"weights version {weights.version} arrived damaged: checksum differs")
    tensors = list(named(model).values())
    expected = sum(tensor.numel() for tensor in tensors)
    if weights.buffer.size != expected:
        raise ValueError(f"weights hold {weights.buffer.size} numbers, the model {expected}")
    start = 0
    with torch.no_grad():
        for tensor in tensors:
            # A copy of each piece: what comes from shared memory is read-only.
            piece = _as_tensor(weights.buffer[start : start + tensor.numel()].copy())
            tensor.copy_(piece.view(tensor.shape))
            start += tensor.numel()


def checksum(buffer: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(buffer).data)


def _as_numpy(flat: Tensor) -> np.ndarray:
    if flat.dtype == torch.bfloat16:  # numpy has none: carry its bits
        return flat.view(torch.uint16).numpy()
    array: np.ndarray = flat.numpy()
    return array


def _as_tensor(piece: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(piece)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
