"""A policy as one contiguous, versioned, checksummed buffer, and back: how weights travel.

The learner flattens, the stream keeps the buffer, every sampler loads it when a lease asks for a
newer version. One buffer is read from shared memory without a copy (a dict of tensors took three
to five times as long).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import xxhash
from torch import Tensor

from aquarl.model.checkpoint import named
from aquarl.model.gpt import GPT
from aquarl.records import Weights


def flatten(model: GPT, version: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Return all weights as one buffer: float32, or bfloat16 seen as uint16."""
    flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in named(model).values()])
    if flat.is_cuda:
        # It writes to pinned memory several times as fast as to other; torch keeps it for the next.
        flat = torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat)
    buffer = _as_numpy(flat)
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
    flat = _as_tensor(weights.buffer).to(tensors[0].device)
    with torch.no_grad():
        for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view(tensor.shape))


def checksum(buffer: np.ndarray) -> int:
    """XXH3, 64 bits: as fast as memory, where zlib's CRC-32 took half of a GPU's publishing."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(buffer).data)


def _as_numpy(flat: Tensor) -> np.ndarray:
    if flat.dtype == torch.bfloat16:  # numpy has none: carry its bits
        return flat.view(torch.uint16).numpy()
    array: np.ndarray = flat.numpy()
    return array


def _as_tensor(buffer: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # What comes from shared memory is read-only, which torch knows nothing of. So it is read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(buffer)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
