"""A policy as one contiguous, versioned, checksummed buffer, and back: how weights travel.

The learner flattens, the stream keeps the buffer, every sampler loads it when a lease asks for a
newer version. One buffer is read from shared memory without a copy (a dict of tensors took three
to five times as long).
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash
from torch import Tensor

from aquarl.model.checkpoint import named
from aquarl.model.gpt import GPT
from aquarl.records import Weights

PART_BYTES = 1 << 24
"""Of a buffer, hashed by one thread."""


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
    """XXH3, 64 bits, of the parts' own: each is hashed on a core of its own, as fast as it is read.

    Not zlib's CRC-32, which took half of a GPU's publishing; one core's XXH3 took most of the rest.
    """
    view = np.ascontiguousarray(buffer).view(np.uint8).data
    parts = [view[start : start + PART_BYTES] for start in range(0, len(view), PART_BYTES)]
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        digests = pool.map(xxhash.xxh3_64_digest, parts)
        return xxhash.xxh3_64_intdigest(b"".join(digests))


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
