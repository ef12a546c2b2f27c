"""A conversation at the terminal: what is drawn, what is shown, what is remembered."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console

from aquarl.errors import ConfigError
from aquarl.model.drawing import draw_from_any
from aquarl.model.gpt import GPT, norm
from aquarl.model.shape import Shape
from aquarl.records import Conversation, Message, Sampling
from aquarl.serve.chat import HELP, _next_line, _show, chat, checked, reply, stream_text
from tests.fakes import byte_tokenizer, random_model

TOKENIZER = byte_tokenizer()
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


def policy_that_says(text: str, context: int = 64) -> GPT:
    """Return a model whose blocks do nothing and whose head names what follows each byte."""
    model = GPT(
        Shape(TOKENIZER.vocab_size, layers=1, width=64, heads=2, kv_heads=2, context=context)
    )
    model.init_weights(seed=0)
    start = TOKENIZER.special_tokens["<|assistant_start|>"]
    chain = [start, *TOKENIZER.encode(text), TOKENIZER.end_of_turn]
    assert len(set(chain)) == len(chain), "each byte can be followed by one other only"
    with torch.no_grad():
        seen_TD = norm(model.transformer.wte(torch.tensor(chain[:-1])))
        model.lm_head.weight[torch.tensor(chain[1:])] = 0.2 * seen_TD
    return model


def lines(*said: str) -> Callable[[], str]:
    waiting = iter(said)

    def read() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


def test_a_question_of_several_lines_is_one_turn() -> None:
    console, _ = screen()
    read = lines("Which?\\ ", "A)1\\", "B)2", "/clear", "x")
    said: list[str] = []
    while (turn := _next_line(read)) is not None:
        said.append(turn)
    assert said == ["Which?\nA)1\nB)2", "/clear", "x"]
    kept = chat(
        policy_that_says("Ye"), TOKENIZER, sampling=GREEDY, console=console, read=lines("a\\", "b")
    )
    assert pairs(kept)[0] == ("user", "a\nb")


def screen() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=200), file


def pairs(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


@torch.inference_mode()
def test_greedy_reply_is_what_the_whole_model_computes_without_a_cache() -> None:
    model = random_model(TOKENIZER.vocab_size, context=64, std=0.3)
    prompt = TOKENIZER.render_prompt(Conversation((Message("user", "2+2?"),)))
    said = list(reply(model, TOKENIZER, prompt, Sampling(20, 0.0), torch.Generator()))
    ids = list(prompt)
    for token in said:
        assert token == int(model.logits(model(torch.tensor([ids])))[0, -1].argmax())
        ids.append(token)
    assert len(said) == 20


def test_a_reply_ends_with_its_turn_or_with_its_length() -> None:
    model = policy_that_says("Yes.")
    prompt = TOKENIZER.render_prompt(Conversation((Message("user", "?"),)))

    def answer(length: int) -> str:
        ids = reply(model, TOKENIZER, prompt, Sampling(length, 0.0), torch.Generator())
        return TOKENIZER.decode(list(ids))

    assert answer(8) == "Yes."
    assert answer(2) == "Ye"


def test_the_same_seed_gives_the_same_reply() -> None:
    prompt = TOKENIZER.render_prompt(Conversation((Message("user", "?"),)))

    def answer(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(
            reply(
                random_model(TOKENIZER.vocab_size, context=64, std=0.3),
                TOKENIZER,
                prompt,
                Sampling(20, 1.0),
                generator,
            )
        )

    assert answer(1) == answer(1) != answer(2)


def test_drawing_follows_temperature_top_k_and_top_p() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(20_000, -1)
    uniforms_B = torch.rand(20_000, generator=torch.Generator().manual_seed(0))

    def shares(sampling: Sampling) -> torch.Tensor:
        ids_B, _ = draw_from_any(logits_BV, uniforms_B, sampling)
        return torch.bincount(ids_B, minlength=4) / 20_000

    assert shares(Sampling(1, 0.0)).tolist() == [0, 1, 0, 0]
    expected = (logits_BV[0] / 0.5).softmax(0)
    torch.testing.assert_close(shares(Sampling(1, 0.5)), expected, atol=0.02, rtol=0)
    two = torch.tensor([0.0, torch.e, 1.0, 0.0]) / (torch.e + 1)
    torch.testing.assert_close(shares(Sampling(1, 1.0, top_k=2)), two, atol=0.02, rtol=0)
    assert shares(Sampling(1, 1.0, top_k=99))[3] > 0
    # The chances are 0.09, 0.64, 0.24 and 0.03.
    torch.testing.assert_close(shares(Sampling(1, 1.0, top_p=0.7)), two, atol=0.02, rtol=0)
    assert shares(Sampling(1, 1.0, top_p=0.6)).tolist() == [0, 1, 0, 0]
    assert shares(Sampling(1, 1.0, top_k=3, top_p=0.999))[3] == 0


def test_text_comes_in_whole_characters_and_steers_no_terminal() -> None:
    broken_off = [0xF0, 0x9F]
    ids = [*TOKENIZER.encode("é🙂\x1b[2J\r\n\t\x9b.\x7f"), *broken_off]
    pieces = list(stream_text(TOKENIZER, ids))
    assert pieces[:2] == ["é", "🙂"]
    assert "".join(pieces) == "é🙂[2J\n\t.\ufffd"


def test_turns_are_remembered_until_cleared() -> None:
    console, file = screen()
    model = policy_that_says("Yes.")
    said = chat(
        model,
        TOKENIZER,
        sampling=GREEDY,
        console=console,
        read=lines("a?", "  ", "b?"),
    )
    assert pairs(said) == [
        ("user", "a?"),
        ("assistant", "Yes."),
        ("user", "b?"),
        ("assistant", "Yes."),
    ]
    assert file.getvalue() == f"{HELP}\npolicy> Yes.\npolicy> Yes.\n"

    console, file = screen()
    read = lines("a?", "/clear", "/what", "b?", "/quit", "c?")
    said = chat(model, TOKENIZER, sampling=GREEDY, console=console, read=read)
    assert pairs(said) == [("user", "b?"), ("assistant", "Yes.")]
    assert file.getvalue() == (f"{HELP}\npolicy> Yes.\nForgotten.\n{HELP}\npolicy> Yes.\n")


def test_the_oldest_turns_make_room_for_new_ones() -> None:
    console, file = screen()
    # 64 positions, 8 of them for the answer. A full exchange takes 10, bos and the open question
    # 6, so the last prompt has room for 5 exchanges before it: those of questions 2 to 6.
    questions = [f"{i}?" for i in range(8)]
    model = policy_that_says("Yes.")
    said = chat(model, TOKENIZER, sampling=GREEDY, console=console, read=lines(*questions))
    assert pairs(said)[-2:] == [("user", "7?"), ("assistant", "Yes.")]
    assert pairs(said)[0] == ("user", "2?")
    assert len(TOKENIZER.render_conversation(said)[0]) <= 64
    assert "oldest turns" in file.getvalue()


def test_a_question_longer_than_the_context_is_not_sent() -> None:
    console, file = screen()
    model = policy_that_says("Yes.")
    read = lines("a?", "x" * 60, "b?")
    said = chat(model, TOKENIZER, sampling=GREEDY, console=console, read=read)
    assert "longer than this policy can read" in file.getvalue()
    assert pairs(said)[-2:] == [("user", "b?"), ("assistant", "Yes.")]
    assert len(said.messages) == 4


def test_markup_in_an_answer_is_shown_as_it_is() -> None:
    console, file = screen()
    chat(policy_that_says("[b]:x"), TOKENIZER, sampling=GREEDY, console=console, read=lines("?"))
    assert "policy> [b]:x\n" in file.getvalue()


def test_an_interrupt_ends_the_answer_and_not_the_conversation() -> None:
    def interrupted() -> Iterator[int]:
        yield from TOKENIZER.encode("Ye")
        raise KeyboardInterrupt

    console, file = screen()
    assert _show(console, TOKENIZER, interrupted()) == "Ye"
    assert file.getvalue() == "Ye (stopped)\n"


@pytest.mark.parametrize(
    "change", [(-1.0, 0, 8), (1.0, -1, 8), (1.0, 0, 0), (1e-40, 0, 8), (float("nan"), 0, 8)]
)
def test_settings_out_of_range_are_refused(change: tuple[float, int, int]) -> None:
    temperature, top_k, max_new_tokens = change
    with pytest.raises(ConfigError, match="Leave them out"):
        checked(Sampling(max_new_tokens, temperature, top_k), context=64)


def test_an_answer_takes_at_most_half_of_the_context() -> None:
    assert checked(Sampling(500), context=64).max_new_tokens == 32
    assert checked(Sampling(5), context=64).max_new_tokens == 5
