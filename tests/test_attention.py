"""The four ways of attention are one: they differ in what they save, not in what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aquarl.model.attention import Continuation, Prefix, WithinDocuments
from aquarl.model.gpt import GPT
from tests.fakes import random_ids, random_model

HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])

G = 3
PROMPT_LENGTHS = (5, 1, 7)
ANSWER_LENGTH = 6


def model64(heads: int, kv_heads: int) -> GPT:
    """In fp64, so that "equal" leaves no room for a small mistake."""
    return random_model(heads=heads, kv_heads=kv_heads).double()


def prompts_and_answers() -> tuple[list[Tensor], Tensor]:
    prompts = [random_ids((n,), seed=n) for n in PROMPT_LENGTHS]
    return prompts, random_ids((len(prompts) * G, ANSWER_LENGTH), seed=99)


def padded(prompts: list[Tensor]) -> Tensor:
    # What stands on the padding must not matter: any token but 0 shows whether it does.
    rows = torch.full((len(prompts), max(map(len, prompts))), 63)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows


def plain_hidden(model: GPT, prompts: list[Tensor], answers_BT: Tensor) -> Tensor:
    """Hidden states (B, T, D) of the answers, each row computed alone with its own prompt."""
    rows = []
    for b, answer in enumerate(answers_BT):
        prompt = prompts[b // G]
        rows.append(model(torch.cat([prompt, answer])[None])[0, len(prompt) :])
    return torch.stack(rows)


def shared_hidden(model: GPT, prompts: list[Tensor], answers_BT: Tensor) -> Tensor:
    prefix = Prefix(torch.tensor([len(prompt) for prompt in prompts]))
    model(padded(prompts), prefix)
    T = answers_BT.shape[1]
    answers = Continuation(prefix, G, room=T)
    return model(answers_BT, answers, answers.positions_BT(T))


@HEADS
@torch.inference_mode()
def test_answers_on_a_shared_prompt_equal_whole_rows(heads: int, kv_heads: int) -> None:
    model, (prompts, answers_BT) = model64(heads, kv_heads), prompts_and_answers()
    torch.testing.assert_close(
        shared_hidden(model, prompts, answers_BT),
        plain_hidden(model, prompts, answers_BT),
        rtol=1e-9,
        atol=1e-9,
    )


@HEADS
@pytest.mark.parametrize("pieces", [(1,) * 6, (2, 1, 3), (6,)])
@torch.inference_mode()
def test_decoding_with_a_cache_equals_whole_rows(
    heads: int, kv_heads: int, pieces: tuple[int, ...]
) -> None:
    model, (prompts, answers_BT) = model64(heads, kv_heads), prompts_and_answers()
    prefix = Prefix(torch.tensor([len(prompt) for prompt in prompts]))
    model(padded(prompts), prefix)
    answers = Continuation(prefix, G, room=ANSWER_LENGTH)
    parts, start = [], 0
    for n in pieces:
        parts.append(model(answers_BT[:, start : start + n], answers, answers.positions_BT(n)))
        answers.advance(n)
        start += n
    expected = plain_hidden(model, prompts, answers_BT)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


@HEADS
@torch.inference_mode()
def test_documents_of_a_row_are_computed_as_if_alone(heads: int, kv_heads: int) -> None:
    """Rotary attention knows distances only, so a document may stand anywhere in its row."""
    model, ids_BT = model64(heads, kv_heads), random_ids((2, 12))
    documents_BT = torch.tensor([[1] * 5 + [2] * 3 + [3] * 4, [1] * 9 + [0] * 3])
    packed = model(ids_BT, WithinDocuments(documents_BT))
    for row, start, end in [(0, 0, 5), (0, 5, 8), (0, 8, 12), (1, 0, 9)]:
        alone = model(ids_BT[row : row + 1, start:end])[0]
        # Elsewhere in the row the same distance has other roundings in the fp32 tables.
        torch.testing.assert_close(packed[row, start:end], alone, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_a_position_sees_nothing_after_it() -> None:
    model, ids_BT = model64(4, 2), random_ids((1, 10))
    changed_BT = ids_BT.clone()
    changed_BT[0, 6] = (changed_BT[0, 6] + 1) % 64
    before, after = model(ids_BT), model(changed_BT)
    assert torch.equal(before[0, :6], after[0, :6])
    assert (before[0, 6:] != after[0, 6:]).any(dim=-1).all()


@torch.inference_mode()
def test_a_model_in_bf16_decodes_in_bf16() -> None:
    """As the sampler has it on a GPU: the fp32 mask must not widen what meets the values."""
    prompts, answers_BT = prompts_and_answers()
    model = random_model().in_precision(torch.bfloat16)
    hidden = shared_hidden(model, prompts, answers_BT)
    assert hidden.dtype == torch.bfloat16
    exact = shared_hidden(random_model(), prompts, answers_BT)
    assert (hidden.float() - exact).abs().mean() < 0.05
