"""Our weights in transformers' own nanochat model compute our logits; our ids are tiktoken's."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

from aquarl.config import ModelConfig
from aquarl.data.tokenizer import Tokenizer
from aquarl.model.gpt import GPT
from aquarl.model.shape import Shape
from aquarl.serve.hf import hf_config, hf_state, hf_tokenizer, last_merge
from tests.fakes import byte_tokenizer

transformers = pytest.importorskip("transformers", reason="parity is with transformers' own code")
tokenizers = pytest.importorskip("tokenizers")

CORPUS = (
    "If 3 x + 7 = 2026, then x is 673; the banana's price was 19.99 or 1,024 roubles.\n\n"
    "Überraschung: naïve cafés — 你好 世界 🙂🙂, das ist gut.\r\n  What isn't it? We'll see!\t"
) * 40


def random_model(layers: int, heads: int, kv_heads: int, width: int = 64) -> GPT:
    """Return a model whose every weight is normal: the zero init would hide wrong names."""
    tokenizer = byte_tokenizer()
    model = GPT(Shape(tokenizer.vocab_size, layers, width, heads, kv_heads, context=32))
    generator = torch.Generator().manual_seed(layers * 10 + kv_heads)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize(
    "model",
    [
        {"depth": depth, "width": 64, "heads": 4, "kv_heads": n}
        for depth in (2, 4)
        for n in (4, 2, 1)
    ]
    + [{"depth": 2}, {"depth": 4}, {"depth": 4, "kv_heads": 1}],  # as the dial derives them
    ids=str,
)
@torch.inference_mode()
def test_transformers_computes_the_same_logits(model: dict[str, int]) -> None:
    shape = Shape.of(ModelConfig.model_validate(model), vocab=0)
    ours = random_model(shape.layers, shape.heads, shape.kv_heads, shape.width)
    tokenizer = byte_tokenizer()
    config = transformers.NanoChatConfig(**hf_config(ours.shape, tokenizer))
    theirs = transformers.NanoChatForCausalLM(config).eval()
    theirs.load_state_dict(hf_state(ours), strict=True)
    # Longer than the context the model was made for: positions must agree there, too.
    ids_BT = torch.randint(tokenizer.vocab_size, (3, 80), generator=torch.manual_seed(0))
    expected = ours.logits(ours(ids_BT))
    assert expected.std() > 0.5
    assert (theirs(ids_BT).logits - expected).abs().max() < 1e-4


@torch.inference_mode()
def test_two_exchanged_weights_would_be_noticed() -> None:
    ours, tokenizer = random_model(2, 4, 4), byte_tokenizer()
    config = transformers.NanoChatConfig(**hf_config(ours.shape, tokenizer))
    theirs = transformers.NanoChatForCausalLM(config).eval()
    state = hf_state(ours)
    q, k = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    state[q], state[k] = state[k], state[q]
    theirs.load_state_dict(state)
    ids_BT = torch.randint(tokenizer.vocab_size, (1, 16), generator=torch.manual_seed(0))
    assert (theirs(ids_BT).logits - ours.logits(ours(ids_BT))).abs().max() > 1e-2


def as_hugging_face(tokenizer: Tokenizer) -> Any:
    return tokenizers.Tokenizer.from_str(json.dumps(hf_tokenizer(tokenizer)))


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train([CORPUS], vocab_size=360)


HARD_TEXTS = [
    "",
    " ",
    "\n\n \r\n\t x",
    "1234567890 3.14 1,000,000 ½ ² ٣٤٥ Ⅷ",
    "it's IT'S we'LL '\u017f \u2019s don''t",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b\ufeff\u00a0\u2028 ﬆ ǅ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x01\x7f\x85 \uffff \U0010ffff",
    "a" * 700 + " banana" * 100,
]


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_ids_of_hard_texts_are_tiktokens(trained: Tokenizer, text: str) -> None:
    encoded = as_hugging_face(trained).encode(text, add_special_tokens=False)
    assert encoded.ids == trained.encode(text)


def test_ids_of_random_text_are_tiktokens(trained: Tokenizer) -> None:
    theirs, rng = as_hugging_face(trained), random.Random(0)
    letters = [
        lambda: rng.choice(CORPUS),
        lambda: rng.choice("0123456789 \n\r\t'.,=+-"),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    for _ in range(2_000):
        weights = [rng.random() for _ in letters]
        text = "".join(rng.choices(letters, weights)[0]() for _ in range(rng.randrange(40)))
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == trained.encode(text), repr(text)
        assert theirs.decode(ids, skip_special_tokens=False) == trained.decode(ids) == text


def test_ids_are_tiktokens_for_vocabularies_that_no_corpus_would_give() -> None:
    """Random merges over two letters: overlapping ways to the same token are the rule here."""
    rng = random.Random(1)
    for _ in range(200):
        merged: list[bytes] = []
        for _ in range(12):
            pieces = [b"a", b"b", *merged]
            token = rng.choice(pieces) + rng.choice(pieces)
            if token not in merged:
                merged.append(token)
        tokenizer = byte_tokenizer(*merged)
        theirs = as_hugging_face(tokenizer)
        for _ in range(30):
            text = "".join(rng.choices("ab", k=rng.randrange(1, 30)))
            assert theirs.encode(text).ids == tokenizer.encode(text), (merged, text)


def test_the_last_merge_is_the_one_that_encoding_makes() -> None:
    ranks = byte_tokenizer(b"ab", b"bc", b"abc", b"xyz").ranks
    assert last_merge(b"abc", ranks) == (b"ab", b"c")  # ab comes before bc
    assert last_merge(b"a", ranks) is None
    assert last_merge(b"xyz", ranks) is None  # neither xy nor yz is a token


def test_token_names_in_text_are_special_only_if_asked(trained: Tokenizer) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=as_hugging_face(trained))
    text = "say <|bos|> now"
    assert theirs.encode(text, split_special_tokens=True) == trained.encode(text)
    assert theirs.encode(text)[len(trained.encode("say "))] == trained.bos
