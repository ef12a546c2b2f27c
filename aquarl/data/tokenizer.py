"""Text in, token ids out: byte-level BPE trained here and used through tiktoken; chat template.

`render_conversation` gives ids and a "learn this" mask; `render_prompt` ends where the assistant
begins. Stored as text: tiktoken's own rank lines and a small JSON beside them, never a pickle.

Source: special tokens, template and split pattern are nanochat's (nanochat/tokenizer.py, October
2025); the pattern is GPT-4's with digits in groups of at most 2.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property

import rustbpe
import tiktoken

from aquarl.errors import CheckpointError, DataError
from aquarl.records import Conversation
from aquarl.storage import get, put_together

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)


class Tokenizer:
    """A trained vocabulary. Byte-pair tokens come first, special tokens last.

    Args:
        ranks: Token bytes to id, 256 single bytes included, ids 0..n-1.
        pattern: Regular expression that cuts text into the pieces merged by themselves.
        special_tokens: Name to id.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        pattern: str = SPLIT_PATTERN,
        special_tokens: dict[str, int] | None = None,
    ) -> None:
        self.ranks, self.pattern = ranks, pattern
        self.special_tokens = special_tokens or {
            name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)
        }
        self.encoding = tiktoken.Encoding(
            "aquarl", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from texts until the vocabulary, special tokens included, has this size.

        Raises:
            DataError: The texts are too few or too uniform for so many tokens.
        """
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(
            iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN
        )
        ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
        tokenizer = cls(ranks)
        if tokenizer.vocab_size < vocab_size:
            raise DataError(
                f"The corpus holds only enough different text for {tokenizer.vocab_size} tokens, "
                f"but tokenizer.vocab_size is {vocab_size}. Give more text, or set "
                f"tokenizer.vocab_size={tokenizer.vocab_size}."
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    @property
    def bos(self) -> int:
        return self.special_tokens["<|bos|>"]

    @property
    def end_of_turn(self) -> int:
        """The token that ends an assistant's answer: sampled, trained, and the sampler's stop."""
        return self.special_tokens["<|assistant_end|>"]

    @cached_property
    def bytes_per_token(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for special tokens."""
        sizes = [0] * self.vocab_size
        for token, rank in self.ranks.items():
            sizes[rank] = len(token)
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of everything that decides an id. Checkpoints carry it."""
        return fingerprint(self.ranks, self.pattern, self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens written in it are plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded on all cores of this machine."""
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens by their names, broken UTF-8 as U+FFFD."""
        return self.encoding.decode(list(ids))

    def decode_answer(self, ids: Sequence[int]) -> str:
        """Return the text of a sampled answer, without its stop token."""
        return self.decode(ids[:-1] if ids and ids[-1] == self.end_of_turn else ids)

    def render_conversation(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant is to learn.

        Learned: what the assistant says, and the token that ends its turn. A system message is
        put before the first user message, as in nanochat.

        Raises:
            DataError: Turns do not alternate between user and assistant, starting with user.
        """
        messages = list(conversation.messages)
        opening = ""
        if messages and messages[0].role == "system":
            opening = messages.pop(0).content + "\n\n"
        ids, is_learned = [self.bos], [False]
        for turn, message in enumerate(messages):
            expected = "user" if turn % 2 == 0 else "assistant"
            if message.role != expected:
                raise DataError(
                    f"Turn {turn + 1} of a conversation is by {message.role!r}, but turns go "
                    "user, assistant, user, ... Mend or drop that conversation."
                )
            body = self.encode((opening if turn == 0 else "") + message.content)
            start, end = self._turn_marks(message.role)
            is_said = message.role == "assistant"
            ids += [start, *body, end]
            is_learned += [False] + [is_said] * (len(body) + 1)
        return ids, is_learned

    def render_prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids of a conversation up to where the assistant begins its next turn."""
        ids, _ = self.render_conversation(conversation)
        return [*ids, self.special_tokens["<|assistant_start|>"]]

    def _turn_marks(self, role: str) -> tuple[int, int]:
        return self.special_tokens[f"<|{role}_start|>"], self.special_tokens[f"<|{role}_end|>"]

    def save(self, folder: str) -> None:
        """Write `ranks.tiktoken`, `bytes_per_token.json` and `tokenizer.json` into a folder.

        Raises:
            StorageError: The place is full, away or forbidden. What stood there stands.
        """
        ordered = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ordered]
        about = {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "fingerprint": self.fingerprint,
        }
        files = {
            "ranks.tiktoken": "\n".join(lines) + "\n",
            "bytes_per_token.json": json.dumps(self.bytes_per_token),
            "tokenizer.json": json.dumps(about, indent=1),
        }
        put_together(folder, {name: text.encode() for name, text in files.items()})

    @classmethod
    def load(cls, folder: str) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            CheckpointError: A file is missing or does not hold what was written.
        """
        path = folder.rstrip("/")
        try:
            about = json.loads(get(f"{path}/tokenizer.json"))
            lines = get(f"{path}/ranks.tiktoken").split(b"\n")
            pairs = [line.split() for line in lines if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            named = about["pattern"], about["special_tokens"]
            # Asked before they are used: tiktoken panics over ranks that do not fit together.
            is_whole = sorted(ranks.values()) == list(range(len(lines) - 1))
            is_whole = is_whole and fingerprint(ranks, *named) == about["fingerprint"]
        except FileNotFoundError as error:
            raise CheckpointError(
                f"There is no tokenizer in {folder}. Run `aquarl tokenizer` for this run first."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The tokenizer in {folder} is damaged ({error}). "
                "Delete that folder and run `aquarl tokenizer` again."
            ) from error
        if not is_whole:
            raise CheckpointError(
                f"The tokenizer in {folder} is not the one that was saved there: its fingerprint "
                "differs. Delete that folder and run `aquarl tokenizer` again."
            )
        return cls(ranks, *named)


def fingerprint(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> str:
    """Return a short hash of everything that decides an id."""
    digest = hashlib.sha256(pattern.encode())
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(len(token).to_bytes(4, "little") + token)
    digest.update(json.dumps(special_tokens, sort_keys=True).encode())
    return digest.hexdigest()[:16]
