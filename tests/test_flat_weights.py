"""Weights arrive as they were sent, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from aquarl.model import flat_weights
from aquarl.model.flat_weights import checksum, flatten, load_flat
from tests.fakes import random_model


def test_fp32_weights_arrive_bit_for_bit() -> None:
    sent, received = random_model(seed=1), random_model(seed=2)
    weights = flatten(sent, version=7)
    assert (weights.version, weights.buffer.dtype, weights.buffer.ndim) == (7, np.float32, 1)
    load_flat(received, weights)
    torch.testing.assert_close(received.state_dict(), sent.state_dict(), rtol=0, atol=0)


def test_bf16_weights_arrive_rounded_once_and_in_half_the_bytes() -> None:
    sent, received = random_model(seed=1), random_model(seed=2)
    weights = flatten(sent, version=7, dtype=torch.bfloat16)
    assert weights.buffer.nbytes * 2 == flatten(sent, version=7).buffer.nbytes
    load_flat(received, weights)
    rounded = {name: w.bfloat16().float() for name, w in sent.state_dict().items()}
    torch.testing.assert_close(dict(received.state_dict()), rounded, rtol=0, atol=0)


def test_a_buffer_from_shared_memory_is_only_read() -> None:
    """Ray hands out read-only arrays; torch would warn of, or crash on, writing to one."""
    sent, received = random_model(seed=1), random_model(seed=2)
    weights = flatten(sent, version=1)
    weights.buffer.flags.writeable = False
    load_flat(received, weights)
    with torch.no_grad():
        received.lm_head.weight.add_(1.0)
    assert checksum(weights.buffer) == weights.checksum


def test_later_changes_of_the_policy_do_not_reach_what_was_flattened() -> None:
    sent = random_model()
    weights = flatten(sent, version=1)
    with torch.no_grad():
        sent.lm_head.weight.add_(1.0)
    assert checksum(weights.buffer) == weights.checksum


@pytest.mark.parametrize("place", [0, 1_000, -1])
def test_damaged_weights_leave_the_model_as_it_was(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_weights, "PART_BYTES", 2_000)  # so that several are hashed
    model = random_model(seed=2)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    weights = flatten(random_model(seed=1), version=3)
    weights.buffer.view(np.uint8)[place] ^= 1
    with pytest.raises(ValueError, match="version 3 arrived damaged"):
        load_flat(model, weights)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_of_another_shape_leave_the_model_as_it_was(layers: int) -> None:
    model = random_model(seed=2)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(ValueError, match="weights hold"):
        load_flat(model, flatten(random_model(layers=layers), version=3))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_the_checksum_sees_every_byte_and_their_order() -> None:
    weights = flatten(random_model(), version=0)
    swapped = weights.buffer.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksum(swapped) != weights.checksum
    assert replace(weights, version=1).checksum == weights.checksum
    assert checksum(np.zeros(3, np.float32)) != checksum(np.zeros(4, np.float32))
