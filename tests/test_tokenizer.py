"""Text survives encoding, templates say what is learned, and a damaged vocabulary is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aquarl.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from aquarl.errors import CheckpointError, DataError, StorageError
from aquarl.records import Conversation, Message
from tests.fakes import byte_tokenizer, small_disk

CORPUS = [
    "If 3 boxes hold 1024 pens, how many hold 2048? Answer: B\n",
    "naïve café, 你好 🙂\n",
] * 50


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=300)


def talk(*turns: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    said = [Message(roles[i % 2], text) for i, text in enumerate(turns)]
    return Conversation(tuple(([Message("system", system)] if system else []) + said))


def random_text(rng: random.Random) -> str:
    """Random bytes as far as they are UTF-8, among any character that is not half of a pair."""
    raw = bytes(rng.randrange(256) for _ in range(rng.randrange(20))).decode(errors="ignore")
    codes = [rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(8)]
    return raw + "".join(map(chr, codes)) + rng.choice(CORPUS)[: rng.randrange(40)]


def test_any_text_comes_back_as_it_was(trained: Tokenizer) -> None:
    rng = random.Random(0)
    hard = ["", " ", "\n\r\n\t \x00", "\ufeff\u200b e\u0301", "a" * 3_000, "12345678901234567890"]
    for text in [*hard, *(random_text(rng) for _ in range(500))]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert sum(trained.bytes_per_token[i] for i in ids) == len(text.encode())


def test_training_makes_the_size_that_was_asked_for(trained: Tokenizer) -> None:
    assert trained.vocab_size == 300
    assert sorted(trained.ranks.values()) == list(range(300 - len(SPECIAL_TOKENS)))
    assert len(trained.encode(CORPUS[0])) < len(CORPUS[0].encode()) / 1.5


def test_training_twice_gives_the_same_vocabulary(trained: Tokenizer) -> None:
    assert Tokenizer.train(CORPUS, vocab_size=300).fingerprint == trained.fingerprint
    assert Tokenizer.train(CORPUS, vocab_size=299).fingerprint != trained.fingerprint


def test_too_little_text_is_refused_with_the_size_it_allows() -> None:
    with pytest.raises(DataError, match=r"set tokenizer\.vocab_size=\d+") as refused:
        Tokenizer.train(["abab"], vocab_size=500)
    allowed = int(str(refused.value).rstrip(".").rsplit("=", 1)[1])
    assert Tokenizer.train(["abab"], vocab_size=allowed).vocab_size == allowed


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_tokens_in_text_are_plain_text(trained: Tokenizer, name: str) -> None:
    ids = trained.encode(f"say {name} now")
    assert not set(ids) & set(trained.special_tokens.values())
    assert trained.decode(ids) == f"say {name} now"


def test_no_token_holds_more_than_two_digits() -> None:
    tokenizer = Tokenizer.train(["1234567 " * 500 + "1000000 " * 500], vocab_size=269)
    digits = [t.decode(errors="ignore") for t in tokenizer.ranks if any(48 <= b < 58 for b in t)]
    assert max(map(len, digits)) == 2
    assert all(token.isdigit() for token in digits)


def test_learned_is_what_the_assistant_says_and_the_end_of_its_turn() -> None:
    tokenizer = byte_tokenizer()
    ids, is_learned = tokenizer.render_conversation(talk("hi", "yes", "more", "no"))
    learned = [token for token, learn in zip(ids, is_learned, strict=True) if learn]
    end = tokenizer.end_of_turn
    assert learned == [*b"yes", end, *b"no", end]
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>yes<|assistant_end|>"
        "<|user_start|>more<|user_end|><|assistant_start|>no<|assistant_end|>"
    )


def test_a_prompt_is_where_the_conversation_begins(trained: Tokenizer) -> None:
    for turns in (("hi", "yes"), ("hi", "yes", "more", "no")):
        for system in (None, "Be brief."):
            whole, is_learned = trained.render_conversation(talk(*turns, system=system))
            prompt = trained.render_prompt(talk(*turns[:-1], system=system))
            assert whole[: len(prompt)] == prompt
            assert all(is_learned[len(prompt) :]), "what follows is learned to its end"


def test_a_system_message_opens_the_first_user_turn() -> None:
    tokenizer = byte_tokenizer()
    with_system = tokenizer.render_prompt(talk("hi", system="Be brief."))
    assert with_system == tokenizer.render_prompt(talk("Be brief.\n\nhi"))


@pytest.mark.parametrize("roles", [("assistant",), ("user", "user"), ("user", "tool")])
def test_turns_that_do_not_alternate_are_refused(roles: tuple[str, ...]) -> None:
    conversation = Conversation(tuple(Message(role, "x") for role in roles))
    with pytest.raises(DataError, match=f"Turn {len(roles)} of a conversation"):
        byte_tokenizer().render_conversation(conversation)


def test_an_answer_is_read_without_its_stop_token() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode_answer([*b"Answer: A", tokenizer.end_of_turn]) == "Answer: A"
    assert tokenizer.decode_answer([*b"Answer: A"]) == "Answer: A"
    assert tokenizer.decode_answer([tokenizer.end_of_turn]) == ""
    assert tokenizer.decode_answer([]) == ""


def test_broken_utf8_from_a_policy_is_shown_not_raised() -> None:
    assert byte_tokenizer().decode([0xE2, 0x82, ord("x")]) == "\N{REPLACEMENT CHARACTER}x"


def test_a_saved_vocabulary_is_loaded_as_it_was(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "tokenizer"))
    loaded = Tokenizer.load(str(tmp_path / "tokenizer"))
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.special_tokens == trained.special_tokens
    assert all(loaded.encode(text) == trained.encode(text) for text in CORPUS[:2])


def test_a_full_disk_leaves_the_vocabulary_that_stood_there(tmp_path: Path) -> None:
    with small_disk(tmp_path, kibibytes=16) as disk:
        folder = str(disk / "tokenizer")
        byte_tokenizer(b"th").save(folder)
        (disk / "filler").write_bytes(bytes(4096))
        with pytest.raises(StorageError, match="No space left on device"):
            byte_tokenizer(b"ab").save(folder)
        assert Tokenizer.load(folder).fingerprint == byte_tokenizer(b"th").fingerprint


def test_a_missing_vocabulary_says_which_stage_makes_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Run `aquarl tokenizer`"):
        Tokenizer.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["ranks.tiktoken", "tokenizer.json"])
def test_a_damaged_vocabulary_is_refused_or_means_the_same(tmp_path: Path, name: str) -> None:
    """Flip bits one at a time; base64 and JSON have a few spellings of the same content."""
    tokenizer = byte_tokenizer(b"th", b"the")
    folder = tmp_path / "tokenizer"
    tokenizer.save(str(folder))
    whole, rng, refused = (folder / name).read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(damaged)
        try:
            loaded = Tokenizer.load(str(folder))
        except CheckpointError:
            refused += 1
        else:
            assert loaded.ranks == tokenizer.ranks
            assert loaded.special_tokens == tokenizer.special_tokens
            assert loaded.pattern == tokenizer.pattern
    assert refused > 250


@pytest.mark.parametrize("name", ["ranks.tiktoken", "tokenizer.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_vocabulary_that_was_cut_short_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    byte_tokenizer(b"th").save(str(tmp_path))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match="run `aquarl tokenizer` again"):
        Tokenizer.load(str(tmp_path))
