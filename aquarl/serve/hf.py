"""A policy and its tokenizer in, the files of a Hugging Face model out.

`transformers` knows the architecture as `NanoChatForCausalLM`, so `AutoModelForCausalLM` and
`AutoTokenizer` load the result without remote code, and vLLM does too. `serve.export` checks the
files and puts them in place. Neither transformers nor tokenizers is needed to write them.

The tokenizer is tiktoken's, told as a list of merges. A token's merge is the last one that makes
it when its own bytes are encoded alone; no other pair of pieces ever meets to make it, because
merges inside a span whose borders stand are those of the span alone. Ids are the same on any text.

Text such as "<|bos|>" inside a message: `Tokenizer.encode` takes it as plain text. In transformers
pass `split_special_tokens=True`, or `sanitize_control_tokens=True` with the chat template.

Source: transformers/models/nanochat/{configuration,modeling}_nanochat.py.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from aquarl.data.tokenizer import Tokenizer
from aquarl.model.gpt import GPT, ROPE_BASE, SOFT_CAP
from aquarl.model.shape import Shape

BLOCK_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- set opening = namespace(text='') -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set opening.text = messages[0]['content'] + '\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception('Turns go user, assistant, user, ...; turn ' ~ loop.index ~ ' does not.') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '_start|>' -}}
{{- (opening.text if loop.first else '') + message['content'] -}}
{{- '<|' ~ message['role'] ~ '_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""
"""`Tokenizer.render_conversation` and `render_prompt` in Jinja."""


def hf_files(
    model: GPT, tokenizer: Tokenizer, *, title: str, figures: dict[str, Any]
) -> dict[str, bytes]:
    """Return the files of a Hugging Face model folder, by name.

    Args:
        model: Its weights are written in fp32.
        title: Heading of the model card.
        figures: Measured figures for the model card, nested by name as in `report.json`; empty
            if none were measured.
    """
    texts = {
        "README.md": model_card(model, title, figures),
        "chat_template.jinja": CHAT_TEMPLATE,
        "tokenizer.json": json.dumps(hf_tokenizer(tokenizer), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_tokenizer_config(tokenizer, model.shape), indent=2),
        "generation_config.json": json.dumps(_special_ids(tokenizer), indent=2),
        "config.json": json.dumps(hf_config(model.shape, tokenizer), indent=2),
    }
    files = {name: text.encode() for name, text in texts.items()}
    config = files.pop("config.json")
    weights = save(hf_state(model), metadata={"format": "pt"})
    return {**files, "model.safetensors": weights, "config.json": config}  # last: it is what counts


def hf_state(model: GPT) -> dict[str, Tensor]:
    """Return the weights, fp32 on the CPU, under the names of `NanoChatForCausalLM`."""
    return {
        hf_name(name): tensor.detach().float().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }


def hf_name(name: str) -> str:
    """Return transformers' name of one of our weights."""
    if name == "transformer.wte.weight":
        return "model.embed_tokens.weight"
    if name == "lm_head.weight":
        return name
    _, _, layer, *middle, leaf = name.split(".")
    return f"model.layers.{layer}.{BLOCK_NAMES['.'.join(middle)]}.{leaf}"


def hf_config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `config.json`: everything that decides a logit is written, no default is relied on."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": "float32",
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": SOFT_CAP,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        # F.rms_norm without eps uses that of the type; transformers' default is 1e-6.
        "rms_norm_eps": torch.finfo(torch.float32).eps,
        "tie_word_embeddings": False,
        "use_cache": True,
        **_special_ids(tokenizer),
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.end_of_turn,
        "pad_token_id": tokenizer.end_of_turn,
    }


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `tokenizer.json`: the same ids as `Tokenizer.encode` on any text."""
    by_rank = sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    pairs = [pair for token, _ in by_rank if (pair := last_merge(token, tokenizer.ranks))]
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated"}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **marks, "special": True}
            for name, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"use_regex": False}],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as in tiktoken, a piece that is a token needs no merges
            "vocab": {spell(token): rank for token, rank in by_rank},
            "merges": [[spell(left), spell(right)] for left, right in pairs],
        },
    }


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Return the two pieces that the last merge joins when a token's bytes are encoded alone.

    None for a single byte, and for a token that merging its bytes does not lead to.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right) for left, right in pairwise(parts)]
        known = [(rank, i) for i, rank in enumerate(joined) if rank is not None]
        if not known:
            return None
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_letters() -> list[str]:
    """Return the printable letter that stands for each byte in a byte-level tokenizer.json.

    Source: `bytes_to_unicode` of github.com/openai/gpt-2, src/encoder.py.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)}
    plain |= set(range(ord("®"), ord("ÿ") + 1))
    strange = [byte for byte in range(256) if byte not in plain]
    return [chr(b) if b in plain else chr(256 + strange.index(b)) for b in range(256)]


def _tokenizer_config(tokenizer: Tokenizer, shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
    }


def model_card(model: GPT, title: str, figures: dict[str, Any]) -> str:
    """Return the model card: what it is, what was measured, how to load it."""
    shape = model.shape
    parameters = model.count()["parameters"]
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat, aquarl, math]
---
# {title}

A nanochat-style GPT trained with aquarl: {parameters:,} parameters, {shape.layers} layers, width
{shape.width}, {shape.heads} heads ({shape.kv_heads} for keys and values), {shape.vocab:,} tokens,
context {shape.context}. It answers multiple-choice algebra with a rationale and a last line
`Answer: X`.

## Measured

{_figures_table(figures)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER_OR_NAME)
model = AutoModelForCausalLM.from_pretrained(FOLDER_OR_NAME)
messages = [{{"role": "user", "content": QUESTION}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

Add `sanitize_control_tokens=True` to `apply_chat_template` where strangers write the messages.
"""


def _figures_table(figures: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in _flat(figures, "")]
    if not rows:
        return (
            "Nothing was measured before this export; run `aquarl evaluate` and `aquarl report`, "
            "then export again."
        )
    return "\n".join(["| figure | value |", "|---|---|", *rows])


def _flat(figures: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    """Return rows of name and value; an accuracy is one row with its interval and baseline."""
    rows: list[tuple[str, str]] = []
    for key, value in figures.items():
        name = f"{prefix}{key}".replace("|", "/")
        if isinstance(value, dict) and {"accuracy", "low", "high", "n"} <= value.keys():
            text = f"{value['accuracy']:.2%} [{value['low']:.2%}, {value['high']:.2%}]"
            text += f", n = {value['n']}"
            if "majority_baseline" in value:
                text += f", always the commonest letter: {value['majority_baseline']:.2%}"
            told = ("accuracy", "low", "high", "n", "correct", "majority_baseline")
            rest = {key: other for key, other in value.items() if key not in told}
            rows += [(name, text), *_flat(rest, f"{name}/")]
        elif isinstance(value, dict) and value and all(type(v) is int for v in value.values()):
            rows.append((name, ", ".join(f"{key} {count}" for key, count in value.items())))
        elif isinstance(value, dict):
            rows += _flat(value, f"{name}/")
        elif isinstance(value, bool | int | str):
            rows.append((name, str(value).replace("|", "/").replace("\n", " ")))
        elif isinstance(value, float):
            rows.append((name, f"{value:.6g}"))
    return rows
