"""A policy and a person at a terminal: turns in, tokens out as they are sampled.

`reply` is the whole sampler: one prompt, one answer. Rollouts in large batches are the engines'
work; nothing here is used in training. The conversation is rendered anew for each turn, so the
policy sees exactly what `Tokenizer.render_prompt` shows it in training and evaluation.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from rich.console import Console

from aquarl.data.tokenizer import Tokenizer
from aquarl.errors import ConfigError
from aquarl.model.attention import Continuation, Prefix
from aquarl.model.drawing import draw_from_any
from aquarl.model.gpt import GPT
from aquarl.records import Conversation, Message, Sampling

HELP = (
    "Write to the policy; a line that ends with \\ goes on in the next one. /clear forgets the "
    "conversation, /quit leaves."
)


def chat(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    sampling: Sampling,
    seed: int = 0,
    console: Console | None = None,
    read: Callable[[], str] | None = None,
) -> Conversation:
    """Talk until the person leaves, and return what was said since the last /clear.

    Args:
        model, tokenizer: Of one checkpoint.
        sampling: How to draw tokens; temperature 0 is greedy.
        seed: The same seed and the same lines give the same conversation.
        console: Where to write; the terminal without it.
        read: Gives the next line, or raises EOFError to leave; the keyboard without it.

    Raises:
        ConfigError: A setting of `sampling` is out of range.
    """
    console = console or Console(highlight=False)
    read = read or (lambda: console.input("[bold]you>[/bold] "))
    sampling = checked(sampling, model.shape.context)
    generator = torch.Generator(device=model.lm_head.weight.device).manual_seed(seed)
    console.print(HELP, style="dim", markup=False)
    said: list[Message] = []
    while (line := _next_line(read)) is not None:
        if not line:
            continue
        if line.startswith("/"):
            if line in ("/quit", "/exit"):
                break
            if line == "/clear":
                said = []
            console.print("Forgotten." if line == "/clear" else HELP, style="dim", markup=False)
            continue
        asked = [*said, Message("user", line)]
        kept, ids = _fitting(tokenizer, asked, model.shape.context - sampling.max_new_tokens)
        if not kept:
            console.print("That is longer than this policy can read. Say it in fewer words.")
            continue
        if len(kept) < len(asked):
            console.print("(the oldest turns no longer fit and were dropped)", style="dim")
        console.print("policy>", style="bold", end=" ")
        answer = _show(console, tokenizer, reply(model, tokenizer, ids, sampling, generator))
        said = [*kept, Message("assistant", answer)]
    return Conversation(tuple(said), source="chat")


def checked(sampling: Sampling, context: int) -> Sampling:
    """Return the settings, an answer taking at most half of the context: the rest is for turns.

    Raises:
        ConfigError: A setting is out of range.
    """
    is_warm = sampling.temperature == 0 or 0.01 <= sampling.temperature <= 100
    is_some = sampling.top_k >= 0 and 0 < sampling.top_p <= 1
    if not is_warm or not is_some or sampling.max_new_tokens < 1:
        raise ConfigError(
            f"--temperature {sampling.temperature:g}, --top-k {sampling.top_k}, --top-p "
            f"{sampling.top_p:g} and --max-new-tokens {sampling.max_new_tokens} cannot be sampled "
            "with: the first is 0 or 0.01 to 100, the second 0 or more, the third above 0 and at "
            "most 1, the last 1 or more. Leave them out for 0.6, 50, 1 and 256."
        )
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context // 2))


@torch.inference_mode()
def reply(
    model: GPT,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[int]:
    """Yield the ids of one answer as they are sampled, the stop token excluded.

    Args:
        prompt_ids: What `Tokenizer.render_prompt` returns; with the answer, at most ten contexts.
        sampling: Temperature 0 takes the likeliest token.
        generator: Source of randomness, on the model's device.
    """
    device = model.lm_head.weight.device
    prefix = Prefix(torch.tensor([len(prompt_ids)], device=device))
    hidden_1TD = model(torch.tensor([prompt_ids], device=device), prefix)
    answer = Continuation(prefix, answers_per_prompt=1, room=sampling.max_new_tokens)
    for _ in range(sampling.max_new_tokens):
        uniform_1 = torch.rand(1, generator=generator, device=device)
        id_1, _ = draw_from_any(model.logits(hidden_1TD[:, -1]), uniform_1, sampling)
        if (token := int(id_1)) in (tokenizer.end_of_turn, tokenizer.bos):
            return
        yield token
        hidden_1TD = model(id_1[:, None], answer, answer.positions_BT(1))
        answer.advance(1)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids as soon as it is whole: a character may span several tokens.

    Characters that steer a terminal (all control characters but newline and tab) are left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if piece := decoder.decode(tokenizer.encoding.decode_single_token_bytes(token)):
            yield _printable(piece)
    yield _printable(decoder.decode(b"", final=True))


def _printable(text: str) -> str:
    return "".join(c for c in text if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))


def _show(console: Console, tokenizer: Tokenizer, ids: Iterator[int]) -> str:
    """Print an answer while it comes. Ctrl-C ends the answer, not the conversation."""
    pieces: list[str] = []
    try:
        for piece in stream_text(tokenizer, ids):
            pieces.append(piece)
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        console.out(" (stopped)", end="", style="dim")
    console.out("")
    return "".join(pieces)


def _next_line(read: Callable[[], str]) -> str | None:
    """Return what is said next, with the lines that a backslash joins to it; None at the end."""
    said: list[str] = []
    goes_on = True
    while goes_on:
        try:
            line = read().rstrip()
        except (EOFError, KeyboardInterrupt):
            return None
        goes_on = line.endswith("\\")
        said.append(line.removesuffix("\\"))
    return "\n".join(said).strip()


def _fitting(
    tokenizer: Tokenizer, messages: list[Message], positions: int
) -> tuple[list[Message], list[int]]:
    """Return the newest turns whose prompt fits these positions, and its ids; none if none do."""
    while messages:
        ids = tokenizer.render_prompt(Conversation(tuple(messages)))
        if len(ids) <= positions:
            return messages, ids
        messages = messages[2:]  # a question and its answer
    return [], []
